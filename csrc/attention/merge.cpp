// Joining partial results, and rotary embeddings: arguments to parameters.
#include "attention/arguments.h"

namespace tilewise {

TILEWISE_KERNEL_SET(attention)

namespace {

using attention::Arguments;
using attention::Kernels;
using attention::kMaxParts;
using attention::MergeBackwardParams;
using attention::MergeParams;
using attention::RopeParams;
using attention::type_of;
using attention::View;
using attention::view_of;

// Parts and result agree with the first part's shape, type and device.
MergeParams merge_params(const Arguments& a, const Tensor* const* outs, const Tensor* const* lses, int parts,
                         const Tensor& out, const Tensor& lse) {
  const View first = view_of(a.q), joined = view_of(out);
  MergeParams p = {};
  for (int i = 0; i < parts; i++) {
    a.same_shape(*outs[i], "outs", a.q);
    a.like_q(*outs[i], "outs", "outs[0]");
    a.statistic(*lses[i], "lses");
    p.outs[i] = outs[i]->data;
    p.outs_strides[i] = view_of(*outs[i]).strides;
    p.lses[i] = lses[i]->ptr<float>();
  }
  a.same_shape(out, "out", a.q);
  a.like_q(out, "out", "outs[0]");
  a.statistic(lse, "lse");
  p.out = out.data;
  p.out_strides = joined.strides;
  p.lse = lse.ptr<float>();
  p.parts = parts;
  p.batch = static_cast<int>(first.batch), p.heads = static_cast<int>(first.heads);
  p.rows = static_cast<int>(first.rows), p.dim = static_cast<int>(first.dim);
  p.type = type_of(a.q.dtype);
  return p;
}

void check_parts(const Check& check, const Tensor* const* outs, int parts) {
  check.that(parts >= 1 && parts <= kMaxParts, "outs", "has %d parts, expected 1 to %d", parts, kMaxParts);
  check.that(outs[0]->ndim == 3 || outs[0]->ndim == 4, "outs", "has %d dimensions, expected 4, or 3 if packed",
             outs[0]->ndim);
  check.dtype(*outs[0], "outs", {DType::f32, DType::f16, DType::bf16});
}

}  // namespace

void merge_attention(const Tensor* const* outs, const Tensor* const* lses, int parts, const Tensor& out,
                     const Tensor& lse, void* stream) {
  const Check check("merge_attention");
  check_parts(check, outs, parts);
  const Arguments a{check, *outs[0]};
  const MergeParams p = merge_params(a, outs, lses, parts, out, lse);
  for (int i = 0; i < parts; i++) {
    a.output(out, "out", {outs[i], lses[i], &lse});
    a.output(lse, "lse", {outs[i], lses[i]});
  }
  if (lse.numel() > 0) run_kernel("merge_attention", kKernels, out.device, &Kernels::merge, p, stream);
}

void merge_attention_backward(const Tensor& dout, const Tensor& dlse, const Tensor* const* outs,
                              const Tensor* const* lses, int parts, const Tensor& out, const Tensor& lse,
                              const Tensor* const* douts, const Tensor* const* dlses, void* stream) {
  const Check check("merge_attention_backward");
  check_parts(check, outs, parts);
  const Arguments a{check, *outs[0]};
  MergeBackwardParams p = {};
  p.forward = merge_params(a, outs, lses, parts, out, lse);
  a.same_shape(dout, "dout", out);
  a.like_q(dout, "dout", "outs[0]");
  a.statistic(dlse, "dlse");
  p.dout = dout.data;
  p.dout_strides = view_of(dout).strides;
  p.dlse = dlse.ptr<float>();
  for (int i = 0; i < parts; i++) {
    a.same_shape(*douts[i], "douts", out);
    a.like_q(*douts[i], "douts", "outs[0]");
    a.statistic(*dlses[i], "dlses");
    a.output(*douts[i], "douts", {&dout, &out, outs[i], dlses[i]});
    a.output(*dlses[i], "dlses", {&dlse, &lse, lses[i]});
    p.douts[i] = douts[i]->data;
    p.douts_strides[i] = view_of(*douts[i]).strides;
    p.dlses[i] = dlses[i]->ptr<float>();
  }
  if (lse.numel() > 0)
    run_kernel("merge_attention_backward", kKernels, out.device, &Kernels::merge_backward, p, stream);
}

void rope_apply(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& out, bool interleaved,
                bool inverse, void* stream) {
  const Check check("rope_apply");
  check.dims(x, "x", 4);
  check.dtype(x, "x", {DType::f32, DType::f16, DType::bf16});
  const Arguments a{check, x};
  a.like_q(x, "x", "x");
  a.same_shape(out, "out", x);
  a.like_q(out, "out", "x");
  check.output(out, "out");
  check.no_overlap(out, "out", x, "x", /*equal_ok=*/true);
  for (const auto& [table, name] : {std::pair{&cos, "cos"}, {&sin, "sin"}}) {
    check.dims(*table, name, 3);
    check.dtype(*table, name, {DType::f32});
    check.same_device(*table, name, x, "x");
    check.last_dim_contiguous(*table, name);
    check.that(table->shape[0] == 1 || table->shape[0] == x.shape[0], name, "has batch %ld, expected 1 or %ld (x's)",
               table->shape[0], x.shape[0]);
    check.that(table->shape[1] == x.shape[2], name, "has %ld rows, expected %ld (x's)", table->shape[1], x.shape[2]);
    check.that(2 * table->shape[2] <= x.shape[3], name, "has %ld pairs, expected at most %ld (half of x's head dim)",
               table->shape[2], x.shape[3] / 2);
    check.no_overlap(out, "out", *table, name);
  }
  check.that(cos.shape[0] == sin.shape[0] && cos.shape[2] == sin.shape[2] && cos.strides[0] == sin.strides[0] &&
                 cos.strides[1] == sin.strides[1],
             "sin", "has another shape or layout, expected that of cos");
  const View in = view_of(x);
  RopeParams p = {};
  p.x = x.data, p.out = out.data;
  p.x_strides = in.strides, p.out_strides = view_of(out).strides;
  p.cos = cos.ptr<float>(), p.sin = sin.ptr<float>();
  p.table_batch = cos.shape[0] == 1 ? 0 : cos.strides[0];
  p.table_row = cos.strides[1];
  p.batch = static_cast<int>(in.batch), p.heads = static_cast<int>(in.heads), p.rows = static_cast<int>(in.rows);
  p.dim = static_cast<int>(in.dim), p.pairs = static_cast<int>(cos.shape[2]);
  p.interleaved = interleaved, p.inverse = inverse;
  p.type = type_of(x.dtype);
  if (x.numel() > 0) run_kernel("rope_apply", kKernels, x.device, &Kernels::rope, p, stream);
}

}  // namespace tilewise
