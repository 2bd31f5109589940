// Operands of the extend kernel in shared memory: queries, keys and values as fp16 tiles.
#pragma once
#include "unpack.cuh"

constexpr int WARPS = TQ_WARPS, MT = TQ_MT, THREADS = 32 * WARPS, ROWS = 16 * MT * WARPS;
// Keys are one vector a token where the kernel rotates. Where it cannot, what is not in the basis of the codes (centring,
// sketch) makes the key longer, and the queries come prepared.
constexpr bool FOLD_CENTER = TQ_ROTATE && TQ_CENTER == 1, FOLD_SKETCH = TQ_ROTATE && TQ_QJL;
constexpr bool LONG_CENTER = !TQ_ROTATE && TQ_CENTER == 1, LONG_SKETCH = !TQ_ROTATE && TQ_QJL;
constexpr int PARTS = 1 + LONG_CENTER + LONG_SKETCH, KD = D * PARTS;
static_assert(D <= 256, "the accumulator of a longer head does not fit the registers");

struct Params {
  Pages pages;
  const void* q;  // (rows, query heads, tokens, KD); fp16 where TQ_ROTATE is 0
  int64_t q_row, q_head, q_token;
  void* out;    // (splits, rows, query heads, tokens, D)
  float* lse;   // (splits, rows, query heads, tokens), natural
  const float* query_weight;   // (heads, D): signs / (balance sqrt(D))
  const float* center_weight;  // (heads, D): signs balance / sqrt(D)
  const float* sketch_weight;  // (D): signs / sqrt(D), times sqrt(pi / (2 D))
  const float* value_weight;   // (D): signs / sqrt(D)
  const uint16_t* constant;    // (heads, D) fp16, TQ_CENTER 2: the mean as it is coded
  const int32_t* first_queries;  // index of the first query of each row, or null: first_query
  float *part_out, *part_lse;    // for tq_merge: what tq_extend left, with splits > 1
  int32_t rows, heads, group, tokens, splits, out_type;
  int32_t first_query, sliding_window, hidden, row_tiles;  // hidden: so many first real tokens of a row are read elsewhere
  float scale, cap, inverse_cap, sketch_scale;  // scale, cap: base 2; inverse_cap: scaling / cap, times 2 log2(e)
};

// ---- tiles: rows of 16-byte chunks, swizzled so that 8 rows of one chunk and the chunks of one unit are in different banks ----
// The 8 dims 8 g .. 8 g + 7 are chunk (g % 4) * UNITS + g / 4, for queries, keys and values alike.
template <int CHUNKS> struct Tile {
  static constexpr int GROUP = CHUNKS % 8 ? 4 : 8, ROW = CHUNKS * 16;
  TQ_DEVICE static int swizzle(int row) {
    return GROUP == 8 ? (row & 1) << 2 | (row & 2) | (row & 4) >> 2 : row >> 1 & 3;
  }
  // Bytes to chunk 0 or 1 of a row; other chunks by at().
  TQ_DEVICE static int begin(int row, int chunk) { return row * ROW + (swizzle(row) ^ chunk) * 16; }
  TQ_DEVICE static int at(int begin, int chunk) { return (begin ^ (chunk & (GROUP - 1)) << 4) + chunk / GROUP * GROUP * 16; }
};
using KeyTile = Tile<KD / 8>;
using ValueTile = Tile<D / 8>;
TQ_DEVICE int dims_of_chunk(int chunk) { return 8 * (chunk % UNITS * 4 + chunk / UNITS); }

constexpr int Q_BYTES = ROWS * KD * 2, K_BYTES = PAGE * KD * 2, V_BYTES = PAGE * D * 2;

// Tokens that a query sees: [lo, hi), lo growing with the query. Kept in shared memory: registers are short.
struct Range {
  int hi, start, index, all_from;  // lo of query t: max(start, index + t); all queries of the block see tokens from all_from on
  int begin, end, first, split;    // pages and first query row of the block
};

struct Shared {
  uint8_t *q, *k, *v, *page;
  Range* range;
  uint64_t* bar;
  TQ_DEVICE explicit Shared(uint8_t* s)
      : q(s), k(s + Q_BYTES), v(k + K_BYTES), page(v + V_BYTES), range((Range*)(page + PAGE_BYTES)), bar((uint64_t*)(range + 1)) {}
};
constexpr int ALWAYS = -(1 << 30);  // Range::index without a sliding window

