// The family's only argument checks, and the choice of its kernels.
#include "tilewise/optim.h"

#include <cmath>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "optim/params.h"

namespace tilewise {

TILEWISE_KERNEL_SET(optim)

namespace {

using optim::AdamWTensor;
using optim::kBlock;
using optim::kCodeBytes;
using optim::Kernels;

int64_t blocks_of(int64_t n, int bits = 4) {
  const int64_t block = bits == 4 ? kBlock : optim::kBlock8;
  return (n + block - 1) / block;
}

optim::Float float_of(DType t) {
  return t == DType::f32 ? optim::Float::f32 : t == DType::bf16 ? optim::Float::bf16 : optim::Float::f16;
}

void check_options(const Check& check, const AdamWOptions& o) {
  check.that(std::isfinite(o.lr) && o.lr >= 0, "lr", "is %g, expected lr >= 0", o.lr);
  check.that(o.beta1 >= 0 && o.beta1 < 1, "beta1", "is %g, expected 0 <= beta1 < 1", o.beta1);
  check.that(o.beta2 >= 0 && o.beta2 < 1, "beta2", "is %g, expected 0 <= beta2 < 1", o.beta2);
  check.that(std::isfinite(o.eps) && o.eps >= 0, "eps", "is %g, expected eps >= 0", o.eps);
  check.that(std::isfinite(o.weight_decay) && o.weight_decay >= 0, "weight_decay", "is %g, expected weight_decay >= 0",
             o.weight_decay);
}

void check_same_shape(const Check& check, const Tensor& t, const char* name, const Tensor& as) {
  check.dims(t, name, as.ndim);
  for (int i = 0; i < as.ndim; i++)
    check.that(t.shape[i] == as.shape[i], name, "has size %ld in dimension %d, expected %ld (param's)", t.shape[i], i,
               as.shape[i]);
}

// The kernels use 16-byte accesses on codes; torch's allocators align far better, an odd view does not.
void check_codes(const Check& check, const Tensor& t, const char* name, int64_t n, int bits = 4) {
  check.dtype(t, name, {DType::u8});
  check.shape(t, name, {blocks_of(n, bits), bits == 4 ? kCodeBytes : optim::kCodeBytes8});
  check.contiguous(t, name);
  check.that(reinterpret_cast<uintptr_t>(t.data) % 16 == 0, name, "is not aligned, expected a multiple of 16 bytes");
}

void check_state(const Check& check, const AdamWSlot& s) {
  const int64_t n = s.param.numel();
  if (s.exp_avg.dtype == DType::u8) {
    check_codes(check, s.exp_avg, "exp_avg", n);
    check_codes(check, s.exp_avg_sq, "exp_avg_sq", n);
    check.dtype(s.scales, "scales", {DType::f32});
    check.shape(s.scales, "scales", {blocks_of(n), 2});
    check.contiguous(s.scales, "scales");
    check.same_device(s.scales, "scales", s.param, "param");
    check.that(reinterpret_cast<uintptr_t>(s.scales.data) % 8 == 0, "scales",
               "is not aligned, expected a multiple of 8 bytes");
    return;
  }
  check.dtype(s.exp_avg, "exp_avg", {DType::u8, DType::f32});
  check.dtype(s.exp_avg_sq, "exp_avg_sq", {DType::f32});
  check_same_shape(check, s.exp_avg, "exp_avg", s.param);
  check_same_shape(check, s.exp_avg_sq, "exp_avg_sq", s.param);
  check.contiguous(s.exp_avg, "exp_avg");
  check.contiguous(s.exp_avg_sq, "exp_avg_sq");
  check.that(s.scales.numel() == 0, "scales", "has %ld elements, expected none with 32-bit states", s.scales.numel());
}

void check_slot(const Check& check, const AdamWSlot& s, const Tensor& first) {
  check.dtype(s.param, "param", {DType::f32, DType::bf16, DType::f16});
  check.dtype(s.grad, "grad", {DType::f32, DType::bf16, DType::f16});
  check_same_shape(check, s.grad, "grad", s.param);
  check.contiguous(s.param, "param");
  check.contiguous(s.grad, "grad");
  check.same_device(s.param, "param", first, "the first param");
  check.same_device(s.grad, "grad", s.param, "param");
  check_state(check, s);
  check.same_device(s.exp_avg, "exp_avg", s.param, "param");
  check.same_device(s.exp_avg_sq, "exp_avg_sq", s.param, "param");
  check.no_overlap(s.param, "param", s.grad, "grad");
  check.no_overlap(s.exp_avg, "exp_avg", s.param, "param");
  check.no_overlap(s.exp_avg, "exp_avg", s.grad, "grad");
  check.no_overlap(s.exp_avg_sq, "exp_avg_sq", s.param, "param");
  check.no_overlap(s.exp_avg_sq, "exp_avg_sq", s.grad, "grad");
  check.no_overlap(s.exp_avg_sq, "exp_avg_sq", s.exp_avg, "exp_avg");
  check.dtype(s.step, "step", {DType::f32});
  check.that(s.step.numel() == 1, "step", "has %ld elements, expected a scalar", s.step.numel());
  check.that(s.step.device.type == DeviceType::cpu, "step", "is not in host memory, expected a CPU tensor");
  const float step = *s.step.ptr<float>();
  check.that(step >= 0 && step < 16777216 && step == std::floor(step), "step",
             "is %g, expected an integer, 0 <= step < 2^24", step);
}

// The bias corrections of step t, in double: 1 - beta2^t loses half of a float's digits at first.
AdamWTensor launch_record(const AdamWSlot& s, const AdamWOptions& o, int64_t first_block) {
  const double t = *s.step.ptr<float>();
  const bool quantized = s.exp_avg.dtype == DType::u8;
  return {s.param.data,
          s.grad.data,
          s.exp_avg.data,
          s.exp_avg_sq.data,
          quantized ? s.scales.ptr<float>() : nullptr,
          s.param.numel(),
          first_block,
          static_cast<float>(o.lr / (1 - std::pow(o.beta1, t))),
          static_cast<float>(1 / std::sqrt(1 - std::pow(o.beta2, t))),
          float_of(s.param.dtype),
          float_of(s.grad.dtype)};
}

optim::CodecParams check_codec(const Check& check, const Tensor& values, const Tensor& codes, const Tensor& scales,
                               bool is_signed, int bits) {
  const int64_t n = values.numel();
  check.that(bits == 4 || bits == 8, "bits", "is %d, expected 4 or 8", bits);
  check.dtype(values, "values", {DType::f32});
  check.contiguous(values, "values");
  check_codes(check, codes, "codes", n, bits);
  check.dtype(scales, "scales", {DType::f32});
  check.shape(scales, "scales", {blocks_of(n, bits)});
  check.output(scales, "scales");
  check.same_device(codes, "codes", values, "values");
  check.same_device(scales, "scales", values, "values");
  check.no_overlap(codes, "codes", values, "values");
  check.no_overlap(scales, "scales", values, "values");
  check.no_overlap(scales, "scales", codes, "codes");
  return {values.ptr<float>(), codes.ptr<uint8_t>(), scales.ptr<float>(), n, scales.strides[0], is_signed, bits};
}

}  // namespace

void adamw_step(const AdamWSlot* slots, size_t count, const AdamWOptions& options, void* stream) {
  const Check check("adamw_step");
  check_options(check, options);
  for (size_t i = 0; i < count; i++) check_slot(check, slots[i], slots[0].param);

  std::vector<AdamWTensor> tensors;
  tensors.reserve(count);
  int64_t blocks = 0;
  for (size_t i = 0; i < count; i++) {
    *slots[i].step.ptr<float>() += 1;
    if (slots[i].param.numel() == 0) continue;
    tensors.push_back(launch_record(slots[i], options, blocks));
    blocks += blocks_of(tensors.back().n);
  }
  if (tensors.empty()) return;
  const double grad_weight = 1 - options.beta1;
  const optim::AdamWParams params = {tensors.data(),
                                     static_cast<int64_t>(tensors.size()),
                                     blocks,
                                     static_cast<float>(options.beta1),
                                     static_cast<float>(options.beta2),
                                     static_cast<float>(options.maximize ? -grad_weight : grad_weight),
                                     static_cast<float>(1 - options.beta2),
                                     static_cast<float>(1 - options.lr * options.weight_decay),
                                     static_cast<float>(options.eps)};
  run_kernel("adamw_step", kKernels, slots[0].param.device, &Kernels::adamw_step, params, stream);
}

void quantize_state(const Tensor& values, const Tensor& codes, const Tensor& scales, bool is_signed, int bits,
                    void* stream) {
  const auto params = check_codec(Check("quantize_state"), values, codes, scales, is_signed, bits);
  if (params.n) run_kernel("quantize_state", kKernels, values.device, &Kernels::quantize, params, stream);
}

void dequantize_state(const Tensor& codes, const Tensor& scales, const Tensor& values, bool is_signed, int bits,
                      void* stream) {
  const auto params = check_codec(Check("dequantize_state"), values, codes, scales, is_signed, bits);
  if (params.n) run_kernel("dequantize_state", kKernels, values.device, &Kernels::dequantize, params, stream);
}

}  // namespace tilewise
