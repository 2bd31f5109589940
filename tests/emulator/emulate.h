// What common.cuh supplies on a GPU, for a CPU (TQ_EMULATE): the same names and the same meaning. Rules that the GPU leaves
// unchecked (alignment, bounds, missing waits, diverged warps) end the launch with a message.
#pragma once

#include <math.h>

#include "fibers.h"

#ifndef TQ_NO_BULK
#define TQ_BULK_COPY 1
#endif
#define TQ_DEVICE inline
#define TQ_EXPORT extern "C" __attribute__((visibility("default")))
#define TQ_KERNEL(name, Params, threads, blocks)                                                                             \
  static void name##_body(const Params& p);                                                                                  \
  TQ_EXPORT int name##_emulate(const emu::Launch* launch, const void* params, size_t bytes) {                                \
    return emu::launch(#name, [](const void* p) { name##_body(*(const Params*)p); }, threads, sizeof(Params), *launch, params, \
                       bytes);                                                                                               \
  }                                                                                                                          \
  static void name##_body(const Params& p)
// A reference, because the array moves with the number of bytes of each launch; usable inside and outside of functions.
#define TQ_SHARED(name) static uint8_t* const& name = emu::shared_base

TQ_EXPORT const char* tq_error() { return emu::message; }

// ---- what the CUDA compiler knows without headers ----

#define __restrict__ __restrict
#define __forceinline__ inline
#define __device__
#define __host__

#define TQ_VECTOR(type, name)                                                       \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                          \
  struct name##3 { type x, y, z; };                                                 \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };                    \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                  \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }       \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
TQ_VECTOR(uint32_t, uint)
TQ_VECTOR(int32_t, int)
TQ_VECTOR(float, float)
TQ_VECTOR(uint16_t, ushort)
TQ_VECTOR(uint8_t, uchar)
#undef TQ_VECTOR

template <class A, class B> UNCHECKED constexpr auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <class A, class B> UNCHECKED constexpr auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }
template <class T> inline T __ldg(const T* p) { return *p; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(uint32_t x) { return __builtin_ffs((int)x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }

// ---- bytes and bits ----

UNCHECKED TQ_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t s) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t pick = s >> (4 * i), byte = (uint32_t)(bytes >> (8 * (pick & 7))) & 0xFF;
    r |= ((pick & 8) ? (byte & 0x80 ? 0xFFu : 0u) : byte) << (8 * i);
  }
  return r;
}

TQ_DEVICE uint32_t rotate_left(uint32_t x, int n) { return x << (n & 31) | x >> (-n & 31); }

// ---- number formats: by bits, so that they need no type or instruction of the CPU ----

UNCHECKED TQ_DEVICE float as_float(uint32_t x) {
  float r;
  memcpy(&r, &x, 4);
  return r;
}
UNCHECKED TQ_DEVICE uint32_t as_uint(float x) {
  uint32_t r;
  memcpy(&r, &x, 4);
  return r;
}
UNCHECKED TQ_DEVICE float f16_to_f32(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000) << 16, m = x & 0x7FFF;
  if (m > 0x7C00) return as_float(0x7FFFFFFF);
  if (m == 0x7C00) return as_float(sign | 0x7F800000);
  const float r = m < 0x400 ? (float)m * 0x1p-24f : as_float((m << 13) + (112u << 23));
  return as_float(sign | as_uint(r));
}
UNCHECKED TQ_DEVICE uint16_t f32_to_f16(float x) {
  const uint32_t sign = as_uint(x) >> 16 & 0x8000, m = as_uint(x) & 0x7FFFFFFF;
  if (m > 0x7F800000) return 0x7FFF;
  if (m >= 0x477FF000) return (uint16_t)(sign | 0x7C00);  // 65520, the tie between 65504 and 65536
  if (m < 0x38800000) return (uint16_t)(sign | (as_uint(as_float(m) + 0.5f) - 0x3F000000));  // a step of 0.5f is 2^-24
  return (uint16_t)(sign | ((m + 0xFFF + (m >> 13 & 1) - (112u << 23)) >> 13));
}
TQ_DEVICE uint32_t f32_to_f16x2(float lo, float hi) { return f32_to_f16(lo) | (uint32_t)f32_to_f16(hi) << 16; }

