// Partial results: of the warps of a block, and of the blocks that share an item.
#pragma once
#include "decode_exact.cuh"

// Every warp puts its accumulator into shared memory, row by row.
TQ_DEVICE void store_accumulator(Shared& sh, const Accumulator& acc, int warp, int lane) {
  const int g = lane >> 2, c = lane & 3;
#pragma unroll
  for (int n = 0; n < NB; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int row = 8 * n + 2 * c + j;
      float l = acc.l[n][j];
#pragma unroll
      for (int m = 4; m < 32; m <<= 1) l += shfl_xor(l, m);
      if (row >= MERGE_ROWS) continue;
      if (g == 0) sh.merge_sums[warp * MERGE_ROWS + row] = float2{acc.m[n][j], l};
      float* to = sh.merge + (warp * MERGE_ROWS + row) * LINE;
#pragma unroll
      for (int quad = 0; quad < D / 32; quad++)
        *(float4*)(to + line_place(value_dim(quad, g))) =
            float4{acc.o[n][2 * quad][j], acc.o[n][2 * quad][2 + j], acc.o[n][2 * quad + 1][j], acc.o[n][2 * quad + 1][2 + j]};
    }
}

// The sum over the warps, of pages or of exact tokens: to sh.lines, or to memory if other blocks work on the item, too.
TQ_DEVICE void merge_warps(const Params& p, Shared& sh, const Item& item, const Work& work, const Accumulator& acc, bool exact, int warp, int lane) {
  store_accumulator(sh, acc, warp, lane);
  sync_block();
  for (int i = threadIdx.x; i < item.rows * D; i += THREADS) {
    const int row = i / D, dim = i % D;
    float top = NEVER, l = 0.f, x = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, sh.merge_sums[w * MERGE_ROWS + row].x);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float2 ml = sh.merge_sums[w * MERGE_ROWS + row];
      const float f = ex2(ml.x - top);
      l += f * ml.y;
      x += f * sh.merge[(w * MERGE_ROWS + row) * LINE + line_place(dim)];
    }
    if (work.entries == 1) {
      const int to = exact * MERGE_ROWS + row;
      sh.lines[to * D + dim] = x;
      if (dim == 0) sh.line_sums[to] = float2{top, l};
    } else {
      const size_t to = (size_t)(exact ? work.first_slot : work.slot) * ROWS + row;
      p.part_out[to * D + dim] = x;
      if (dim == 0) *(float2*)(p.part_ml + 2 * to) = float2{top, l};
    }
  }
}

// The sum over an item's partial results: 32 dims of a row per warp. The first slot is that of the exact tokens, if there are any.
TQ_DEVICE void merge_slots(const Params& p, Shared& sh, const Item& item, const Work& work, int warp, int lane) {
  const int slots = work.entries + p.has_window;
  for (int task = warp; task < item.rows * PER_LANE; task += WARPS) {
    const int row = task / PER_LANE, dim = task % PER_LANE * 32 + lane;
    const float* from = p.part_out + ((size_t)work.first_slot * ROWS + row) * D + dim;
    const float2* sums = (const float2*)p.part_ml + (size_t)work.first_slot * ROWS + row;
    float top = NEVER, total = 0.f, x = 0.f, exact = 0.f;
    for (int i = lane; i < slots; i += 32) top = fmaxf(top, sums[(size_t)i * ROWS].x);
#pragma unroll
    for (int m = 16; m; m >>= 1) top = fmaxf(top, shfl_xor(top, m));
    for (int i0 = 0; i0 < slots; i0 += 32) {
      float weight = 0.f;
      if (i0 + lane < slots) {
        const float2 ml = sums[(size_t)(i0 + lane) * ROWS];
        weight = ex2(ml.x - top);
        total += weight * ml.y;
      }
      const int n = min(32, slots - i0);
#pragma unroll 8
      for (int i = 0; i < n; i++) {
        const float v = from[(size_t)(i0 + i) * ROWS * D] * shfl(weight, i);
        if (p.has_window && i0 + i == 0) exact = v;
        else x += v;
      }
    }
    sh.lines[row * D + dim] = x;
    sh.lines[(MERGE_ROWS + row) * D + dim] = exact;
    total = sum_of_lanes(total);
    if (dim == 0) {
      sh.line_sums[row] = float2{top, total};
      sh.line_sums[MERGE_ROWS + row] = float2{top, 0.f};  // counted in total
    }
  }
}

// One row of the result: the part of the pages turned back into the model's basis, and the exact part.
TQ_DEVICE void write_row(const Params& p, const Shared& sh, const Item& item, int row, float* line, int lane) {
  const int r = item.first + row, token = r / p.group, head = item.head * p.group + r - token * p.group;
  const float2 pages = sh.line_sums[row], exact = p.has_window ? sh.line_sums[MERGE_ROWS + row] : float2{NEVER, 0.f};
  const float sink = p.sink_logits ? p.sink_logits[head] * LOG2E : NEVER;
  const float base = fmaxf(fmaxf(pages.x, exact.x), sink), f = ex2(pages.x - base), e = ex2(exact.x - base);
  const float total = f * pages.y + e * exact.y + (p.sink_logits ? ex2(sink - base) : 0.f), inverse = total > 0.f ? 1.f / total : 0.f;
  float x[PER_LANE];
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) x[k] = sh.lines[row * D + k * 32 + lane];
  rotate_back(x, TQ_ROTATE ? sh.matrix + D : p.value_rotation, line, lane);
  const int64_t to = (int64_t)item.row * p.out_row + (int64_t)head * p.out_head + (int64_t)token * p.out_token;
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) {
    const float more = p.has_window ? e * sh.lines[(MERGE_ROWS + row) * D + k * 32 + lane] : 0.f;
    store_number(p.out, to + k * 32 + lane, (f * x[k] + more) * inverse);
  }
  if (lane == 0)
    p.lse[((int64_t)item.row * p.heads * p.group + head) * p.tokens + token] = total > 0.f ? (base + lg2(total)) * LN2 : as_float(0xFF800000u);
}

// The item's result, if this was its last entry to come in.
TQ_DEVICE void finish_item(const Params& p, Shared& sh, const Item& item, const Work& work, int warp, int lane) {
  if (work.entries > 1) {
    sync_block();
    if (threadIdx.x == 0) {
      const bool all = atomic_add_acq_rel(&p.counters[work.item], 1) == work.entries - 1;
      if (all) p.counters[work.item] = 0;
      *sh.flag = all;
    }
    sync_block();
    if (!*sh.flag) return;
    merge_slots(p, sh, item, work, warp, lane);
  }
  sync_block();
  for (int row = warp; row < item.rows; row += WARPS) write_row(p, sh, item, row, sh.matrix + warp * D, lane);
}
