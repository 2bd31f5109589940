// Query rows of one item as tensor-core operands in shared memory.
#pragma once
#include "decode_params.cuh"

// Head dims are dealt to lanes in segments of 128, 64 or 32, so that the codes of a lane are neighbours in the page.
constexpr int N128 = D / 128 * 128, N64 = D % 128 / 64 * 64;
TQ_DEVICE constexpr int segment_size(int dim) { return dim < N128 ? 128 : dim < N128 + N64 ? 64 : 32; }
TQ_DEVICE constexpr int segment_base(int dim) { return dim < N128 ? dim / 128 * 128 : dim < N128 + N64 ? N128 : N128 + N64; }
// Number of a step or quad of 32 dims within its segment.
TQ_DEVICE constexpr int segment_step(int i) { return i - segment_base(32 * i) / 32; }
// First of the 8 neighbouring dims that lane c of a quad of lanes brings to K step `step` (32 dims).
TQ_DEVICE int key_dim(int step, int c) { return segment_base(32 * step) + c * (segment_size(32 * step) / 4) + 8 * segment_step(step); }
// First of the 4 neighbouring dims of V that row g of a fragment holds in quad `quad`.
TQ_DEVICE int value_dim(int quad, int g) {
  const int base = segment_base(32 * quad), size = segment_size(32 * quad), k = segment_step(quad);
  // 2 bits: two lanes share a word by its halves, so that both have the same bits of each byte.
  if (VB == 2 && size == 64) return base + g / 2 * 16 + g % 2 * 4 + 8 * k;
  return base + g * (size / 8) + 4 * k;
}

#if TQ_DTYPE == 2
typedef float Raw;
TQ_DEVICE float number(Raw x) { return x; }
#else
typedef uint16_t Raw;
TQ_DEVICE float number(Raw x) { return TQ_DTYPE == 1 ? bf16_to_f32(x) : f16_to_f32(x); }
#endif
TQ_DEVICE void store_number(void* base, int64_t i, float x) {
#if TQ_DTYPE == 2
  ((float*)base)[i] = x;
#elif TQ_DTYPE == 1
  ((uint16_t*)base)[i] = f32_to_bf16(x);
#else
  ((uint16_t*)base)[i] = f32_to_f16(x);
#endif
}

constexpr int PER_LANE = D / 32;  // a warp holds a vector with element k * 32 + lane in x[k]

TQ_DEVICE float sum_of_lanes(float x) {
#pragma unroll
  for (int m = 16; m; m >>= 1) x += shfl_xor(x, m);
  return x;
}

#if TQ_ROTATE
TQ_DEVICE void hadamard(float (&x)[PER_LANE], int lane) {
#pragma unroll
  for (int m = 1; m < 32; m <<= 1)
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
      const float other = shfl_xor(x[k], m);
      x[k] = lane & m ? other - x[k] : x[k] + other;
    }
#pragma unroll
  for (int m = 1; m < PER_LANE; m <<= 1)
#pragma unroll
    for (int k = 0; k < PER_LANE; k++)
      if (!(k & m)) {
        const float a = x[k], b = x[k | m];
        x[k] = a + b;
        x[k | m] = a - b;
      }
}
#endif

// y = R x. `rotation` is signs or a matrix, `line` D floats of this warp's own (for a matrix).
TQ_DEVICE void rotate(float (&x)[PER_LANE], const float* rotation, float* line, int lane) {
#if TQ_ROTATE
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) x[k] *= rotation[k * 32 + lane];
  hadamard(x, lane);
#else
  sync_warp();
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) line[k * 32 + lane] = x[k], x[k] = 0.f;
  sync_warp();
  // Rows of R are read whole, so lanes add up each output together.
  for (int i = 0; i < D; i++) {
    float part = 0.f;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) part += rotation[i * D + k * 32 + lane] * line[k * 32 + lane];
    part = sum_of_lanes(part);
#pragma unroll
    for (int k = 0; k < PER_LANE; k++)
      if (i == k * 32 + lane) x[k] = part;
  }
#endif
}

// x = R^T y.
TQ_DEVICE void rotate_back(float (&x)[PER_LANE], const float* rotation, float* line, int lane) {
#if TQ_ROTATE
  hadamard(x, lane);
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) x[k] *= rotation[k * 32 + lane];
#else
  sync_warp();
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) line[k * 32 + lane] = x[k], x[k] = 0.f;
  sync_warp();
  for (int i = 0; i < D; i++)
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) x[k] += rotation[i * D + k * 32 + lane] * line[i];
#endif
}

// A key's level (layout.py) is key_step() times the sum of a number that key_bytes() gives and key_shift(). A sketch's is one of 1 bit.
TQ_DEVICE constexpr float key_step(int bits) { return bits == 1 ? -2.f : bits == 2 ? 1.f : 1.f / 64; }
TQ_DEVICE constexpr float key_shift(int bits) { return bits == 1 ? -0.5f : bits == 2 ? -1.5f : bits == 4 ? 0.5f : 0.f; }
// Codes of 1 and 2 bits come 2^code_shift() times too large: their bits are masked where they are, in the low 4 bits of a byte.
TQ_DEVICE constexpr int code_shift(int bits, int dim) { return bits == 1 ? dim >> 2 & 3 : bits == 2 ? dim >> 2 & 2 : 0; }

