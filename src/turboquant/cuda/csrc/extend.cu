// Attention of many queries over packed pages: a block owns ROWS query rows of one KV head (all query heads of its group, so
// that codes are decoded once for them) and streams pages. A page is decoded to fp16 tiles of keys and values in shared memory
// and multiplied on tensor cores; nothing else of the prefix is ever decoded. The result is that of packed tokens alone, with
// its log-sum-exp, for the caller to merge with that of the exact tokens.
//
// Keys become levels * scale + centring in fp16, in the basis of the codes, so that centring costs a Hadamard transform a page
// and block instead of a second product. One page is in flight while another is multiplied.
//
// Defines: those of unpack.cuh, TQ_CENTER (0 none, 1 R_p mu, 2 constant), TQ_SOFTCAP, TQ_ROTATE (1: the kernel rotates, 0: queries
// come rotated as fp16 and outputs stay rotated), TQ_DTYPE of the queries (0 fp16, 1 bf16, 2 fp32), TQ_WARPS, TQ_MT.
#include "common.cuh"
#include "pages.cuh"
#include "extend_tiles.cuh"

constexpr int N_TILES = PAGE / 8, CHUNKS = D / 8;
constexpr float LN2 = 0.6931471805599453f;
constexpr float NEVER = -1e30f;
// The maximum of a row is followed only when it grows by more than this (base 2): probabilities then stay below 2^SLACK.
constexpr float SLACK = 8.f;

struct State {
  float o[MT][CHUNKS][4];
  float m[MT][2], l[MT][2];  // running maximum (base 2), sum over this lane's tokens
};

// s = Q K^T for the 16 MT rows of a warp; q and k are this lane's ldmatrix offsets.
TQ_DEVICE void score(float (&s)[MT][N_TILES][4], const Shared& sh, const int (&q)[MT], int k) {
#pragma unroll
  for (int t = 0; t < MT; t++)
#pragma unroll
    for (int n = 0; n < N_TILES; n++) s[t][n][0] = s[t][n][1] = s[t][n][2] = s[t][n][3] = 0.f;
#pragma unroll 4  // more takes registers that are not there
  for (int chunk = 0; chunk < KD / 8; chunk += 2) {
    uint32_t a[MT][4];
#pragma unroll
    for (int t = 0; t < MT; t++) ldmatrix_x4(a[t], sh.q + KeyTile::at(q[t], chunk));
#pragma unroll
    for (int n = 0; n < N_TILES; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, sh.k + KeyTile::at(k, chunk) + n * 8 * KeyTile::ROW);
#pragma unroll
      for (int t = 0; t < MT; t++) {
        mma_f16(s[t][n], a[t][0], a[t][1], a[t][2], a[t][3], b[0], b[1]);
        mma_f16(s[t][n + 1], a[t][0], a[t][1], a[t][2], a[t][3], b[2], b[3]);
      }
    }
  }
}

// Fold a page's scores in: they become probabilities in place.
TQ_DEVICE void soft_max(float (&s)[MT][N_TILES][4], State& state, float scale) {
#pragma unroll
  for (int t = 0; t < MT; t++) {
    bool grows = false;
    float m[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = NEVER;
#pragma unroll
      for (int n = 0; n < N_TILES; n++) top = fmaxf(top, fmaxf(s[t][n][2 * r], s[t][n][2 * r + 1]));
      top = fmaxf(top, shfl_xor(top, 1));
      top = fmaxf(top, shfl_xor(top, 2)) * scale;
      m[r] = top > state.m[t][r] + SLACK ? top : state.m[t][r];
      grows |= m[r] != state.m[t][r];
    }
    if (any_lane(grows)) {
      const float f0 = ex2(state.m[t][0] - m[0]), f1 = ex2(state.m[t][1] - m[1]);
      state.m[t][0] = m[0], state.m[t][1] = m[1];
      state.l[t][0] *= f0, state.l[t][1] *= f1;
#pragma unroll
      for (int n = 0; n < CHUNKS; n++) state.o[t][n][0] *= f0, state.o[t][n][1] *= f0, state.o[t][n][2] *= f1, state.o[t][n][3] *= f1;
    }
#pragma unroll
    for (int n = 0; n < N_TILES; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[t][n][e] = ex2(s[t][n][e] * scale - m[e >> 1]);
        state.l[t][e >> 1] += s[t][n][e];
      }
  }
}

