// Primitives that all kernels share: one function per machine instruction, so that kernels read as algorithms and the same
// sources also run on a CPU, where tests/emulator supplies these functions (TQ_EMULATE).
//
// Only built-in types are used (no cuda_fp16.h), so NVRTC needs no include folder on the user's machine. A "half2" is a
// uint32_t with the first number in the low 16 bits.
#pragma once

#ifdef TQ_EMULATE
#include "emulate.h"
#else

typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;

#define TQ_DEVICE __device__ __forceinline__
// A kernel takes one struct by value: TQ_KERNEL(name, Params, threads, blocks per multiprocessor) { ... p.field ... }
#define TQ_KERNEL(name, Params, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)
// All shared memory is dynamic: one array, cut up by the kernel.
#define TQ_SHARED(name) extern __shared__ __align__(128) uint8_t name[]

// ---- bytes and bits ----

// Four bytes picked from the eight of (b, a); the low 4 nibbles of s select; a nibble >= 8 replicates the sign of its byte.
TQ_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t s) {
  uint32_t r;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(s));
  return r;
}

TQ_DEVICE uint32_t rotate_left(uint32_t x, int n) { return __funnelshift_l(x, x, n); }  // n modulo 32

// ---- number formats ----

TQ_DEVICE float f16_to_f32(uint16_t x) {
  float r;
  asm("cvt.f32.f16 %0,%1;" : "=f"(r) : "h"(x));
  return r;
}
TQ_DEVICE uint16_t f32_to_f16(float x) {  // nearest even; out of range becomes infinity
  uint16_t r;
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(r) : "f"(x));
  return r;
}
TQ_DEVICE uint32_t f32_to_f16x2(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
TQ_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
TQ_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {  // a b + c
  uint32_t r;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
TQ_DEVICE float bf16_to_f32(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }
TQ_DEVICE uint16_t f32_to_bf16(float x) {
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(r) : "f"(x));
  return r;
}
TQ_DEVICE uint32_t f32_to_bf16x2(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
TQ_DEVICE float ex2(float x) {  // 2^x, error below 2^-22; -inf gives 0
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
TQ_DEVICE float lg2(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
TQ_DEVICE float rcp(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
TQ_DEVICE float as_float(uint32_t x) { return __uint_as_float(x); }
TQ_DEVICE uint32_t as_uint(float x) { return __float_as_uint(x); }
TQ_DEVICE int32_t round_to_int(float x) { return __float2int_rn(x); }
// IEEE operations that the compiler does not fuse: what the encoder needs to give the same bytes everywhere.
TQ_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
TQ_DEVICE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
TQ_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
TQ_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
TQ_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
TQ_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // a b + c, rounded once

// ---- between lanes ----

TQ_DEVICE float shfl_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
TQ_DEVICE uint32_t shfl_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
TQ_DEVICE int shfl_xor(int x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
TQ_DEVICE uint32_t shfl(uint32_t x, int lane) { return __shfl_sync(~0u, x, lane); }
TQ_DEVICE float shfl(float x, int lane) { return __shfl_sync(~0u, x, lane); }
TQ_DEVICE bool any_lane(bool x) { return __any_sync(~0u, x); }
TQ_DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }
TQ_DEVICE uint32_t max_of_lanes(uint32_t x) { return __reduce_max_sync(~0u, x); }
TQ_DEVICE void sync_warp() { __syncwarp(); }
TQ_DEVICE void sync_block() { __syncthreads(); }

// ---- tensor cores ----
// Lane (g, c) = (lane / 4, lane % 4). C and D: [g][2c], [g][2c+1], [g+8][2c], [g+8][2c+1].

// A 16 x 16 fp16: a0 = [g][2c,2c+1], a1 = [g+8][same], a2 = [g][2c+8,2c+9], a3 = [g+8][same]. B 16 x 8: b0 = [2c,2c+1][g], b1 = [2c+8,2c+9][g].
TQ_DEVICE void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// A 16 x 32 int8: a0 = [g][4c..4c+3], a1 = [g+8][same], a2 = [g][16+4c..], a3 = [g+8][same]. B 32 x 8: b0 = [4c..4c+3][g], b1 = [16+4c..][g].
TQ_DEVICE void mma_s8(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Transpose of an 8 x 8 matrix of 16-bit numbers; lane (g, c) holds [g][2c, 2c+1].
TQ_DEVICE uint32_t movmatrix(uint32_t a) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(a));
  return r;
}
// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
TQ_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  uint32_t a = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
TQ_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  uint32_t a = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}

// ---- memory ----

TQ_DEVICE void copy_async_16(void* shared, const void* global) {
  uint32_t a = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(a), "l"(global) : "memory");
}
TQ_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> TQ_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

#if __CUDA_ARCH__ >= 900
#define TQ_BULK_COPY 1
// A barrier in shared memory on which one thread's bulk copies complete.
TQ_DEVICE void mbar_init(uint64_t* bar) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"((uint32_t)__cvta_generic_to_shared(bar)) : "memory");
}
TQ_DEVICE void mbar_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Pages are read once a step: let them leave the L2 cache first, so that queries, plans and partial results stay.
TQ_DEVICE uint64_t read_once() {
  uint64_t r;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(r));
  return r;
}
// Bytes, source and destination are multiples of 16.
TQ_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* bar) {
  uint32_t d = (uint32_t)__cvta_generic_to_shared(shared), b = (uint32_t)__cvta_generic_to_shared(bar);
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::"r"(d), "l"(global), "r"(bytes), "r"(b), "l"(read_once())
               : "memory");
}
// Two copies on one barrier.
TQ_DEVICE void bulk_load_2(void* shared0, const void* global0, uint32_t bytes0, void* shared1, const void* global1, uint32_t bytes1, uint64_t* bar) {
  uint32_t d0 = (uint32_t)__cvta_generic_to_shared(shared0), d1 = (uint32_t)__cvta_generic_to_shared(shared1), b = (uint32_t)__cvta_generic_to_shared(bar);
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b), "r"(bytes0 + bytes1) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::"r"(d0), "l"(global0), "r"(bytes0), "r"(b), "l"(read_once())
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(d1), "l"(global1), "r"(bytes1), "r"(b)
               : "memory");
}
TQ_DEVICE void mbar_wait(uint64_t* bar, uint32_t parity) {
  uint32_t b = (uint32_t)__cvta_generic_to_shared(bar), done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p,[%1],%2;\nselp.u32 %0,1,0,p;\n}" : "=r"(done) : "r"(b), "r"(parity) : "memory");
  } while (!done);
}
#endif

TQ_DEVICE void fence_device() { __threadfence(); }
TQ_DEVICE int atomic_add(int* p, int x) { return atomicAdd(p, x); }
// Releases this thread's earlier writes, and those it has seen at a barrier, and acquires those released to the same address.
TQ_DEVICE int atomic_add_acq_rel(int* p, int x) {
  int r;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0,[%1],%2;" : "=r"(r) : "l"(p), "r"(x) : "memory");
  return r;
}

#endif  // TQ_EMULATE
