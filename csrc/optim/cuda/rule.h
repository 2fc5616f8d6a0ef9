// The rules of the optimizers (formulas: tilewise/optim.h) for the elements in a thread's registers.
#pragma once
#include "optim/cuda/tensors.h"

namespace tilewise::optim {

// What the second moment is after this step. One formula for all kernels: row and column maxima must be those of the
// very numbers that are quantised under them.
SIMT_DEVICE float next_square(float v, float g, const CallConstants& c) {
  return fmaf(g * c.square_weight, g, v * c.beta2);
}

SIMT_DEVICE float gradient(float grad, float p, float grad_factor, float l2) {
  const float g = grad * grad_factor;
  return l2 != 0 ? fmaf(l2, p, g) : g;
}

// Every sum is a fused one that is spelled out, so that all kernels round alike: a bf16 parameter with its residual
// takes the very steps of a float32 one.
//
// p, m and v become the next ones; g arrives as the raw gradient. Where there is no first moment, m stays untouched;
// where the second is factored, v is the next one already.
struct Update {
  const CallConstants& c;
  const StepNumbers& x;
  bool has_first, squares_known;

  template <int Runs, int Run>
  SIMT_DEVICE void operator()(float (&p)[Runs][Run], float (&g)[Runs][Run], float (*m)[Run], float (*v)[Run]) const {
    switch (c.rule) {
      case Rule::adam: return each<Runs, Run>(p, g, m, v, [this](auto&... e) { adam(e...); });
      case Rule::rms: return each<Runs, Run>(p, g, m, v, [this](auto&... e) { rms(e...); });
      case Rule::momentum: return each<Runs, Run>(p, g, m, v, [this](auto&... e) { momentum(e...); });
      case Rule::lion: return each<Runs, Run>(p, g, m, v, [this](auto&... e) { lion(e...); });
    }
  }

  template <int Runs, int Run, class Element>
  SIMT_DEVICE void each(float (&p)[Runs][Run], float (&g)[Runs][Run], float (*m)[Run], float (*v)[Run],
                        const Element& element) const {
#pragma unroll
    for (int r = 0; r < Runs; r++) {
#pragma unroll
      for (int i = 0; i < Run; i++) {
        g[r][i] = gradient(g[r][i], p[r][i], x.grad_factor, c.l2);
        element(p[r][i], g[r][i], m[r][i], v[r][i]);
      }
    }
  }

  SIMT_DEVICE float inverse_root(float& v, float g) const {
    v = squares_known ? v : next_square(v, g, c);
    return rcp_approx(fmaf(sqrt_approx(v), x.k.inv_correction2, c.eps));
  }
  SIMT_DEVICE void adam(float& p, float g, float& m, float& v) const {
    m = fmaf(g, x.k.grad_weight, m * c.beta1);
    p = fmaf(-m * x.k.step_size, inverse_root(v, g), p * x.k.decay);
  }
  SIMT_DEVICE void rms(float& p, float g, float& m, float& v) const {
    float u = g * inverse_root(v, g);
    if (has_first) u = m = fmaf(u, x.k.grad_weight, m * c.beta1);
    p = fmaf(-u, x.k.step_size, p * x.k.decay);
  }
  SIMT_DEVICE void momentum(float& p, float g, float& m, float&) const {
    float u = g;
    if (has_first) {
      m = fmaf(g, x.k.grad_weight, m * c.beta1);
      u = c.nesterov ? fmaf(m, c.beta1, g) : m;
    }
    p = fmaf(-u, x.k.step_size, p * x.k.decay);
  }
  SIMT_DEVICE void lion(float& p, float g, float& m, float&) const {
    const float u = fmaf(g, x.k.grad_weight, m * c.beta1);
    m = fmaf(g, c.square_weight, m * c.beta2);
    const float sign = u != 0 && fabsf(u) <= INFINITY ? copysignf(1, u) : u;  // zero and NaN are their own
    p = fmaf(-sign, x.k.step_size, p * x.k.decay);
  }
};

}  // namespace tilewise::optim