// o += P V; v is this lane's ldmatrix offset.
TQ_DEVICE void add_values(State& state, const float (&s)[MT][N_TILES][4], const Shared& sh, int v) {
#pragma unroll
  for (int n = 0; n < N_TILES; n += 2) {
    uint32_t a[MT][4];
#pragma unroll
    for (int t = 0; t < MT; t++)
#pragma unroll
      for (int e = 0; e < 4; e++) a[t][e] = f32_to_f16x2(s[t][n + (e >> 1)][2 * (e & 1)], s[t][n + (e >> 1)][2 * (e & 1) + 1]);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, sh.v + ValueTile::at(v, chunk) + n * 8 * ValueTile::ROW);
#pragma unroll
      for (int t = 0; t < MT; t++) {
        mma_f16(state.o[t][chunk], a[t][0], a[t][1], a[t][2], a[t][3], b[0], b[1]);
        mma_f16(state.o[t][chunk + 1], a[t][0], a[t][1], a[t][2], a[t][3], b[2], b[3]);
      }
    }
  }
}

TQ_DEVICE void store_numbers(void* base, int64_t at, const float (&x)[32], int type) {
  if (type == 2) {
#pragma unroll
    for (int k = 0; k < 8; k++) ((float4*)((float*)base + at))[k] = {x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]};
  } else {
#pragma unroll
    for (int k = 0; k < 4; k++)
      ((uint4*)((uint16_t*)base + at))[k] = {pack_numbers(x[8 * k], x[8 * k + 1], type), pack_numbers(x[8 * k + 2], x[8 * k + 3], type),
                                            pack_numbers(x[8 * k + 4], x[8 * k + 5], type), pack_numbers(x[8 * k + 6], x[8 * k + 7], type)};
  }
}

// Normalize, rotate back and write the rows of a warp, 8 at a time by way of the warp's own part of the query tile.
TQ_DEVICE void finish(const Params& p, const Shared& sh, State& state) {
  const int row = blockIdx.z, head = blockIdx.y, first = sh.range->first, split = sh.range->split;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  float* stage = (float*)(sh.q + warp * 16 * MT * KD * 2);
  const int64_t base = ((int64_t)split * p.rows + row) * p.heads * p.group + head * p.group;
#pragma unroll
  for (int t = 0; t < MT; t++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = state.l[t][r];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      const float inverse = sum > 0.f ? 1.f / sum : 0.f;
      const int begin = first + (warp * MT + t) * 16 + r * 8;
      if (c == 0 && begin + g < p.tokens * p.group) {
        const int64_t line = (base + (begin + g) % p.group) * p.tokens + (begin + g) / p.group;
        p.lse[line] = sum > 0.f ? LN2 * (state.m[t][r] + lg2(sum)) : -as_float(0x7F800000u);
      }
      sync_warp();
#pragma unroll
      for (int n = 0; n < CHUNKS; n++) {
        const int dim = dims_of_chunk(n) + 2 * c;
        *(float2*)(stage + unit_index(g * UNITS + dim / 32, dim % 32)) = {state.o[t][n][2 * r] * inverse, state.o[t][n][2 * r + 1] * inverse};
      }
      sync_warp();
#pragma unroll 1
      for (int i = lane; i < (8 * UNITS + 31) / 32 * 32; i += 32) {
        const int u = i % (8 * UNITS), line = begin + u / UNITS;
        float x[32];
#pragma unroll
        for (int k = 0; k < 32; k += 4) {
          const float4 v = *(const float4*)(stage + unit_index(u, k));
          x[k] = v.x, x[k + 1] = v.y, x[k + 2] = v.z, x[k + 3] = v.w;
        }
#if TQ_ROTATE
        hadamard_units(x, lane);
        const float4* w = (const float4*)(p.value_weight + 32 * (u % UNITS));
#pragma unroll
        for (int k = 0; k < 32; k += 4) x[k] *= w[k / 4].x, x[k + 1] *= w[k / 4].y, x[k + 2] *= w[k / 4].z, x[k + 3] *= w[k / 4].w;
#endif
        if (i == u && line < p.tokens * p.group)
          store_numbers(p.out, ((base + line % p.group) * p.tokens + line / p.group) * D + 32 * (u % UNITS), x, p.out_type);
      }
    }
}

TQ_DEVICE Range find_range(const Params& p, int row) {
  Range r;
  r.first = blockIdx.x % p.row_tiles * ROWS, r.split = blockIdx.x / p.row_tiles;
  r.hi = packed_length(p.pages, row);
  r.start = (p.pages.starts ? max(p.pages.starts[row], 0) : 0) + p.hidden;
  r.index = p.sliding_window ? (p.first_queries ? p.first_queries[row] : p.first_query) - p.sliding_window + 1 : ALWAYS;
  r.all_from = max(r.start, r.index + (min(r.first + ROWS, p.tokens * p.group) - 1) / p.group);
  const int page_0 = max(p.pages.first_page, max(r.start, r.index + r.first / p.group) / PAGE);
  const int page_n = max((r.hi + PAGE - 1) / PAGE, page_0), share = (page_n - page_0 + p.splits - 1) / p.splits;
  r.begin = page_0 + r.split * share;
  r.end = min(page_n, r.begin + share);
  return r;
}

