// Scores and outputs from packed pages.
#pragma once
#include "decode_queries.cuh"

constexpr int TILES = D / 16;        // output fragments: 16 dims x 8 query rows
constexpr bool RAW_CODES = VB <= 2;  // products with values are taken with codes, not levels

struct Accumulator {
  float o[NB][TILES][4];     // columns 2c, 2c + 1 of dims value_dim(tile / 2, g) + 2 (tile % 2) (+ 1 in the last two)
  float m[NB][2], l[NB][2];  // running maximum (base 2), and the sum over this lane's tokens
  float w[4];                // RAW_CODES: sums over all tokens of what their codes are multiplied by, w[2n], w[2n + 1]
  TQ_DEVICE void clear() {
    w[0] = w[1] = w[2] = w[3] = 0.f;
#pragma unroll
    for (int n = 0; n < NB; n++) {
      m[n][0] = m[n][1] = NEVER;
      l[n][0] = l[n][1] = 0.f;
#pragma unroll
      for (int i = 0; i < TILES; i++) o[n][i][0] = o[n][i][1] = o[n][i][2] = o[n][i][3] = 0.f;
    }
  }
  TQ_DEVICE void scale(int n, float f0, float f1) {
    l[n][0] *= f0;
    l[n][1] *= f1;
    w[2 * n] *= f0;
    w[2 * n + 1] *= f1;
#pragma unroll
    for (int i = 0; i < TILES; i++) o[n][i][0] *= f0, o[n][i][1] *= f1, o[n][i][2] *= f0, o[n][i][3] *= f1;
  }
};

// Token of a tile of 16 that stands in fragment row k. So permuted, the transposed probabilities meet V's rows c, c + 4, c + 8, c + 12.
TQ_DEVICE constexpr int tile_token(int k) { return (k & 8) + ((k & 7) >> 1) + ((k & 1) << 2); }

// The pages of a warp, in order over all entries of its block: a ring of STAGES pages in shared memory, filled ahead.
struct PageStream {
  const Params& p;
  uint8_t* ring;
  uint64_t* bars;
  int warp, lane, last;
  int entry, page = 0, end = 0, stage = 0, parity = 0;
  bool done = false;
  int64_t entry_bytes = 0;  // row and head part of the address
  const uint8_t* address = nullptr;
  const float* angles = nullptr;
  int table_row = 0;

  int angle_bytes = 0;

  TQ_DEVICE PageStream(const Params& p, Shared& sh, int warp, int lane, const Block& block)
      : p(p), ring(sh.ring + warp * STAGES * STAGE_BYTES), bars(sh.bars + warp * STAGES), warp(warp), lane(lane), last(block.last), entry(block.first) {
    if (block.first < block.last) enter(block.work);
    if (TQ_CENTER == 1) {
      // Channels that the embedding leaves alone are turned by nothing; the copies never overwrite that.
      angle_bytes = p.pairs * 8;
      for (int s = 0; s < STAGES; s++)
        for (int i = p.pairs + lane; i < D / 2; i += 32) *(float2*)(ring + s * STAGE_BYTES + PAGE_BYTES + 8 * i) = float2{1.f, 0.f};
    }
#ifdef TQ_BULK_COPY
    if (lane == 0) {
      for (int s = 0; s < STAGES; s++) mbar_init(&bars[s]);
      mbar_fence();
    }
    sync_warp();
#endif
    find();
    if (warp < WARPS / 2) issue(0);
  }

  // The rest of the first loads. All at once they would be 6 us of traffic, and the first queries would wait behind them.
  TQ_DEVICE void fill() {
    if (warp >= WARPS / 2) issue(0);
#pragma unroll
    for (int s = 1; s < STAGES; s++) issue(s);
  }

  TQ_DEVICE void enter(const Work& work) {
    page = work.begin + warp;
    end = work.end;
    const Item item(p, work.item);
    table_row = item.row;
    entry_bytes = item.row * p.row_stride + item.head * p.head_stride;
    if (TQ_CENTER == 1) angles = p.angles + item.row * p.angles_row;
  }

