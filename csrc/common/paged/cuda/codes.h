// Pages of codes (source.h) for the tensor-core kernel (attention.h). Rows arrive in shared memory as they stand in the
// pages, and become operands of mma in registers: a code is a small integer, which fp16 and bf16 hold exactly. What a
// row's codes are multiplied by and offset from goes into scores and weights instead:
//
//   q . (scale c + zero) = scale (q . c) + zero sum(q)        sum_j p_j (scale_j c_j + zero_j) = (p scale) . c + p .
//   zero
//
// So nothing is rounded but queries and weights. These are two rows of one mma each, whose accumulators a thread has
// both of: a number, and what rounding it has lost. Queries have 22 bits of the largest channel in fp16, weights 16 in
// bf16, whose range takes any scale. A block has 8 rows, and each of its warps a quarter of the keys.
//
// Which position of a contraction, or column of a result, has which channel is free, as long as both operands agree.
// Hence the order of channels is that of the codes in a 32-bit word (K), or in halves of one (V, where the other half
// of a register is another key): fields are cut out where they are.
#pragma once
#include "common/paged/cuda/attention.h"
#include "common/paged/cuda/source.h"

namespace tilewise::paged {

// The codes in the low bits of both halves of x, as a pair of T. In the low bits of the mantissa of 1024 (fp16) or 128
// (bf16), a number stands for itself.
template <class T, int Bits>
SIMT_DEVICE uint32_t code_pair(uint32_t x) {
  constexpr uint32_t kHalf = (1 << (Bits - 1)) * 0x00010001u, kMask = ((1 << Bits) - 1) * 0x00010001u;
  if constexpr (is_same_v<T, bf16> && Bits == 8) {  // 128 + low bits, less 128 or, if negative, 256
    const uint32_t low = (x & 0x007f007fu) | 0x43004300u, base = (x & kHalf) | 0x43004300u;
    return hfma2<bf16>(base, 0xbf80bf80u, low);
  } else {  // 128 + half + code, less 128 + half
    constexpr uint32_t kBias = (is_same_v<T, bf16> ? 0x43004300u : 0x64006400u) | kHalf;
    return hadd2<T>((x & kMask) ^ kBias, 0x80008000u | kBias);
  }
}

// A pair of floats as T, and what that has lost.
template <class T>
struct TwoParts {
  uint32_t high, low;
  SIMT_DEVICE TwoParts(float x, float y) : high(pack2<T>(x, y)) {
    const float2 rounded = unpack2<T>(high);
    low = pack2<T>(x - rounded.x, y - rounded.y);
  }
};

template <class T, int D, class Source>
struct CodePages {
  static constexpr int kItem = 1, kKeyWarps = kTileWarps, kParts = 2, kWarpKeys = kTileKeys / kKeyWarps;
  // As many blocks as registers allow without spills: their copies hide each other's latency.
  static constexpr int kMinBlocks = D == 64 ? (Source::kScaled ? 4 : 3) : Source::kBits == 8 ? 2 : 3;
  static constexpr int kBits = Source::kBits, kFields = Source::kFields, kGroup = Source::kGroup, kGroups = D / kGroup;
  static constexpr bool kScaled = Source::kScaled;  // a scale and a zero per row, else an exponent per group
  static constexpr int kCodeWords = D * kBits / 32, kBytes = 4 * kCodeWords + (kScaled ? 4 : kGroups);
  static constexpr int kUnit = kBytes % 4 ? 2 : 4, kUnits = kBytes / kUnit;  // in which rows are copied
  // Of a row in shared memory, in words: 4 times an odd number, so that 8 rows by 4 words are in different banks.
  static constexpr int kPitch = (ceil_div(kBytes, 16) | 1) * 4;
  static_assert(D % kGroup == 0 && kBytes % kUnit == 0 && kWarpKeys == 16, "whole groups, one step of 16 keys");
  struct Stage {
    alignas(16) uint32_t k[kTileKeys * kPitch];
    alignas(16) uint32_t v[kTileKeys * kPitch];
  };
  using Scores = float[kWarpKeys / 8][4];

  static bool aligned(const AttentionParams& p) {
    const PageStrides &k = p.k_strides, &v = p.v_strides;
    const auto bits = reinterpret_cast<uintptr_t>(p.k_pages) | reinterpret_cast<uintptr_t>(p.v_pages);
    const int64_t strides = k.page | k.slot | k.head | v.page | v.slot | v.head;
    return bits % kUnit == 0 && strides % kUnit == 0;
  }

