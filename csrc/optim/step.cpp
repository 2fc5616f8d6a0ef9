// Argument checks of a step, and what its kernels receive.
#include <cmath>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "optim/arguments.h"
#include "optim/params.h"

namespace tilewise {

TILEWISE_KERNEL_SET(optim)

namespace {

using optim::Format;
using optim::Kernels;
using optim::StepTensor;

constexpr const char* kStep = "optimizer_step";

struct RuleTraits {
  optim::Rule rule;
  bool beta1_below_1, beta2_below_1;
};
constexpr RuleTraits kRules[] = {
    // by OptimizerRule
    {optim::Rule::adam, true, true},  {optim::Rule::momentum, false, false}, {optim::Rule::lion, true, true},
    {optim::Rule::rms, false, false}, {optim::Rule::rms, false, false},
};

bool keeps_first(const OptimizerOptions& o) {
  const bool with_momentum = o.rule == OptimizerRule::sgd || o.rule == OptimizerRule::rmsprop;
  return with_momentum ? o.beta1 > 0 : o.rule != OptimizerRule::adagrad;
}
bool keeps_second(const OptimizerOptions& o) {
  return o.rule != OptimizerRule::sgd && o.rule != OptimizerRule::lion;
}

bool given(const Tensor& t) {
  return t.data && t.numel();
}

optim::Float float_of(DType t) {
  return t == DType::f32 ? optim::Float::f32 : t == DType::bf16 ? optim::Float::bf16 : optim::Float::f16;
}

// ---- options ----

void check_number(const Check& check, double value, const char* name, bool below_1 = false) {
  check.that(std::isfinite(value) && value >= 0 && !(below_1 && value >= 1), name, "is %g, expected 0 <= %s%s", value,
             name, below_1 ? " < 1" : "");
}

void check_scalar(const Check& check, const Tensor& t, const char* name, Device device) {
  if (!given(t)) return;
  check.dtype(t, name, {DType::f32});
  check.that(t.numel() == 1, name, "has %ld elements, expected a scalar", t.numel());
  check.that(t.device == device, name, "is on another device than the params, expected theirs");
}

void check_options(const Check& check, const OptimizerOptions& o) {
  const RuleTraits& rule = kRules[static_cast<int>(o.rule)];
  check_number(check, o.lr, "lr");
  check_number(check, o.beta1, "beta1", rule.beta1_below_1);
  check_number(check, o.beta2, "beta2", rule.beta2_below_1);
  check_number(check, o.eps, "eps");
  check_number(check, o.weight_decay, "weight_decay");
  check_number(check, o.lr_decay, "lr_decay");
  check.that(std::isfinite(o.dampening), "dampening", "is %g, expected a finite number", o.dampening);
  check.that(!o.nesterov || (o.beta1 > 0 && o.dampening == 0), "nesterov",
             "is true with beta1 %g and dampening %g, expected beta1 > 0 and no dampening", o.beta1, o.dampening);
}

// ---- tensors ----

void check_same_shape(const Check& check, const Tensor& t, const char* name, const Tensor& as) {
  check.dims(t, name, as.ndim);
  for (int i = 0; i < as.ndim; i++)
    check.that(t.shape[i] == as.shape[i], name, "has size %ld in dimension %d, expected %ld (param's)", t.shape[i], i,
               as.shape[i]);
}

void check_empty(const Check& check, const Tensor& t, const char* name, const char* because) {
  check.that(!given(t), name, "has %ld elements, expected none %s", t.numel(), because);
}

void check_scales(const Check& check, const Tensor& t, const char* name, int64_t count) {
  check.dtype(t, name, {DType::f32});
  check.shape(t, name, {count});
  check.contiguous(t, name);
}

// Whole elements in 32 bits, or blocks of codes.
Format check_elementwise(const Check& check, const Tensor& param, const Tensor& values, const char* name,
                         const Tensor& scales, const char* scales_name) {
  if (values.dtype == DType::f32) {
    check_same_shape(check, values, name, param);
    check.contiguous(values, name);
    check_empty(check, scales, scales_name, "with 32-bit states");
    return Format::f32;
  }
  check.dtype(values, name, {DType::u8, DType::f32});
  const int bits = values.ndim == 2 && values.shape[1] == optim::kCodeBytes8 ? 8 : 4;
  check_codes(check, values, name, param.numel(), bits);
  check_scales(check, scales, scales_name, blocks_of(param.numel(), bits));
  return bits == 8 ? Format::bits8 : Format::bits4;
}

Format check_structured(const Check& check, const OptimizerSlot& s) {
  const int64_t n = s.param.numel();
  check.that(s.rows > 0 && n % s.rows == 0, "rows", "is %ld, expected a divisor of %ld (param's elements)", s.rows, n);
  check_scales(check, s.second_scales, "second_scales", s.rows + n / s.rows);
  if (!given(s.second)) return Format::factored;
  check_codes(check, s.second, "second", n, 4);
  return Format::rank1;
}

Format check_second(const Check& check, const OptimizerSlot& s) {
  if (s.rows != 0) return check_structured(check, s);
  return check_elementwise(check, s.param, s.second, "second", s.second_scales, "second_scales");
}

void check_step_counter(const Check& check, const Tensor& step, const Tensor& param, bool on_device) {
  check.dtype(step, "step", {DType::f32});
  check.that(step.numel() == 1, "step", "has %ld elements, expected a scalar", step.numel());
  if (on_device) return check.same_device(step, "step", param, "param");
  check.that(step.device.type == DeviceType::cpu, "step", "is not in host memory, expected a CPU tensor");
  const float count = *step.ptr<float>();
  check.that(count >= 0 && count < 16777216 && count == std::floor(count), "step",
             "is %g, expected an integer, 0 <= step < 2^24", count);
}

void check_overlaps(const Check& check, const OptimizerSlot& s) {
  struct Written {
    const Tensor& tensor;
    const char* name;
  };
  const Written written[] = {{s.param, "param"},
                             {s.first, "first"},
                             {s.second, "second"},
                             {s.first_scales, "first_scales"},
                             {s.second_scales, "second_scales"},
                             {s.residual, "residual"}};
  for (const Written& w : written) {
    if (!given(w.tensor)) continue;
    check.same_device(w.tensor, w.name, s.param, "param");
    check.no_overlap(w.tensor, w.name, s.grad, "grad");
    for (const Written& other : written) {
      if (&other == &w) break;
      if (given(other.tensor)) check.no_overlap(w.tensor, w.name, other.tensor, other.name);
    }
  }
}

void check_residual(const Check& check, const OptimizerSlot& s, const OptimizerOptions& o) {
  if (!given(s.residual)) return;
  check.dtype(s.residual, "residual", {DType::i16});
  check_same_shape(check, s.residual, "residual", s.param);
  check.contiguous(s.residual, "residual");
  check.dtype(s.param, "param", {DType::bf16});
  check.that(!o.stochastic_rounding, "stochastic_rounding", "is true, expected false for a param with a residual");
}

struct Formats {
  Format first = Format::none, second = Format::none;
};

// Which pairs have a kernel.
void check_pair(const Check& check, Formats f) {
  if (f.first == Format::none || f.second == Format::none || f.second == Format::factored) return;
  const Format expected = f.second == Format::rank1 ? Format::bits4 : f.second;
  if (f.first != expected)
    check.fail(ErrorKind::not_implemented, "first", "has other bits than second, expected the same");
}

Formats check_slot(const Check& check, const OptimizerSlot& s, const OptimizerOptions& o, const Tensor& first) {
  check.dtype(s.param, "param", {DType::f32, DType::bf16, DType::f16});
  check.dtype(s.grad, "grad", {DType::f32, DType::bf16, DType::f16});
  check_same_shape(check, s.grad, "grad", s.param);
  check.contiguous(s.param, "param");
  check.contiguous(s.grad, "grad");
  check.same_device(s.param, "param", first, "the first param");
  check.same_device(s.grad, "grad", s.param, "param");
  Formats found;
  if (keeps_first(o))
    found.first = check_elementwise(check, s.param, s.first, "first", s.first_scales, "first_scales");
  else
    check_empty(check, s.first, "first", "(the rule keeps no first moment)");
  if (keeps_second(o)) {
    found.second = check_second(check, s);
  } else {
    check_empty(check, s.second, "second", "(the rule keeps no second moment)");
    check.that(s.rows == 0, "rows", "is %ld, expected 0 (the rule keeps no second moment)", s.rows);
  }
  check_pair(check, found);
  check_residual(check, s, o);
  check_overlaps(check, s);
  const bool on_device = o.capturable && !host_checks_indices(s.param.device);
  check_step_counter(check, s.step, s.param, on_device);
  check.that(s.stream >= 0 && s.stream < int64_t(1) << 32, "stream", "is %ld, expected 0 <= stream < 2^32", s.stream);
  return found;
}

// ---- what the kernels receive ----

optim::Moment moment(const Tensor& values, const Tensor& scales, Format format) {
  if (format == Format::none) return {nullptr, nullptr, format};
  return {format == Format::factored ? nullptr : values.data, format == Format::f32 ? nullptr : scales.ptr<float>(),
          format};
}

double grad_weight(const OptimizerOptions& o, double t) {
  switch (o.rule) {
    case OptimizerRule::sgd: return t == 1 ? 1 : 1 - o.dampening;
    case OptimizerRule::rmsprop: return 1;
    default: return 1 - o.beta1;
  }
}

// In double: 1 - beta2^t loses half of a float's digits at first.
optim::TensorConstants constants(const OptimizerOptions& o, double t) {
  const bool adam = o.rule == OptimizerRule::adam;
  const double lr = o.rule == OptimizerRule::adagrad ? o.lr / (1 + (t - 1) * o.lr_decay) : o.lr;
  return {static_cast<float>(adam ? lr / (1 - std::pow(o.beta1, t)) : lr),
          static_cast<float>(adam ? 1 / std::sqrt(1 - std::pow(o.beta2, t)) : 1),
          static_cast<float>(o.decoupled_weight_decay ? 1 - o.lr * o.weight_decay : 1),
          static_cast<float>(grad_weight(o, t))};
}

optim::DeviceScalars device_scalars(const OptimizerOptions& o) {
  const auto pointer = [](const Tensor& t) { return given(t) ? t.ptr<const float>() : nullptr; };
  return {o.capturable,
          pointer(o.lr_tensor),
          pointer(o.found_inf),
          pointer(o.grad_scale),
          static_cast<float>(o.lr),
          static_cast<float>(o.decoupled_weight_decay ? o.weight_decay : 0),
          static_cast<float>(o.rule == OptimizerRule::adagrad ? o.lr_decay : 0),
          static_cast<float>(std::log(o.beta1)),
          static_cast<float>(std::log(o.beta2)),
          o.rule == OptimizerRule::adam,
          static_cast<float>(grad_weight(o, 1))};
}

StepTensor launch_record(const OptimizerSlot& s, Formats formats, const OptimizerOptions& o) {
  StepTensor r = {};
  r.param = s.param.data;
  r.grad = s.grad.data;
  r.residual = given(s.residual) ? s.residual.ptr<int16_t>() : nullptr;
  r.first = moment(s.first, s.first_scales, formats.first);
  r.second = moment(s.second, s.second_scales, formats.second);
  r.n = s.param.numel();
  r.rows = s.rows;
  r.columns = s.rows ? r.n / s.rows : 0;
  r.stream = static_cast<uint32_t>(s.stream);
  r.param_type = float_of(s.param.dtype);
  r.grad_type = float_of(s.grad.dtype);
  r.step = s.step.ptr<float>();
  if (o.capturable) return r;
  const float t = *s.step.ptr<float>();
  r.step_number = static_cast<uint32_t>(t);
  r.k = constants(o, t);
  return r;
}

// Scalars that the host may read take effect here; false if the step is to be skipped.
bool read_scalars(OptimizerOptions& o, double& grad_factor) {
  if (given(o.lr_tensor)) o.lr = *o.lr_tensor.ptr<float>();
  if (given(o.grad_scale)) grad_factor /= *o.grad_scale.ptr<float>();
  const bool skip = given(o.found_inf) && *o.found_inf.ptr<float>() != 0;
  o.lr_tensor = o.found_inf = o.grad_scale = {};
  o.capturable = false;
  return !skip;
}

optim::StepParams step_params(const OptimizerOptions& o, double grad_factor) {
  optim::StepParams p = {};
  p.rule = kRules[static_cast<int>(o.rule)].rule;
  p.beta1 = static_cast<float>(o.beta1);
  p.beta2 = static_cast<float>(o.rule == OptimizerRule::adagrad ? 1 : o.beta2);
  p.grad_weight = static_cast<float>(grad_weight(o, 2));
  p.square_weight = static_cast<float>(o.rule == OptimizerRule::adagrad ? 1 : 1 - o.beta2);
  p.l2 = static_cast<float>(o.decoupled_weight_decay ? 0 : o.weight_decay);
  p.grad_factor = static_cast<float>(o.maximize ? -grad_factor : grad_factor);
  p.eps = static_cast<float>(o.eps);
  p.nesterov = o.nesterov;
  p.stochastic_rounding = o.stochastic_rounding;
  p.seed = static_cast<uint32_t>(o.seed);
  p.device = device_scalars(o);
  return p;
}

std::vector<Formats> check_slots(const Check& check, const OptimizerSlot* slots, size_t count,
                                 const OptimizerOptions& o) {
  std::vector<Formats> formats;
  for (size_t i = 0; i < count; i++) formats.push_back(check_slot(check, slots[i], o, slots[0].param));
  const int64_t floats = optimizer_workspace(slots, count);
  if (!floats) return formats;
  check.dtype(o.workspace, "workspace", {DType::f32});
  check.that(given(o.workspace) && o.workspace.numel() >= floats, "workspace", "has %ld elements, expected %ld",
             o.workspace.numel(), floats);
  check.contiguous(o.workspace, "workspace");
  check.same_device(o.workspace, "workspace", slots[0].param, "param");
  return formats;
}

// Counts the steps (on the host), and numbers the chunks of all tensors through.
std::vector<StepTensor> launch_records(const OptimizerSlot* slots, size_t count, const std::vector<Formats>& formats,
                                       const OptimizerOptions& o, optim::StepParams& params) {
  std::vector<StepTensor> tensors;
  tensors.reserve(count);
  float* workspace = given(o.workspace) ? o.workspace.ptr<float>() : nullptr;
  for (size_t i = 0; i < count; i++) {
    if (!o.capturable) *slots[i].step.ptr<float>() += 1;
    StepTensor t = launch_record(slots[i], formats[i], o);
    if (t.n == 0 && !o.capturable) continue;
    t.first_chunk = params.chunks;
    params.chunks += (t.n + optim::kChunk - 1) / optim::kChunk;
    if (t.rows) {
      t.workspace = workspace;
      workspace += optim::workspace_floats(t.rows, t.columns);
      params.structured = true;
    }
    tensors.push_back(t);
  }
  return tensors;
}

}  // namespace

int64_t optimizer_workspace(const OptimizerSlot* slots, size_t count) {
  int64_t floats = 0;
  for (size_t i = 0; i < count; i++)
    if (slots[i].rows > 0) floats += optim::workspace_floats(slots[i].rows, slots[i].param.numel() / slots[i].rows);
  return floats;
}

void optimizer_step(const OptimizerSlot* slots, size_t count, const OptimizerOptions& asked, void* stream) {
  const Check check(kStep);
  if (count == 0) return check_options(check, asked);
  OptimizerOptions o = asked;
  const Device device = slots[0].param.device;
  for (const auto& [tensor, name] : {std::pair(&o.lr_tensor, "lr_tensor"), std::pair(&o.found_inf, "found_inf"),
                                     std::pair(&o.grad_scale, "grad_scale")})
    check_scalar(check, *tensor, name, device);
  double grad_factor = 1;
  const bool run = !host_checks_indices(device) || read_scalars(o, grad_factor);
  check_options(check, o);
  check.that(!given(o.found_inf) || o.capturable, "found_inf",
             "is on the device and capturable is false, expected true: the host could not know whether to count");
  const std::vector<Formats> formats = check_slots(check, slots, count, o);
  if (!run) return;

  optim::StepParams params = step_params(o, grad_factor);
  const std::vector<StepTensor> tensors = launch_records(slots, count, formats, o, params);
  params.tensors = tensors.data();
  params.count = static_cast<int64_t>(tensors.size());
  if (params.count) run_kernel(kStep, kKernels, device, &Kernels::step, params, stream);
}

}  // namespace tilewise
