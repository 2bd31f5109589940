// Pages of a table to or from a buffer, as they are: one block a page and KV head.
#include "common.cuh"
#include "pages.cuh"

struct Params {
  Pages pages;
  uint8_t* buffer;
  int64_t buffer_page, buffer_row, buffer_head;  // bytes
  int32_t first_page, page_bytes, to_buffer, wide;  // wide: everything is a multiple of 16 bytes, else of 8
};

template <class Word> TQ_DEVICE void copy_page(uint8_t* to, const uint8_t* from, int bytes, Word zero) {
  for (int i = threadIdx.x; i < bytes / (int)sizeof(Word); i += blockDim.x) ((Word*)to)[i] = from ? ((const Word*)from)[i] : zero;
}

TQ_KERNEL(tq_copy, Params, 128, 1) {
  const int page = p.first_page + blockIdx.x, head = blockIdx.y, row = blockIdx.z;
  uint8_t* place = p.buffer + blockIdx.x * p.buffer_page + row * p.buffer_row + head * p.buffer_head;
  const uint8_t* held = page * 64 < packed_length(p.pages, row) ? page_address(p.pages, row, head, page) : nullptr;
  if (!p.to_buffer && !held) return;
  uint8_t* to = p.to_buffer ? place : (uint8_t*)held;
  const uint8_t* from = p.to_buffer ? held : place;
  if (p.wide) copy_page<uint4>(to, from, p.page_bytes, {0, 0, 0, 0});
  else copy_page<uint2>(to, from, p.page_bytes, {0, 0});
}
