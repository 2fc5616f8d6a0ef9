// Sweeps over a whole block: the first pass from real samples, the last pass to real results, and the nodes between.
//
// Scratch layout of N complex points: vectors of W reals and W imaginaries; the first pass's blocks stand kBlockPadding
// floats apart, so that power-of-two strides do not share L1 sets.
#pragma once
#include "fft_conv/cpu/leaf.h"
#include "fft_conv/cpu/signal.h"

namespace tilewise {
namespace {

constexpr int64_t kBlockPadding = 32;    // floats
constexpr int64_t kBufferPadding = 480;  // floats between buffers, for the same reason

TILEWISE_INLINE int64_t block_size(const Plan& plan) {
  return plan.size / plan.first_radix;
}
TILEWISE_INLINE int64_t block_stride(const Plan& plan) {  // floats
  return 2 * block_size(plan) + kBlockPadding;
}
inline int64_t buffer_size(const Plan& plan) {  // floats
  return 2 * plan.size + plan.first_radix * kBlockPadding + kBufferPadding;
}

// Calls f(Int<R>) for a radix known only at run time.
template <class F>
inline void with_radix(int radix, const F& f) {
  switch (radix) {
    case 1: return f(Int<1>{});
    case 2: return f(Int<2>{});
    case 3: return f(Int<3>{});
    case 4: return f(Int<4>{});
    case 5: return f(Int<5>{});
    case 6: return f(Int<6>{});
    case 7: return f(Int<7>{});
    default: return f(Int<8>{});
  }
}
template <class F>
inline void with_node_radix(int radix, const F& f) {
  switch (radix) {
    case 2: return f(Int<2>{});
    case 4: return f(Int<4>{});
    default: return f(Int<8>{});
  }
}

// One node over `size` points: R vectors m = size / R points apart at a time.
template <int R, bool kInverse>
inline void node_pass(float* x, int64_t m, const float* w) {
  for (int64_t j = 0; j < m; j += W) {
    Complex t[R];
    unroll<R>([&](auto s) TILEWISE_LAMBDA { t[s] = load_complex(x + 2 * (s * m + j)); });
    if constexpr (kInverse)
      merge<R>(t, Scalars{w});
    else
      split<R>(t, Scalars{w});
    unroll<R>([&](auto s) TILEWISE_LAMBDA { store_complex(x + 2 * (s * m + j), t[s]); });
  }
}
template <bool kInverse>
inline void node_pass(int radix, float* x, int64_t m, const float* w) {
  with_node_radix(radix, [&](auto r) { node_pass<r, kInverse>(x, m, w); });
}

constexpr bool power_of_two(int n) {
  return (n & (n - 1)) == 0;
}

// R real vectors to the R residues at the roots of x^R = i.
template <int R>
TILEWISE_INLINE void split_real(const Plan& plan, const VF* a, Complex* t) {
  if constexpr (R == 1) {
    t[0] = {a[0], set1(0.f)};
  } else if constexpr (power_of_two(R)) {  // the first level multiplies reals, the others are as in split()
    const Scalars w{plan.first_node};
    const Complex top = w[R / 2 - 1];
    unroll<R / 2>([&](auto s) TILEWISE_LAMBDA {
      const VF re = a[s + R / 2] * top.re, im = a[s + R / 2] * top.im;
      t[s] = {a[s] + re, im};
      t[s + R / 2] = {a[s] - re, -im};
    });
    if constexpr (R == 8) {
      unroll<2>([&](auto j) TILEWISE_LAMBDA { butterfly(t[j], t[j + 2], w[1]); });
      unroll<2>([&](auto j) TILEWISE_LAMBDA { butterfly_i(t[j + 4], t[j + 6], w[1]); });
      butterfly(t[4], t[5], w[7]);
      butterfly_i(t[6], t[7], w[7]);
    }
    if constexpr (R >= 4) {
      butterfly(t[0], t[1], w[0]);
      butterfly_i(t[2], t[3], w[0]);
    }
  } else {
    unroll<R>([&](auto c) TILEWISE_LAMBDA {
      const Scalars powers{plan.first_powers + 2 * R * c};
      t[c] = {a[0], set1(0.f)};
      unroll<R - 1>([&](auto s) TILEWISE_LAMBDA {
        const Complex w = powers[s + 1];
        t[c] = {t[c].re + a[s + 1] * w.re, t[c].im + a[s + 1] * w.im};
      });
    });
  }
}

// The inverse. Only the real parts, unless kComplex.
template <int R, bool kComplex>
TILEWISE_INLINE void merge_real(const Plan& plan, Complex* t) {
  if constexpr (R == 1) return;
  if constexpr (power_of_two(R)) {
    const Scalars w{plan.first_node};
    merge_untwisted<R>(t);
    unroll<R - 1>([&](auto s) TILEWISE_LAMBDA {
      const Complex turned = mul_conj(t[s + 1], w[s]);
      t[s + 1].re = turned.re;
      if constexpr (kComplex) t[s + 1].im = turned.im;
    });
  } else {
    Complex sums[R];
    unroll<R>([&](auto s) TILEWISE_LAMBDA {
      sums[s] = {set1(0.f), set1(0.f)};
      unroll<R>([&](auto c) TILEWISE_LAMBDA {
        const Complex w = Scalars{plan.first_powers + 2 * R * c}[s];
        sums[s].re += t[c].re * w.re + t[c].im * w.im;
        if constexpr (kComplex) sums[s].im += t[c].im * w.re - t[c].re * w.im;
      });
    });
    unroll<R>([&](auto s) TILEWISE_LAMBDA { t[s] = sums[s]; });
  }
}

// Positions up to which none of the first pass's R vectors reaches beyond a plain row.
inline int64_t direct_positions(bool plain, int64_t length, int radix, int64_t m) {
  const int64_t full = length - (radix - 1) * m;
  return !plain || full <= 0 ? 0 : min_of(full / W * W, m);
}

template <int R>
inline void first_pass(const Plan& plan, const Signal& in, float* x) {
  const int64_t m = block_size(plan), stride = block_stride(plan);
  const int64_t direct = direct_positions(in.plain, in.length, R, m);
  float fetched[R * W];
  for (int64_t j = 0; j < m; j += W) {
    VF a[R];
    if (j < direct) {
      unroll<R>([&](auto s) TILEWISE_LAMBDA { a[s] = load(in.floats() + s * m + j); });
    } else {
      in.fetch(in, j, m, R, fetched);
      unroll<R>([&](auto s) TILEWISE_LAMBDA { a[s] = load(fetched + s * W); });
    }
    Complex t[R];
    split_real<R>(plan, a, t);
    unroll<R>([&](auto s) TILEWISE_LAMBDA { store_complex(x + s * stride + 2 * j, t[s]); });
  }
}
inline void first_pass(const Plan& plan, const Signal& in, float* x) {
  with_radix(plan.first_radix, [&](auto r) { first_pass<r>(plan, in, x); });
}

// Where the other half of a result stands (plan.h), if it is needed at all.
enum class Wrap {
  none,         // causal: the real part alone
  convolution,  // circular: z[l] + z[l + L], z[N + n] being the imaginary part of z[n]
  correlation,  // circular: z[l] - z[2N - L + l]
};

// Writes Re z, the causal result, or Re z + sign Im z: the circular one of a period that is N itself.
template <int R, bool kWrapped>
inline void last_pass(const Plan& plan, const float* x, const Sink& out, float sign) {
  const int64_t m = block_size(plan), stride = block_stride(plan);
  const int64_t direct = direct_positions(out.plain, out.length, R, m);
  float results[R * W];
  for (int64_t j = 0; j < m; j += W) {
    Complex t[R];
    unroll<R>([&](auto s) TILEWISE_LAMBDA { t[s] = load_complex(x + s * stride + 2 * j); });
    merge_real<R, kWrapped>(plan, t);
    if constexpr (kWrapped) unroll<R>([&](auto s) TILEWISE_LAMBDA { t[s].re += set1(sign) * t[s].im; });
    if (j < direct) {
      unroll<R>([&](auto s) TILEWISE_LAMBDA { store(out.floats() + s * m + j, t[s].re); });
    } else {
      unroll<R>([&](auto s) TILEWISE_LAMBDA { store(results + s * W, t[s].re); });
      out.put(out, j, m, R, results);
    }
  }
}

// Both parts as plain arrays of N; re and im do not share L1 sets (kBlockPadding).
template <int R>
inline void last_pass_planar(const Plan& plan, const float* x, float* re, float* im) {
  const int64_t m = block_size(plan), stride = block_stride(plan);
  for (int64_t j = 0; j < m; j += W) {
    Complex t[R];
    unroll<R>([&](auto s) TILEWISE_LAMBDA { t[s] = load_complex(x + s * stride + 2 * j); });
    merge_real<R, true>(plan, t);
    unroll<R>([&](auto s) TILEWISE_LAMBDA {
      store(re + s * m + j, t[s].re);
      store(im + s * m + j, t[s].im);
    });
  }
}

// Floats that wrapped_pass needs, vectors of slack behind either part included.
inline int64_t planar_size(const Plan& plan) {
  return 2 * (plan.size + kBlockPadding);
}

// The circular result of a period below N, through both parts in `planar`.
inline void wrapped_pass(const Plan& plan, const float* x, const Sink& out, Wrap wrap, int64_t period, float* planar) {
  float *re = planar, *im = planar + plan.size + kBlockPadding;
  with_radix(plan.first_radix, [&](auto r) { last_pass_planar<r>(plan, x, re, im); });
  const int64_t short_by = plan.size - period;
  // A convolution's z[l + L] is still in the real part for the first N - L results.
  const auto other = [&](int64_t i) TILEWISE_LAMBDA {
    if (wrap == Wrap::correlation) return -load(im + short_by + i);
    const VF in_real = load_clipped(re, i + period, plan.size);
    const VF in_imaginary = i + W > short_by ? load(im + i - short_by) : set1(0.f);
    return select(first_lanes(max_of<int64_t>(short_by - i, 0)), in_real, in_imaginary);
  };
  float result[W];
  for (int64_t i = 0; i < out.length; i += W) {
    store(result, load(re + i) + other(i));
    out.put(out, i, 0, 1, result);
  }
}

// The result for rows of `length` samples; `planar` is scratch memory for circular ones.
inline void last_pass(const Plan& plan, const float* x, const Sink& out, Wrap wrap, int64_t length, float* planar) {
  if (wrap != Wrap::none && length < plan.size) return wrapped_pass(plan, x, out, wrap, length, planar);
  with_radix(plan.first_radix, [&](auto r) {
    if (wrap == Wrap::none) return last_pass<r, false>(plan, x, out, 0);
    last_pass<r, true>(plan, x, out, wrap == Wrap::convolution ? 1.f : -1.f);
  });
}

}  // namespace
}  // namespace tilewise
