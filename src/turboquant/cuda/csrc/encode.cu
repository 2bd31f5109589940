// New keys and values to codes, written into their pages: centre, balance, rotate, quantize and pack in one pass.
//
// A vector (token, head) is held by a few lanes, 32 or 64 neighbouring dims each: whole words of all planes. Warps are
// independent. Bytes are exactly those of PageCodec.encode.
//
// Defines: TQ_D, TQ_KB, TQ_VB, TQ_QJL; TQ_UNITS of 32 dims per lane; TQ_DTYPE of key and value (0 fp16, 1 bf16, 2 fp32);
// TQ_ROTATE (0: they are centred, balanced and rotated already); TQ_CENTER (0 no, 1 by R_p mu, 2 by a constant), TQ_PAIRS and
// TQ_INTERLEAVED of the rotary embedding; TQ_BALANCE (only with centring); and the tables of codec/layout.py.
#include "common.cuh"
#include "encode_math.cuh"

struct Params {
  const void *key, *value;
  uint8_t* pool;
  const int64_t* slots;         // block * 64 + slot of each token, negative: skip; or null: token t of row b in block t / 64
  const int32_t* token_index;   // or null: first_index + t
  const float* angles;          // (rows or 1, pages, pairs, 2): cos and sin at each page's first position
  const float* centers;         // (heads, 64, D): R_j mu
  const float* balance;         // (heads, D)
  const float *key_signs, *value_signs, *qjl_signs;  // (D): signs over sqrt(D)
  int64_t key_row, key_head, key_token, value_row, value_head, value_token;  // elements
  int64_t block_stride, row_stride, head_stride;                             // bytes
  int64_t angles_row;                                                        // elements; 0: one row for all
  int32_t tokens, total, first_index, split;  // tokens of a row; of all rows; split: blocks code keys or values, in turn
};

struct Vector {
  int row, token, slot, page;
  int64_t block;
  bool stored;
};

// Of this lane's vector; lanes beyond the last token repeat it and store nothing.
TQ_DEVICE Vector find(const Params& p, int first) {
  Vector v;
  const int wanted = first + (threadIdx.x & 31) / SPAN, n = min(wanted, p.total - 1);
  v.row = p.tokens == p.total ? 0 : n / p.tokens;
  v.token = n - v.row * p.tokens;
  v.stored = wanted < p.total;
  int index = p.first_index + v.token;
  if (p.token_index) index = p.token_index[n];
  if (p.slots) {
    const int64_t at = p.slots[n];
    v.stored = v.stored && at >= 0;
    v.block = v.stored ? at >> 6 : 0;
    v.slot = v.stored ? (int)(at & 63) : 0;
    if (!v.stored) index = 0;
  } else {
    v.block = v.token >> 6;
    v.slot = v.token & 63;
  }
  v.page = index >> 6;
  return v;
}

#if TQ_CENTER
static_assert(TQ_ROTATE && SPAN == LANES && TQ_PAIRS % 4 == 0, "centring in the kernel");

// Byte of a warp's table where the chunks (4 dims) of part `part` of vector v begin. Chunk k is at this ^ 16 k: eight lanes
// that read their k-th chunks at the same time meet eight different groups of banks.
TQ_DEVICE uint32_t center_chunks(int v, int part) { return v * D * 4 + part * DIMS * 4 + (v * SPAN + part) % 8 * 16; }

// False, and not for the same reason at every step. A branch on it keeps the compiler from issuing all loads at once, which
// would spill registers.
TQ_DEVICE bool hold_loads(const Params& p, int step) { return p.tokens < step - 100; }

// The warp's rows j of the table, to shared memory.
TQ_DEVICE void stage_centers(const Params& p, const Vector& v, int head, uint8_t* rows) {
  const int lane = threadIdx.x & 31;
  const uint8_t* table = (const uint8_t*)(p.centers + (int64_t)head * 64 * D);
#pragma unroll
  for (int i = 0; i < VECTORS * D / 4; i += 32) {
    const int row = i / (D / 4) + (D < 128 ? lane / (D / 4) : 0), chunk = D < 128 ? lane % (D / 4) : i % (D / 4) + lane;
    const uint32_t slot = shfl((uint32_t)v.slot, row * SPAN);
    const float4 c = __ldg((const float4*)(table + (slot * (D * 4) + chunk * 16)));
    *(float4*)(rows + (center_chunks(row, chunk / (DIMS / 4)) ^ chunk % (DIMS / 4) * 16)) = c;
  }
  sync_warp();
}