  // Go to the next page of this warp and look its address up; it is needed one page later, so the look-up is not waited for.
  TQ_DEVICE void find() {
    while (page >= end) {
      if (++entry >= last) {
        done = true;
        return;
      }
      enter(p.work[entry]);
    }
    const int64_t i = table_row * p.table_row + (page - p.first_page);
    const int64_t block = p.table_wide ? ((const int64_t*)p.table)[i] : (int64_t)((const int32_t*)p.table)[i];
    address = p.pool + block * p.block_stride + entry_bytes;
  }

  TQ_DEVICE void issue(int s) {
    uint8_t* to = ring + s * STAGE_BYTES;
    const float* turn = TQ_CENTER == 1 ? angles + (size_t)page * 2 * p.pairs : nullptr;
#ifdef TQ_BULK_COPY
    if (lane == 0 && !done) {
      if (TQ_CENTER == 1) bulk_load_2(to, address, PAGE_BYTES, to + PAGE_BYTES, turn, angle_bytes, &bars[s]);
      else bulk_load(to, address, PAGE_BYTES, &bars[s]);
    }
#else
    if (!done) {
      for (int i = lane; i < PAGE_BYTES / 16; i += 32) copy_async_16(to + 16 * i, address + 16 * i);
      if (TQ_CENTER == 1)
        for (int i = lane; i < angle_bytes / 16; i += 32) copy_async_16(to + PAGE_BYTES + 16 * i, (const uint8_t*)turn + 16 * i);
    }
    copy_async_commit();
#endif
    if (!done) {
      page += WARPS;
      find();
    }
  }

  TQ_DEVICE const uint8_t* wait() {
#ifdef TQ_BULK_COPY
    mbar_wait(&bars[stage], parity);
#else
    copy_async_wait<STAGES - 1>();
    sync_warp();
#endif
    return ring + stage * STAGE_BYTES;
  }

