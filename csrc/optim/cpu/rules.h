// The rules of tilewise/optim.h on vectors. A rule first averages the gradient into the moments (`average`), then moves
// the parameter (`updated`); the second moment is averaged the same way by all. Moments arrive multiplied by their
// beta.
#pragma once
#include "optim/cpu/codec.h"

namespace tilewise {
namespace {

struct StepConstants {
  float beta1, beta2, grad_weight, square_weight, decay, eps, step_size, inv_correction2;
  float correction2_per_step, eps_per_step;  // inv_correction2 and eps, over step_size
  bool nesterov;
  bool careful;  // eps, or these two, are such that quotient() might leave the range of floats
};

// a / b. On AVX-512 by an approximate reciprocal and one Newton step, within 2 ulp: a division would keep the divider
// busy that the square root needs. The Newton step makes NaN of an infinite b, and of a zero.
template <bool kFast>
TILEWISE_INLINE VF quotient(VF a, VF b) {
#if defined(__AVX512F__)
  if constexpr (kFast) {
    VF r = (VF)_mm512_rcp14_ps((__m512)b);
    r = r + r * (1 - b * r);
    return a * r;
  }
#endif
  return a / b;
}

struct Adam {
  static constexpr Rule kRule = Rule::adam;
  static constexpr bool kSecond = true;
  static constexpr bool kFirstIsFinite = true;  // where the second moment is, and `updated` leaves it alone
  static float first_factor(const StepConstants& k) { return k.beta1; }
  TILEWISE_INLINE static void average(VF g, VF& m, const StepConstants& k) { m = g * set1(k.grad_weight) + m; }
  template <bool kFast>
  TILEWISE_INLINE static VF updated(VF p, VF, VF& m, VF v, const StepConstants& k) {
    if (kFast)
      return p * set1(k.decay) - quotient<true>(m, sqrt(v) * set1(k.correction2_per_step) + set1(k.eps_per_step));
    return p * set1(k.decay) - m * set1(k.step_size) / (sqrt(v) * set1(k.inv_correction2) + set1(k.eps));
  }
};

// RMSprop and Adagrad, without momentum.
struct Rms {
  static constexpr Rule kRule = Rule::rms;
  static constexpr bool kSecond = true, kFirstIsFinite = true;
  static float first_factor(const StepConstants&) { return 0; }
  TILEWISE_INLINE static void average(VF, VF&, const StepConstants&) {}
  template <bool kFast>
  TILEWISE_INLINE static VF updated(VF p, VF g, VF&, VF v, const StepConstants& k) {
    return p * set1(k.decay) - quotient<kFast>(g * set1(k.step_size), sqrt(v) + set1(k.eps));
  }
};

struct RmsMomentum {
  static constexpr Rule kRule = Rule::rms;
  static constexpr bool kSecond = true, kFirstIsFinite = false;
  static float first_factor(const StepConstants& k) { return k.beta1; }
  TILEWISE_INLINE static void average(VF, VF&, const StepConstants&) {}
  template <bool kFast>
  TILEWISE_INLINE static VF updated(VF p, VF g, VF& m, VF v, const StepConstants& k) {
    m = m + quotient<kFast>(g, sqrt(v) + set1(k.eps));
    return p * set1(k.decay) - m * set1(k.step_size);
  }
};

struct Sgd {
  static constexpr Rule kRule = Rule::momentum;
  static constexpr bool kSecond = false, kFirstIsFinite = true;
  static float first_factor(const StepConstants&) { return 0; }
  TILEWISE_INLINE static void average(VF, VF&, const StepConstants&) {}
  template <bool kFast>
  TILEWISE_INLINE static VF updated(VF p, VF g, VF&, VF, const StepConstants& k) {
    return p * set1(k.decay) - g * set1(k.step_size);
  }
};

struct SgdMomentum {
  static constexpr Rule kRule = Rule::momentum;
  static constexpr bool kSecond = false, kFirstIsFinite = false;
  static float first_factor(const StepConstants& k) { return k.beta1; }
  TILEWISE_INLINE static void average(VF g, VF& m, const StepConstants& k) { m = g * set1(k.grad_weight) + m; }
  template <bool kFast>
  TILEWISE_INLINE static VF updated(VF p, VF g, VF& m, VF, const StepConstants& k) {
    const VF direction = k.nesterov ? m * set1(k.beta1) + g : m;
    return p * set1(k.decay) - direction * set1(k.step_size);
  }
};

struct Lion {
  static constexpr Rule kRule = Rule::lion;
  static constexpr bool kSecond = false, kFirstIsFinite = false;
  static float first_factor(const StepConstants&) { return 1; }
  TILEWISE_INLINE static void average(VF, VF&, const StepConstants&) {}
  template <bool kFast>
  TILEWISE_INLINE static VF updated(VF p, VF g, VF& m, VF, const StepConstants& k) {
    const VF between = m * set1(k.beta1) + g * set1(k.grad_weight);
    m = m * set1(k.beta2) + g * set1(k.square_weight);
    const VF one = (VF)(((VI)between & INT32_MIN) | (VI)set1(1));
    const VF sign = select((VI)(abs(between) > set1(0)), one, between);  // zero and NaN are their own signs
    return p * set1(k.decay) - sign * set1(k.step_size);
  }
};

}  // namespace
}  // namespace tilewise
