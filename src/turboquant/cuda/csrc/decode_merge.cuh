// Partial results: of the warps of a block, and of the blocks that share an item.
#pragma once
#include "decode_exact.cuh"

// Merge the warps' accumulators into that of warp 0, halving the number of warps each time.
TQ_DEVICE void merge_warps(Shared& sh, Accumulator& acc, int warp, int lane) {
  constexpr int PER_BLOCK = TILES * 4 + 4, L = MERGE_LANES;
  const bool used = !FEW || (lane & 2) == 0;
  lane = FEW ? lane >> 2 << 1 | (lane & 1) : lane;
  for (int count = WARPS; count > 1;) {
    const int half = (count + 1) / 2;
    if (used && warp >= half && warp < count) {
      float* to = sh.merge + (warp - half) * NB * PER_BLOCK * L + lane;
#pragma unroll
      for (int n = 0; n < NB; n++, to += PER_BLOCK * L) {
        to[0] = acc.m[n][0], to[L] = acc.m[n][1], to[2 * L] = acc.l[n][0], to[3 * L] = acc.l[n][1];
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) to[(4 + i) * L] = acc.o[n][i / 4][i % 4];
      }
    }
    sync_block();
    if (used && warp + half < count) {
      const float* from = sh.merge + warp * NB * PER_BLOCK * L + lane;
#pragma unroll
      for (int n = 0; n < NB; n++, from += PER_BLOCK * L) {
        const float m0 = fmaxf(acc.m[n][0], from[0]), m1 = fmaxf(acc.m[n][1], from[L]);
        const float e0 = ex2(from[0] - m0), e1 = ex2(from[L] - m1);
        acc.scale(n, ex2(acc.m[n][0] - m0), ex2(acc.m[n][1] - m1));
        acc.m[n][0] = m0, acc.m[n][1] = m1;
        acc.l[n][0] += e0 * from[2 * L], acc.l[n][1] += e1 * from[3 * L];
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) acc.o[n][i / 4][i % 4] += (i & 1 ? e1 : e0) * from[(4 + i) * L];
      }
    }
    count = half;
    if (count > 1) sync_block();
  }
}

TQ_DEVICE void write_partial(const Params& p, const Accumulator& acc, int slot, int rows, int lane) {
  const int g = lane >> 2, c = lane & 3;
#pragma unroll
  for (int n = 0; n < NB; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float l = acc.l[n][j];
#pragma unroll
      for (int m = 4; m < 32; m <<= 1) l += shfl_xor(l, m);
      const int row = 8 * n + 2 * c + j;
      if (row >= rows) continue;
      if (g == 0) *(float2*)(p.part_ml + ((size_t)slot * ROWS + row) * 2) = float2{acc.m[n][j], l};
      float* to = p.part_out + ((size_t)slot * ROWS + row) * D;
#pragma unroll
      for (int quad = 0; quad < D / 32; quad++)
        *(float4*)(to + value_dim(quad, g)) =
            float4{acc.o[n][2 * quad][j], acc.o[n][2 * quad][2 + j], acc.o[n][2 * quad + 1][j], acc.o[n][2 * quad + 1][2 + j]};
    }
}

// One query row from all its partial results; those of pages are still rotated, that of the exact tokens (the first) is not.
TQ_DEVICE void finish_row(const Params& p, const Shared& sh, const Item& item, int slot, int count, int row, float* line, int lane) {
  const int r = item.first + row, token = r / p.group, head = item.head * p.group + r % p.group;
  float top = NEVER;
  for (int i = lane; i < count; i += 32) top = fmaxf(top, p.part_ml[((size_t)(slot + i) * ROWS + row) * 2]);
#pragma unroll
  for (int m = 16; m; m >>= 1) top = fmaxf(top, shfl_xor(top, m));
  const float sink = p.sink_logits ? p.sink_logits[head] * LOG2E : NEVER;
  const float base = fmaxf(top, sink);
  float x[PER_LANE] = {}, exact[PER_LANE] = {}, total = 0.f;
  const int pages = p.has_window ? 1 : 0;  // first slot of pages
  for (int i0 = 0; i0 < count; i0 += 32) {
    float weight = 0.f;
    if (i0 + lane < count) {
      const float2 ml = *(const float2*)(p.part_ml + ((size_t)(slot + i0 + lane) * ROWS + row) * 2);
      weight = ex2(ml.x - base);
      total += weight * ml.y;
    }
    const int n = min(32, count - i0);
    const float* from = p.part_out + ((size_t)(slot + i0) * ROWS + row) * D + lane;
    int i = 0;
    if (i0 == 0 && pages) {
      const float f = shfl(weight, 0);
#pragma unroll
      for (int k = 0; k < PER_LANE; k++) exact[k] = f * from[k * 32];
      i = 1;
    }
#pragma unroll 8
    for (; i < n; i++) {
      const float f = shfl(weight, i);
#pragma unroll
      for (int k = 0; k < PER_LANE; k++) x[k] += f * from[(size_t)i * ROWS * D + k * 32];
    }
  }
  total = sum_of_lanes(total);
  const float with_sink = p.sink_logits ? total + ex2(sink - base) : total;
  const float inverse = with_sink > 0.f ? 1.f / with_sink : 0.f;
  rotate_back(x, TQ_ROTATE ? sh.matrix + D : p.value_rotation, line, lane);
  const int64_t to = (int64_t)item.row * p.out_row + (int64_t)head * p.out_head + (int64_t)token * p.out_token;
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) store_number(p.out, to + k * 32 + lane, (x[k] + exact[k]) * inverse);
  if (lane == 0)
    p.lse[((int64_t)item.row * p.heads * p.group + head) * p.tokens + token] =
        with_sink > 0.f ? (base + lg2(with_sink)) * LN2 : as_float(0xFF800000u);
}

TQ_DEVICE void finish_item(const Params& p, Shared& sh, const Item& item, const Work& work, int warp, int lane) {
  if (warp == 0) {
    sync_warp();
    // Released by one lane for the warp: the partial result is visible before the count.
    if (lane == 0) {
      const bool all = atomic_add_acq_rel(&p.counters[work.item], 1) == work.slots - 1;
      if (all) p.counters[work.item] = 0;
      *sh.flag = all;
    }
  }
  sync_block();
  if (*sh.flag)
    for (int row = warp; row < item.rows; row += WARPS)
      finish_row(p, sh, item, work.first_slot, work.slots, row, sh.matrix + warp * D, lane);
}
