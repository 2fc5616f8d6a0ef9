// The argument checks of Shampoo's pieces, and the choice of their kernels.
#include <utility>

#include "common/check.h"
#include "common/dispatch.h"
#include "optim/params.h"
#include "tilewise/optim.h"

namespace tilewise {

TILEWISE_KERNEL_SET(optim)

namespace {

using optim::Kernels;
using optim::kRowBlock;
using optim::kRowBlockBytes;

constexpr int64_t kMaxOrder = 1 << 15, kMaxElements = int64_t{1} << 36;  // so that the CUDA grids fit

// f32 [b, n, n], contiguous.
void check_squares(const Check& check, const Tensor& t, const char* name) {
  check.dtype(t, name, {DType::f32});
  check.dims(t, name, 3);
  check.that(t.shape[1] == t.shape[2], name, "has shape (%ld, %ld, %ld), expected square matrices", t.shape[0],
             t.shape[1], t.shape[2]);
  check.that(t.shape[1] <= kMaxOrder, name, "has order %ld, expected at most %ld", t.shape[1], kMaxOrder);
  check.that(t.numel() <= kMaxElements, name, "has %ld elements, expected at most 2^36", t.numel());
  check.contiguous(t, name);
}

void check_part(const Check& check, const Tensor& t, const char* name, DType dtype, const Tensor& values,
                std::initializer_list<int64_t> shape) {
  check.dtype(t, name, {dtype});
  check.shape(t, name, shape);
  check.contiguous(t, name);
  check.same_device(t, name, values, "values");
  check.no_overlap(t, name, values, "values");
}

optim::MatrixCodecParams check_codec(const Check& check, const Tensor& values, const Tensor& codes,
                                     const Tensor& scales, const Tensor* diagonal) {
  check_squares(check, values, "values");
  const int64_t batch = values.shape[0], order = values.shape[1], blocks = (order + kRowBlock - 1) / kRowBlock;
  check_part(check, codes, "codes", DType::u8, values, {batch, order, blocks * kRowBlockBytes});
  check.that(reinterpret_cast<uintptr_t>(codes.data) % 16 == 0, "codes",
             "is not aligned, expected a multiple of 16 bytes");
  check_part(check, scales, "scales", DType::f32, values, {batch, order, blocks});
  check.no_overlap(scales, "scales", codes, "codes");
  if (diagonal) {
    check_part(check, *diagonal, "diagonal", DType::f32, values, {batch, order});
    check.no_overlap(*diagonal, "diagonal", codes, "codes");
    check.no_overlap(*diagonal, "diagonal", scales, "scales");
  }
  return {values.ptr<float>(),
          codes.ptr<uint8_t>(),
          scales.ptr<float>(),
          diagonal ? diagonal->ptr<float>() : nullptr,
          batch,
          order};
}

}  // namespace

void quantize_matrix(const Tensor& values, const Tensor& codes, const Tensor& scales, const Tensor* diagonal,
                     void* stream) {
  const auto params = check_codec(Check("quantize_matrix"), values, codes, scales, diagonal);
  if (values.numel()) run_kernel("quantize_matrix", kKernels, values.device, &Kernels::quantize_matrix, params, stream);
}

void dequantize_matrix(const Tensor& codes, const Tensor& scales, const Tensor* diagonal, const Tensor& values,
                       void* stream) {
  const auto params = check_codec(Check("dequantize_matrix"), values, codes, scales, diagonal);
  if (values.numel())
    run_kernel("dequantize_matrix", kKernels, values.device, &Kernels::dequantize_matrix, params, stream);
}

void orthonormalize(const Tensor& rows, const Tensor& defect, const Tensor& out, void* stream) {
  const Check check("orthonormalize");
  check_squares(check, rows, "rows");
  const int64_t batch = rows.shape[0], order = rows.shape[1];
  for (const auto& [t, name] : {std::pair{&defect, "defect"}, std::pair{&out, "out"}}) {
    check_squares(check, *t, name);
    check.shape(*t, name, {batch, order, order});
    check.same_device(*t, name, rows, "rows");
    check.no_overlap(*t, name, rows, "rows");
  }
  check.no_overlap(out, "out", defect, "defect");
  const optim::OrthonormalizeParams params = {rows.ptr<float>(), defect.ptr<float>(), out.ptr<float>(), batch, order};
  if (rows.numel()) run_kernel("orthonormalize", kKernels, rows.device, &Kernels::orthonormalize, params, stream);
}

}  // namespace tilewise
