// Decode attention on packed pages: 1..16 new tokens a sequence against pages, sinks and the exact window, in one launch.
//
// docs/kernels.md explains the lane mapping and the budget; the page format is codec/layout.py.
// A block works through a list of entries made by plan(): a range of pages of one item (sequence, KV head, block of query
// rows), or the exact tokens of an item. Every entry leaves a partial result; the block that brings an item's last one merges.
//
// Defines: TQ_D, TQ_KB, TQ_VB, TQ_QJL, TQ_CENTER (0 none, 1 R_p mu, 2 constant), TQ_SOFTCAP, TQ_ROTATE (1 Hadamard, 0 matrix),
// TQ_DTYPE (0 fp16, 1 bf16, 2 fp32), TQ_NB (blocks of 8 query rows handled at once), TQ_WARPS, TQ_STAGES, TQ_BLOCKS.
#include "common.cuh"
#include "decode_params.cuh"
#include "decode_pages.cuh"
#include "decode_attend.cuh"
#include "decode_exact.cuh"
#include "decode_merge.cuh"

TQ_KERNEL(tq_decode, Params, THREADS, TQ_BLOCKS) {
  TQ_SHARED(smem);
  Shared sh(smem);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // What the first products need is asked for in the order in which it is waited for: its latency is most of a short launch.
  const Block block = p.blocks[blockIdx.x];
  constexpr int SIGNS = TQ_ROTATE ? (2 * D + THREADS - 1) / THREADS : 0;
  float sign[SIGNS + 1];
#pragma unroll
  for (int k = 0; k < SIGNS; k++) {
    const int i = k * THREADS + threadIdx.x;
    if (i < 2 * D) sign[k] = i < D ? p.key_rotation[i] : p.value_rotation[i - D];
  }
  RawRow raw;
  if (block.first < block.last) raw.load(p, Item(p, block.work.item), warp, lane);
  PageStream stream(p, sh, warp, lane, block);
#pragma unroll
  for (int k = 0; k < SIGNS; k++)
    if (k * THREADS + threadIdx.x < 2 * D) sh.matrix[k * THREADS + threadIdx.x] = sign[k];
  sync_block();
  int number = block.work.item, begin = block.work.begin, end = block.work.end, exact = block.work.exact, table_head = -1;
  for (int w = block.first; w < block.last; w++) {
    const Item item(p, number);
    prepare_queries(p, sh, item, exact, raw, warp, lane);
    if (w == block.first) stream.fill();
    if (TQ_CENTER == 1 && table_head != item.head) {
      table_head = item.head;
      const uint4* src = p.center_table + (size_t)item.head * CENTER_WORDS;
      for (int i = threadIdx.x; i < CENTER_WORDS; i += THREADS) sh.center[i] = src[i];
    }
    sync_block();
    if (w + 1 < block.last && warp < ROWS) raw.load(p, Item(p, p.work[w + 1].item), warp, lane);
    Accumulator acc;
    if (exact) {
      acc.clear();
      attend_exact(p, sh, item, acc, warp, lane);
      merge_warps(p, sh, item, p.work[w], acc, true, warp, lane);
      sync_block();
    }
    acc.clear();
    attend_pages(p, sh, item, begin, end, stream, acc, warp, lane);
    // Read again: what is not held during the loop over pages leaves registers to it.
    const Work work = p.work[w], next = p.work[w + 1];
    merge_warps(p, sh, item, work, acc, false, warp, lane);
    finish_item(p, sh, item, work, warp, lane);
    number = next.item, begin = next.begin, end = next.end, exact = next.exact;
  }
}
