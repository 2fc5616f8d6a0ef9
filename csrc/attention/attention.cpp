// The family's only argument checks, and the choice of its kernels.
#include "tilewise/attention.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <utility>

#include "attention/params.h"
#include "common/check.h"
#include "common/dispatch.h"

namespace tilewise {

TILEWISE_KERNEL_SET(attention)

namespace {

using attention::BackwardParams;
using attention::ForwardParams;
using attention::Kernels;
using attention::Strides;
using attention::Type;

constexpr int kMaxHeadDim = 256;

// A [b, h, s, d] tensor, or a packed [t, h, d] one seen as [1, h, t, d].
struct View {
  int64_t batch, heads, rows, dim;
  Strides strides;
};
View view_of(const Tensor& t) {
  const int64_t *n = t.shape, *s = t.strides;
  if (t.ndim == 4) return {n[0], n[1], n[2], n[3], {s[0], s[1], s[2]}};
  return {1, n[1], n[0], n[2], {0, s[1], s[0]}};
}

// The checks of one call; every tensor it is shown must be on q's device and of q's dtype.
struct Arguments {
  Check check;
  const Tensor& q;

  void like_q(const Tensor& t, const char* name) const {
    check.same_dtype(t, name, q, "q");
    check.same_device(t, name, q, "q");
    check.last_dim_contiguous(t, name);
  }

  void input(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    check.shape(t, name, shape);
    like_q(t, name);
  }

  void same_shape(const Tensor& t, const char* name, const Tensor& as) const {
    if (as.ndim == 4)
      check.shape(t, name, {as.shape[0], as.shape[1], as.shape[2], as.shape[3]});
    else
      check.shape(t, name, {as.shape[0], as.shape[1], as.shape[2]});
  }

  void statistic(const Tensor& t, const char* name) const {
    check.dtype(t, name, {DType::f32});
    check.same_device(t, name, q, "q");
    if (q.ndim == 4)
      check.shape(t, name, {q.shape[0], q.shape[1], q.shape[2]});
    else
      check.shape(t, name, {q.shape[1], q.shape[0]});
    check.contiguous(t, name);
  }

  void output(const Tensor& t, const char* name, std::initializer_list<const Tensor*> others) const {
    check.output(t, name);
    for (const Tensor* other : others)
      if (other) check.no_overlap(t, name, *other, "another argument");
  }

