// Attention of one item's query rows over a range of its pages, and over its exact tokens.
#pragma once
#include "decode_pages.cuh"

TQ_DEVICE float soft_cap(const Params& p, float s) {  // s in units of log2; tanh by ex2 keeps 22 bits, tanh.approx only 11
  const float e = ex2(s * (2.f / p.softcap));
  return (p.softcap * LOG2E) * (1.f - 2.f * rcp(1.f + e));
}

// Fold the scores of 16 * MT tokens into the running maximum; returns whether the accumulator must shrink.
template <int MT> TQ_DEVICE bool new_maximum(const float (&s)[MT][4], const float (&old)[2], float (&top)[2]) {
  top[0] = old[0], top[1] = old[1];
#pragma unroll
  for (int i = 0; i < MT; i++) {
    top[0] = fmaxf(top[0], fmaxf(s[i][0], s[i][2]));
    top[1] = fmaxf(top[1], fmaxf(s[i][1], s[i][3]));
  }
#pragma unroll
  for (int m = 4; m < 32; m <<= 1) {
    top[0] = fmaxf(top[0], shfl_xor(top[0], m));
    top[1] = fmaxf(top[1], shfl_xor(top[1], m));
  }
  return any_lane(top[0] > old[0] || top[1] > old[1]);
}

struct Bounds {  // which packed tokens a row of queries sees
  int low, high, slide;  // [low, high), and from slide + token of the query on
  TQ_DEVICE Bounds(const Params& p, const Item& item) {
    const int seq = seq_len_of(p, item.row);
    high = packed_len_of(p, item.row);
    low = start_of(p, item.row) + (high > 0 ? p.sinks : 0);  // sinks are read from their exact copies
    slide = p.sliding_window ? seq - p.tokens - p.sliding_window + 1 : -(1 << 30);
  }
  TQ_DEVICE bool whole(const Params& p, int page) const {
    return page * PAGE >= max(low, slide + p.tokens - 1) && (page + 1) * PAGE <= high;
  }
};

// The term q . R_p mu of all tokens of a page: the query, turned back by the angles of the page's first position, times R_j mu.
#if TQ_CENTER == 1
TQ_DEVICE void center_scores(const Shared& sh, const uint8_t* page, int lane, float (&s)[NB][4][4]) {
  const float4* angles = (const float4*)(page + PAGE_BYTES);
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    const float4 a = angles[i * 4 + (lane & 3)];  // cos, sin of two pairs; four lanes read neighbours, free of bank conflicts
    uint32_t b[NB][2];
#pragma unroll
    for (int n = 0; n < NB; n++) {
      const float4 q = sh.turn[(n * (D / 16) + i) * 32 + lane];
      b[n][0] = f32_to_f16x2(q.x * a.x + q.z * a.y, q.y * a.z + q.w * a.w);
      b[n][1] = f32_to_f16x2(q.z * a.x - q.x * a.y, q.w * a.z - q.y * a.w);
    }
#pragma unroll
    for (int mt = 0; mt < 4; mt++) {
      const uint4 t = sh.center[(mt * (D / 16) + i) * 32 + lane];
#pragma unroll
      for (int n = 0; n < NB; n++) mma_f16(s[n][mt], t.x, t.y, t.z, t.w, b[n][0], b[n][1]);
    }
  }
}
#endif

// Scores (base 2) of 16 tokens of a page for NB blocks of 8 query rows.
TQ_DEVICE void page_scores(const Shared& sh, const uint8_t* page, int mt, int lane, const float (&unit)[NB][2], const float (&constant)[NB][2],
                           float (&out)[NB][4]) {
  const int g = lane >> 2, c = lane & 3, ta = mt * 16 + tile_token(g);
  int high[NB][4] = {}, low[NB][4] = {};
#pragma unroll
  for (int s = 0; s < K_STEPS; s++) {
    uint32_t a0, a1, a2, a3;
    key_bytes<KB>(page, ta, key_place(s, c), a0, a2);
    key_bytes<KB>(page, ta + 8, key_place(s, c), a1, a3);
#pragma unroll
    for (int n = 0; n < NB; n++) {
      const uint4 q = sh.query[(n * K_STEPS + s) * 32 + lane];  // read again each time: 16 registers less are one warp more
      mma_s8(high[n], a0, a1, a2, a3, q.x, q.y);
      mma_s8(low[n], a0, a1, a2, a3, q.z, q.w);
    }
  }
  const uint16_t* scales = (const uint16_t*)(page + K_SCALES);
  const float sa = f16_to_f32(scales[ta]), sb = f16_to_f32(scales[ta + 8]);
#pragma unroll
  for (int n = 0; n < NB; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x = (float)(high[n][i] * 256 + low[n][i]);
      out[n][i] = (key_shift(KB) != 0.f ? x + constant[n][i & 1] : x) * (unit[n][i & 1] * (i < 2 ? sa : sb));
    }
}

