// Codes of a page to fp16 levels, 32 neighbouring dims of a token at a time (a "unit"), and what else kernels that decode whole
// pages share. The bytes are described in codec/layout.py. Needs common.cuh and pages.cuh.
//
// Defines: TQ_D (a multiple of 32), TQ_KB, TQ_VB, TQ_QJL, and from pages.level_defines TQ_{KEY,VALUE}_{HIGH,LOW}{0,1}.
#pragma once

constexpr int D = TQ_D, PAGE = 64, UNITS = D / 32;  // units of a vector; unit u of a page is token u / UNITS
static_assert(D % 32 == 0, "head_dim must be a multiple of 32");

TQ_DEVICE constexpr int plane_bytes(int bits) { return PAGE * D * bits / 8; }
constexpr int QJL_OFFSET = plane_bytes(TQ_KB);
constexpr int V_OFFSET = QJL_OFFSET + (TQ_QJL ? plane_bytes(1) : 0);
constexpr int K_SCALES = V_OFFSET + plane_bytes(TQ_VB);
constexpr int QJL_NORMS = K_SCALES + 2 * PAGE;
constexpr int V_SCALES = QJL_NORMS + (TQ_QJL ? 2 * PAGE : 0);
constexpr int PAGE_BYTES = V_SCALES + 2 * PAGE;

struct KeyLevels {
  static constexpr int BITS = TQ_KB;
  static constexpr uint32_t HIGH0 = TQ_KEY_HIGH0, HIGH1 = TQ_KEY_HIGH1, LOW0 = TQ_KEY_LOW0, LOW1 = TQ_KEY_LOW1;
  static constexpr uint32_t LOW_SIGN = 0;  // negative 4-bit keys differ in the sign of the number alone
};
struct ValueLevels {
  static constexpr int BITS = TQ_VB;
  static constexpr uint32_t HIGH0 = TQ_VALUE_HIGH0, HIGH1 = TQ_VALUE_HIGH1, LOW0 = TQ_VALUE_LOW0, LOW1 = TQ_VALUE_LOW1;
  static constexpr uint32_t LOW_SIGN = TQ_VB == 4 ? 0x80808080u : 0;
};

TQ_DEVICE uint32_t plane_word(const uint8_t* planes, int at) { return ((const uint32_t*)planes)[at]; }

// Levels of a unit: h[k] holds dims 2 k and 2 k + 1. A level's high and low byte are looked up apart; where they are equal, as
// for values, the compiler finds that they are one look-up.
template <class L> TQ_DEVICE void unpack_unit(uint32_t (&h)[16], const uint8_t* planes, int token, int c) {
  uint32_t a[2], b, sign;
  if constexpr (L::BITS >= 2) {
    const uint2 w = ((const uint2*)planes)[token * UNITS + c];
    a[0] = w.x, a[1] = w.y;
  }
  if constexpr (L::BITS >= 3) b = plane_word(planes + PAGE * D / 4, token * UNITS + c);
  if constexpr (L::BITS == 4 || L::BITS == 1) sign = plane_word(planes + (L::BITS == 4 ? PAGE * D * 3 / 8 : 0), token * UNITS + c);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t select = 0;
    if constexpr (L::BITS >= 2) select = (a[i >> 1] >> (2 * (i & 1))) & 0x33333333u;
    if constexpr (L::BITS >= 3) select |= (i < 3 ? b << (i < 2 ? 2 - i : 0) : b >> 1) & 0x44444444u;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t high = 0x01010101u * (L::HIGH0 & 0xFF), low = 0x01010101u * (L::LOW0 & 0xFF);
      if constexpr (L::BITS >= 2) {
        const uint32_t four = half ? select >> 16 : select;
        high = prmt(L::HIGH0, L::HIGH1, four), low = prmt(L::LOW0, L::LOW1, four);
      }
      if constexpr (L::BITS == 4 || L::BITS == 1) {
        const uint32_t flip = (sign << (7 - 2 * i - half)) & 0x80808080u;
        high ^= flip, low ^= flip & L::LOW_SIGN;
      }
      h[4 * i + 2 * half] = prmt(low, high, 0x5140), h[4 * i + 2 * half + 1] = prmt(low, high, 0x7362);
    }
  }
}

// The signs of a unit's sketch as sign bits of half2 numbers.
TQ_DEVICE void unpack_signs(uint32_t (&h)[16], const uint8_t* plane, int token, int c) {
  const uint32_t w = plane_word(plane, token * UNITS + c);
#pragma unroll
  for (int s = 0; s < 8; s++) {
    const uint32_t flip = (w << (7 - s)) & 0x80808080u;
    h[2 * s] = prmt(flip, 0u, 0x1404), h[2 * s + 1] = prmt(flip, 0u, 0x3424);
  }
}

