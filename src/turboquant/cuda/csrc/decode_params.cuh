// What the decode kernel is told, and how its shared memory is cut up.
#pragma once

constexpr int D = TQ_D, KB = TQ_KB, VB = TQ_VB, NB = TQ_NB, WARPS = TQ_WARPS, STAGES = TQ_STAGES;
constexpr int THREADS = 32 * WARPS, ROWS = 8 * NB, PAGE = 64;
constexpr bool FEW = TQ_FEW;  // at most 4 query rows an item: half of the columns of fragments are not used
static_assert(NB == 1 || NB == 2, "one or two blocks of 8 query rows at once");
static_assert(D % 32 == 0 && D <= 512, "head_dim must be a multiple of 32");

// ---- page layout (codec/layout.py; the wrapper compares these offsets with PageLayout) ----
TQ_DEVICE constexpr int plane_bytes(int bits) { return PAGE * D * bits / 8; }
constexpr int QJL_OFFSET = plane_bytes(KB);
constexpr int V_OFFSET = QJL_OFFSET + (TQ_QJL ? plane_bytes(1) : 0);
constexpr int K_SCALES = V_OFFSET + plane_bytes(VB);
constexpr int QJL_NORMS = K_SCALES + 2 * PAGE;
constexpr int V_SCALES = QJL_NORMS + (TQ_QJL ? 2 * PAGE : 0);
constexpr int PAGE_BYTES = V_SCALES + 2 * PAGE;
constexpr int ANGLE_BYTES = TQ_CENTER == 1 ? D * 4 : 0;  // cos and sin of D / 2 channel pairs
constexpr int STAGE_BYTES = PAGE_BYTES + ANGLE_BYTES;
constexpr int CENTER_WORDS = TQ_CENTER == 1 ? 4 * (D / 16) * 32 : 0;  // 16-byte words of one head's table

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f, NEVER = -1e30f;

struct Work {
  int item, begin, end, slot;  // pages [begin, end); slot: where the partial result goes if the item has more entries
  int exact;                   // whether the item's exact tokens come first; their partial result goes to first_slot
  int first_slot, entries, pad;  // of the item
};
struct Block {
  int first, last, pad[2];  // entries of a thread block
  Work work;                // a copy of the first one: one dependent load less before pages can be asked for
};

struct Params {
  // queries (row, query head, token): strides in elements, the last axis is contiguous
  const void* q;
  int64_t q_row, q_head, q_token;
  // pages: base + entry * block_stride + row * row_stride + head * head_stride
  const uint8_t* pool;
  const void* table;  // int32, or int64 if table_wide, (rows, pages)
  int64_t table_row, block_stride, row_stride, head_stride;
  const int32_t* packed_lens;  // tokens of each row held in pages, or null: packed_len for all
  const int32_t* seq_lens;     // tokens of each row with the new ones, or null: seq_len for all
  const int32_t* starts;       // first real token of each row, or null
  // exact tokens: token i of a row is in slot (i - window_first) % window_slots; window_first < 0 means packed_len
  const void *window_k, *window_v;
  int64_t window_row, window_head, window_token;
  const void *sink_k, *sink_v;
  int64_t sink_row, sink_head, sink_token;
  // transforms
  const float* inverse_balance;  // (heads, D) or null
  const float *key_rotation, *value_rotation, *sketch_rotation;  // D signs over sqrt(D), or a D x D matrix R with y = R x
  const float* angles;           // (1 or rows, pages, pairs, 2): cos and sin of each page's first position
  const uint4* center_table;     // R_j mu as tensor-core fragments, CENTER_WORDS a head
  const float* mean;             // (heads, D), for TQ_CENTER 2
  const float* sink_logits;      // (query heads) or null
  int64_t angles_row;            // elements
  // results
  void* out;
  int64_t out_row, out_head, out_token;
  float* lse;  // (rows, query heads, tokens)
  // plan
  const Block* blocks;
  const Work* work;          // one entry more than there are
  float* part_out;           // (slots, ROWS, D)
  float* part_ml;            // (slots, ROWS, 2): maximum and sum, base 2
  int32_t* counters;         // (items), zero between launches
  int32_t table_wide, first_page, packed_len, seq_len, window_first, window_slots, sinks;
  int32_t heads, group, tokens, row_blocks, has_window;
  int32_t pairs, interleaved, sliding_window;  // channel pairs that the rotary embedding turns
  float scale, softcap;  // scale: of the scores, natural units
};