TQ_DEVICE void multiply(float (&x)[4], const float4& f) {
  x[0] = mul_rn(x[0], f.x), x[1] = mul_rn(x[1], f.y), x[2] = mul_rn(x[2], f.z), x[3] = mul_rn(x[3], f.w);
}

// x <- (x - R_p (R_j mu)) times the balance, times the signs.
TQ_DEVICE void center(Part& x, const Params& p, const Vector& v, int head, const uint8_t* rows) {
  const int lane = threadIdx.x & 31, part = lane % SPAN;
  const float4* signs = (const float4*)(p.key_signs + part * DIMS);
#if TQ_BALANCE
  const float4* balance = (const float4*)(p.balance + head * D + part * DIMS);
#endif
  const uint32_t mine = center_chunks(lane / SPAN, part);
#if TQ_CENTER == 1
  const float* angles = p.angles + v.row * p.angles_row + (int64_t)v.page * (2 * TQ_PAIRS);
#endif
#pragma unroll
  for (int k = 0; k < DIMS / 4; k++) {
    if (k && k % 2 == 0 && hold_loads(p, k)) return;
    const float4 c = *(const float4*)(rows + (mine ^ 16 * k));
    float o[4] = {c.x, c.y, c.z, c.w};
#if TQ_CENTER == 1
    const int dim = DIMS * part + 4 * k;
#if TQ_INTERLEAVED
    if (2 * TQ_PAIRS >= D || dim < 2 * TQ_PAIRS) {
      const float4 t = __ldg((const float4*)(angles + DIMS * part) + k);  // cos, sin, cos, sin
      o[0] = sub_rn(mul_rn(c.x, t.x), mul_rn(c.y, t.y)), o[1] = add_rn(mul_rn(c.y, t.x), mul_rn(c.x, t.y));
      o[2] = sub_rn(mul_rn(c.z, t.z), mul_rn(c.w, t.w)), o[3] = add_rn(mul_rn(c.w, t.z), mul_rn(c.z, t.w));
    }
#else
    if (2 * TQ_PAIRS >= D || dim < 2 * TQ_PAIRS) {
      // Where parts do not straddle the halves, all that depends on the lane is the same for every k.
      constexpr bool WHOLE = TQ_PAIRS % DIMS == 0;
      const bool first = (WHOLE ? DIMS * part : dim) < TQ_PAIRS;
      const float sign = first ? -1.f : 1.f;
      const int other = dim + (first ? TQ_PAIRS : -TQ_PAIRS);
      const uint32_t where = WHOLE ? center_chunks(lane / SPAN, part + (first ? 1 : -1) * (TQ_PAIRS / DIMS)) ^ 16 * k
                                   : center_chunks(lane / SPAN, other / DIMS) ^ other % DIMS / 4 * 16;
      const float4 q = *(const float4*)(rows + where);
      const float* pair = WHOLE ? angles + 2 * (DIMS * part - (first ? 0 : TQ_PAIRS)) + 8 * k : angles + 2 * min(dim, other);
      const float4 t = __ldg((const float4*)pair), u = __ldg((const float4*)pair + 1);
      o[0] = fma_rn(mul_rn(q.x, t.y), sign, mul_rn(c.x, t.x)), o[1] = fma_rn(mul_rn(q.y, t.w), sign, mul_rn(c.y, t.z));
      o[2] = fma_rn(mul_rn(q.z, u.y), sign, mul_rn(c.z, u.x)), o[3] = fma_rn(mul_rn(q.w, u.w), sign, mul_rn(c.w, u.z));
    }
#endif
#endif
#pragma unroll
    for (int e = 0; e < 4; e++) o[e] = sub_rn(x[4 * k + e], o[e]);
#if TQ_BALANCE
    multiply(o, __ldg(balance + k));
#endif
    multiply(o, __ldg(signs + k));
#pragma unroll
    for (int e = 0; e < 4; e++) x[4 * k + e] = o[e];
  }
}
#endif

// The slot, by way of the lanes: else the compiler makes all addresses of stores early and keeps them in registers.
TQ_DEVICE int late_slot(const Vector& v) { return (int)shfl((uint32_t)v.slot, threadIdx.x & 31); }

