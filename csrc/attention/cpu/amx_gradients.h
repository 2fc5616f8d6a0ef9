// How P and dS become operands of the backward on tiles, by those of the forward (common/tile_attention.h).
#pragma once
#include "common/tile_attention.h"

namespace tilewise {
namespace {

// Powers of two that bring P and dS into fp16's range. Both are scaled to 2^14 at most, if no P exceeds 1 by more than
// rounding; P then keeps all its bits down to 2^-27. What is too large nevertheless becomes infinite, and with it the
// result.
struct GradientScales {
  int weight_power = 0;  // P is scaled by two to this,
  float ds = 1;          // and dS by that and this

  float weight_unit() const { return __builtin_bit_cast(float, uint32_t(127 - weight_power) << 23); }
  float ds_unit() const { return weight_unit() / ds; }

  // Dropout makes weights larger, by `keep`.
  void fit_weights(float keep) { weight_power = int(__builtin_bit_cast(uint32_t, scale_to(13, keep)) >> 23) - 127; }
  // For queries whose dS, but for P, is `most` at most. Gives the change of `ds`, which sums of dS have to follow: none
  // unless `most` has grown over two, or shrunk by some powers of two, since the last one.
  float fit_gradients(float most) {
    constexpr float kFewest = 0x1p-8f, kLargest = 0x1p60f;
    if (!(most > 0 && most <= kFloatMost) || (most * ds >= kFewest && most * ds <= 2)) return 1;
    const float before = ds;
    ds = min_of(max_of(scale_to(-2, most), 1 / kLargest), kLargest);
    return ds / before;
  }
};

// The largest sum of the squares of a row.
template <class Row>
float largest_square(const Row& row, int count, int dim) {
  float most = 0;
  for (int i = 0; i < count; i++) {
    const auto* from = row(i);
    VF sum = {};
    for (int d = 0; d < dim; d += W) {
      const VF v = load_up_to(from + d, dim - d);
      sum += v * v;
    }
    most = max_of(most, reduce_add(sum));
  }
  return most;
}

template <class Operands>
struct GradientOperands : Operands {
  static constexpr bool kRanged = false;  // whether P and dS have to be scaled
  template <int P>
  static TILEWISE_INLINE void split_square(const VF (&v)[2][2], Halves (&rows)[2][P], Halves (&pairs)[2][P]) {
    tilewise::split_square(v, rows, pairs);
  }
};
template <>
struct GradientOperands<NativeFp16Operands> : NativeFp16Operands {
  static constexpr bool kRanged = true;
  static TILEWISE_INLINE void split_square(const VF (&v)[2][2], Halves (&rows)[2][1], Halves (&pairs)[2][1]) {
    split_halves(v[0][0], v[0][1], rows[0]);
    split_halves(v[1][0], v[1][1], rows[1]);
    pair_rows(rows, pairs);
  }
};

}  // namespace
}  // namespace tilewise
