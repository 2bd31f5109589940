// Tensor core instructions and matrix moves of common.cuh on a CPU; included by emulate.h.
#pragma once

namespace emu {

inline void check_shared(const char* what, const void* at, size_t bytes, size_t align) {
  const intptr_t offset = (intptr_t)at - (intptr_t)shared_base;
  if (offset < 0 || offset + (intptr_t)bytes > (intptr_t)launch_now.shared)
    TQ_FAIL("%s: bytes %ld to %ld are outside of the %u bytes of shared memory", what, (long)offset, (long)(offset + bytes),
            launch_now.shared);
  if (offset % align) TQ_FAIL("%s: byte %ld of shared memory is no multiple of %zu", what, (long)offset, align);
}
inline void check_global(const char* what, const void* at) {
  if ((uintptr_t)at % 16) TQ_FAIL("%s: the global address %p is no multiple of 16", what, at);
}

struct Mma {
  void* d;
  uint32_t a[4], b[2];
};
typedef float Float4 __attribute__((vector_size(16)));  // the widest vectors that every 64-bit CPU has
typedef int32_t Int4 __attribute__((vector_size(16)));

// As f16_to_f32, four at a time and without branches: conversions are most of the work of mma_f16.
UNCHECKED inline Float4 f16_to_f32x4(Int4 x) {
  const Int4 m = x & 0x7FFF, tiny = m < 0x400, special = m >= 0x7C00;
  const Int4 small = (Int4)(__builtin_convertvector(m, Float4) * 0x1p-24f), normal = (m << 13) + (112 << 23);
  return (Float4)((tiny & small) | (~tiny & normal) | (special & 0x7F800000) | ((x & 0x8000) << 16));
}

// Products of fp16 are exact in float32; their 16 are summed in float32, then added to d.
UNCHECKED static void run_mma_f16(void** all) {
  float a[16][16];
  alignas(16) float b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Mma& m = *(Mma*)all[lane];
    const int g = lane / 4, c = lane % 4;
    Int4 x, y;
    memcpy(&x, m.a, 16);
    const Float4 low = f16_to_f32x4(x), high = f16_to_f32x4(x >> 16);
    y = Int4{(int)m.b[0], (int)(m.b[0] >> 16), (int)m.b[1], (int)(m.b[1] >> 16)};
    const Float4 pairs = f16_to_f32x4(y);
    for (int i = 0; i < 4; i++) {
      a[g + 8 * (i & 1)][2 * c + 8 * (i >> 1)] = low[i];
      a[g + 8 * (i & 1)][2 * c + 8 * (i >> 1) + 1] = high[i];
      b[2 * c + 8 * (i >> 1) + (i & 1)][g] = pairs[i];
    }
  }
  for (int row = 0; row < 16; row++) {
    Float4 sum[2] = {};
    for (int k = 0; k < 16; k++) {
      sum[0] += a[row][k] * *(const Float4*)&b[k][0];
      sum[1] += a[row][k] * *(const Float4*)&b[k][4];
    }
    for (int c = 0; c < 4; c++) {
      float* d = (float*)((Mma*)all[(row & 7) * 4 + c])->d + (row >> 3) * 2;
      d[0] += sum[c / 2][c % 2 * 2];
      d[1] += sum[c / 2][c % 2 * 2 + 1];
    }
  }
}

