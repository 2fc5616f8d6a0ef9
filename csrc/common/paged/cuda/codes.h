// Pages of codes for the tensor-core kernel (attention.h), up to 8 rows: rows of codes (code_rows.h) become operands of
// mma in registers. Both parts of queries and weights are two rows of one mma each, whose accumulators a thread has
// both of. A block has 8 rows, and each of its warps a quarter of the keys.
//
// The order of channels is that of the codes in a 32-bit word (K), or in halves of one (V, where the other half of a
// register is another key).
#pragma once
#include "common/paged/cuda/code_rows.h"

namespace tilewise::paged {

template <class T, int D, class Source>
struct CodePages : CodeRows<D, Source> {
  using Rows = CodeRows<D, Source>;
  using Rows::exponents_of, Rows::factor_of, Rows::scale_of, Rows::value_pair, Rows::zero_of, Rows::zero_of_exponents;
  using Rows::kBits, Rows::kCodeWords, Rows::kFields, Rows::kGroup, Rows::kGroups, Rows::kPitch, Rows::kScaled;
  using Stage = typename Rows::Stage;
  using Shared = TwoStages<Stage>;
  static constexpr int kKeyWarps = kTileWarps, kParts = 2, kWarpKeys = kTileKeys / kKeyWarps;
  // As many blocks as registers allow without spills: their copies hide each other's latency.
  static constexpr int kMinBlocks = D == 64 ? (kScaled ? 4 : 3) : kBits == 8 ? 2 : 3;
  static_assert(kWarpKeys == 16, "one step of 16 keys");
  using Scores = float[kWarpKeys / 8][4];

  // Rows g and g + 8 of A are the two parts of a query.
  struct Queries {
    uint32_t a[D / 16][4];
    float unit, sum;

    SIMT_DEVICE Queries(const AttentionParams& p, const PagedTile& t, const Shared&, int row) {
      const QueryRow<T, D> own(p, t, row + lane_id() / 4, [&](int k, TwoParts<fp16> even, TwoParts<fp16> odd) {
        a[k][0] = even.high, a[k][1] = even.low;
        a[k][2] = odd.high, a[k][3] = odd.low;
      });
      unit = own.unit, sum = own.sum;
    }
  };

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
          if constexpr (!kScaled) both[n] = Rows::factors(exponents[n][0], exponents[n][1], word / 4);
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
