// Dense and packed attention: checked arguments to the kernels' parameters, and the choice of the kernels.
#include <algorithm>
#include <utility>

#include "attention/arguments.h"
#include "attention/packing.h"
#include "common/paged/checks.h"

namespace tilewise {

TILEWISE_KERNEL_SET(attention)

namespace {

using attention::Arguments;
using attention::BackwardParams;
using attention::ForwardParams;
using attention::Kernels;
using attention::PagedParams;
using attention::type_of;
using attention::View;
using attention::view_of;

ForwardParams forward_params(const Check& check, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                             const Tensor& lse, const AttentionOptions& options) {
  const View a = view_of(q), b = view_of(k), c = view_of(v), o = view_of(out);
  ForwardParams p = {};
  p.q = q.data, p.k = k.data, p.v = v.data, p.out = out.data;
  p.lse = lse.ptr<float>();
  p.q_strides = a.strides, p.k_strides = b.strides, p.v_strides = c.strides, p.out_strides = o.strides;
  p.batch = static_cast<int>(a.batch), p.q_heads = static_cast<int>(a.heads), p.kv_heads = static_cast<int>(b.heads);
  p.seq_q = static_cast<int>(a.rows), p.seq_k = static_cast<int>(b.rows);
  p.total_q = a.rows, p.total_k = b.rows;
  p.dim = static_cast<int>(a.dim), p.v_dim = static_cast<int>(c.dim);
  p.scale = attention::checked_scale(check, options.scale, a.dim);
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

attention::Rules rules_of(const Arguments& a, const AttentionOptions& options, const ForwardParams& p,
                          const PackedSequences* sequences) {
  const auto longest = [&](std::optional<int64_t> PackedSequences::* given, int seq) {
    return sequences && sequences->*given ? *(sequences->*given) : seq;
  };
  return attention::RuleArguments{a, options, p, longest(&PackedSequences::max_seqlen_q, p.seq_q),
                                  longest(&PackedSequences::max_seqlen_k, p.seq_k)}
      .rules();
}

// What of `p` decides about ranges of keys: the result's shapes, and the type.
int splits_of(const Tensor& q, const Tensor& k) {
  if (host_checks_indices(q.device) || q.ndim != 4 || k.ndim != 4 || q.numel() == 0 || k.numel() == 0) return 1;
  if (q.shape[2] > attention::kFewQueries) return 1;
  PagedParams p = {};
  p.batch = int(q.shape[0]), p.q_heads = int(q.shape[1]), p.tokens = int(q.shape[2]), p.dim = int(q.shape[3]);
  p.kv_heads = int(k.shape[1]);
  p.table.pages_per_row = 1, p.table.page_size = int(k.shape[2]);
  p.type = paged::type_of(q);
  return paged::cuda_splits(p);
}

int64_t workspace_of(const Tensor& q, int splits) {
  return splits > 1 ? paged::workspace_floats(splits, q.numel() / q.shape[3], q.shape[3]) : 0;
}

bool nothing_to_do(const ForwardParams& p) {
  return p.batch == 0 || p.q_heads == 0 || p.seq_q == 0;
}

void option_gradients(const Arguments& a, const AttentionOptions& options, const AttentionOptionGradients& wanted,
                      BackwardParams& p) {
  if (wanted.bias) {
    a.check.that(options.bias, "dbias", "is given, expected none without a bias");
    a.check.dtype(*wanted.bias, "dbias", {options.bias->dtype});
    a.same_shape(*wanted.bias, "dbias", *options.bias);
    a.check.same_device(*wanted.bias, "dbias", a.q, "q");
    a.check.contiguous(*wanted.bias, "dbias");
    p.dbias = wanted.bias->data;
    std::copy_n(wanted.bias->shape, 4, p.dbias_sizes);
  }
  if (wanted.sink_logits) {
    a.check.that(options.sink_logits, "dsink_logits", "is given, expected none without sink_logits");
    a.check.dtype(*wanted.sink_logits, "dsink_logits", {DType::f32});
    a.check.shape(*wanted.sink_logits, "dsink_logits", {a.q.shape[1]});
    a.check.same_device(*wanted.sink_logits, "dsink_logits", a.q, "q");
    a.check.contiguous(*wanted.sink_logits, "dsink_logits");
    p.dsink = wanted.sink_logits->ptr<float>();
  }
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
  ForwardParams p = forward_params(a.check, q, k, v, out, lse, options);
  if (sequences) pack(a, *sequences, p);
  p.rules = rules_of(a, options, p, sequences);
  if (nothing_to_do(p)) return;
  const int splits = options.workspace && !sequences && attention::is_decoding(p) ? splits_of(q, k) : 1;
  if (splits == 1) return run_kernel(operation, kKernels, q.device, &Kernels::forward, p, stream);
  PagedParams pages = attention::as_pages(p);
  pages.splits = splits;
  pages.workspace = paged::check_workspace(a.check, options.workspace, workspace_of(q, splits), q);
  run_kernel(operation, kKernels, q.device, &Kernels::paged, pages, stream);
}

void run_backward(const char* operation, const Tensor& dout, const Tensor* dlse, const Tensor& q, const Tensor& k,
                  const Tensor& v, const PackedSequences* sequences, const Tensor& out, const Tensor& lse,
                  const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& delta,
                  const AttentionOptions& options, const AttentionOptionGradients& wanted, void* stream) {
  const Arguments a{Check(operation), q};
  a.inputs(k, v, sequences ? 3 : 4);
  const int64_t v_dim = v.shape[v.ndim - 1];
  sequences ? a.input(out, "out", {q.shape[0], q.shape[1], v_dim})
            : a.input(out, "out", {q.shape[0], q.shape[1], q.shape[2], v_dim});
  a.same_shape(dout, "dout", out);
  a.like_q(dout, "dout");
  a.statistic(lse, "lse");
  a.statistic(delta, "delta");
  if (dlse) a.statistic(*dlse, "dlse");
  const std::pair<const Tensor*, const Tensor*> gradients[] = {{&dq, &q}, {&dk, &k}, {&dv, &v}};
  const char* names[] = {"dq", "dk", "dv"};
  for (int i = 0; i < 3; i++) {
    const Tensor& gradient = *gradients[i].first;
    a.same_shape(gradient, names[i], *gradients[i].second);
    a.like_q(gradient, names[i]);
    a.output(gradient, names[i],
             {&q, &k, &v, &out, &dout, &lse, dlse, &delta, i > 0 ? &dq : nullptr, i > 1 ? &dk : nullptr});
  }
  a.output(delta, "delta", {&q, &k, &v, &out, &dout, &lse, dlse});
  BackwardParams p = {};
  p.forward = forward_params(a.check, q, k, v, out, lse, options);
  if (sequences) pack(a, *sequences, p.forward);
  p.forward.rules = rules_of(a, options, p.forward, sequences);
  option_gradients(a, options, wanted, p);
  p.dout = dout.data, p.dq = dq.data, p.dk = dk.data, p.dv = dv.data;
  p.dout_strides = view_of(dout).strides, p.dq_strides = view_of(dq).strides;
  p.dk_strides = view_of(dk).strides, p.dv_strides = view_of(dv).strides;
  p.delta = delta.ptr<float>();
  p.dlse = dlse ? dlse->ptr<float>() : nullptr;
  p.deterministic = options.deterministic;
  if (p.forward.batch > 0 && p.forward.q_heads > 0)
    run_kernel(operation, kKernels, q.device, &Kernels::backward, p, stream);
}

}  // namespace

void attention_pack_mask(const Tensor& mask, int64_t keys, const Tensor& words, void* stream) {
  const Check check("attention_pack_mask");
  check.dims(mask, "mask", 4);
  check.dtype(mask, "mask", {DType::boolean});
  check.that(keys >= 0 && (mask.shape[3] == keys || mask.shape[3] == 1), "mask", "has %ld keys, expected %ld or 1",
             mask.shape[3], keys);
  check.dtype(words, "words", {DType::i32});
  check.shape(words, "words", {mask.shape[0], mask.shape[1], mask.shape[2], (keys + 31) / 32});
  check.same_device(words, "words", mask, "mask");
  check.contiguous(words, "words");
  attention::PackMaskParams p = {};
  p.mask = mask.ptr<uint8_t>();
  p.words = words.ptr<uint32_t>();
  std::copy_n(mask.shape, 3, p.sizes);
  std::copy_n(mask.strides, 3, p.strides);
  p.key_stride = mask.shape[3] == 1 ? 0 : mask.strides[3];
  p.keys = keys;
  if (words.numel() > 0) run_kernel("attention_pack_mask", kKernels, mask.device, &Kernels::pack_mask, p, stream);
}

int64_t attention_workspace(const Tensor& q, const Tensor& k) {
  return workspace_of(q, splits_of(q, k));
}

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                       const AttentionOptions& options, void* stream) {
  run_forward("attention", q, k, v, nullptr, out, lse, options, stream);
}

void attention_backward(const Tensor& dout, const Tensor* dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& out, const Tensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                        const Tensor& delta, const AttentionOptions& options, const AttentionOptionGradients& gradients,
                        void* stream) {
  run_backward("attention_backward", dout, dlse, q, k, v, nullptr, out, lse, dq, dk, dv, delta, options, gradients,
               stream);
}

void attention_varlen_forward(const Tensor& q, const Tensor& k, const Tensor& v, const PackedSequences& sequences,
                              const Tensor& out, const Tensor& lse, const AttentionOptions& options, void* stream) {
  run_forward("attention_varlen", q, k, v, &sequences, out, lse, options, stream);
}

void attention_varlen_backward(const Tensor& dout, const Tensor* dlse, const Tensor& q, const Tensor& k,
                               const Tensor& v, const PackedSequences& sequences, const Tensor& out, const Tensor& lse,
                               const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& delta,
                               const AttentionOptions& options, const AttentionOptionGradients& gradients,
                               void* stream) {
  run_backward("attention_varlen_backward", dout, dlse, q, k, v, &sequences, out, lse, dq, dk, dv, delta, options,
               gradients, stream);
}

}  // namespace tilewise
