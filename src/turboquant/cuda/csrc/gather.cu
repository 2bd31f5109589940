// Packed pages to keys and values in the model's basis: one block a page and KV head. A unit of 32 dims stays in one lane
// from codes to the finished numbers; shared memory holds the page, the centring, and results on their way out in long lines.
//
// Defines: those of unpack.cuh, TQ_CENTER (0 none, 1 R_p mu, 2 constant), TQ_ROTATE (0: results stay in the rotated domain and
// uncentred, and the sketch's part is written apart).
#include "common.cuh"
#include "pages.cuh"
#include "unpack.cuh"

constexpr int THREADS = 128;

struct Params {
  Pages pages;
  void *key, *value;  // (rows, heads, tokens, D)
  float* sketch;      // (rows, heads, tokens, D), only with TQ_QJL and without TQ_ROTATE
  const float* key_weight;     // (heads, D): signs / (balance sqrt(D))
  const float* value_weight;   // (D): signs / sqrt(D)
  const float* sketch_weight;  // (D): signs / sqrt(D), times sqrt(pi / (2 D))
  int64_t key_row, key_head, key_token, value_row, value_head, value_token;  // elements
  int32_t first_page, tokens, type;
  float sketch_scale;  // sqrt(pi / (2 D))
};

TQ_DEVICE void scaled_levels(float (&x)[32], const uint32_t (&h)[16], float scale) {
#pragma unroll
  for (int k = 0; k < 16; k++) x[2 * k] = low_half(h[k]) * scale, x[2 * k + 1] = high_half(h[k]) * scale;
}

TQ_DEVICE void multiply(float (&x)[32], const float* weight) {
  const float4* w = (const float4*)weight;
#pragma unroll
  for (int k = 0; k < 32; k += 4) {
    const float4 v = w[k / 4];
    x[k] *= v.x, x[k + 1] *= v.y, x[k + 2] *= v.z, x[k + 3] *= v.w;
  }
}

// The signs of a unit times `scale`.
TQ_DEVICE void sketch_signs(float (&x)[32], const uint8_t* page, int token, int c, float scale) {
  uint32_t h[16];
  unpack_signs(h, page + QJL_OFFSET, token, c);
#pragma unroll
  for (int k = 0; k < 16; k++) {
    x[2 * k] = as_float(as_uint(scale) ^ (h[k] << 16 & 0x80000000u));
    x[2 * k + 1] = as_float(as_uint(scale) ^ (h[k] & 0x80000000u));
  }
}

TQ_DEVICE void put_unit(float* stage, int u, const float (&x)[32], bool real) {
#pragma unroll
  for (int k = 0; k < 32; k += 4)
    *(float4*)(stage + unit_index(u, k)) = real ? float4{x[k], x[k + 1], x[k + 2], x[k + 3]} : float4{0.f, 0.f, 0.f, 0.f};
}

// The 32 units of a warp from shared to global memory, neighbouring lanes writing neighbouring bytes. `at`: element of token 0.
TQ_DEVICE void write_units(const float* stage, int base, void* out, int64_t at, int64_t token_stride, int count, int type, int lane) {
  sync_warp();
  const int per_unit = type == 2 ? 8 : 4, numbers = 32 / per_unit;
  for (int i = lane; i < 32 * per_unit; i += 32) {
    const int u = base + i / per_unit, k = i % per_unit * numbers, token = u / UNITS;
    if (token >= count) continue;
    const int64_t to = at + token * token_stride + u % UNITS * 32 + k;
    const float4 x = *(const float4*)(stage + unit_index(u, k));
    if (type == 2) {
      *(float4*)((float*)out + to) = x;
    } else {
      const float4 y = *(const float4*)(stage + unit_index(u, k + 4));
      *(uint4*)((uint16_t*)out + to) = {pack_numbers(x.x, x.y, type), pack_numbers(x.z, x.w, type), pack_numbers(y.x, y.y, type),
                                        pack_numbers(y.z, y.w, type)};
    }
  }
  sync_warp();
}

TQ_KERNEL(tq_gather, Params, THREADS, TQ_QJL || TQ_CENTER == 2 || TQ_D > 256 ? 3 : 4) {
  TQ_SHARED(smem);
  uint8_t* data = smem;
  float* stage = (float*)(smem + PAGE_BYTES);  // a unit of 32 floats for each of the page's
  const int lane = threadIdx.x & 31, page = p.first_page + blockIdx.x, head = blockIdx.y, row = blockIdx.z;
  const int held = min(packed_length(p.pages, row) - page * PAGE, PAGE), count = min(p.tokens - (int)blockIdx.x * PAGE, PAGE);
  if (held > 0) {
    const uint8_t* from = page_address(p.pages, row, head, page);
    for (int i = threadIdx.x; i < PAGE_BYTES / 16; i += THREADS) copy_async_16(data + 16 * i, from + 16 * i);
    if constexpr (TQ_ROTATE && TQ_CENTER == 1)
      center_page<THREADS, false>(p.pages, row, head, page, nullptr,
                                  [&](int j, int dim, float x, float y) { *(float2*)(stage + unit_index(j * UNITS + dim / 32, dim % 32)) = {x, y}; });
  }
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();

  for (int base = threadIdx.x & ~31; base < PAGE * UNITS; base += THREADS) {
    const int u = base + lane, token = u / UNITS, c = u % UNITS;
    const bool real = token < held;
    float x[32];
    uint32_t h[16];
    unpack_unit<KeyLevels>(h, data, token, c);
    scaled_levels(x, h, f16_to_f32(scale_at(data, K_SCALES, token)));
#if TQ_ROTATE
#if TQ_QJL
    {
      float y[32];
      sketch_signs(y, data, token, c, 1.f);
      hadamard_units(y, lane);
      multiply(y, p.sketch_weight + 32 * c);
      const float norm = f16_to_f32(scale_at(data, QJL_NORMS, token));
#pragma unroll
      for (int k = 0; k < 32; k++) x[k] += norm * y[k];
    }
#endif
    hadamard_units(x, lane);
    multiply(x, p.key_weight + head * D + 32 * c);
#if TQ_CENTER
#pragma unroll
    for (int k = 0; k < 32; k += 4) {
      const float4 v = *(const float4*)(TQ_CENTER == 1 ? stage + unit_index(u, k) : p.pages.centers + (int64_t)head * PAGE * D + 32 * c + k);
      x[k] += v.x, x[k + 1] += v.y, x[k + 2] += v.z, x[k + 3] += v.w;
    }
#endif
#endif
    put_unit(stage, u, x, real);
    const int64_t from = (int64_t)blockIdx.x * PAGE;
    write_units(stage, base, p.key, row * p.key_row + head * p.key_head + from * p.key_token, p.key_token, count, p.type, lane);
#if TQ_QJL && !TQ_ROTATE
    sketch_signs(x, data, token, c, f16_to_f32(scale_at(data, QJL_NORMS, token)) * p.sketch_scale);
    put_unit(stage, u, x, real);
    write_units(stage, base, p.sketch, row * p.key_row + head * p.key_head + from * p.key_token, p.key_token, count, 2, lane);
#endif
    unpack_unit<ValueLevels>(h, data + V_OFFSET, token, c);
    scaled_levels(x, h, f16_to_f32(scale_at(data, V_SCALES, token)));
#if TQ_ROTATE
    hadamard_units(x, lane);
    multiply(x, p.value_weight + 32 * c);
#endif
    put_unit(stage, u, x, real);
    write_units(stage, base, p.value, row * p.value_row + head * p.value_head + from * p.value_token, p.value_token, count, p.type, lane);
  }
}
