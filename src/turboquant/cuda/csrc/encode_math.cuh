// What one lane does with its neighbouring dims of a vector, and what the lanes of a vector do together.
//
// Every operation and its order are those of codec/page.py, codec/rotation.py and codec/center.py, so the bytes are the same.
// A lane has one or two units of 32 dims. Bits of a unit are first gathered in "B order", that of plane B: bit 4 n + i belongs
// to dim 8 i + n.
#pragma once

constexpr int D = TQ_D, UNITS = TQ_UNITS, DIMS = 32 * UNITS, LANES = D / DIMS;  // lanes that hold a vector
constexpr int SPAN = LANES > 8 ? 16 : LANES > 4 ? 8 : LANES > 2 ? 4 : LANES;  // the next power of two; idle lanes hold zeros
constexpr int VECTORS = 32 / SPAN;                                            // of a warp
static_assert(D % DIMS == 0 && D >= 32 && D <= 512, "head_dim must be a multiple of 32 up to 512");

typedef float Part[DIMS];

struct KeyCodes {
  static constexpr int BITS = TQ_KB;
  static constexpr bool SYMMETRIC = true;  // levels are, so middle and shifts are zero
  static TQ_DEVICE float middle() { return 0; }
  static TQ_DEVICE float shift(int) { return 0; }
  static TQ_DEVICE float bound(int k) {
    constexpr uint32_t x[] = {TQ_KEY_BOUNDS};
    return as_float(x[k]);
  }
  static TQ_DEVICE float square(int k, int) {
    constexpr uint32_t x[] = {TQ_KEY_SQUARES};
    return as_float(x[2 * k]);
  }
};
struct ValueCodes {
  static constexpr int BITS = TQ_VB;
  static constexpr bool SYMMETRIC = TQ_VB <= 2;
  static TQ_DEVICE float middle() { return as_float(TQ_VALUE_MIDDLE); }
  static TQ_DEVICE float shift(int k) {
    constexpr uint32_t x[] = {TQ_VALUE_SHIFTS};
    return as_float(x[k]);
  }
  static TQ_DEVICE float bound(int k) {
    constexpr uint32_t x[] = {TQ_VALUE_BOUNDS};
    return as_float(x[k]);
  }
  static TQ_DEVICE float square(int k, int negative) {
    constexpr uint32_t x[] = {TQ_VALUE_SQUARES};
    return as_float(x[2 * k + negative]);
  }
};

// ---- loads ----

// Numbers of the model's type; 16-byte aligned.
TQ_DEVICE void load_numbers(Part& x, const void* from) {
#if TQ_DTYPE == 2
#pragma unroll
  for (int i = 0; i < DIMS / 4; i++) {
    const float4 w = __ldg((const float4*)from + i);
    x[4 * i] = w.x, x[4 * i + 1] = w.y, x[4 * i + 2] = w.z, x[4 * i + 3] = w.w;
  }
#else
#pragma unroll
  for (int i = 0; i < DIMS / 8; i++) {
    const uint4 w = __ldg((const uint4*)from + i);
    const uint32_t pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
#if TQ_DTYPE == 1
      x[8 * i + 2 * j] = as_float(pairs[j] << 16);
      x[8 * i + 2 * j + 1] = as_float(pairs[j] & 0xFFFF0000u);
#else
      x[8 * i + 2 * j] = f16_to_f32((uint16_t)pairs[j]);
      x[8 * i + 2 * j + 1] = f16_to_f32((uint16_t)(pairs[j] >> 16));
#endif
    }
  }
#endif
}

// ---- transform and sums ----

TQ_DEVICE void multiply(Part& x, const float* factors) {
#pragma unroll
  for (int i = 0; i < DIMS / 4; i++) {
    const float4 f = __ldg((const float4*)factors + i);
    x[4 * i] = mul_rn(x[4 * i], f.x), x[4 * i + 1] = mul_rn(x[4 * i + 1], f.y);
    x[4 * i + 2] = mul_rn(x[4 * i + 2], f.z), x[4 * i + 3] = mul_rn(x[4 * i + 3], f.w);
  }
}

// Butterflies of small strides in registers, of large ones between lanes.
TQ_DEVICE void hadamard(Part& x, int part) {
#pragma unroll
  for (int stride = 1; stride < DIMS; stride *= 2)
#pragma unroll
    for (int i = 0; i < DIMS; i++)
      if (!(i & stride)) {
        const float a = x[i], b = x[i + stride];
        x[i] = add_rn(a, b);
        x[i + stride] = sub_rn(a, b);
      }
#pragma unroll
  for (int lanes = 1; lanes < LANES; lanes *= 2) {
    const float sign = part & lanes ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < DIMS; i++) x[i] = fma_rn(x[i], sign, shfl_xor(x[i], lanes));  // times 1 or -1: as exact as a sum
  }
}