struct Item {
  int row, head, first, rows;  // query rows [first, first + rows) of the KV head: row = token * group + query head in the group
  TQ_DEVICE Item(const Params& p, int item) {
    // (row * heads + head) * row_blocks + block
    const int block = item % p.row_blocks;
    head = item / p.row_blocks % p.heads;
    row = item / p.row_blocks / p.heads;
    first = block * ROWS;
    rows = min(ROWS, p.tokens * p.group - first);
  }
};

TQ_DEVICE int packed_len_of(const Params& p, int row) { return p.packed_lens ? p.packed_lens[row] : p.packed_len; }
TQ_DEVICE int seq_len_of(const Params& p, int row) { return p.seq_lens ? p.seq_lens[row] : p.seq_len; }
TQ_DEVICE int start_of(const Params& p, int row) { return p.starts ? p.starts[row] : 0; }

// ---- shared memory ----
constexpr int K_STEPS = D / 32;                                   // int8 products of 32 dims
constexpr int QUERY_WORDS = NB * K_STEPS * 32;                    // uint4 (high 0, high 1, low 0, low 1) per step and lane
constexpr int TURN_WORDS = TQ_CENTER == 1 ? NB * (D / 16) * 32 : 0;  // float4 (firsts, seconds) per step and lane
constexpr int PLAIN_WORDS = NB * (D / 16) * 32;                   // uint2 of four fp16 per step and lane
constexpr int MERGE_ROWS = FEW ? 4 : ROWS;
constexpr int LINE = D + 4 * (D / 16);  // a row of floats with gaps, so that fragments are stored without bank conflicts
TQ_DEVICE constexpr int line_place(int dim) { return dim + 4 * (dim >> 4); }
constexpr int MERGE_FLOATS = WARPS * MERGE_ROWS * (LINE + 2) + MERGE_ROWS * (2 * D + 4);
constexpr int MATRIX_FLOATS = TQ_ROTATE ? 2 * D : WARPS * D;  // signs of keys and values, or a vector per warp

struct Shared {
  uint8_t* ring;
  uint4* center;
  uint4 *query, *sketch;
  float4* turn;
  uint2* plain;
  float* columns;  // (5, ROWS): a query row's scale and constant of its products, scale of its sketch, q . mu, constant of its sketch
  float* matrix;   // key and value signs; or a vector per warp while it is multiplied by a matrix
  float* merge;        // (WARPS, MERGE_ROWS, LINE)
  float* lines;        // (2, MERGE_ROWS, D): parts of pages and of exact tokens
  float2 *merge_sums, *line_sums;  // maximum and sum, of (WARPS, MERGE_ROWS) and (2, MERGE_ROWS)
  uint64_t* bars;
  int* flag;
  TQ_DEVICE explicit Shared(uint8_t* s) {
    ring = s;
    s += WARPS * STAGES * STAGE_BYTES;
    center = (uint4*)s;
    s += CENTER_WORDS * 16;
    query = (uint4*)s;
    s += QUERY_WORDS * 16;
    sketch = (uint4*)s;
    s += (TQ_QJL ? QUERY_WORDS * 16 : 0);
    turn = (float4*)s;
    s += TURN_WORDS * 16;
    plain = (uint2*)s;
    s += PLAIN_WORDS * 8;
    merge = (float*)s;
    lines = merge + WARPS * MERGE_ROWS * LINE;
    merge_sums = (float2*)(lines + 2 * MERGE_ROWS * D);
    line_sums = merge_sums + WARPS * MERGE_ROWS;
    s += MERGE_FLOATS * 4;
    matrix = (float*)s;
    s += MATRIX_FLOATS * 4;
    columns = (float*)s;
    s += 5 * ROWS * 4;
    bars = (uint64_t*)s;
    s += WARPS * STAGES * 8;
    flag = (int*)s;
  }
};
constexpr int SHARED_BYTES = WARPS * STAGES * STAGE_BYTES + CENTER_WORDS * 16 + QUERY_WORDS * 16 * (TQ_QJL ? 2 : 1) + TURN_WORDS * 16 +
                             PLAIN_WORDS * 8 + MERGE_FLOATS * 4 + MATRIX_FLOATS * 4 + 5 * ROWS * 4 + WARPS * STAGES * 8 + 16;
static_assert(SHARED_BYTES == TQ_SHARED_BYTES, "decode.py computes another size of shared memory");