template <class T> TQ_DEVICE void store_unit(uint8_t* tile, int row, int chunk, const uint32_t (&h)[16]) {
  const int begin = T::begin(row, 0);
#pragma unroll
  for (int i = 0; i < 4; i++) *(uint4*)(tile + T::at(begin, chunk + i * UNITS)) = {h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3]};
}

// f(u) for the units 0 .. count - 1, by whole warps and without a branch where the block's threads divide them evenly.
template <class F> TQ_DEVICE void for_units(int count, F f) {
#pragma unroll 1
  for (int u = threadIdx.x; u < count / THREADS * THREADS; u += THREADS) f(u);
  if (count % THREADS && threadIdx.x < count % THREADS) f(count / THREADS * THREADS + threadIdx.x);
}

// Rows of this block: query token r / group, query head r % group of the KV head.
TQ_DEVICE void load_queries(const Params& p, const Shared& sh, int row, int head, int first) {
  for_units(ROWS * UNITS * PARTS, [&](int u) {
    const int part = u / (ROWS * UNITS), local = u % (ROWS * UNITS) / UNITS, c = u % UNITS, r = first + local;
    const bool real = r < p.tokens * p.group;
    const int64_t at = row * p.q_row + (int64_t)(head * p.group + r % p.group) * p.q_head + (int64_t)(r / p.group) * p.q_token + 32 * c;
    float x[32];
#pragma unroll
    for (int k = 0; k < 32; k++) x[k] = 0.f;
    if (real) load_numbers<TQ_ROTATE ? TQ_DTYPE : 0>(x, p.q, at + part * D);
#if TQ_ROTATE
    float w[32];
    load_floats(w, p.query_weight + head * D + 32 * c);
#pragma unroll
    for (int k = 0; k < 32; k++) x[k] *= w[k];
    hadamard_units(x, threadIdx.x & 31);
#endif
    uint32_t h[16];
#pragma unroll
    for (int k = 0; k < 16; k++) h[k] = f32_to_f16x2(x[2 * k], x[2 * k + 1]);
    store_unit<KeyTile>(sh.q, local, part * (D / 8) + c, h);
  });
}

// ---- pages ----

TQ_DEVICE void request_page(const Shared& sh, const uint8_t* from) {
#ifdef TQ_BULK_COPY
  if (threadIdx.x == 0) bulk_load(sh.page, from, PAGE_BYTES, sh.bar);
#else
  for (int i = threadIdx.x; i < PAGE_BYTES / 16; i += THREADS) copy_async_16(sh.page + 16 * i, from + 16 * i);
  copy_async_commit();
#endif
}
TQ_DEVICE void await_page(const Shared& sh, int parity) {
#ifdef TQ_BULK_COPY
  mbar_wait(sh.bar, parity);
#else
  copy_async_wait<0>();
  sync_block();
#endif
}

// What a page's keys have besides levels * scale, before the page has come: the centring, in the basis of the codes up to the
// Hadamard transform, in the place of the values (FOLD), or as it is, as a further part of the key (LONG).
TQ_DEVICE void build_center(const Params& p, const Shared& sh, int row, int head, int page) {
  if constexpr (FOLD_CENTER) {
    center_page<THREADS, true>(p.pages, row, head, page, p.center_weight + head * D, [&](int j, int dim, float x, float y) {
      const int g = dim >> 3;
      *(uint32_t*)(sh.v + ValueTile::at(ValueTile::begin(j, 0), (g & 3) * UNITS + (g >> 2)) + (dim & 7) * 2) = f32_to_f16x2(x, y);
    });
  } else if constexpr (LONG_CENTER) {
    center_page<THREADS, false>(p.pages, row, head, page, nullptr, [&](int j, int dim, float x, float y) {
      const int g = dim >> 3;
      *(uint32_t*)(sh.k + KeyTile::at(KeyTile::begin(j, 0), D / 8 + (g & 3) * UNITS + (g >> 2)) + (dim & 7) * 2) = f32_to_f16x2(x, y);
    });
  }
}

