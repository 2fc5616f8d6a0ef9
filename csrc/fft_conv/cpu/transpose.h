// The W x W transpose of a leaf in two halves: 4x4 blocks inside every 128-bit lane, and the lanes among each other.
// Each half needs only the vectors that one radix sweep of the leaf holds in registers anyway.
#pragma once
#include "fft_conv/cpu/complex.h"

namespace tilewise {
namespace {

// In every 128-bit lane: elements A, B, C, D, where 0..3 count in `a` and 4..7 in `b`.
template <int A, int B, int C, int D, int... I>
TILEWISE_INLINE VF shuffle_quads(VF a, VF b, Ints<I...>) {
  constexpr int from[4] = {A, B, C, D};
  return __builtin_shuffle(a, b, VI{((I & ~3) + (from[I & 3] & 3) + (from[I & 3] >= 4 ? W : 0))...});
}
template <int A, int B, int C, int D>
TILEWISE_INLINE VF shuffle_quads(VF a, VF b) {
  return shuffle_quads<A, B, C, D>(a, b, typename CountTo<W>::type{});
}
TILEWISE_INLINE void transpose_4x4(VF& a, VF& b, VF& c, VF& d) {
  const VF ab_low = shuffle_quads<0, 4, 1, 5>(a, b), ab_high = shuffle_quads<2, 6, 3, 7>(a, b);
  const VF cd_low = shuffle_quads<0, 4, 1, 5>(c, d), cd_high = shuffle_quads<2, 6, 3, 7>(c, d);
  a = shuffle_quads<0, 1, 4, 5>(ab_low, cd_low);
  b = shuffle_quads<2, 3, 6, 7>(ab_low, cd_low);
  c = shuffle_quads<0, 1, 4, 5>(ab_high, cd_high);
  d = shuffle_quads<2, 3, 6, 7>(ab_high, cd_high);
}
TILEWISE_INLINE void transpose_4x4(Complex* x) {
  transpose_4x4(x[0].re, x[1].re, x[2].re, x[3].re);
  transpose_4x4(x[0].im, x[1].im, x[2].im, x[3].im);
}

// The even (Odd = 0) or odd 128-bit lanes of a, then of b.
template <int Odd, int... I>
TILEWISE_INLINE VF pick_lanes(VF a, VF b, Ints<I...>) {
  return __builtin_shuffle(a, b, VI{((2 * (I / 4) + Odd) * 4 + (I & 3))...});
}
template <int Odd>
TILEWISE_INLINE VF pick_lanes(VF a, VF b) {
  return pick_lanes<Odd>(a, b, typename CountTo<W>::type{});
}
// (W/4) x (W/4) transpose of the 128-bit lanes of W/4 vectors.
TILEWISE_INLINE void transpose_lanes(Complex* x, VF Complex::* part) {
  if constexpr (W == 8) {
    const VF even = pick_lanes<0>(x[0].*part, x[1].*part), odd = pick_lanes<1>(x[0].*part, x[1].*part);
    x[0].*part = even;
    x[1].*part = odd;
  }
  if constexpr (W == 16) {
    const VF even01 = pick_lanes<0>(x[0].*part, x[1].*part), odd01 = pick_lanes<1>(x[0].*part, x[1].*part);
    const VF even23 = pick_lanes<0>(x[2].*part, x[3].*part), odd23 = pick_lanes<1>(x[2].*part, x[3].*part);
    x[0].*part = pick_lanes<0>(even01, even23);
    x[1].*part = pick_lanes<0>(odd01, odd23);
    x[2].*part = pick_lanes<1>(even01, even23);
    x[3].*part = pick_lanes<1>(odd01, odd23);
  }
}
TILEWISE_INLINE void transpose_lanes(Complex* x) {
  transpose_lanes(x, &Complex::re);
  transpose_lanes(x, &Complex::im);
}

}  // namespace
}  // namespace tilewise