TQ_DEVICE float sum_lanes(float x) {
#pragma unroll
  for (int lanes = 1; lanes < SPAN; lanes *= 2) x = add_rn(x, shfl_xor(x, lanes));
  return x;
}
// tree_sum of the products a[i] b[i] of a whole vector.
TQ_DEVICE float dot(const Part& a, const Part& b) {
  float s[DIMS / 2];
#pragma unroll
  for (int i = 0; i < DIMS / 2; i++) s[i] = add_rn(mul_rn(a[2 * i], b[2 * i]), mul_rn(a[2 * i + 1], b[2 * i + 1]));
#pragma unroll
  for (int stride = 1; stride < DIMS / 2; stride *= 2)
#pragma unroll
    for (int i = 0; i < DIMS / 2; i += 2 * stride) s[i] = add_rn(s[i], s[i + stride]);
  return sum_lanes(s[0]);
}

// ---- codes ----

struct Bits {
  uint32_t sign, low, high, top;  // of a unit in B order; low, high, top: bits of the number of the magnitude
};

TQ_DEVICE uint32_t push_sign(uint32_t bits, float x) { return bits << 1 | as_uint(x) >> 31; }
// Dims of a unit in the order in which their bits are pushed.
TQ_DEVICE constexpr int dim_of_bit(int at) { return 8 * (at & 3) + (at >> 2); }

// Sums over the lanes of a vector, three numbers of ten bits at a time; the first number is left out.
template <int N> TQ_DEVICE void sum_counts(uint32_t (&n)[N]) {
#pragma unroll
  for (int i = 1; i < N; i += 3) {
    uint32_t packed = n[i] | (i + 1 < N ? n[i + 1] << 10 : 0) | (i + 2 < N ? n[i + 2] << 20 : 0);
#pragma unroll
    for (int lanes = 1; lanes < SPAN; lanes *= 2) packed += shfl_xor(packed, lanes);
    n[i] = packed & 1023;
    if (i + 1 < N) n[i + 1] = packed >> 10 & 1023;
    if (i + 2 < N) n[i + 2] = packed >> 20;
  }
}

// Codes of y, and the sum of the squares of their levels over the whole vector.
template <class Role> TQ_DEVICE float quantize(Bits (&codes)[UNITS], const Part& y, float rms) {
  constexpr int COUNT = (1 << (Role::BITS - 1)) - 1;
  // Negative dims are counted apart unless squares are the same for both signs; the sums of those are exact.
  constexpr int EACH = Role::SYMMETRIC ? 1 : 2;
  uint32_t n[EACH * COUNT + EACH] = {};  // dims of magnitude k or a larger one, then the negative ones of these
  const float middle = mul_rn(rms, Role::middle());
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    Bits r = {0, 0, 0, 0};
#pragma unroll
    for (int at = 31; at >= 0; at--) {
      const float x = y[32 * u + dim_of_bit(at)];
      r.sign = push_sign(r.sign, Role::SYMMETRIC ? x : sub_rn(x, middle));
    }
    if (!Role::SYMMETRIC) n[EACH - 1] += __popc(r.sign);
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const float shift = mul_rn(rms, Role::shift(k)), bound = mul_rn(rms, Role::bound(k));
      uint32_t above = 0;
#pragma unroll
      for (int at = 31; at >= 0; at--) {
        const float x = y[32 * u + dim_of_bit(at)];
        above = push_sign(above, sub_rn(bound, fabsf(Role::SYMMETRIC ? x : sub_rn(x, shift))));
      }
      n[EACH * (k + 1)] += __popc(above);
      if (!Role::SYMMETRIC) n[EACH * (k + 1) + EACH - 1] += __popc(above & r.sign);
      r.low ^= above;
      if (k & 1) r.high ^= above;
      if (k == 3) r.top = above;
    }
    codes[u] = r;
  }
  sum_counts(n);
  n[0] = D;
  float squares = 0;
#pragma unroll
  for (int k = 0; k <= COUNT; k++) {
    uint32_t all = n[EACH * k], negative = Role::SYMMETRIC ? 0 : n[EACH * k + EACH - 1];
    if (k < COUNT) {
      all -= n[EACH * (k + 1)];
      if (!Role::SYMMETRIC) negative -= n[EACH * (k + 1) + EACH - 1];
    }
    squares = add_rn(squares, mul_rn((float)(int)(all - negative), Role::square(k, 0)));
    if (!Role::SYMMETRIC) squares = add_rn(squares, mul_rn((float)(int)negative, Role::square(k, 1)));
  }
  return squares;
}

// Bits 0, 4, 8, 12 of x to bit 7 of bytes 0 to 3.
TQ_DEVICE uint32_t spread_to_tops(uint32_t x) {
  const uint32_t pairs = prmt(x, 0, 0x1100);
  return (pairs & 0x00010001) << 7 | (pairs & 0x10001000) << 3;
}

