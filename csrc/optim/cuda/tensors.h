// What a launch over many tensors carries. Their addresses travel in the kernel's parameters: nothing is allocated,
// copied or waited for. What only the device knows (learning rate, step counters, whether to skip) it reads itself, so
// a captured graph may be replayed.
#pragma once
#include "optim/params.h"
#include "simt/simt.h"

namespace tilewise::optim {

using namespace simt;

constexpr int kMaxTensors = 256;
constexpr int kStepThreads = 256;

// A StepTensor, and its place in the launch.
struct Entry {
  void* param;
  const void* grad;
  int16_t* residual;
  void* first;
  float* first_scales;
  void* second;
  float* second_scales;
  float* workspace;
  int64_t n, rows, columns;
  union {
    TensorConstants k;  // where the host knows the step
    const float* step;  // where the device counts
  };
  uint32_t stream, step_number;
  int first_unit;  // the first thread block that works on this tensor
  Format first_format, second_format;
  Float param_type : 4, grad_type : 4;
  bool aligned;  // all but codes and scales, to 16 bytes; codes always are

  SIMT_DEVICE bool structured() const { return second_format >= Format::rank1; }
};

// Of all tensors; as in StepParams.
struct CallConstants {
  Rule rule;
  bool nesterov, stochastic_rounding;
  float beta1, beta2, grad_weight, square_weight, l2, grad_factor, eps;
  uint32_t seed;
  DeviceScalars device;
};

struct TensorTable {
  Entry tensors[kMaxTensors];
  int count;
  CallConstants c;

  // The last tensor that starts at or before `unit`.
  SIMT_DEVICE const Entry& tensor_of(int unit) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (tensors[middle].first_unit <= unit ? low : high) = middle;
    }
    return tensors[low];
  }
};
static_assert(sizeof(TensorTable) <= 32764, "the limit of kernel parameters");

// found_inf: the whole call changes nothing.
SIMT_DEVICE bool skipped(const DeviceScalars& d) {
  return d.found_inf && *d.found_inf != 0;
}

SIMT_DEVICE float grad_factor_of(const CallConstants& c) {
  return c.device.grad_scale ? c.grad_factor / *c.device.grad_scale : c.grad_factor;
}

// The numbers of one tensor's step, computed by one thread of a block.
struct StepNumbers {
  TensorConstants k;
  float grad_factor;
  uint32_t step_number;
};

SIMT_DEVICE TensorConstants constants_at(float t, float lr, const CallConstants& c) {
  const DeviceScalars& d = c.device;
  TensorConstants k;
  const float correction1 = d.correct_bias ? -expm1f(t * d.log_beta1) : 1;
  const float correction2 = d.correct_bias ? -expm1f(t * d.log_beta2) : 1;
  k.step_size = lr / (correction1 * fmaf(t - 1, d.lr_decay, 1));
  k.inv_correction2 = 1 / sqrtf(correction2);
  k.decay = fmaf(-lr, d.decoupled_decay, 1);
  k.grad_weight = t == 1 ? d.first_grad_weight : c.grad_weight;
  return k;
}

SIMT_DEVICE StepNumbers numbers_of(const Entry& t, const CallConstants& c) {
  const DeviceScalars& d = c.device;
  StepNumbers x;
  x.grad_factor = grad_factor_of(c);
  x.step_number = d.steps ? static_cast<uint32_t>(*t.step) + 1 : t.step_number;
  if (d.steps || d.lr)
    x.k = constants_at(static_cast<float>(x.step_number), d.lr ? *d.lr : d.lr_value, c);
  else
    x.k = t.k;
  return x;
}

// The last kernel of a call whose steps the device counts.
struct CountSteps {
  static constexpr int kThreads = 128, kMinArch = 800, kMaxSteps = 2048;
  struct Params {
    float* steps[kMaxSteps];
    int count;
    DeviceScalars device;
  };
  struct Smem {};

  SIMT_DEVICE static void run(const Params& q, Smem&) {
    const int i = static_cast<int>(block_idx().x) * kThreads + thread_id();
    if (i < q.count && !skipped(q.device)) *q.steps[i] += 1;
  }
};

}  // namespace tilewise::optim