// A row as 16-bit integers, split into a high and a low byte for two int8 products: exact to 2^-16 of its largest number.
// Where codes come 2, 4 or 8 times too large, integers are that much smaller and coarser. Writes them in the order of
// key_bytes<BITS>; returns the unit of products in `unit` and what to add to products in `constant`.
template <int BITS> TQ_DEVICE void store_row(uint4* words, int row, const float (&x)[PER_LANE], int lane, float& unit, float& constant) {
  float top = 0.f;
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) top = fmaxf(top, fabsf(x[k]));
#pragma unroll
  for (int m = 16; m; m >>= 1) top = fmaxf(top, shfl_xor(top, m));
  const float inverse = top > 0.f ? 32512.f / top : 0.f;
  unit = top * (key_step(BITS) / 32512.f);
  int sum = 0;
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) {
    const int dim = k * 32 + lane, shift = code_shift(BITS, dim);
    const int v = round_to_int(x[k] * (inverse * as_float((uint32_t)(127 - shift) << 23))), high = (v + 128) >> 8, low = v - 256 * high;
    const int base = segment_base(dim), share = segment_size(dim) / 4, in = dim - base;
    const int step = base / 32 + in % share / 8, owner = (row & 7) * 4 + in / share;
    const int byte = BITS == 2 ? in % 8 / 2 + in % 2 * 4 : in % 8;
    uint8_t* w = (uint8_t*)&words[((row >> 3) * K_STEPS + step) * 32 + owner];
    w[byte] = (uint8_t)high;
    w[8 + byte] = (uint8_t)low;
    sum += v << shift;
  }
  constant = 0.f;
  if constexpr (key_shift(BITS) != 0.f) {
#pragma unroll
    for (int m = 16; m; m >>= 1) sum += shfl_xor(sum, m);
    constant = key_shift(BITS) * (float)sum;
  }
}

// Where channel `dim` stands when channels are ordered as rotary pairs: first halves, then second halves.
TQ_DEVICE int pair_order(const Params& p, int dim) {
  const int turned = 2 * p.pairs;
  if (p.interleaved || dim >= turned) return (dim >> 1) + (dim & 1) * (D / 2);
  const bool second = dim >= p.pairs;
  return dim - second * p.pairs + second * (D / 2);
}

// One query row per warp as it is in memory; asked for early, looked at late.
struct RawRow {
  Raw x[PER_LANE];
  TQ_DEVICE void load(const Params& p, const Item& item, int row, int lane) {
    if (row >= item.rows) return;
    const int r = item.first + row, token = r / p.group, head = item.head * p.group + r - token * p.group;
    const Raw* from = (const Raw*)p.q + ((int64_t)item.row * p.q_row + (int64_t)head * p.q_head + (int64_t)token * p.q_token);
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) x[k] = from[k * 32 + lane];
  }
};

// For pages a row is balanced, rotated and cut into bytes; for exact tokens it becomes fp16 as it is.
TQ_DEVICE void prepare_row(const Params& p, Shared& sh, const Item& item, bool exact, int row, const RawRow& raw, int warp, int lane) {
  const bool real = row < item.rows;
  float x[PER_LANE];
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) x[k] = real ? number(raw.x[k]) : 0.f;
  if (exact) {
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
      const int dim = k * 32 + lane, base = segment_base(dim), share = segment_size(dim) / 4, in = dim - base;
      const int step = 2 * (base / 32 + in % share / 8) + (in >> 2 & 1), owner = (row & 7) * 4 + in / share;
      ((uint16_t*)&sh.plain[((row >> 3) * (D / 16) + step) * 32 + owner])[in & 3] = f32_to_f16(x[k]);
    }
  }
#if TQ_CENTER == 1
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) {
    const int at_pair = pair_order(p, k * 32 + lane), second = at_pair >= D / 2, i = at_pair - second * (D / 2);
    const int owner = (row & 7) * 4 + i % 8 / 2, step = i / 8;
    ((float*)&sh.turn[((row >> 3) * (D / 16) + step) * 32 + owner])[2 * second + (i & 1)] = x[k] * (p.scale * LOG2E);
  }
#elif TQ_CENTER == 2
  float mean = 0.f;
#pragma unroll
  for (int k = 0; k < PER_LANE; k++) mean += x[k] * p.mean[item.head * D + k * 32 + lane];
  mean = sum_of_lanes(mean) * (p.scale * LOG2E);
  if (lane == 0) sh.columns[3 * ROWS + row] = mean;
#endif
  if (p.inverse_balance)
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) x[k] *= p.inverse_balance[item.head * D + k * 32 + lane];
  float unit, constant, *line = sh.matrix + warp * D;
  rotate(x, TQ_ROTATE ? sh.matrix : p.key_rotation, line, lane);
  store_row<KB>(sh.query, row, x, lane, unit, constant);
  if (lane == 0) {
    sh.columns[row] = unit * (p.scale * LOG2E);
    sh.columns[ROWS + row] = constant;
  }
#if TQ_QJL
  rotate(x, p.sketch_rotation, line, lane);
  store_row<1>(sh.sketch, row, x, lane, unit, constant);
  if (lane == 0) {
    sh.columns[2 * ROWS + row] = unit * (p.scale * LOG2E) * TQ_QJL_SCALE;  // sqrt(pi / (2 D))
    sh.columns[4 * ROWS + row] = constant;
  }
#endif
}

TQ_DEVICE void prepare_queries(const Params& p, Shared& sh, const Item& item, bool exact, const RawRow& first, int warp, int lane) {
  if (warp < ROWS) prepare_row(p, sh, item, exact, warp, first, warp, lane);
  for (int row = warp + WARPS; row < ROWS; row += WARPS) {
    RawRow raw;
    raw.load(p, item, row, lane);
    prepare_row(p, sh, item, exact, row, raw, warp, lane);
  }
}