// 32 products of bytes are below 2^24: exact in float32. The accumulator wraps round as on the GPU.
UNCHECKED static void run_mma_s8(void** all) {
  float a[16][32];
  alignas(16) float b[32][8];
  for (int lane = 0; lane < 32; lane++) {
    const Mma& m = *(Mma*)all[lane];
    const int g = lane / 4, c = lane % 4;
    Int4 x;
    memcpy(&x, m.a, 16);
    const Int4 y = {(int)m.b[0], (int)m.b[1], 0, 0};
    for (int h = 0; h < 4; h++) {
      const Float4 fa = __builtin_convertvector((x << (24 - 8 * h)) >> 24, Float4);
      const Float4 fb = __builtin_convertvector((y << (24 - 8 * h)) >> 24, Float4);
      for (int i = 0; i < 4; i++) a[g + 8 * (i & 1)][4 * c + 16 * (i >> 1) + h] = fa[i];
      for (int i = 0; i < 2; i++) b[4 * c + 16 * i + h][g] = fb[i];
    }
  }
  for (int row = 0; row < 16; row++) {
    Float4 sum[2] = {};
    for (int k = 0; k < 32; k++) {
      sum[0] += a[row][k] * *(const Float4*)&b[k][0];
      sum[1] += a[row][k] * *(const Float4*)&b[k][4];
    }
    for (int c = 0; c < 4; c++) {
      uint32_t* d = (uint32_t*)((Mma*)all[(row & 7) * 4 + c])->d + (row >> 3) * 2;
      d[0] += (uint32_t)(int32_t)sum[c / 2][c % 2 * 2];
      d[1] += (uint32_t)(int32_t)sum[c / 2][c % 2 * 2 + 1];
    }
  }
}

struct Move {
  uint32_t r[4];
  const void* row;
};
UNCHECKED static void run_movmatrix(void** all) {
  uint16_t m[8][8];
  for (int lane = 0; lane < 32; lane++) memcpy(&m[lane / 4][lane % 4 * 2], &((Move*)all[lane])->r[0], 4);
  for (int lane = 0; lane < 32; lane++)
    ((Move*)all[lane])->r[0] = m[lane % 4 * 2][lane / 4] | (uint32_t)m[lane % 4 * 2 + 1][lane / 4] << 16;
}
template <bool TRANS> UNCHECKED static void run_ldmatrix(void** all) {
  for (int i = 0; i < 4; i++) {
    uint16_t m[8][8];
    for (int row = 0; row < 8; row++) memcpy(m[row], ((Move*)all[8 * i + row])->row, 16);
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, c = lane % 4 * 2;
      ((Move*)all[lane])->r[i] = TRANS ? m[c][g] | (uint32_t)m[c + 1][g] << 16 : m[g][c] | (uint32_t)m[g][c + 1] << 16;
    }
  }
}
static const Op op_mma_f16 = {"mma_f16", run_mma_f16}, op_mma_s8 = {"mma_s8", run_mma_s8},
                op_movmatrix = {"movmatrix", run_movmatrix}, op_ldmatrix = {"ldmatrix_x4", run_ldmatrix<false>},
                op_ldmatrix_trans = {"ldmatrix_x4_trans", run_ldmatrix<true>};

inline void load_matrix(const Op& op, uint32_t (&r)[4], const void* row) {
  check_shared(op.name, row, 16, 16);
  Move move = {{}, row};
  collective(op, &move);
  memcpy(r, move.r, 16);
}

}  // namespace emu

// The accumulators are copied: were the address of d passed on, the compiler could not keep d in registers.
TQ_DEVICE void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  float sum[4] = {d[0], d[1], d[2], d[3]};
  emu::Mma args = {sum, {a0, a1, a2, a3}, {b0, b1}};
  emu::collective(emu::op_mma_f16, &args);
  for (int i = 0; i < 4; i++) d[i] = sum[i];
}
TQ_DEVICE void mma_s8(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  int32_t sum[4] = {d[0], d[1], d[2], d[3]};
  emu::Mma args = {sum, {a0, a1, a2, a3}, {b0, b1}};
  emu::collective(emu::op_mma_s8, &args);
  for (int i = 0; i < 4; i++) d[i] = sum[i];
}
TQ_DEVICE uint32_t movmatrix(uint32_t a) {
  emu::Move move = {{a}, nullptr};
  emu::collective(emu::op_movmatrix, &move);
  return move.r[0];
}
TQ_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emu::load_matrix(emu::op_ldmatrix, r, row); }
TQ_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emu::load_matrix(emu::op_ldmatrix_trans, r, row); }
