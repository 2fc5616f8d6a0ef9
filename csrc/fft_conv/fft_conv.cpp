// The family's only argument checks, and the choice of its kernels.
#include "tilewise/fft_conv.h"

#include <cstring>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/pages.h"
#include "fft_conv/params.h"
#include "fft_conv/plan.h"

namespace tilewise {

TILEWISE_KERNEL_SET(fft_conv)

namespace {

using fft_conv::BackwardParams;
using fft_conv::ForwardParams;
using fft_conv::Kernels;
using fft_conv::Strides;
using fft_conv::Type;

constexpr int64_t kWorkspaceAlignment = 256;
constexpr int64_t kMaxLength = int64_t(1) << 40;

Type type_of(const Tensor& u) {
  return u.dtype == DType::f32 ? Type::f32 : u.dtype == DType::f16 ? Type::f16 : Type::bf16;
}

Strides strides_of(const Tensor* t) {
  return t ? Strides{t->strides[0], t->strides[1]} : Strides{};
}
void* data_of(const Tensor* t) {
  return t ? t->data : nullptr;
}

// A tensor that has a row for each of u's.
void check_like_u(const Check& check, const Tensor* t, const char* name, const Tensor& u) {
  if (!t) return;
  check.same_dtype(*t, name, u, "u");
  check.shape(*t, name, {u.shape[0], u.shape[1], u.shape[2]});
  check.same_device(*t, name, u, "u");
  check.last_dim_contiguous(*t, name);
}
// fp32 per head: k's gradient, skip and its gradient.
void check_per_head(const Check& check, const Tensor* t, const char* name, std::initializer_list<int64_t> shape,
                    const Tensor& u) {
  if (!t) return;
  check.dtype(*t, name, {DType::f32});
  check.shape(*t, name, shape);
  check.same_device(*t, name, u, "u");
  check.contiguous(*t, name);
}

void check_inputs(const Check& check, const FftConvInputs& in) {
  const Tensor &u = in.u, &k = in.k;
  check.dtype(u, "u", {DType::f32, DType::f16, DType::bf16});
  check.dims(u, "u", 3);
  check.last_dim_contiguous(u, "u");
  check.that(u.shape[2] <= kMaxLength, "u", "has length %ld, expected at most %ld", u.shape[2], kMaxLength);
  check.dtype(k, "k", {DType::f32});
  check.shape(k, "k", {u.shape[1], kAny});
  check.same_device(k, "k", u, "u");
  check.last_dim_contiguous(k, "k");
  check.that(k.shape[1] <= u.shape[2], "k", "has length %ld, expected at most %ld (u's)", k.shape[1], u.shape[2]);
  check_like_u(check, in.pregate, "pregate", u);
  check_like_u(check, in.postgate, "postgate", u);
  check_per_head(check, in.skip, "skip", {u.shape[1]}, u);
}

void check_apart(const Check& check, const Tensor& out, const char* name, const FftConvInputs& in) {
  check.no_overlap(out, name, in.u, "u");
  check.no_overlap(out, name, in.k, "k");
  if (in.pregate) check.no_overlap(out, name, *in.pregate, "pregate");
  if (in.postgate) check.no_overlap(out, name, *in.postgate, "postgate");
  if (in.skip) check.no_overlap(out, name, *in.skip, "skip");
}

struct NamedOutput {
  const Tensor* tensor;
  const char* name;
};

void check_gradients(const Check& check, const FftConvInputs& in, const Tensor& dy, const FftConvGradients& out) {
  const Tensor& u = in.u;
  check_like_u(check, &dy, "dy", u);
  check_like_u(check, out.du, "du", u);
  check_like_u(check, out.dpregate, "dpregate", u);
  check_like_u(check, out.dpostgate, "dpostgate", u);
  check_per_head(check, out.dk, "dk", {u.shape[1], in.k.shape[1]}, u);
  check_per_head(check, out.dskip, "dskip", {u.shape[1]}, u);
  check.that(!out.dpregate || in.pregate, "dpregate", "is given without pregate, expected both");
  check.that(!out.dpostgate || in.postgate, "dpostgate", "is given without postgate, expected both");
  check.that(!out.dskip || in.skip, "dskip", "is given without skip, expected both");
  const NamedOutput outputs[] = {
      {out.du, "du"}, {out.dk, "dk"}, {out.dpregate, "dpregate"}, {out.dpostgate, "dpostgate"}, {out.dskip, "dskip"}};
  for (const NamedOutput& o : outputs) {
    if (!o.tensor) continue;
    if (o.tensor->numel()) check.output(*o.tensor, o.name);
    check_apart(check, *o.tensor, o.name, in);
    check.no_overlap(*o.tensor, o.name, dy, "dy");
    for (const NamedOutput& other : outputs)
      if (other.tensor && &other < &o) check.no_overlap(*o.tensor, o.name, *other.tensor, other.name);
  }
}

ForwardParams forward_params(const FftConvInputs& in, const Tensor* y) {
  ForwardParams p = {};
  p.u = in.u.data;
  p.pregate = data_of(in.pregate);
  p.postgate = data_of(in.postgate);
  p.y = data_of(y);
  p.k = in.k.ptr<float>();
  p.skip = static_cast<const float*>(data_of(in.skip));
  p.u_strides = strides_of(&in.u);
  p.pregate_strides = strides_of(in.pregate);
  p.postgate_strides = strides_of(in.postgate);
  p.y_strides = strides_of(y);
  p.k_stride = in.k.strides[0];
  p.batch = in.u.shape[0];
  p.heads = in.u.shape[1];
  p.length = in.u.shape[2];
  p.filter_length = in.k.shape[1];
  p.causal = in.causal;
  p.type = type_of(in.u);
  p.plan = &fft_conv::plan_for;
  return p;
}

BackwardParams backward_params(const FftConvInputs& in, const Tensor* dy, const FftConvGradients& out) {
  BackwardParams p = {};
  p.forward = forward_params(in, nullptr);
  p.dy = data_of(dy);
  p.du = data_of(out.du);
  p.dpregate = data_of(out.dpregate);
  p.dpostgate = data_of(out.dpostgate);
  p.dk = static_cast<float*>(data_of(out.dk));
  p.dskip = static_cast<float*>(data_of(out.dskip));
  p.dy_strides = strides_of(dy);
  p.du_strides = strides_of(out.du);
  p.dpregate_strides = strides_of(out.dpregate);
  p.dpostgate_strides = strides_of(out.dpostgate);
  return p;
}

// Raises for calls beyond what this machine's kernels serve.
void check_served(const Check& check, const ForwardParams& params, Device device) {
  const bool empty = params.batch == 0 || params.heads == 0 || params.length == 0;
  const auto unsupported = empty ? nullptr : select_kernel(kKernels, device, &Kernels::unsupported);
  const char* limit = unsupported ? unsupported(params) : nullptr;
  if (limit) check.fail(ErrorKind::not_implemented, "u", "has %s, expected a length that a kernel serves", limit);
}

// Bytes to allocate, so that an aligned part of them suffices.
template <class Params>
int64_t workspace_bytes(const Tensor& u, int64_t (*Kernels::*query)(const Params&), const Params& params) {
  const auto ask = u.numel() ? select_kernel(kKernels, u.device, query) : nullptr;
  const int64_t bytes = ask ? ask(params) : 0;
  return bytes ? bytes + kWorkspaceAlignment : 0;
}

void* check_workspace(const Check& check, const FftConvInputs& in, int64_t bytes) {
  if (bytes == 0) return nullptr;
  check.that(in.workspace != nullptr, "workspace", "is missing, expected %ld bytes", bytes);
  const Tensor& w = *in.workspace;
  check.dtype(w, "workspace", {DType::u8});
  check.same_device(w, "workspace", in.u, "u");
  check.contiguous(w, "workspace");
  check.that(w.numel() >= bytes, "workspace", "has %ld bytes, expected %ld", w.numel(), bytes);
  const auto address = reinterpret_cast<uintptr_t>(w.data);
  return reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
}

void expect_writes(const Tensor* t) {
  if (t && t->device.type == DeviceType::cpu && t->contiguous())
    advise_huge_pages(t->data, t->numel() * item_size(t->dtype));
}

void fill_zero(const Tensor* t) {
  if (t && t->numel()) std::memset(t->data, 0, t->numel() * item_size(t->dtype));
}

}  // namespace

int64_t fft_conv_forward_workspace(const FftConvInputs& in) {
  const Check check("fft_conv");
  check_inputs(check, in);
  const ForwardParams params = forward_params(in, nullptr);
  check_served(check, params, in.u.device);
  return workspace_bytes(in.u, &Kernels::forward_workspace, params);
}

int64_t fft_conv_backward_workspace(const FftConvInputs& in, const FftConvGradients& out) {
  const Check check("fft_conv_backward");
  check_inputs(check, in);
  const BackwardParams params = backward_params(in, nullptr, out);
  check_served(check, params.forward, in.u.device);
  return workspace_bytes(in.u, &Kernels::backward_workspace, params);
}

void fft_conv_forward(const FftConvInputs& in, const Tensor& y, void* stream) {
  const Check check("fft_conv");
  check_inputs(check, in);
  check_like_u(check, &y, "y", in.u);
  if (y.numel()) check.output(y, "y");
  check_apart(check, y, "y", in);
  if (in.u.numel() == 0) return;
  ForwardParams params = forward_params(in, &y);
  check_served(check, params, in.u.device);
  params.workspace = check_workspace(check, in, workspace_bytes(in.u, &Kernels::forward_workspace, params));
  expect_writes(&y);
  run_kernel("fft_conv", kKernels, in.u.device, &Kernels::forward, params, stream);
}

void fft_conv_backward(const FftConvInputs& in, const Tensor& dy, const FftConvGradients& out, void* stream) {
  const Check check("fft_conv_backward");
  check_inputs(check, in);
  check_gradients(check, in, dy, out);
  if (in.u.numel() == 0) {  // sums over nothing
    check.that(in.u.device.type == DeviceType::cpu || (!out.dk && !out.dskip), "u",
               "is empty on a CUDA device, expected the caller to clear dk and dskip");
    fill_zero(out.dk);
    fill_zero(out.dskip);
    return;
  }
  BackwardParams params = backward_params(in, &dy, out);
  check_served(check, params.forward, in.u.device);
  params.forward.workspace = check_workspace(check, in, workspace_bytes(in.u, &Kernels::backward_workspace, params));
  for (const Tensor* t : {out.du, out.dk, out.dpregate, out.dpostgate}) expect_writes(t);
  run_kernel("fft_conv_backward", kKernels, in.u.device, &Kernels::backward, params, stream);
}

}  // namespace tilewise
