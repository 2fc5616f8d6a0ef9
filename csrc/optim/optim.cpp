// Quantisation by itself: argument checks, and the choice of kernels.
#include "common/dispatch.h"
#include "optim/arguments.h"

namespace tilewise {

TILEWISE_KERNEL_SET(optim)

namespace {

using optim::Kernels;

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
