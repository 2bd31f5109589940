// Attention of one item's query rows over its exact tokens: sinks and the recent window, in the model's dtype.
#pragma once
#include "decode_attend.cuh"

struct Half4 {  // four fp16
  uint32_t lo, hi;
};
#if TQ_DTYPE == 2
typedef float4 Raw4;
TQ_DEVICE Half4 halves(const Raw4& x) { return {f32_to_f16x2(x.x, x.y), f32_to_f16x2(x.z, x.w)}; }
#elif TQ_DTYPE == 1
typedef uint2 Raw4;
TQ_DEVICE Half4 halves(const Raw4& x) {
  return {f32_to_f16x2(as_float(x.x << 16), as_float(x.x & 0xFFFF0000u)), f32_to_f16x2(as_float(x.y << 16), as_float(x.y & 0xFFFF0000u))};
}
#else
typedef uint2 Raw4;
TQ_DEVICE Half4 halves(const Raw4& x) { return {x.x, x.y}; }
#endif
TQ_DEVICE Raw4 load_4(const void* base, int64_t i) { return *(const Raw4*)((const Raw*)base + i); }
// Values are asked for together with keys where registers allow: one wait for memory instead of two.
constexpr int KEYS_AT_ONCE = TQ_DTYPE == 2 || D > 128 || NB == 2 ? 2 : TQ_CENTER == 1 ? D / 32 : D / 16;
constexpr bool VALUES_EARLY = TQ_DTYPE != 2 && D <= 128 && NB == 1;

// Exact tokens of an item, numbered through: its packed sinks first, then the window.
struct ExactTokens {
  int sinks, count, packed, start;
  int64_t sink, window;  // element offsets of the item's row and head
  TQ_DEVICE ExactTokens(const Params& p, const Item& item) {
    packed = packed_len_of(p, item.row);
    start = start_of(p, item.row);
    // Sinks that are not packed yet are still in the window.
    sinks = max(0, min(p.sinks, packed - start));
    count = sinks + seq_len_of(p, item.row) - packed;
    sink = item.row * p.sink_row + item.head * p.sink_head;
    window = item.row * p.window_row + item.head * p.window_head;
  }
  TQ_DEVICE int index(int i) const { return i < sinks ? start + i : packed + i - sinks; }
  // Element offset of token i, from the sinks' tensor if i < sinks.
  TQ_DEVICE int64_t at(const Params& p, int i) const {
    if (i < sinks) return sink + i * p.sink_token;
    const int slot = packed + i - sinks - (p.window_first < 0 ? packed : p.window_first);
    return window + (int64_t)(slot % p.window_slots) * p.window_token;
  }
};

TQ_DEVICE void attend_exact(const Params& p, const Shared& sh, const Item& item, Accumulator& acc, int warp, int lane) {
  const int g = lane >> 2, c = lane & 3;
  const ExactTokens tokens(p, item);
  const int first_query = seq_len_of(p, item.row) - p.tokens;
  const float scale = p.scale * LOG2E;
  for (int tile = warp * 16; tile < tokens.count; tile += WARPS * 16) {
    float s[NB][1][4] = {};
    int64_t at[2], from[4];
    const void *keys[2], *values[4];
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const int i = min(tile + tile_token(g) + 8 * u, tokens.count - 1);
      at[u] = tokens.at(p, i);
      keys[u] = i < tokens.sinks ? p.sink_k : p.window_k;
    }
#pragma unroll
    for (int u = 0; u < 4; u++) {
      const int i = min(tile + c + 4 * u, tokens.count - 1);  // beyond the last token p is 0
      from[u] = tokens.at(p, i);
      values[u] = i < tokens.sinks ? p.sink_v : p.window_v;
    }
    Raw4 v[VALUES_EARLY ? D / 32 : 1][4];
    if constexpr (VALUES_EARLY)
#pragma unroll
      for (int quad = 0; quad < D / 32; quad++)
#pragma unroll
        for (int u = 0; u < 4; u++) v[quad][u] = load_4(values[u], from[u] + value_dim(quad, g));
#pragma unroll KEYS_AT_ONCE
    for (int step = 0; step < D / 16; step++) {
      const int dim = key_dim(step >> 1, c) + 4 * (step & 1);
      const Half4 a = halves(load_4(keys[0], at[0] + dim)), b = halves(load_4(keys[1], at[1] + dim));
#pragma unroll
      for (int n = 0; n < NB; n++) {
        const uint2 q = sh.plain[(n * (D / 16) + step) * 32 + lane];
        mma_f16(s[n][0], a.lo, b.lo, a.hi, b.hi, q.x, q.y);
      }
    }
#pragma unroll
    for (int n = 0; n < NB; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = item.first + 8 * n + 2 * c + (i & 1), query = first_query + row / p.group;
        const int token = tile + tile_token(g) + (i < 2 ? 0 : 8), index = tokens.index(token);
        const bool seen = token < tokens.count && index <= query && index >= tokens.start &&
                          (!p.sliding_window || index > query - p.sliding_window);
        float y = s[n][0][i] * scale;
        if (TQ_SOFTCAP) y = soft_cap(p, y);
        s[n][0][i] = seen ? y : as_float(0xFF800000u);
      }
      float top[2];
      if (new_maximum(s[n], acc.m[n], top)) {
        acc.scale(n, ex2(acc.m[n][0] - top[0]), ex2(acc.m[n][1] - top[1]));
        acc.m[n][0] = top[0], acc.m[n][1] = top[1];
      }
    }
    uint32_t b[NB][2];
#pragma unroll
    for (int n = 0; n < NB; n++) {
      const float p0 = ex2(s[n][0][0] - acc.m[n][0]), p1 = ex2(s[n][0][1] - acc.m[n][1]);
      const float p2 = ex2(s[n][0][2] - acc.m[n][0]), p3 = ex2(s[n][0][3] - acc.m[n][1]);
      acc.l[n][0] += p0 + p2, acc.l[n][1] += p1 + p3;
      b[n][0] = movmatrix(f32_to_f16x2(p0, p1));
      b[n][1] = movmatrix(f32_to_f16x2(p2, p3));
    }
#pragma unroll
    for (int quad = 0; quad < D / 32; quad++) {
      Half4 h[4];
#pragma unroll
      for (int u = 0; u < 4; u++) h[u] = halves(VALUES_EARLY ? v[VALUES_EARLY ? quad : 0][u] : load_4(values[u], from[u] + value_dim(quad, g)));
#pragma unroll
      for (int n = 0; n < NB; n++) {
        mma_f16(acc.o[n][2 * quad], prmt(h[0].lo, h[1].lo, 0x5410), prmt(h[0].lo, h[1].lo, 0x7632), prmt(h[2].lo, h[3].lo, 0x5410),
                prmt(h[2].lo, h[3].lo, 0x7632), b[n][0], b[n][1]);
        mma_f16(acc.o[n][2 * quad + 1], prmt(h[0].hi, h[1].hi, 0x5410), prmt(h[0].hi, h[1].hi, 0x7632), prmt(h[2].hi, h[3].hi, 0x5410),
                prmt(h[2].hi, h[3].hi, 0x7632), b[n][0], b[n][1]);
      }
    }
  }
}
