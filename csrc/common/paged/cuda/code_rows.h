// Rows of codes (source.h) as the tensor-core kernels have them in shared memory: as they stand in the pages. A code is
// a small integer, which fp16 and bf16 hold exactly. What a row's codes are multiplied by and offset from goes into
// scores and weights instead:
//
//   q . (scale c + zero) = scale (q . c) + zero sum(q)
//   sum_j p_j (scale_j c_j + zero_j) = (p scale) . c + p . zero
//
// So nothing is rounded but queries and weights, and these have two parts each: a number, and what rounding it has
// lost. Queries have 22 bits of the largest channel in fp16, weights 16 in bf16, whose range takes any scale.
//
// Which position of a contraction, or column of a result, has which channel is free, as long as both operands agree.
// Hence the order of channels is that in which fields are cut out of words where they are.
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

// A row of queries as two parts, divided by `unit`, a power of two that brings the largest channel of the row into
// range. A thread has channels 16 k + 4 (lane % 4) + 0 .. 3, in the order in which code_pair cuts them out of a word:
// put(k, even, odd) receives 0 and 2, 1 and 3.
template <class T, int D>
struct QueryRow {
  float unit, sum = 0.f;  // sum: of the whole row

  template <class Put>
  SIMT_DEVICE QueryRow(const AttentionParams& p, const PagedTile& t, int r, const Put& put) {
    const int own = lane_id() % 4 * 4;
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
    for (int k = 0; k < D / 16; k++)
      put(k, TwoParts<fp16>(x[k][0] * over, x[k][2] * over), TwoParts<fp16>(x[k][1] * over, x[k][3] * over));
  }

 private:
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

template <int D, class Source>
struct CodeRows {
  static constexpr int kItem = 1;
  static constexpr int kBits = Source::kBits, kFields = Source::kFields, kGroup = Source::kGroup, kGroups = D / kGroup;
  static constexpr bool kScaled = Source::kScaled;  // a scale and a zero per row, else an exponent per group
  static constexpr int kCodeWords = D * kBits / 32, kBytes = 4 * kCodeWords + (kScaled ? 4 : kGroups);
  static constexpr int kUnit = kBytes % 4 ? 2 : 4, kUnits = kBytes / kUnit;  // in which rows are copied
  // Of a row in shared memory, in words: 4 times an odd number, so that 8 rows by 4 words are in different banks.
  static constexpr int kPitch = (ceil_div(kBytes, 16) | 1) * 4;
  static_assert(D % kGroup == 0 && kBytes % kUnit == 0, "whole groups");
  struct Stage {
    alignas(16) uint32_t k[kTileKeys * kPitch];
    alignas(16) uint32_t v[kTileKeys * kPitch];
  };

  static bool aligned(const AttentionParams& p) {
    const PageStrides &k = p.k_strides, &v = p.v_strides;
    const auto bits = reinterpret_cast<uintptr_t>(p.k_pages) | reinterpret_cast<uintptr_t>(p.v_pages);
    const int64_t strides = k.page | k.slot | k.head | v.page | v.slot | v.head;
    return bits % kUnit == 0 && strides % kUnit == 0;
  }

  // A lane copies one unit of codes of many rows, and what scales them of the row that it knows, of a key or a value.
  SIMT_DEVICE static void copy(Stage& stage, int first, const char* k, const char* v, int64_t k_row, int64_t v_row) {
    constexpr int kAcross = 4 * kCodeWords / kUnit, kStep = kWarp / kAcross;  // lanes of a row; rows of an instruction
    static_assert(kAcross + 1 == kUnits && kWarp == 2 * kGathered, "one unit behind the codes");
    const int lane = lane_id(), unit = lane % kAcross, row = lane / kAcross, known = lane % kGathered;
    const uint32_t real = warp_ballot(k_row >= 0);
    if (k_row < 0) k_row = v_row = 0;
#pragma unroll
    for (int r = 0; r < kGathered; r += kStep) {
      const int64_t k_from = shfl(k_row, r + row) + unit * kUnit;
      const int64_t v_from = shfl(v_row, r + row) + unit * kUnit;
      const bool wanted = real >> row >> r & 1;
      copy_unit(stage.k + (first + row + r) * kPitch, k + k_from, unit, wanted);
      copy_unit(stage.v + (first + row + r) * kPitch, v + v_from, unit, wanted);
    }
    const bool of_key = lane < kGathered;
    copy_unit((of_key ? stage.k : stage.v) + (first + known) * kPitch,
              (of_key ? k + k_row : v + v_row) + kAcross * kUnit, kAcross, real >> known & 1);
  }
  SIMT_DEVICE static void copy_unit(uint32_t* to, const char* from, int unit, bool real) {
    if constexpr (kUnit == 4)
      cp_async4(to + unit, from, real);
    else
      store2(reinterpret_cast<char*>(to) + 2 * unit, real ? load2(from) : (uint16_t)0);
  }

  template <int Rows, class Shared>
  SIMT_DEVICE static void start_queries(const AttentionParams&, const PagedTile&, Shared&) {}

  // Of the groups of a row, a byte each.
  SIMT_DEVICE static uint32_t exponents_of(const uint32_t* row) {
    return kGroups == 4 ? load4(row + kCodeWords) : load2(row + kCodeWords);
  }
  SIMT_DEVICE static float factor_of(uint32_t exponents, int group) {
    return Source::scale(static_cast<int>(exponents >> (8 * group) & 255));
  }
  SIMT_DEVICE static float scale_of(const uint32_t* row) { return bits_f32(row[kCodeWords] << 16); }
  SIMT_DEVICE static float zero_of(const uint32_t* row) { return bits_f32(row[kCodeWords] & 0xffff0000u); }

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
};

}  // namespace tilewise::paged