TQ_DEVICE float low_half(uint32_t h) { return f16_to_f32((uint16_t)h); }
TQ_DEVICE float high_half(uint32_t h) { return f16_to_f32((uint16_t)(h >> 16)); }
TQ_DEVICE uint16_t scale_at(const uint8_t* page, int offset, int token) { return ((const uint16_t*)(page + offset))[token]; }

// Unnormalized Walsh-Hadamard transform of vectors of D numbers, 32 to a lane, neighbouring lanes.
TQ_DEVICE void hadamard_units(float (&x)[32], int lane) {
#pragma unroll
  for (int m = 1; m < 32; m <<= 1)
#pragma unroll
    for (int k = 0; k < 32; k++)
      if (!(k & m)) {
        const float s = x[k], t = x[k | m];
        x[k] = s + t, x[k | m] = s - t;
      }
#pragma unroll
  for (int m = 1; m < UNITS; m <<= 1) {
    const float sign = lane & m ? -1.f : 1.f;
#pragma unroll
    for (int k = 0; k < 32; k++) x[k] = sign * x[k] + shfl_xor(x[k], m);
  }
}

// Where number k (a multiple of 4) of unit u stands in an array of units of 32 floats, so that lanes read their units of 128
// bytes without meeting in one bank.
TQ_DEVICE int unit_index(int u, int k) { return u * 32 + (((k >> 2) ^ (u & 7)) << 2) + (k & 3); }

TQ_DEVICE void load_floats(float (&x)[32], const float* from) {
#pragma unroll
  for (int k = 0; k < 32; k += 4) {
    const float4 v = ((const float4*)from)[k / 4];
    x[k] = v.x, x[k + 1] = v.y, x[k + 2] = v.z, x[k + 3] = v.w;
  }
}

// Two floats as two 16-bit numbers of a type (0 fp16, 1 bf16), and 32 numbers of any type from global memory.
TQ_DEVICE uint32_t pack_numbers(float a, float b, int type) { return type == 1 ? f32_to_bf16x2(a, b) : f32_to_f16x2(a, b); }
template <int TYPE> TQ_DEVICE void load_numbers(float (&x)[32], const void* base, int64_t at) {
  if constexpr (TYPE == 2) {
    load_floats(x, (const float*)base + at);
  } else {
    const uint4* from = (const uint4*)((const uint16_t*)base + at);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint4 v = from[k];
      const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        x[8 * k + 2 * e] = TYPE == 1 ? bf16_to_f32((uint16_t)w[e]) : low_half(w[e]);
        x[8 * k + 2 * e + 1] = TYPE == 1 ? as_float(w[e] & 0xFFFF0000u) : high_half(w[e]);
      }
    }
  }
}

// R_p0 (R_j mu) for the tokens of a page, made by all threads of the block: store(j, dim, x, y) is called once for every two
// neighbouring dims. A thread keeps two channel pairs and walks over tokens, so each angle is read once. With WEIGHTED each dim
// is multiplied by weight[dim].
template <int THREADS, bool WEIGHTED, class Store>
TQ_DEVICE void center_page(const Pages& p, int row, int head, int page, const float* weight, Store store) {
  constexpr int PAIRS = D / 4, STEP = THREADS / PAIRS;
  const int m = threadIdx.x % PAIRS;
  const bool turned = 2 * m < p.pairs, apart = turned && !p.interleaved;  // channels beyond the rotary ones are copied
  const int first = apart ? 2 * m : 4 * m, second = apart ? 2 * m + p.pairs : 4 * m + 2;
  float4 angle = {1.f, 0.f, 1.f, 0.f};
  if (turned) angle = ((const float4*)page_angles(p, row, page))[m];
  float2 w = {1.f, 1.f}, v = {1.f, 1.f};
  if constexpr (WEIGHTED) w = *(const float2*)(weight + first), v = *(const float2*)(weight + second);
  const float* table = p.centers + (int64_t)head * PAGE * D;
#pragma unroll 4
  for (int j = threadIdx.x / PAIRS; j < (threadIdx.x / PAIRS < STEP ? PAGE : 0); j += STEP) {
    const float2 a = *(const float2*)(table + j * D + first), b = *(const float2*)(table + j * D + second);
    float2 x, y;
    if (p.interleaved) {
      x = {a.x * angle.x - a.y * angle.y, a.y * angle.x + a.x * angle.y};
      y = {b.x * angle.z - b.y * angle.w, b.y * angle.z + b.x * angle.w};
    } else {
      x = {a.x * angle.x - b.x * angle.y, a.y * angle.z - b.y * angle.w};
      y = {b.x * angle.x + a.x * angle.y, b.y * angle.z + a.y * angle.w};
    }
    store(j, first, x.x * w.x, x.y * w.y);
    store(j, second, y.x * v.x, y.y * v.y);
  }
}
