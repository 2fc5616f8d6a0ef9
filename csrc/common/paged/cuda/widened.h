// Pages of codes for the tensor-core kernel (attention.h), more than 8 rows: a tile of codes (code_rows.h) is widened
// once, into shared memory, keys as fp16 and values as bf16, and multiplied as numbers are (operands.h). Its codes then
// make room for those of the next tile, which arrive while this one is multiplied.
//
// Queries and weights have their two parts in two products, which share the keys and values that ldmatrix has read: the
// second costs time of the tensor cores, none of shared memory.
//
// Of 16 channels, a row has the first two of every four even places 4 w + 0 and 4 w + 2, then all odd ones, as
// code_pair cuts them out; a thread of the queries, or of the results, then has four neighbours.
#pragma once
#include "common/paged/cuda/code_rows.h"
#include "common/paged/cuda/operands.h"

namespace tilewise::paged {

template <class T, int D, class Source, int KeyWarps>
struct WidenedPages : CodeRows<D, Source> {
  using Rows = CodeRows<D, Source>;
  using Rows::kBits, Rows::kFields, Rows::kGroups, Rows::kPitch, Rows::kScaled;
  using Stage = typename Rows::Stage;
  static constexpr int kKeyWarps = KeyWarps, kParts = 1, kWarpKeys = kTileKeys / KeyWarps;
  static constexpr int kMinBlocks = D == 64 ? 3 : 2;
  static constexpr int kFactors = kScaled ? 1 : kGroups;  // of a key
  static constexpr bool kHeld = kScaled || D == 64;       // first parts of queries have registers
  static constexpr int kWidePitch = D + 8;
  using KeyRows = OperandRows<fp16, kWidePitch>;
  using ValueRows = OperandRows<bf16, kWidePitch>;
  using Scores = float[kWarpKeys / 8][4];

  struct Tile {
    alignas(128) fp16 k[kTileKeys * kWidePitch];
    alignas(128) bf16 v[kTileKeys * kWidePitch];
    alignas(16) float k_factors[kFactors][kTileKeys], k_zeros[kTileKeys], v_scales[kTileKeys], v_zeros[kTileKeys];
  };
  struct Shared {
    Stage stages[1];
    Tile tile;
    uint4 parts[kHeld ? 1 : 2][D / 16][kTileThreads];  // of queries, a thread's own: second, then first
  };

  // A thread widens a row: half of them keys, the others values.
  SIMT_DEVICE static void widen(Tile& to, const Stage& from) {
    static_assert(kTileThreads == 2 * kTileKeys, "a row each");
    const int r = thread_id() % kTileKeys;
    if (thread_id() < kTileKeys)
      widen_key(to, r, from.k + r * kPitch);
    else
      widen_value(to, r, from.v + r * kPitch);
  }
  SIMT_DEVICE static void widen_key(Tile& to, int r, const uint32_t* row) {
    if constexpr (kScaled) {
      to.k_factors[0][r] = Rows::scale_of(row);
      to.k_zeros[r] = Rows::zero_of(row);
    } else {
#pragma unroll
      for (int g = 0; g < kFactors; g++) to.k_factors[g][r] = Rows::factor_of(Rows::exponents_of(row), g);
    }
    widen_row<KeyRows>(to.k, r, row, [](uint32_t x, int) { return code_pair<fp16, kBits>(x); });
  }
  SIMT_DEVICE static void widen_value(Tile& to, int r, const uint32_t* row) {
    uint32_t factors[kGroups] = {};
    if constexpr (kScaled) {
      to.v_scales[r] = Rows::scale_of(row);
      to.v_zeros[r] = Rows::zero_of(row);
    } else {
      const uint32_t exponents = Rows::exponents_of(row);
      to.v_zeros[r] = Rows::zero_of_exponents(exponents);
#pragma unroll
      for (int g = 0; g < kGroups; g++) factors[g] = Rows::factors(exponents, exponents, g);
    }
    widen_row<ValueRows>(to.v, r, row, [&](uint32_t x, int g) { return Rows::value_pair(x, factors[g]); });
  }
  template <class Operand, class Number, class Pair>
  SIMT_DEVICE static void widen_row(Number* to, int r, const uint32_t* row, const Pair& pair) {
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      const uint4 words = load16(row + 4 * g);
#pragma unroll
      for (int half = 0; half < 2 * kFields; half++) {  // eight channels
        const int shift = half / 2 * kBits + half % 2 * 8;
        store16(to + Operand::at(r, g * 2 * kFields + half),
                uint4{pair(words.x >> shift, g), pair(words.y >> shift, g), pair(words.z >> shift, g),
                      pair(words.w >> shift, g)});
      }
    }
  }