namespace emu {
// a b + c rounded once. a b is exact in float64; where a sum is inexact its last bit is made 1 ("round to odd"), which keeps
// the next, coarser rounding from seeing a tie that is none (Boldo and Melquiond, 2008).
inline uint16_t fma_f16(uint16_t a, uint16_t b, uint16_t c) {
  const double product = (double)f16_to_f32(a) * f16_to_f32(b), addend = f16_to_f32(c);
  double sum = product + addend;
  if (sum - sum != 0 || sum == 0) return f32_to_f16((float)sum);
  const double part = sum - product, error = (product - (sum - part)) + (addend - part);  // of sum, exact (Knuth)
  uint64_t bits;
  memcpy(&bits, &sum, 8);
  if (error != 0 && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : -1;
  memcpy(&sum, &bits, 8);
  uint32_t odd = as_uint((float)sum);
  const double rest = sum - (double)(float)sum;
  if (rest != 0 && !(odd & 1)) odd += (rest > 0) == (sum > 0) ? 1 : -1;
  return f32_to_f16(as_float(odd));
}
}  // namespace emu
TQ_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  const uint16_t lo = f32_to_f16(f16_to_f32((uint16_t)a) * f16_to_f32((uint16_t)b));
  return lo | (uint32_t)f32_to_f16(f16_to_f32((uint16_t)(a >> 16)) * f16_to_f32((uint16_t)(b >> 16))) << 16;
}
TQ_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  const uint16_t lo = emu::fma_f16((uint16_t)a, (uint16_t)b, (uint16_t)c);
  return lo | (uint32_t)emu::fma_f16((uint16_t)(a >> 16), (uint16_t)(b >> 16), (uint16_t)(c >> 16)) << 16;
}
TQ_DEVICE float bf16_to_f32(uint16_t x) { return as_float((uint32_t)x << 16); }
TQ_DEVICE uint16_t f32_to_bf16(float x) {
  const uint32_t m = as_uint(x);
  if ((m & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return (uint16_t)((m + 0x7FFF + (m >> 16 & 1)) >> 16);
}
TQ_DEVICE uint32_t f32_to_bf16x2(float lo, float hi) { return f32_to_bf16(lo) | (uint32_t)f32_to_bf16(hi) << 16; }

namespace emu {
inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }  // .ftz
}  // namespace emu
TQ_DEVICE float ex2(float x) { return emu::flush(exp2f(emu::flush(x))); }
TQ_DEVICE float lg2(float x) { return emu::flush(log2f(emu::flush(x))); }
TQ_DEVICE float rcp(float x) { return emu::flush(1.f / emu::flush(x)); }
TQ_DEVICE int32_t round_to_int(float x) {
  if (!(x == x)) return 0;
  if (x >= 0x1p31f) return INT32_MAX;
  return x <= -0x1p31f ? INT32_MIN : (int32_t)rintf(x);
}
TQ_DEVICE float add_rn(float a, float b) { return a + b; }  // compiled with -ffp-contract=off
TQ_DEVICE float sub_rn(float a, float b) { return a - b; }
TQ_DEVICE float mul_rn(float a, float b) { return a * b; }
TQ_DEVICE float div_rn(float a, float b) { return a / b; }
TQ_DEVICE float sqrt_rn(float a) { return sqrtf(a); }
TQ_DEVICE float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }

// ---- between lanes ----

namespace emu {

struct Shuffle {
  uint32_t value;
  int lane;
  uint32_t result;
};
UNCHECKED static void run_shuffle(void** all) {
  for (int i = 0; i < 32; i++) ((Shuffle*)all[i])->result = ((Shuffle*)all[((Shuffle*)all[i])->lane & 31])->value;
}
UNCHECKED static void run_vote(void** all) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; i++) mask |= (uint32_t)(((Shuffle*)all[i])->value != 0) << i;
  for (int i = 0; i < 32; i++) ((Shuffle*)all[i])->result = mask;
}
UNCHECKED static void run_max(void** all) {
  uint32_t most = 0;
  for (int i = 0; i < 32; i++) most = max(most, ((Shuffle*)all[i])->value);
  for (int i = 0; i < 32; i++) ((Shuffle*)all[i])->result = most;
}
static void run_nothing(void**) {}
static const Op op_shfl_xor = {"shfl_xor", run_shuffle}, op_shfl = {"shfl", run_shuffle}, op_any = {"any_lane", run_vote},
                op_ballot = {"ballot", run_vote}, op_max = {"max_of_lanes", run_max}, op_sync_warp = {"sync_warp", run_nothing};

inline uint32_t exchange(const Op& op, uint32_t value, int lane = 0) {
  Shuffle args = {value, lane, 0};
  collective(op, &args);
  return args.result;
}

}  // namespace emu

TQ_DEVICE uint32_t shfl_xor(uint32_t x, int mask) { return emu::exchange(emu::op_shfl_xor, x, (int)(threadIdx.x & 31) ^ mask); }
TQ_DEVICE int shfl_xor(int x, int mask) { return (int)shfl_xor((uint32_t)x, mask); }
TQ_DEVICE float shfl_xor(float x, int mask) { return as_float(shfl_xor(as_uint(x), mask)); }
TQ_DEVICE uint32_t shfl(uint32_t x, int lane) { return emu::exchange(emu::op_shfl, x, lane); }
TQ_DEVICE float shfl(float x, int lane) { return as_float(shfl(as_uint(x), lane)); }
TQ_DEVICE bool any_lane(bool x) { return emu::exchange(emu::op_any, x) != 0; }
TQ_DEVICE uint32_t ballot(bool x) { return emu::exchange(emu::op_ballot, x); }
TQ_DEVICE uint32_t max_of_lanes(uint32_t x) { return emu::exchange(emu::op_max, x); }
TQ_DEVICE void sync_warp() { emu::collective(emu::op_sync_warp, nullptr); }
TQ_DEVICE void sync_block() { emu::block_barrier(); }

#include "emulate_matrix.h"
#include "emulate_memory.h"
#include "emulate_undefined.h"
