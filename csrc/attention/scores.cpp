// What attention weighed: arguments to parameters.
#include "attention/arguments.h"

namespace tilewise {

TILEWISE_KERNEL_SET(attention)

namespace {

using attention::Arguments;
using attention::check_block_size;
using attention::Kernels;
using attention::ScoresParams;
using attention::type_of;
using attention::View;
using attention::view_of;

ScoresParams scores_params(const Check& check, const Tensor& q, const Tensor& k, const Tensor& lse,
                           const ScoreOptions& options) {
  check.dims(q, "q", 4);
  check.dims(k, "k", 4);
  check.dtype(q, "q", {DType::f32, DType::f16, DType::bf16});
  const Arguments a{check, q};
  a.like_q(q, "q");
  a.like_q(k, "k");
  a.statistic(lse, "lse");
  const View queries = view_of(q), keys = view_of(k);
  a.heads_of(queries, keys);
  a.head_dim(queries.dim, "q");
  if (options.last_key) {
    check.dtype(*options.last_key, "last_key", {DType::i32});
    check.shape(*options.last_key, "last_key", {q.shape[2]});
    check.same_device(*options.last_key, "last_key", q, "q");
    check.contiguous(*options.last_key, "last_key");
  }
  ScoresParams p = {};
  p.q = q.data, p.k = k.data;
  p.lse = lse.ptr<float>();
  p.last_key = options.last_key ? options.last_key->ptr<int32_t>() : nullptr;
  p.q_strides = queries.strides, p.k_strides = keys.strides;
  p.batch = static_cast<int>(queries.batch), p.q_heads = static_cast<int>(queries.heads);
  p.kv_heads = static_cast<int>(keys.heads), p.rows = static_cast<int>(queries.rows);
  p.keys = static_cast<int>(keys.rows), p.dim = static_cast<int>(queries.dim);
  p.scale = attention::checked_scale(check, options.scale, queries.dim);
  p.type = type_of(q.dtype);
  return p;
}

void check_result(const Arguments& a, const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
                  std::initializer_list<const Tensor*> others) {
  a.check.dtype(t, name, {DType::f32});
  a.check.shape(t, name, shape);
  a.check.same_device(t, name, a.q, "q");
  a.check.contiguous(t, name);
  a.output(t, name, others);
}

}  // namespace

void attention_column_sums(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& sums,
                           const ScoreOptions& options, void* stream) {
  const Check check("attention_column_sums");
  ScoresParams p = scores_params(check, q, k, lse, options);
  check_result({check, q}, sums, "sums", {q.shape[0], q.shape[1], k.shape[2]}, {&q, &k, &lse});
  p.sums = sums.ptr<float>();
  if (sums.numel() > 0) run_kernel("attention_column_sums", kKernels, q.device, &Kernels::column_sums, p, stream);
}

void attention_block_max(const Tensor& q, const Tensor& k, const Tensor& lse, int64_t block_q, int64_t block_k,
                         const Tensor& maxima, const ScoreOptions& options, void* stream) {
  const Check check("attention_block_max");
  ScoresParams p = scores_params(check, q, k, lse, options);
  check_block_size(check, block_q, "block_size (queries)");
  check_block_size(check, block_k, "block_size (keys)");
  const int64_t down = (q.shape[2] + block_q - 1) / block_q, across = (k.shape[2] + block_k - 1) / block_k;
  check_result({check, q}, maxima, "maxima", {q.shape[0], q.shape[1], down, across}, {&q, &k, &lse});
  p.maxima = maxima.ptr<float>();
  p.block_q = static_cast<int>(block_q), p.block_k = static_cast<int>(block_k);
  if (maxima.numel() > 0) run_kernel("attention_block_max", kKernels, q.device, &Kernels::block_max, p, stream);
}

}  // namespace tilewise