  struct Queries {
    uint32_t high[kHeld ? D / 16 : 1][4];
    const uint4* parts;
    float unit[2], sum[2];

    SIMT_DEVICE Queries(const AttentionParams& p, const PagedTile& t, Shared& s, int row)
        : parts(&s.parts[0][0][thread_id()]) {
      uint32_t both[2][D / 16][4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const QueryRow<T, D> own(p, t, row + lane_id() / 4 + 8 * h,
                                 [&](int k, TwoParts<fp16> even, TwoParts<fp16> odd) {
                                   both[0][k][h] = even.low, both[0][k][2 + h] = odd.low;
                                   both[1][k][h] = even.high, both[1][k][2 + h] = odd.high;
                                 });
        unit[h] = own.unit, sum[h] = own.sum;
      }
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        store_part(s, 0, k, both[0][k]);
        if constexpr (!kHeld) store_part(s, 1, k, both[1][k]);
#pragma unroll
        for (int i = 0; i < 4; i++)
          if constexpr (kHeld) high[k][i] = both[1][k][i];
      }
    }
    SIMT_DEVICE static void store_part(Shared& s, int part, int k, const uint32_t (&a)[4]) {
      store16(&s.parts[part][k][thread_id()], uint4{a[0], a[1], a[2], a[3]});
    }
    SIMT_DEVICE void load_part(uint32_t (&a)[4], int part, int k) const {
      const uint4 four = load16(parts + (part * (D / 16) + k) * kTileThreads);
      a[0] = four.x, a[1] = four.y, a[2] = four.z, a[3] = four.w;
    }
    SIMT_DEVICE void low_part(uint32_t (&a)[4], int k) const { load_part(a, 0, k); }
    SIMT_DEVICE void high_part(uint32_t (&a)[4], int k) const {
      if constexpr (kHeld) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = high[k][i];
      } else {
        load_part(a, 1, k);
      }
    }
  };

  // x[2 i] and x[2 i + 1] += a . b[i]
  template <class Number, int N, int M>
  SIMT_DEVICE static void multiply(float (&x)[M][4], int first, const uint32_t (&a)[4], const uint32_t (&b)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      mma_m16n8k16<Number>(x[first + 2 * i], a, b[i][0], b[i][1]);
      mma_m16n8k16<Number>(x[first + 2 * i + 1], a, b[i][2], b[i][3]);
    }
  }

  // This thread's pair of keys, of eight.
  SIMT_DEVICE static float2 own_pair(const float* of_keys, int first) {
    const uint2 two = load8(of_keys + first + lane_id() % 4 * 2);
    return {bits_f32(two.x), bits_f32(two.y)};
  }

  SIMT_DEVICE static void scores(Scores& x, const Queries& q, const Tile& tile, int first, float) {
    constexpr int kSteps = D / 16 / kFactors;
#pragma unroll
    for (int g = 0; g < kFactors; g++) {
      float sums[kWarpKeys / 8][4] = {};
#pragma unroll
      for (int k = g * kSteps; k < (g + 1) * kSteps; k++) {
        uint32_t high[4], low[4];
        q.high_part(high, k);
        q.low_part(low, k);
        uint32_t b[kWarpKeys / 16][4];
#pragma unroll
        for (int n = 0; n < kWarpKeys / 16; n++) KeyRows::load_keys(b[n], tile.k, first + 16 * n, k);
        multiply<fp16>(sums, 0, high, b);
        multiply<fp16>(sums, 0, low, b);
      }
#pragma unroll
      for (int n = 0; n < kWarpKeys / 8; n++) add_scaled(x[n], sums[n], q, tile, first + 8 * n, g);
    }
  }
  SIMT_DEVICE static void add_scaled(float (&x)[4], const float (&sums)[4], const Queries& q, const Tile& tile, int key,
                                     int group) {
    const float2 factor = own_pair(tile.k_factors[group], key);
    float2 zero = {0.f, 0.f};
    if constexpr (kScaled) zero = own_pair(tile.k_zeros, key);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (kScaled) x[2 * h] = zero.x * q.sum[h], x[2 * h + 1] = zero.y * q.sum[h];
      x[2 * h] += sums[2 * h] * q.unit[h] * factor.x;
      x[2 * h + 1] += sums[2 * h + 1] * q.unit[h] * factor.y;
    }
  }

  struct Output {
    float acc[D / 8][4] = {};
    float zero[2] = {};  // this thread's share of sum_j p_j zero_j; NaN: some row is not finite

    SIMT_DEVICE void rescale(int h, float factor) {
      zero[h] *= factor;
#pragma unroll
      for (int d = 0; d < D / 8; d++) {
        acc[d][2 * h] *= factor;
        acc[d][2 * h + 1] *= factor;
      }
    }

    SIMT_DEVICE void add(const Scores& x, const Tile& tile, int first) {
#pragma unroll
      for (int n = 0; n < kWarpKeys / 8; n += 2) {
        uint32_t high[4], low[4];
        split(high, low, 0, x[n], tile, first + 8 * n);
        split(high, low, 2, x[n + 1], tile, first + 8 * n + 8);
#pragma unroll
        for (int d = 0; d < D / 16; d += 2) {
          uint32_t b[2][4];
          ValueRows::load_values(b[0], tile.v, first + 8 * n, d);
          ValueRows::load_values(b[1], tile.v, first + 8 * n, d + 1);
          multiply<bf16>(acc, 2 * d, high, b);
          multiply<bf16>(acc, 2 * d, low, b);
        }
      }
    }
    // The weights of eight keys as left operands, and their zeros.
    SIMT_DEVICE void split(uint32_t (&high)[4], uint32_t (&low)[4], int at, const float (&x)[4], const Tile& tile,
                           int key) {
      const float2 offset = own_pair(tile.v_zeros, key);
      float2 scale = {1.f, 1.f};
      if constexpr (kScaled) scale = own_pair(tile.v_scales, key);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float p = x[2 * h], next = x[2 * h + 1];
        zero[h] += p == 0.f ? 0.f : p * offset.x;  // hidden rows may be NaN
        zero[h] += next == 0.f ? 0.f : next * offset.y;
        const TwoParts<bf16> parts(p * scale.x, next * scale.y);
        high[at + h] = parts.high, low[at + h] = parts.low;
      }
    }

    template <int N>
    SIMT_DEVICE void store(float (&to)[N][D + 8], int row) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        zero[h] += shfl_xor(zero[h], 1);
        zero[h] += shfl_xor(zero[h], 2);
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
          const float (&even)[4] = acc[2 * k], (&odd)[4] = acc[2 * k + 1];
          store16(&to[row + lane_id() / 4 + h * 8][16 * k + lane_id() % 4 * 4],
                  uint4{f32_bits(even[2 * h] + zero[h]), f32_bits(odd[2 * h] + zero[h]),
                        f32_bits(even[2 * h + 1] + zero[h]), f32_bits(odd[2 * h + 1] + zero[h])});
        }
      }
    }
  };
};

}  // namespace tilewise::paged