TQ_DEVICE float root_mean_square(float norm2) { return sqrt_rn(mul_rn(norm2, (float)(1.0 / D))); }
TQ_DEVICE void clear_unused(Part& x, bool used) {
  if (SPAN != LANES && !used)
#pragma unroll
    for (int i = 0; i < DIMS; i++) x[i] = 0;
}

TQ_DEVICE void code_key(const Params& p, const Vector& v, int head, int part, bool used, uint8_t* page, uint8_t* shared) {
  const int dim = used ? DIMS * part : 0;
  constexpr int SIZE = TQ_DTYPE == 2 ? 4 : 2;
#if TQ_CENTER
  uint8_t* rows = shared + (threadIdx.x >> 5) * (VECTORS * D * 4);
  stage_centers(p, v, head, rows);
  if (hold_loads(p, 0)) return;
#endif
  Part x;
  load_numbers(x, (const uint8_t*)p.key + (v.row * p.key_row + head * p.key_head + v.token * p.key_token + dim) * SIZE);
#if TQ_CENTER
  center(x, p, v, head, rows);
#elif TQ_ROTATE
  multiply(x, p.key_signs + dim);
#endif
#if TQ_ROTATE
  hadamard(x, part);
#endif
  clear_unused(x, used);
  const float norm2 = dot(x, x);
  Bits codes[UNITS];
  const float squares = quantize<KeyCodes>(codes, x, root_mean_square(norm2));
  const uint16_t scale = half_scale(sqrt_rn(div_rn(norm2, squares)));
  const bool stored = v.stored && used;
  const int slot = late_slot(v);
  if (stored) store_planes<TQ_KB>(page, codes, slot, part);
  if (stored && part == 0) ((uint16_t*)(page + TQ_KEY_SCALES))[slot] = scale;
#if TQ_QJL
  subtract_levels(x, codes, f16_to_f32(scale));
  const uint16_t norm = half_scale(sqrt_rn(dot(x, x)));
  multiply(x, p.qjl_signs + dim);
  hadamard(x, part);
#pragma unroll
  for (int u = 0; u < UNITS; u++)
#pragma unroll
    for (int at = 31; at >= 0; at--) codes[u].sign = push_sign(codes[u].sign, x[32 * u + dim_of_bit(at)]);
  if (stored) store_planes<1>(page + TQ_QJL_OFFSET, codes, slot, part);
  if (stored && part == 0) ((uint16_t*)(page + TQ_QJL_NORMS))[slot] = norm;
#endif
}

TQ_DEVICE void code_value(const Params& p, const Vector& v, int head, int part, bool used, uint8_t* page) {
  const int dim = used ? DIMS * part : 0;
  constexpr int SIZE = TQ_DTYPE == 2 ? 4 : 2;
  Part x;
  load_numbers(x, (const uint8_t*)p.value + (v.row * p.value_row + head * p.value_head + v.token * p.value_token + dim) * SIZE);
#if TQ_ROTATE
  multiply(x, p.value_signs + dim);
  hadamard(x, part);
#endif
  clear_unused(x, used);
  Bits codes[UNITS];
  const float squares = quantize<ValueCodes>(codes, x, root_mean_square(dot(x, x)));
  Part level;
  value_levels(level, codes);
  const uint16_t scale = half_scale(div_rn(dot(x, level), squares));
  const int slot = late_slot(v);
  if (!v.stored || !used) return;
  store_planes<TQ_VB>(page + TQ_VALUE_OFFSET, codes, slot, part);
  if (part == 0) ((uint16_t*)(page + TQ_VALUE_SCALES))[slot] = scale;
}

TQ_KERNEL(tq_encode, Params, 128, 3) {
  TQ_SHARED(smem);
  const int group = p.split ? blockIdx.x >> 1 : blockIdx.x, warps = blockDim.x >> 5;
  const int first = (group * warps + (threadIdx.x >> 5)) * VECTORS;
  if (first >= p.total) return;
  const int head = blockIdx.y, part = threadIdx.x % SPAN;
  const bool used = part < LANES;
  const Vector v = find(p, first);
  uint8_t* page = p.pool + v.block * p.block_stride + v.row * p.row_stride + head * p.head_stride;
  if (!p.split || blockIdx.x & 1) code_value(p, v, head, part, used, page);
  if (!p.split || !(blockIdx.x & 1)) code_key(p, v, head, part, used, page, smem);
}
