// Complex vectors, compile-time loops, and the butterflies of the ring splittings.
#pragma once
#include "common/isa.h"

namespace tilewise {
namespace {

// ---- compile-time loops: unroll<4>([&](auto i) { ... }) with i usable as a constant ----
template <int I>
struct Int {
  constexpr operator int() const { return I; }
};
template <int... I>
struct Ints {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Ints<I...>;
};
template <class F, int... I>
TILEWISE_INLINE void unroll_over(Ints<I...>, const F& f) {
  (f(Int<I>{}), ...);
}
template <int N, class F>
TILEWISE_INLINE void unroll(const F& f) {
  unroll_over(typename CountTo<N>::type{}, f);
}
#define TILEWISE_LAMBDA __attribute__((always_inline))

// ---- complex vectors; in scratch memory W reals stand before their W imaginary parts ----
struct Complex {
  VF re, im;
};
TILEWISE_INLINE Complex load_complex(const float* p) {
  return {load(p), load(p + W)};
}
TILEWISE_INLINE void store_complex(float* p, Complex c) {
  store(p, c.re);
  store(p + W, c.im);
}
TILEWISE_INLINE Complex mul(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
TILEWISE_INLINE Complex mul_conj(Complex a, Complex b) {  // a conj(b)
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}
TILEWISE_INLINE Complex scale(Complex a, VF s) {
  return {a.re * s, a.im * s};
}

// ---- twiddles: one scalar for all lanes, or one value a lane ----
struct Scalars {
  const float* p;
  TILEWISE_INLINE Complex operator[](int k) const { return {set1(p[2 * k]), set1(p[2 * k + 1])}; }
};
struct Vectors {
  const Complex* p;
  TILEWISE_INLINE Complex operator[](int k) const { return p[k]; }
};

// (a, b) -> (a + w b, a - w b) in six multiply-adds: the difference is 2a minus the sum.
TILEWISE_INLINE void butterfly(Complex& a, Complex& b, Complex w) {
  const Complex sum = {(a.re + w.re * b.re) - w.im * b.im, (a.im + w.im * b.re) + w.re * b.im};
  b = {a.re * 2.f - sum.re, a.im * 2.f - sum.im};
  a = sum;
}
// (a + i w b, a - i w b)
TILEWISE_INLINE void butterfly_i(Complex& a, Complex& b, Complex w) {
  butterfly(a, b, {-w.im, w.re});
}
TILEWISE_INLINE void add_sub(Complex& a, Complex& b) {
  const Complex difference = {a.re - b.re, a.im - b.im};
  a = {a.re + b.re, a.im + b.im};
  b = difference;
}
// (a - i b, a + i b)
TILEWISE_INLINE void add_sub_i(Complex& a, Complex& b) {
  const Complex difference = {a.re - b.im, a.im + b.re};
  a = {a.re + b.im, a.im - b.re};
  b = difference;
}
// (a + conj(t) b, a - conj(t) b) for t = e^{i pi/4} and t = e^{3i pi/4}
TILEWISE_INLINE void add_sub_eighth(Complex& a, Complex& b) {
  constexpr float c = 0.70710678118654752440f;
  const VF p = b.re + b.im, q = b.im - b.re;
  b = {a.re - p * c, a.im - q * c};
  a = {a.re + p * c, a.im + q * c};
}
TILEWISE_INLINE void add_sub_three_eighths(Complex& a, Complex& b) {
  constexpr float c = 0.70710678118654752440f;
  const VF p = b.im - b.re, q = b.re + b.im;
  b = {a.re - p * c, a.im + q * c};
  a = {a.re + p * c, a.im - q * c};
}

// Forward node: residues modulo x^R - rho^R -> values at rho times the R-th roots of one, bit-reversed.
template <int R, class Twiddles>
TILEWISE_INLINE void split(Complex* x, Twiddles w) {
  if constexpr (R == 2) butterfly(x[0], x[1], w[0]);
  if constexpr (R == 4) {
    unroll<2>([&](auto j) TILEWISE_LAMBDA { butterfly(x[j], x[j + 2], w[1]); });
    butterfly(x[0], x[1], w[0]);
    butterfly_i(x[2], x[3], w[0]);
  }
  if constexpr (R == 8) {
    unroll<4>([&](auto j) TILEWISE_LAMBDA { butterfly(x[j], x[j + 4], w[3]); });
    unroll<2>([&](auto j) TILEWISE_LAMBDA { butterfly(x[j], x[j + 2], w[1]); });
    unroll<2>([&](auto j) TILEWISE_LAMBDA { butterfly_i(x[j + 4], x[j + 6], w[1]); });
    butterfly(x[0], x[1], w[0]);
    butterfly_i(x[2], x[3], w[0]);
    butterfly(x[4], x[5], w[7]);
    butterfly_i(x[6], x[7], w[7]);
  }
}

// The inverse node without its twiddles: an inverse DFT of bit-reversed input, unscaled.
template <int R>
TILEWISE_INLINE void merge_untwisted(Complex* x) {
  if constexpr (R >= 2) add_sub(x[0], x[1]);
  if constexpr (R >= 4) {
    add_sub(x[2], x[3]);
    add_sub(x[0], x[2]);
    add_sub_i(x[1], x[3]);
  }
  if constexpr (R == 8) {
    add_sub(x[4], x[5]);
    add_sub(x[6], x[7]);
    add_sub(x[4], x[6]);
    add_sub_i(x[5], x[7]);
    add_sub(x[0], x[4]);
    add_sub_eighth(x[1], x[5]);
    add_sub_i(x[2], x[6]);
    add_sub_three_eighths(x[3], x[7]);
  }
}
template <int R, class Twiddles>
TILEWISE_INLINE void merge(Complex* x, Twiddles w) {
  merge_untwisted<R>(x);
  unroll<R - 1>([&](auto s) TILEWISE_LAMBDA { x[s + 1] = mul_conj(x[s + 1], w[s]); });
}

}  // namespace
}  // namespace tilewise