  SIMT_DEVICE static void copy(Stage& stage, int first, const char* k, const char* v, int64_t k_row, int64_t v_row) {
#pragma unroll
    for (int i = 0; i < ceil_div(kGathered * kUnits, kWarp); i++) {
      const int index = i * kWarp + lane_id(), r = index / kUnits, c = index % kUnits;
      const int64_t k_from = shfl(k_row, r % kGathered), v_from = shfl(v_row, r % kGathered);
      const bool real = k_from >= 0;
      if (r >= kGathered) continue;
      copy_unit(stage.k + (first + r) * kPitch, k + (real ? k_from : 0), c, real);
      copy_unit(stage.v + (first + r) * kPitch, v + (real ? v_from : 0), c, real);
    }
  }
  SIMT_DEVICE static void copy_unit(uint32_t* to, const char* row, int unit, bool real) {
    if constexpr (kUnit == 4)
      cp_async4(to + unit, row + (real ? 4 * unit : 0), real);
    else
      store2(reinterpret_cast<char*>(to) + 2 * unit, real ? load2(row + 2 * unit) : (uint16_t)0);
  }

  template <int Rows>
  SIMT_DEVICE static void start_queries(const AttentionParams&, const PagedTile&, Stage&) {}

  // A thread has channels 16 k + 4 (lane % 4) + 0 .. 3 of its row, in the order in which code_pair cuts them out of a
  // word: 0 and 2, 1 and 3. They are divided by `unit`, a power of two that brings the largest of the row into range.
  struct Queries {
    uint32_t a[D / 16][4];
    float unit, sum = 0.f;

    SIMT_DEVICE Queries(const AttentionParams& p, const PagedTile& t, const Stage&, int row) {
      const int r = row + lane_id() / 4, own = lane_id() % 4 * 4;
      const bool real = r < t.rows;
      const T* from = static_cast<const T*>(p.q) + (real ? t.offset_of(p.q_strides, r) : 0) + own;
      const float* channels = p.k_channels ? p.k_channels + t.kv_head * D + own : nullptr;
      const float scale = p.scale * kLog2e;
      float x[D / 16][4], top = 0.f;
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        load_four(x[k], from + 16 * k, channels ? channels + 16 * k : nullptr, scale, real);
#pragma unroll
        for (int i = 0; i < 4; i++) top = fmaxf(top, fabsf(x[k][i]));
        sum += (x[k][0] + x[k][1]) + (x[k][2] + x[k][3]);
      }
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      const float over = to_units(warp_max(top, 4));
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        const TwoParts<fp16> even(x[k][0] * over, x[k][2] * over), odd(x[k][1] * over, x[k][3] * over);
        a[k][0] = even.high, a[k][1] = even.low;
        a[k][2] = odd.high, a[k][3] = odd.low;
      }
    }
    SIMT_DEVICE static void load_four(float (&x)[4], const T* from, const float* channels, float scale, bool real) {
      const uint2 four = load8(from);
      const float2 low = unpack2<T>(four.x), high = unpack2<T>(four.y);
      const float q[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = real ? q[i] * (channels ? scale * channels[i] : scale) : 0.f;
    }
    // Sets `unit`, so that `top` becomes 256 to 512, and returns its inverse.
    SIMT_DEVICE float to_units(float top) {
      const uint32_t exponent = f32_bits(top) >> 23, bounded = exponent < 9 ? 9 : exponent > 253 ? 253 : exponent;
      unit = bits_f32((bounded - 8) << 23);
      return bits_f32((254 + 8 - bounded) << 23);
    }
  };

  // Of the groups of a row, a byte each.
  SIMT_DEVICE static uint32_t exponents_of(const uint32_t* row) {
    return kGroups == 4 ? load4(row + kCodeWords) : load2(row + kCodeWords);
  }
  SIMT_DEVICE static float factor_of(uint32_t exponents, int group) {
    return Source::scale(static_cast<int>(exponents >> (8 * group) & 255));
  }
  SIMT_DEVICE static float scale_of(const uint32_t* row) { return bits_f32(row[kCodeWords] << 16); }
  SIMT_DEVICE static float zero_of(const uint32_t* row) { return bits_f32(row[kCodeWords] & 0xffff0000u); }

