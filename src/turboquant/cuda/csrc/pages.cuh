// Where the packed pages of a layer are. Mirrored by PagesStruct in pages.py, whose PackedPages explains the fields.
#pragma once

struct Pages {
  const uint8_t* pool;         // or null, with absolute addresses in the table
  const void* table;           // int32, or int64 if table_wide
  const int32_t* packed_lens;  // or null: packed_len for all rows
  const int32_t* starts;       // or null
  const float* angles;         // (rows or 1, pages, pairs, 2): cos and sin at each page's first position
  const float* centers;        // (heads, 64, D): R_j mu
  int64_t block_stride, row_stride, head_stride;  // bytes
  int64_t table_row, angles_row;                  // elements; 0: one row for all
  int32_t table_wide, packed_len, first_page, pairs, interleaved, unused;
};

TQ_DEVICE const uint8_t* page_address(const Pages& p, int row, int head, int page) {
  const int64_t i = row * p.table_row + (page - p.first_page);
  const int64_t block = p.table_wide ? ((const int64_t*)p.table)[i] : (int64_t)((const int32_t*)p.table)[i];
  return p.pool + block * p.block_stride + row * p.row_stride + head * p.head_stride;
}
TQ_DEVICE int packed_length(const Pages& p, int row) { return p.packed_lens ? p.packed_lens[row] : p.packed_len; }
TQ_DEVICE const float* page_angles(const Pages& p, int row, int page) {
  return p.angles + row * p.angles_row + (int64_t)page * p.pairs * 2;
}