TQ_DEVICE void build_keys(const Params& p, const Shared& sh, int head) {
  for_units(PAGE * UNITS, [&](int u) {
    const int token = u / UNITS, c = u % UNITS;
    uint32_t h[16];
    const uint32_t scale = scale_at(sh.page, K_SCALES, token) * 0x10001u;
    uint32_t more[16];  // what a key has besides levels * scale
    if constexpr (FOLD_SKETCH) {
      float x[32];
      unpack_signs(h, sh.page + QJL_OFFSET, token, c);
#pragma unroll
      for (int k = 0; k < 16; k++)
        x[2 * k] = as_float(0x3F800000u | (h[k] << 16 & 0x80000000u)), x[2 * k + 1] = as_float(0x3F800000u | (h[k] & 0x80000000u));
      hadamard_units(x, threadIdx.x & 31);
      const float norm = f16_to_f32(scale_at(sh.page, QJL_NORMS, token));
      const float4* w = (const float4*)(p.sketch_weight + 32 * c);
#pragma unroll
      for (int k = 0; k < 32; k += 4) {
        const float4 v = w[k / 4];
        more[k / 2] = f32_to_f16x2(x[k] * v.x * norm, x[k + 1] * v.y * norm);
        more[k / 2 + 1] = f32_to_f16x2(x[k + 2] * v.z * norm, x[k + 3] * v.w * norm);
      }
    }
    if constexpr (FOLD_CENTER) {
      float x[32];
      const int begin = ValueTile::begin(token, 0);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4 v = *(const uint4*)(sh.v + ValueTile::at(begin, c + i * UNITS));
        x[8 * i] = low_half(v.x), x[8 * i + 1] = high_half(v.x), x[8 * i + 2] = low_half(v.y), x[8 * i + 3] = high_half(v.y);
        x[8 * i + 4] = low_half(v.z), x[8 * i + 5] = high_half(v.z), x[8 * i + 6] = low_half(v.w), x[8 * i + 7] = high_half(v.w);
      }
      hadamard_units(x, threadIdx.x & 31);
#pragma unroll
      for (int k = 0; k < 16; k++) {
        const uint32_t own = f32_to_f16x2(x[2 * k], x[2 * k + 1]);
        more[k] = FOLD_SKETCH ? fma_f16x2(0x3C003C00u, own, more[k]) : own;
      }
    }
    unpack_unit<KeyLevels>(h, sh.page, token, c);
#pragma unroll
    for (int k = 0; k < 16; k++) h[k] = FOLD_CENTER || FOLD_SKETCH ? fma_f16x2(h[k], scale, more[k]) : mul_f16x2(h[k], scale);
    if constexpr (TQ_CENTER == 2) {
      const uint4* from = (const uint4*)(p.constant + head * D + 32 * c);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4 v = from[i];
        const uint32_t one = 0x3C003C00u;
        h[4 * i] = fma_f16x2(one, v.x, h[4 * i]), h[4 * i + 1] = fma_f16x2(one, v.y, h[4 * i + 1]);
        h[4 * i + 2] = fma_f16x2(one, v.z, h[4 * i + 2]), h[4 * i + 3] = fma_f16x2(one, v.w, h[4 * i + 3]);
      }
    }
    store_unit<KeyTile>(sh.k, token, c, h);
    if constexpr (LONG_SKETCH) {
      const uint32_t norm = f32_to_f16(f16_to_f32(scale_at(sh.page, QJL_NORMS, token)) * p.sketch_scale) * 0x10001u;
      unpack_signs(h, sh.page + QJL_OFFSET, token, c);
#pragma unroll
      for (int k = 0; k < 16; k++) h[k] ^= norm;
      store_unit<KeyTile>(sh.k, token, (PARTS - 1) * (D / 8) + c, h);
    }
  });
}

// Values of tokens from `limit` on, which may hold anything, become 0.
TQ_DEVICE void build_values(const Shared& sh, int limit) {
  for_units(PAGE * UNITS, [&](int u) {
    const int token = u / UNITS, c = u % UNITS;
    uint32_t h[16];
    unpack_unit<ValueLevels>(h, sh.page + V_OFFSET, token, c);
    const uint32_t scale = token < limit ? scale_at(sh.page, V_SCALES, token) * 0x10001u : 0u;
#pragma unroll
    for (int k = 0; k < 16; k++) h[k] = mul_f16x2(h[k], scale);
    store_unit<ValueTile>(sh.v, token, c, h);
  });
}