  TQ_DEVICE void release() {
    sync_warp();
    issue(stage);
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

TQ_DEVICE uint32_t word_at(const uint8_t* s) { return *(const uint32_t*)s; }

// Where a lane finds codes in a token's row of each plane: of 8 dims (K, step) or 4 dims (V, quad).
struct Place {
  int a, r, b, i, slot, half;  // word and pair of bits in plane A, word and bit in B, word b and bit of the first 4 dims in C, half of 8 dims
};
// key_dim() and value_dim() in these terms, written out so that the compiler sees which parts are constants and loads words once.
TQ_DEVICE Place key_place(int step, int c) {
  const int base = segment_base(32 * step), size = segment_size(32 * step), k = segment_step(step);
  if (size == 128) return {base / 16 + 2 * c + k / 2, k % 2, base / 32 + c, k, 2 * k, 0};
  if (size == 64) return {base / 16 + c, k, base / 32 + c / 2, 2 * (c & 1) + k, 4 * (c & 1) + 2 * k, 0};
  return {base / 16 + c / 2, c & 1, base / 32, c, 2 * c, 0};
}
TQ_DEVICE Place value_place(int quad, int g) {
  const int base = segment_base(32 * quad), size = segment_size(32 * quad), k = segment_step(quad);
  if (size == 128) return {base / 16 + g, k / 2, base / 32 + g / 2, 2 * (g & 1) + k / 2, 4 * (g & 1) + k, k % 2};
  if (VB == 2 && size == 64) return {base / 16 + g / 2, k, 0, 0, 0, g & 1};
  if (size == 64) return {base / 16 + g / 2, g & 1, base / 32 + g / 4, g & 3, 2 * (g & 3) + k, k};
  return {base / 16 + g / 4, g >> 1 & 1, base / 32, g >> 1, g, g & 1};
}

// The word of plane A, the first one, with the two low bits of the codes.
TQ_DEVICE uint32_t low_bits(const uint8_t* planes, int token, const Place& at) { return word_at(planes + token * (D / 4) + at.a * 4); }
// Selector nibbles of 8 neighbouring dims of one token at 3 and 4 bits: the magnitude bits of its codes.
TQ_DEVICE uint32_t selectors(const uint8_t* planes, int token, const Place& at) {
  return (low_bits(planes, token, at) >> (2 * at.r) & 0x33333333u) |
         (rotate_left(word_at(planes + PAGE * D / 4 + token * (D / 8) + at.b * 4), 2 - at.i) & 0x44444444u);
}
// Signs of 4 neighbouring dims at 4 bits in the top bits of the 4 bytes; the other bits are arbitrary.
TQ_DEVICE uint32_t signs(const uint8_t* planes, int token, const Place& at, int next) {
  return word_at(planes + PAGE * D * 3 / 8 + token * (D / 8) + at.b * 4) << (7 - at.slot - next);
}

// Eight neighbouring keys of one token as int8: levels in units of 1/64 (layout.py), at 4 bits less a half; at 1 and 2 bits codes
// times 2^code_shift(), at 2 bits those of even dims first. store_row() makes up for all that.
template <int BITS> TQ_DEVICE void key_bytes(const uint8_t* planes, int token, const Place& at, uint32_t& first, uint32_t& second) {
  if constexpr (BITS == 1) {
    const uint32_t w = word_at(planes + token * (D / 8) + at.b * 4) >> (at.slot & 4), mask = 0x01010101u << (at.slot & 3);
    first = w & mask;
    second = w & mask << 1;
  } else if constexpr (BITS == 2) {
    const uint32_t w = low_bits(planes, token, at), mask = 0x03030303u << (2 * at.r);
    first = w & mask;
    second = w >> 4 & mask;
  } else {
    const uint32_t s = selectors(planes, token, at);
    first = prmt(TQ_KLUT0, TQ_KLUT1, s);
    second = prmt(TQ_KLUT0, TQ_KLUT1, s >> 16);
    if constexpr (BITS == 4) {
      first ^= prmt(signs(planes, token, at, 0), 0u, 0xBA98u);
      second ^= prmt(signs(planes, token, at, 1), 0u, 0xBA98u);
    }
  }
}

// Four neighbouring values of four tokens, as fp16 pairs of tokens (0, 1) and (2, 3): lo[i], hi[i] of dim + i. At 3 and 4 bits
// levels; at 1 and 2 bits codes times 2^(code_bit() - 24), for masked bits of a word are small fp16 numbers as they stand:
// subnormal ones below bit 10, and a single bit may also be bit 10 or 11. With `complement` codes are counted from the top.
TQ_DEVICE constexpr int code_bit(int quad, const Place& at, int i) {
  return VB == 1 ? segment_step(quad) + 8 * (i & 1) : 2 * at.r + 4 * (i & 1);
}
TQ_DEVICE void value_pairs(const uint8_t* planes, int token, int quad, int g, bool complement, uint32_t (&lo)[4], uint32_t (&hi)[4]) {
  const Place at = value_place(quad, g);
  uint32_t x[4];
#pragma unroll
  for (int u = 0; u < 4; u++) {
    const int t = token + 4 * u;
    if constexpr (VB == 1) {
      x[u] = word_at(planes + t * (D / 8) + at.b * 4) >> (at.slot - segment_step(quad));
    } else if constexpr (VB == 2) {
      x[u] = low_bits(planes, t, at);
    } else {
      x[u] = prmt(TQ_VLUT0, TQ_VLUT1, selectors(planes, t, at) >> (16 * at.half));
      if constexpr (VB == 4) x[u] ^= signs(planes, t, at, 0) & 0x80808080u;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // The 16 or 8 low bits of each half matter.
    const uint32_t pick = VB == 1 ? (i < 2 ? 0x5410u : 0x7632u) : VB == 2 ? 0x0400u + 0x0101u * (2 * at.half + i / 2) : 0x4400u + 0x1111u * i;
    lo[i] = prmt(x[0], x[1], pick);
    hi[i] = prmt(x[2], x[3], pick);
    if constexpr (RAW_CODES) {
      const uint32_t mask = (VB == 1 ? 0x00010001u : 0x00030003u) << code_bit(quad, at, i);
      lo[i] = (complement ? ~lo[i] : lo[i]) & mask;
      hi[i] = (complement ? ~hi[i] : hi[i]) & mask;
    }
  }
}
