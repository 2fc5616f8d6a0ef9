// A leaf: the transform of W^2 points on W complex vectors. Radix-Q and radix-4 sweeps over the vectors split it into W
// rings of W points, one a vector; after the transpose each lane holds one of those rings, and the same two sweeps
// finish them. A sweep works on at most four vectors at a time, and half of the transpose rides on each inner one.
#pragma once
#include "fft_conv/cpu/plan.h"
#include "fft_conv/cpu/transpose.h"

namespace tilewise {
namespace {

using fft_conv::Plan;

constexpr int Q = W / 4;
constexpr int kLeaf = W * W;  // complex points

struct LeafTwiddles {
  Complex lanes[fft_conv::leaf_vectors(W)];  // of the sweeps after the transpose
  const float* nodes;                        // of those before

  TILEWISE_INLINE LeafTwiddles(const Plan& plan, const float* w) : nodes(w) {
    const Scalars scalars{w + 2 * fft_conv::leaf_nodes(W)};
    unroll<fft_conv::leaf_vectors(W)>([&](auto k) TILEWISE_LAMBDA {
      constexpr int scalar = k < Q - 1 ? int(k) : Q - 1 + (k - (Q - 1)) % 3;
      lanes[k] = mul(load_complex(plan.lane_powers + 2 * W * k), scalars[scalar]);
    });
  }
  TILEWISE_INLINE Scalars outer() const { return {nodes}; }
  TILEWISE_INLINE Scalars inner(int q) const { return {nodes + 2 * (fft_conv::node_twiddles(Q) + 3 * q)}; }
  TILEWISE_INLINE Vectors outer_lanes() const { return {lanes}; }
  TILEWISE_INLINE Vectors inner_lanes(int q) const { return {lanes + Q - 1 + 3 * q}; }
};

// Runs f on the Q groups of four vectors 4q..4q+3, or on the four groups of Q vectors j, j+4, ...
template <class F>
TILEWISE_INLINE void for_quads(Complex* y, const F& f) {
  unroll<Q>([&](auto q) TILEWISE_LAMBDA { f(q, y + 4 * q); });
}
template <class F>
TILEWISE_INLINE void for_columns(Complex* y, const F& f) {
  unroll<4>([&](auto j) TILEWISE_LAMBDA {
    Complex t[Q];
    unroll<Q>([&](auto s) TILEWISE_LAMBDA { t[s] = y[j + 4 * s]; });
    f(t);
    unroll<Q>([&](auto s) TILEWISE_LAMBDA { y[j + 4 * s] = t[s]; });
  });
}

// x is transformed (kForward), every spectrum vector goes through middle(offset in floats, value), and what that
// returns is transformed back to x (kInverse). Without kForward x is not read: middle supplies the spectrum. Without
// kInverse x is not written: middle stores it.
template <bool kForward, bool kInverse, class Middle>
TILEWISE_INLINE void leaf(const Plan& plan, const float* w, float* x, const Middle& middle) {
  const LeafTwiddles twiddles(plan, w);
  Complex y[W];
  if constexpr (kForward) {
    unroll<W>([&](auto v) TILEWISE_LAMBDA { y[v] = load_complex(x + 2 * W * v); });
    for_columns(y, [&](Complex* t) TILEWISE_LAMBDA { split<Q>(t, twiddles.outer()); });
    for_quads(y, [&](auto q, Complex* t) TILEWISE_LAMBDA {
      split<4>(t, twiddles.inner(q));
      transpose_4x4(t);
    });
    for_columns(y, [&](Complex* t) TILEWISE_LAMBDA {
      transpose_lanes(t);
      split<Q>(t, twiddles.outer_lanes());
    });
  }
  for_quads(y, [&](auto q, Complex* t) TILEWISE_LAMBDA {
    if constexpr (kForward) split<4>(t, twiddles.inner_lanes(q));
    unroll<4>([&](auto s) TILEWISE_LAMBDA { t[s] = middle(2 * W * (4 * q + s), t[s]); });
    if constexpr (kInverse) merge<4>(t, twiddles.inner_lanes(q));
  });
  if constexpr (kInverse) {
    for_columns(y, [&](Complex* t) TILEWISE_LAMBDA {
      merge<Q>(t, twiddles.outer_lanes());
      transpose_lanes(t);
    });
    for_quads(y, [&](auto q, Complex* t) TILEWISE_LAMBDA {
      transpose_4x4(t);
      merge<4>(t, twiddles.inner(q));
    });
    for_columns(y, [&](Complex* t) TILEWISE_LAMBDA { merge<Q>(t, twiddles.outer()); });
    unroll<W>([&](auto v) TILEWISE_LAMBDA { store_complex(x + 2 * W * v, y[v]); });
  }
}

}  // namespace
}  // namespace tilewise