TQ_KERNEL(tq_extend, Params, THREADS, TQ_WARPS == 4 && TQ_D <= 128 ? 2 : 1) {
  TQ_SHARED(smem);
  const Shared sh(smem);
  const int lane = threadIdx.x & 31, row = blockIdx.z, head = blockIdx.y;
  if (threadIdx.x == 0) {
    Range range = find_range(p, row);
    *sh.range = range;
#ifdef TQ_BULK_COPY
    mbar_init(sh.bar);
    mbar_fence();
#endif
  }
  sync_block();
  int page = sh.range->begin;
  if (page < sh.range->end) request_page(sh, page_address(p.pages, row, head, page));
  load_queries(p, sh, row, head, sh.range->first);

  State state;
#pragma unroll
  for (int t = 0; t < MT; t++) {
    state.m[t][0] = state.m[t][1] = NEVER;
    state.l[t][0] = state.l[t][1] = 0.f;
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) state.o[t][n][0] = state.o[t][n][1] = state.o[t][n][2] = state.o[t][n][3] = 0.f;
  }
  int q[MT];
#pragma unroll
  for (int t = 0; t < MT; t++) q[t] = KeyTile::begin(((threadIdx.x >> 5) * MT + t) * 16 + (lane & 15), lane >> 4);
  const int k = KeyTile::begin((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1), v = ValueTile::begin(lane & 15, lane >> 4);

#pragma unroll 1
  for (; page < sh.range->end; page++) {
    const uint8_t* next = nullptr;  // looked up now, used when this page is decoded
    if (page + 1 < sh.range->end) next = page_address(p.pages, row, head, page + 1);
    build_center(p, sh, row, head, page);
    await_page(sh, (page - sh.range->begin) & 1);
    if constexpr (FOLD_CENTER) sync_block();
    build_keys(p, sh, head);
    if constexpr (FOLD_CENTER) sync_block();
    build_values(sh, sh.range->hi - page * PAGE);
    sync_block();
    if (next) request_page(sh, next);

    float s[MT][N_TILES][4];
    score(s, sh, q, k);
#if TQ_SOFTCAP
#pragma unroll
    for (int t = 0; t < MT; t++)
#pragma unroll
      for (int n = 0; n < N_TILES; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[t][n][e] = p.cap - 2.f * p.cap * rcp(1.f + ex2(s[t][n][e] * p.inverse_cap));
#endif
    if (page * PAGE < sh.range->all_from || (page + 1) * PAGE > sh.range->hi) {
      const Range range = *sh.range;
#pragma unroll
      for (int t = 0; t < MT; t++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int line = range.first + ((threadIdx.x >> 5) * MT + t) * 16 + r * 8 + (lane >> 2);
          const int from = max(range.start, range.index + line / p.group) - page * PAGE, to = range.hi - page * PAGE;
#pragma unroll
          for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const int i = 8 * n + 2 * (lane & 3) + e;
              if (i < from || i >= to) s[t][n][2 * r + e] = -as_float(0x7F800000u);
            }
        }
    }
    soft_max(s, state, TQ_SOFTCAP ? 1.f : p.scale);
    add_values(state, s, sh, v);
    sync_block();
  }
  finish(p, sh, state);
}

// Sum of the splits' outputs with the weights of their log-sum-exps: one warp a query row.
TQ_KERNEL(tq_merge, Params, 128, 1) {
  const int lane = threadIdx.x & 31;
  const int64_t lines = (int64_t)p.rows * p.heads * p.group * p.tokens, line = (int64_t)blockIdx.x * 4 + (threadIdx.x >> 5);
  if (line >= lines) return;
  const float mine = lane < p.splits ? p.part_lse[lane * lines + line] : -as_float(0x7F800000u);
  float top = fmaxf(mine, NEVER);
#pragma unroll
  for (int m = 16; m; m >>= 1) top = fmaxf(top, shfl_xor(top, m));
  float sum = ex2((mine - top) * (1.f / LN2));
  const float weight = sum;
#pragma unroll
  for (int m = 16; m; m >>= 1) sum += shfl_xor(sum, m);
  const float inverse = sum > 0.f ? 1.f / sum : 0.f;
  float x[UNITS];
#pragma unroll
  for (int k = 0; k < UNITS; k++) x[k] = 0.f;
  for (int s = 0; s < p.splits; s++) {
    const float w = shfl(weight, s) * inverse;
#pragma unroll
    for (int k = 0; k < UNITS; k++) x[k] += w * p.part_out[(s * lines + line) * D + k * 32 + lane];
  }
#pragma unroll
  for (int k = 0; k < UNITS; k++) {
    const int64_t at = line * D + k * 32 + lane;
    if (p.out_type == 2) ((float*)p.out)[at] = x[k];
    else ((uint16_t*)p.out)[at] = p.out_type == 1 ? f32_to_bf16(x[k]) : f32_to_f16(x[k]);
  }
  if (lane == 0) p.lse[line] = sum > 0.f ? top + LN2 * lg2(sum) : -as_float(0x7F800000u);
}