#if TQ_QJL
TQ_DEVICE void sketch_scores(const Shared& sh, const uint8_t* page, int mt, int lane, float (&out)[NB][4]) {
  const int g = lane >> 2, c = lane & 3, ta = mt * 16 + tile_token(g);
  int high[NB][4] = {}, low[NB][4] = {};
#pragma unroll
  for (int s = 0; s < K_STEPS; s++) {
    uint32_t a0, a1, a2, a3;
    key_bytes<1>(page + QJL_OFFSET, ta, key_place(s, c), a0, a2);
    key_bytes<1>(page + QJL_OFFSET, ta + 8, key_place(s, c), a1, a3);
#pragma unroll
    for (int n = 0; n < NB; n++) {
      const uint4 q = sh.sketch[(n * K_STEPS + s) * 32 + lane];
      mma_s8(high[n], a0, a1, a2, a3, q.x, q.y);
      mma_s8(low[n], a0, a1, a2, a3, q.z, q.w);
    }
  }
  const uint16_t* norms = (const uint16_t*)(page + QJL_NORMS);
  const float na = f16_to_f32(norms[ta]), nb = f16_to_f32(norms[ta + 8]);
#pragma unroll
  for (int n = 0; n < NB; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* of = sh.columns + 8 * n + 2 * c + (i & 1);
      out[n][i] += ((float)(high[n][i] * 256 + low[n][i]) + of[4 * ROWS]) * (of[2 * ROWS] * (i < 2 ? na : nb));
    }
}
#endif

constexpr uint32_t ONES = 0x3C003C00u;  // two fp16