  // x += q . c for keys [first, first + 8) and the channels of a group. Column lane / 4 of B is a key; its word lane %
  // 4 of the group has 4 channels of every 16.
  SIMT_DEVICE static void multiply_group(float (&x)[4], const Queries& q, const Stage& stage, int first, int group) {
    const uint32_t word = stage.k[(first + lane_id() / 4) * kPitch + 4 * group + lane_id() % 4];
#pragma unroll
    for (int f = 0; f < kFields; f++)
      mma_m16n8k16<fp16>(x, q.a[group * kFields + f], code_pair<fp16, kBits>(word >> (kBits * f)),
                         code_pair<fp16, kBits>(word >> (kBits * f + 8)));
  }
  SIMT_DEVICE static void scores(Scores& x, const Queries& q, const Stage& stage, int first, float) {
    const auto row_of = [&](int n, int e) { return stage.k + (first + 8 * n + lane_id() % 4 * 2 + e) * kPitch; };
    if constexpr (kScaled) {
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int n = 0; n < kWarpKeys / 8; n++) multiply_group(x[n], q, stage, first + 8 * n, g);
    }
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; n++) {
      if constexpr (!kScaled) {
#pragma unroll
        for (int g = 0; g < kGroups; g++) {
          float of_group[4] = {};
          multiply_group(of_group, q, stage, first + 8 * n, g);
#pragma unroll
          for (int e = 0; e < 2; e++)
            x[n][e] += (of_group[e] + of_group[e + 2]) * q.unit * factor_of(exponents_of(row_of(n, e)), g);
        }
      } else {
#pragma unroll
        for (int e = 0; e < 2; e++)  // both parts of the query
          x[n][e] = (x[n][e] + x[n][e + 2]) * q.unit * scale_of(row_of(n, e)) + zero_of(row_of(n, e)) * q.sum;
      }
    }
  }

  // What the codes of two rows in a group are multiplied by. A row whose exponent says that it is not finite would turn
  // products with weights of zero into NaN: it is left out here, and goes in with the zeros.
  SIMT_DEVICE static uint32_t factors(uint32_t exponents, uint32_t others, int group) {
    const auto finite = [](float factor) { return factor < INFINITY ? factor : 0.f; };
    return pack2<bf16>(finite(factor_of(exponents, group)), finite(factor_of(others, group)));
  }
  SIMT_DEVICE static float zero_of_exponents(uint32_t x) {
    const bool any_255 = (~x - 0x01010101u) & x & 0x80808080u;
    return any_255 ? bits_f32(0x7fc00000u) : 0.f;
  }
  SIMT_DEVICE static uint32_t value_pair(uint32_t x, uint32_t factors) {
    const uint32_t codes = code_pair<bf16, kBits>(x);
    return kScaled ? codes : hmul2<bf16>(codes, factors);
  }

  // Rows are those of the weights. Columns: a thread of B has half words of four keys; where a row has eight words or
  // more, lane / 4 + 8 i is the word and both halves are used, else lane / 4 names a half.
  struct Output {
    static constexpr bool kWholeWords = kCodeWords >= 8;
    static constexpr int kHalves = D * kBits / 128;  // that a thread has of a row
    float acc[D / 8][4] = {};
    float zero = 0.f;  // this thread's share of sum_j p_j zero_j; NaN: some row is not finite

    SIMT_DEVICE static int word_of(int column, int half) { return kWholeWords ? column + half / 2 * 8 : column % 4; }
    SIMT_DEVICE static int upper(int column, int half) { return kWholeWords ? half % 2 : column / 4; }
    // The channel of a column of accumulator `tile`.
    SIMT_DEVICE static int channel(int tile, int column) {
      const int field = tile % kFields, odd = tile / kFields % 2, half = tile / kFields / 2;
      const int byte = word_of(column, half) * 4 + upper(column, half) * 2 + odd;
      return byte / 16 * kGroup + field * 16 + byte % 16;
    }

    SIMT_DEVICE void rescale(int, float factor) {
      zero *= factor;
#pragma unroll
      for (int d = 0; d < D / 8; d++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[d][e] *= factor;
    }

    SIMT_DEVICE void add(const Scores& x, const Stage& stage, int first) {
      const int lane = lane_id(), column = lane / 4;
      const uint32_t* rows[2][2];  // of this thread's keys
      uint32_t exponents[2][2] = {};
      float p[2][2];
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const uint32_t* row = rows[n][e] = stage.v + (first + 8 * n + lane % 4 * 2 + e) * kPitch;
          if constexpr (!kScaled) exponents[n][e] = exponents_of(row);
          p[n][e] = kScaled ? x[n][e] * scale_of(row) : x[n][e];
          const float offset = kScaled ? zero_of(row) : zero_of_exponents(exponents[n][e]);
          zero += x[n][e] == 0.f ? 0.f : x[n][e] * offset;  // hidden rows may be NaN
        }
      const TwoParts<bf16> near(p[0][0], p[0][1]), far(p[1][0], p[1][1]);
      const uint32_t a[4] = {near.high, near.low, far.high, far.low};
#pragma unroll
      for (int half = 0; half < kHalves; half++) {
        const int word = word_of(column, half);
        const uint32_t select = upper(column, half) ? 0x7632 : 0x5410;
        uint32_t halves[2], both[2] = {};
#pragma unroll
        for (int n = 0; n < 2; n++) {
          halves[n] = prmt(rows[n][0][word], rows[n][1][word], select);
          if constexpr (!kScaled) both[n] = factors(exponents[n][0], exponents[n][1], word / 4);
        }
#pragma unroll
        for (int i = 0; i < 2 * kFields; i++) {
          const int shift = i / kFields * 8 + i % kFields * kBits;
          mma_m16n8k16<bf16>(acc[half * 2 * kFields + i], a, value_pair(halves[0] >> shift, both[0]),
                             value_pair(halves[1] >> shift, both[1]));
        }
      }
    }

    template <int Rows>
    SIMT_DEVICE void store(float (&to)[Rows][D + 8], int row) {
      zero += shfl_xor(zero, 1);
      zero += shfl_xor(zero, 2);
#pragma unroll
      for (int tile = 0; tile < D / 8; tile++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          to[row + lane_id() / 4][channel(tile, lane_id() % 4 * 2 + e)] = acc[tile][e] + acc[tile][e + 2] + zero;
    }
  };
};

}  // namespace tilewise::paged