  // q, k and v of one call, packed (3 dimensions) or not (4).
  void inputs(const Tensor& k, const Tensor& v, int dims) const {
    check.dims(q, "q", dims);
    check.dims(k, "k", dims);
    check.dims(v, "v", dims);
    check.dtype(q, "q", {DType::f32, DType::f16, DType::bf16});
    for (const auto& [tensor, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) like_q(*tensor, name);
    const View a = view_of(q), b = view_of(k), c = view_of(v);
    check.that(b.batch == a.batch, "k", "has batch %ld, expected %ld (q's)", b.batch, a.batch);
    check.that(b.dim == a.dim, "k", "has head dim %ld, expected %ld (q's)", b.dim, a.dim);
    check.that(c.batch == a.batch, "v", "has batch %ld, expected %ld (q's)", c.batch, a.batch);
    check.that(c.heads == b.heads, "v", "has %ld heads, expected %ld (k's)", c.heads, b.heads);
    check.that(c.rows == b.rows, "v", "has %ld keys, expected %ld (k's)", c.rows, b.rows);
    check.that(b.heads > 0 ? a.heads % b.heads == 0 : a.heads == 0, "q",
               "has %ld heads, expected a multiple of %ld (k's)", a.heads, b.heads);
    for (const Tensor* t : {&q, &k, &v})
      for (int i = 0; i < dims; i++)
        check.that(t->shape[i] <= INT_MAX, "q, k or v", "has a dimension of %ld, expected at most %d", t->shape[i],
                   INT_MAX);
    head_dim(a.dim, "q");
    head_dim(c.dim, "v");
    if (!host_checks_indices(q.device) && c.dim != a.dim)
      check.fail(ErrorKind::not_implemented, "v", "has head dim %ld, expected %ld (q's) on CUDA", c.dim, a.dim);
  }

  void head_dim(int64_t d, const char* name) const {
    if (host_checks_indices(q.device)) {
      if (d < 1 || d > kMaxHeadDim)
        check.fail(ErrorKind::not_implemented, name, "has head dim %ld, expected 1 to %d", d, kMaxHeadDim);
    } else if (d != 64 && d != 128) {
      check.fail(ErrorKind::not_implemented, name, "has head dim %ld, expected 64 or 128 on CUDA", d);
    }
  }
};

Type type_of(DType t) {
  return t == DType::f32 ? Type::f32 : t == DType::f16 ? Type::f16 : Type::bf16;
}

ForwardParams forward_params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                             const AttentionOptions& options) {
  const View a = view_of(q), b = view_of(k), c = view_of(v), o = view_of(out);
  ForwardParams p = {};
  p.q = q.data, p.k = k.data, p.v = v.data, p.out = out.data;
  p.lse = lse.ptr<float>();
  p.q_strides = a.strides, p.k_strides = b.strides, p.v_strides = c.strides, p.out_strides = o.strides;
  p.batch = static_cast<int>(a.batch), p.q_heads = static_cast<int>(a.heads), p.kv_heads = static_cast<int>(b.heads);
  p.seq_q = static_cast<int>(a.rows), p.seq_k = static_cast<int>(b.rows);
  p.total_q = a.rows, p.total_k = b.rows;
  p.dim = static_cast<int>(a.dim), p.v_dim = static_cast<int>(c.dim);
  p.scale = static_cast<float>(options.scale.value_or(1 / std::sqrt(static_cast<double>(a.dim))));
  p.causal = options.causal;
  p.type = type_of(q.dtype);
  return p;
}

// On CPU, follows the offsets of one cu_seqlens and returns the longest sequence.
int64_t check_offsets(const Check& check, const Tensor& cu, const char* name, int64_t total) {
  const int32_t* at = cu.ptr<int32_t>();
  const int64_t batch = cu.shape[0] - 1;
  int64_t longest = 0;
  check.that(at[0] == 0, name, "starts with %d, expected 0", at[0]);
  for (int64_t b = 0; b < batch; b++) {
    check.that(at[b + 1] >= at[b], name, "[%ld] is %d, expected at least %d (the one before)", b + 1, at[b + 1], at[b]);
    longest = std::max<int64_t>(longest, at[b + 1] - at[b]);
  }
  check.that(at[batch] <= total, name, "ends with %d, expected at most %ld (tokens)", at[batch], total);
  return longest;
}

int pack_side(const Arguments& a, const Tensor& cu, const char* name, const std::optional<int64_t>& given,
              const char* max_name, int64_t total) {
  const int64_t bound = host_checks_indices(cu.device) ? check_offsets(a.check, cu, name, total) : total;
  if (!given) return static_cast<int>(bound);
  a.check.that(*given >= 0, max_name, "is %ld, expected at least 0", *given);
  if (host_checks_indices(cu.device))
    a.check.that(*given >= bound, max_name, "is %ld, expected at least %ld (the longest sequence)", *given, bound);
  return static_cast<int>(std::min(*given, total));
}

void pack(const Arguments& a, const PackedSequences& sequences, ForwardParams& p) {
  const Tensor &cu_q = sequences.cu_seqlens_q, &cu_k = sequences.cu_seqlens_k;
  for (const auto& [cu, name] : {std::pair{&cu_q, "cu_seqlens_q"}, {&cu_k, "cu_seqlens_k"}}) {
    a.check.dtype(*cu, name, {DType::i32});
    a.check.dims(*cu, name, 1);
    a.check.that(cu->shape[0] >= 1, name, "is empty, expected batch + 1 offsets");
    a.check.same_device(*cu, name, a.q, "q");
    a.check.contiguous(*cu, name);
  }
  a.check.shape(cu_k, "cu_seqlens_k", {cu_q.shape[0]});
  p.cu_seqlens_q = cu_q.ptr<int32_t>();
  p.cu_seqlens_k = cu_k.ptr<int32_t>();
  p.batch = static_cast<int>(cu_q.shape[0] - 1);
  p.seq_q = pack_side(a, cu_q, "cu_seqlens_q", sequences.max_seqlen_q, "max_seqlen_q", p.total_q);
  p.seq_k = pack_side(a, cu_k, "cu_seqlens_k", sequences.max_seqlen_k, "max_seqlen_k", p.total_k);
}

bool nothing_to_do(const ForwardParams& p) {
  return p.batch == 0 || p.q_heads == 0 || p.seq_q == 0;
}

void run_forward(const char* operation, const Tensor& q, const Tensor& k, const Tensor& v,
                 const PackedSequences* sequences, const Tensor& out, const Tensor& lse,
                 const AttentionOptions& options, void* stream) {
  const Arguments a{Check(operation), q};
  a.inputs(k, v, sequences ? 3 : 4);
  const int64_t v_dim = v.shape[v.ndim - 1];
  sequences ? a.input(out, "out", {q.shape[0], q.shape[1], v_dim})
            : a.input(out, "out", {q.shape[0], q.shape[1], q.shape[2], v_dim});
  a.statistic(lse, "lse");
  a.output(out, "out", {&q, &k, &v, &lse});
  a.output(lse, "lse", {&q, &k, &v});
  ForwardParams p = forward_params(q, k, v, out, lse, options);
  if (sequences) pack(a, *sequences, p);
  if (!nothing_to_do(p)) run_kernel(operation, kKernels, q.device, &Kernels::forward, p, stream);
}

void run_backward(const char* operation, const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                  const PackedSequences* sequences, const Tensor& out, const Tensor& lse, const Tensor& dq,
                  const Tensor& dk, const Tensor& dv, const Tensor& delta, const AttentionOptions& options,
                  void* stream) {
  const Arguments a{Check(operation), q};
  a.inputs(k, v, sequences ? 3 : 4);
  const int64_t v_dim = v.shape[v.ndim - 1];
  sequences ? a.input(out, "out", {q.shape[0], q.shape[1], v_dim})
            : a.input(out, "out", {q.shape[0], q.shape[1], q.shape[2], v_dim});
  a.same_shape(dout, "dout", out);
  a.like_q(dout, "dout");
  a.statistic(lse, "lse");
  a.statistic(delta, "delta");
  const std::pair<const Tensor*, const Tensor*> gradients[] = {{&dq, &q}, {&dk, &k}, {&dv, &v}};
  const char* names[] = {"dq", "dk", "dv"};
  for (int i = 0; i < 3; i++) {
    const Tensor& gradient = *gradients[i].first;
    a.same_shape(gradient, names[i], *gradients[i].second);
    a.like_q(gradient, names[i]);
    a.output(gradient, names[i], {&q, &k, &v, &out, &dout, &lse, &delta, i > 0 ? &dq : nullptr, i > 1 ? &dk : nullptr});
  }
  a.output(delta, "delta", {&q, &k, &v, &out, &dout, &lse});
  BackwardParams p = {};
  p.forward = forward_params(q, k, v, out, lse, options);
  if (sequences) pack(a, *sequences, p.forward);
  p.dout = dout.data, p.dq = dq.data, p.dk = dk.data, p.dv = dv.data;
  p.dout_strides = view_of(dout).strides, p.dq_strides = view_of(dq).strides;
  p.dk_strides = view_of(dk).strides, p.dv_strides = view_of(dv).strides;
  p.delta = delta.ptr<float>();
  p.deterministic = options.deterministic;
  if (p.forward.batch > 0 && p.forward.q_heads > 0)
    run_kernel(operation, kKernels, q.device, &Kernels::backward, p, stream);
}

}  // namespace

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                       const AttentionOptions& options, void* stream) {
  run_forward("attention", q, k, v, nullptr, out, lse, options, stream);
}

void attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& delta,
                        const AttentionOptions& options, void* stream) {
  run_backward("attention_backward", dout, q, k, v, nullptr, out, lse, dq, dk, dv, delta, options, stream);
}

void attention_varlen_forward(const Tensor& q, const Tensor& k, const Tensor& v, const PackedSequences& sequences,
                              const Tensor& out, const Tensor& lse, const AttentionOptions& options, void* stream) {
  run_forward("attention_varlen", q, k, v, &sequences, out, lse, options, stream);
}

void attention_varlen_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                               const PackedSequences& sequences, const Tensor& out, const Tensor& lse, const Tensor& dq,
                               const Tensor& dk, const Tensor& dv, const Tensor& delta, const AttentionOptions& options,
                               void* stream) {
  run_backward("attention_varlen_backward", dout, q, k, v, &sequences, out, lse, dq, dk, dv, delta, options, stream);
}

}  // namespace tilewise