TQ_DEVICE void attend_pages(const Params& p, const Shared& sh, const Item& item, int begin, int end, PageStream& stream,
                            Accumulator& acc, int warp, int lane) {
  const int g = lane >> 2, c = lane & 3;
  const Bounds bounds(p, item);
  float unit[NB][2], constant[NB][2];
#pragma unroll
  for (int n = 0; n < NB; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) unit[n][j] = sh.columns[8 * n + 2 * c + j], constant[n][j] = sh.columns[ROWS + 8 * n + 2 * c + j];
  // Values are multiplied by 2^(27 - exponent), exponent that of the largest scale met, so that p * scale uses the range of fp16.
  int exponent = 0;
  for (int t = begin + warp; t < end; t += WARPS) {
    const uint8_t* page = stream.wait();
    float s[NB][4][4] = {};
#if TQ_CENTER == 1
    center_scores(sh, page, lane, s);
#endif
#pragma unroll
    for (int mt = 0; mt < 4; mt++) {
      float x[NB][4];
      page_scores(sh, page, mt, lane, unit, constant, x);
#if TQ_QJL
      sketch_scores(sh, page, mt, lane, x);
#endif
#pragma unroll
      for (int n = 0; n < NB; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float y = s[n][mt][i] + x[n][i];
          if (TQ_CENTER == 2) y += sh.columns[3 * ROWS + 8 * n + 2 * c + (i & 1)];
          if (TQ_SOFTCAP) y = soft_cap(p, y);
          s[n][mt][i] = y;
        }
    }
    if (!bounds.whole(p, t)) {
#pragma unroll
      for (int n = 0; n < NB; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int low = max(bounds.low, bounds.slide + (item.first + 8 * n + 2 * c + (i & 1)) / p.group);
#pragma unroll
          for (int mt = 0; mt < 4; mt++) {
            const int token = t * PAGE + mt * 16 + tile_token(g) + (i < 2 ? 0 : 8);
            if (token < low || token >= bounds.high) s[n][mt][i] = as_float(0xFF800000u);
          }
        }
    }
    const uint32_t scales = word_at(page + V_SCALES + 4 * lane) & 0x7FFF7FFFu;
    const int largest = max_of_lanes(max(scales & 0xFFFFu, scales >> 16)) >> 10;
    const float grow = largest > exponent ? as_float((uint32_t)(127 + exponent - largest) << 23) : 1.f;
    exponent = max(exponent, largest);
#pragma unroll
    for (int n = 0; n < NB; n++) {
      float top[2];
      if (new_maximum(s[n], acc.m[n], top) || grow != 1.f) {
        const float f0 = ex2(acc.m[n][0] - top[0]), f1 = ex2(acc.m[n][1] - top[1]);
        acc.scale(n, f0 * grow, f1 * grow);
        acc.l[n][0] *= 1.f / grow, acc.l[n][1] *= 1.f / grow;
        acc.m[n][0] = top[0], acc.m[n][1] = top[1];
      }
    }
    const float to_unit = as_float((uint32_t)(127 + 27 - exponent) << 23);
    const uint16_t* vs = (const uint16_t*)(page + V_SCALES);
#pragma unroll
    for (int mt = 0; mt < 4; mt++) {
      const int ta = mt * 16 + tile_token(g);
      // Codes average far from zero: every other tile counts them from the top with negative weights, or the accumulators would
      // grow with the number of tokens and round to zero what is left when the mean is taken off.
      const bool complement = RAW_CODES && mt & 1;
      const float factor = complement ? -to_unit : to_unit;
      const float va = f16_to_f32(vs[ta]) * factor, vb = f16_to_f32(vs[ta + 8]) * factor;
      uint32_t b[NB][2];
#pragma unroll
      for (int n = 0; n < NB; n++) {
        const float p0 = ex2(s[n][mt][0] - acc.m[n][0]), p1 = ex2(s[n][mt][1] - acc.m[n][1]);
        const float p2 = ex2(s[n][mt][2] - acc.m[n][0]), p3 = ex2(s[n][mt][3] - acc.m[n][1]);
        acc.l[n][0] += p0 + p2, acc.l[n][1] += p1 + p3;
        b[n][0] = movmatrix(f32_to_f16x2(p0 * va, p1 * va));
        b[n][1] = movmatrix(f32_to_f16x2(p2 * vb, p3 * vb));
      }
      if constexpr (RAW_CODES)
#pragma unroll
        for (int n = 0; n < NB; n++) {
          const uint32_t first = n ? 0 : ONES, second = NB == 1 || n ? ONES : 0;  // rows that give w[0], w[1] and w[2], w[3]
          mma_f16(acc.w, first, second, first, second, b[n][0], b[n][1]);
        }
#pragma unroll
      for (int quad = 0; quad < D / 32; quad++) {
        uint32_t lo[4], hi[4];
        value_pairs(page + V_OFFSET, mt * 16 + c, quad, g, complement, lo, hi);
#pragma unroll
        for (int n = 0; n < NB; n++) {
          mma_f16(acc.o[n][2 * quad], lo[0], lo[1], hi[0], hi[1], b[n][0], b[n][1]);
          mma_f16(acc.o[n][2 * quad + 1], lo[2], lo[3], hi[2], hi[3], b[n][0], b[n][1]);
        }
      }
    }
    stream.release();
  }
  const float from_unit = as_float((uint32_t)(127 - 27 + exponent) << 23);
#pragma unroll
  for (int quad = 0; quad < D / 32; quad++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // A level is TQ_VALUE_FIRST + TQ_VALUE_STEP times its code.
      const int bit = RAW_CODES ? code_bit(quad, value_place(quad, g), i) : 0;
      const float factor = RAW_CODES ? TQ_VALUE_STEP * from_unit * as_float((uint32_t)(127 + 24 - bit) << 23) : from_unit;
#pragma unroll
      for (int n = 0; n < NB; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& x = acc.o[n][2 * quad + i / 2][2 * (i & 1) + j];
          x *= factor;
          if constexpr (RAW_CODES) x += TQ_VALUE_FIRST * from_unit * acc.w[2 * n + j];
        }
    }
}