// y minus its coded key: levels times `scale`.
TQ_DEVICE void subtract_levels(Part& y, const Bits (&codes)[UNITS], float scale) {
#pragma unroll
  for (int i = 0; i < DIMS / 8; i++) {
    const Bits b = codes[i / 4];
    const uint32_t at = i % 4;
    const uint32_t number = (b.low >> at & 0x11111111) | (b.high >> at & 0x11111111) << 1 | (b.top >> at & 0x11111111) << 2;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const uint32_t bytes = prmt(TQ_KEY_LUT0, TQ_KEY_LUT1, number >> (16 * (e / 4)));
      // 2^23 + byte is an exact number; at 4 bits the level is byte + 0.5.
      const float whole = as_float(prmt(bytes, 0x4B000000, 0x7540 + e % 4));
      const float level = mul_rn(sub_rn(whole, TQ_KB == 4 ? 8388607.5f : 8388608.f), 1.f / 64), x = y[8 * i + e];
      y[8 * i + e] = sub_rn(x, as_float(as_uint(mul_rn(level, scale)) | (as_uint(x) & 0x80000000u)));
    }
  }
}

// Levels of coded values.
TQ_DEVICE void value_levels(Part& level, const Bits (&codes)[UNITS]) {
#pragma unroll
  for (int i = 0; i < DIMS / 8; i++) {
    const Bits b = codes[i / 4];
    const int at = i % 4;
    const uint32_t sign = b.sign >> at & 0x11111111;
    // Selectors of the table: the number of the magnitude, and at 1 to 3 bits the sign above it.
    uint32_t code = TQ_VB == 1 ? sign : b.low >> at & 0x11111111;
    if (TQ_VB == 2) code |= sign << 1;
    if (TQ_VB >= 3) code |= (b.high >> at & 0x11111111) << 1 | (TQ_VB == 3 ? sign : b.top >> at & 0x11111111) << 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t bytes = prmt(TQ_VALUE_LUT0, TQ_VALUE_LUT1, code >> (16 * half));
      if (TQ_VB == 4) bytes ^= spread_to_tops(sign >> (16 * half));
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const uint32_t pair = prmt(bytes, 0, TQ_VB <= 2 ? (e ? 0x3424 : 0x1404) : (e ? 0x3322 : 0x1100));
        level[8 * i + 4 * half + 2 * e] = f16_to_f32((uint16_t)pair);
        level[8 * i + 4 * half + 2 * e + 1] = f16_to_f32((uint16_t)(pair >> 16));
      }
    }
  }
}

// ---- planes ----

// Plane C: bit 8 e + s of dim 4 s + e, from B order.
TQ_DEVICE uint32_t plane_c(uint32_t b) {
  uint32_t r = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t x = b >> i & 0x11111111;  // dims 8 i + n at bit 4 n
    const uint32_t first = prmt(x, 0, 0x1100), second = prmt(x, 0, 0x3322);
    r |= ((first & 0x00010001) | (first & 0x10001000) >> 4) << (2 * i);
    r |= ((second & 0x00010001) | (second & 0x10001000) >> 4) << (2 * i + 1);
  }
  return r;
}
// Plane A: the word of dims 16 w, ...: low bits at 4 n + 2 r, high bits one above.
TQ_DEVICE uint32_t plane_a(uint32_t low, uint32_t high, int w) {
  low >>= 2 * w, high >>= 2 * w;
  return (low & 0x11111111) | (low & 0x22222222) << 1 | (high & 0x11111111) << 1 | (high & 0x22222222) << 2;
}
TQ_DEVICE void store_words(uint8_t* to, const uint32_t (&x)[1]) { *(uint32_t*)to = x[0]; }
TQ_DEVICE void store_words(uint8_t* to, const uint32_t (&x)[2]) { *(uint2*)to = make_uint2(x[0], x[1]); }
TQ_DEVICE void store_words(uint8_t* to, const uint32_t (&x)[4]) { *(uint4*)to = make_uint4(x[0], x[1], x[2], x[3]); }

// Write a lane's words of a token's planes.
template <int BITS> TQ_DEVICE void store_planes(uint8_t* planes, const Bits (&codes)[UNITS], int slot, int part) {
  uint32_t a[2 * UNITS], b[UNITS], c[UNITS];
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const Bits x = codes[u];
    // Codes of 2 and 3 bits ascend with the level: negative ones are counted down.
    const uint32_t flip = BITS == 4 ? 0 : x.sign, low = x.low ^ flip, high = BITS == 2 ? ~x.sign : x.high ^ flip;
    a[2 * u] = plane_a(low, high, 0), a[2 * u + 1] = plane_a(low, high, 1);
    b[u] = BITS == 3 ? ~x.sign : x.top;
    c[u] = plane_c(x.sign);
  }
  const int unit = slot * (D / 32) + part * UNITS;
  if (BITS >= 2) store_words(planes + 8 * unit, a);
  if (BITS >= 3) store_words(planes + 16 * D + 4 * unit, b);
  if (BITS == 1 || BITS == 4) store_words(planes + (BITS == 4 ? 24 * D : 0) + 4 * unit, c);
}

TQ_DEVICE uint16_t half_scale(float x) {  // limited to finite numbers
  return f32_to_f16(x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x);
}
