// Attention over paged caches: checked arguments to the kernels' parameters, and the choice of the kernels.
#include <algorithm>

#include "attention/arguments.h"
#include "attention/cache.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/paged/checks.h"

namespace tilewise {

TILEWISE_KERNEL_SET(attention)

namespace {

using attention::Kernels;
using attention::kUnlimited;
using attention::PagedParams;

int window_side(const Check& check, const char* name, const std::optional<int64_t>& size) {
  if (!size) return kUnlimited;
  check.that(*size >= 0, name, "is %ld, expected at least 0", *size);
  return int(std::min(*size, paged::kMaxExtent / 2));
}

void set_options(const Check& check, const PagedAttentionOptions& options, PagedParams& p) {
  p.window_left = window_side(check, "window's left", options.window_left);
  p.window_right = window_side(check, "window's right", options.window_right);
  if (options.causal) p.window_right = 0;
  p.scale = attention::checked_scale(check, options.scale, p.dim);
  p.softcap = attention::checked_softcap(check, options.softcap);
  if (options.num_splits)
    check.that(*options.num_splits >= 1, "num_splits", "is %ld, expected at least 1", *options.num_splits);
}

// What decides about ranges of keys.
void set_sizes(const Tensor& q, const Cache& cache, const PagedAttentionOptions& options, PagedParams& p) {
  p.type = paged::type_of(q);
  p.format = paged::Format(options.format);
  p.batch = int(q.shape[0]), p.q_heads = int(q.shape[1]), p.tokens = int(q.shape[2]), p.dim = int(q.shape[3]);
  p.kv_heads = int(cache.k_pages.shape[2]);
  p.table.pages_per_row = int(cache.block_table.shape[1]), p.table.page_size = int(cache.k_pages.shape[1]);
}

// As asked for, or as the shapes suggest; 0, on CPU: as the kernel sees fit.
int splits_of(const PagedAttentionOptions& options, const PagedParams& p, bool host) {
  constexpr int64_t kMinKeys = 64, kMost = 1024;
  const int64_t most = std::min(kMost, int64_t(p.table.pages_per_row) * p.table.page_size / kMinKeys);
  if (options.num_splits) return int(std::max<int64_t>(1, std::min(*options.num_splits, most)));
  return host ? 0 : paged::cuda_splits(p);
}

void check_query(const Check& check, const Tensor& q, const Tensor& k_pages) {
  check.dims(q, "q", 4);
  check.dtype(q, "q", {DType::f32, DType::f16, DType::bf16});
  check.last_dim_contiguous(q, "q");
  check.same_device(q, "q", k_pages, "k_pages");
  check.that(q.shape[1] % k_pages.shape[2] == 0, "q", "has %ld heads, expected a multiple of %ld (k_pages's)",
             q.shape[1], k_pages.shape[2]);
  for (int i = 0; i < 4; i++)
    check.that(q.shape[i] <= paged::kMaxExtent, "q", "has a dimension of %ld, expected at most %ld", q.shape[i],
               paged::kMaxExtent);
}

void check_results(const Check& check, const Tensor& q, const Tensor& out, const Tensor& lse) {
  check.shape(out, "out", {q.shape[0], q.shape[1], q.shape[2], q.shape[3]});
  check.same_dtype(out, "out", q, "q");
  check.same_device(out, "out", q, "q");
  check.last_dim_contiguous(out, "out");
  check.output(out, "out");
  check.dtype(lse, "lse", {DType::f32});
  check.shape(lse, "lse", {q.shape[0], q.shape[1], q.shape[2]});
  check.same_device(lse, "lse", q, "q");
  check.contiguous(lse, "lse");
}

// Lengths that exist, and pages that exist wherever a key is looked up.
void check_lengths(const Check& check, const PagedParams& p) {
  for (int64_t b = 0; b < p.batch; b++) {
    const int64_t length = p.seq_lens[b];
    check.that(length >= 0, "seq_lens", "[%ld] is %ld, expected at least 0", b, length);
    const int64_t unseen = p.window_left == kUnlimited ? 0 : length - p.tokens - p.window_left;
    paged::check_pages(check, p.table, b, "seq_lens", length, length, std::clamp<int64_t>(unseen, 0, length));
  }
}

}  // namespace

int64_t paged_attention_workspace(const Tensor& q, const Cache& cache, const PagedAttentionOptions& options) {
  if (host_checks_indices(q.device) || q.ndim != 4 || cache.k_pages.ndim != 4 || cache.block_table.ndim != 2) return 0;
  if (cache.k_pages.shape[2] == 0 || q.numel() == 0) return 0;
  PagedParams p = {};
  set_sizes(q, cache, options, p);
  return paged::workspace_floats(splits_of(options, p, false), q.numel() / q.shape[3], q.shape[3]);
}

void paged_attention(const Tensor& q, const Cache& cache, const Tensor& seq_lens, const Tensor& out, const Tensor& lse,
                     const PagedAttentionOptions& options, const Tensor* workspace, void* stream) {
  const Check check("paged_attention");
  const Tensor &k_pages = cache.k_pages, &v_pages = cache.v_pages;
  const bool native = options.format == CacheFormat::native;
  native ? paged::check_cache(check, k_pages, v_pages) : attention::check_codes(check, k_pages, v_pages);
  check_query(check, q, k_pages);
  attention::check_rows(check, k_pages, options.format, q.shape[3], "q");
  if (native) check.same_dtype(q, "q", k_pages, "k_pages");
  check_results(check, q, out, lse);
  for (const Tensor* in : {&q, &k_pages, &v_pages, options.k_channels, options.v_channels})
    if (in) check.no_overlap(out, "out", *in, "another argument");
  check.dtype(seq_lens, "seq_lens", {DType::i32});
  check.shape(seq_lens, "seq_lens", {q.shape[0]});
  check.same_device(seq_lens, "seq_lens", q, "q");
  check.contiguous(seq_lens, "seq_lens");
  PagedParams p = {};
  set_sizes(q, cache, options, p);
  p.table = paged::check_block_table(check, cache.block_table, k_pages, p.batch);
  set_options(check, options, p);
  p.q = q.data, p.k_pages = k_pages.data, p.v_pages = v_pages.data, p.out = out.data, p.lse = lse.ptr<float>();
  p.q_strides = {q.strides[0], q.strides[2], q.strides[1]};
  p.out_strides = {out.strides[0], out.strides[2], out.strides[1]};
  p.lse_strides = {lse.strides[0], lse.strides[2], lse.strides[1]};
  p.k_strides = paged::page_strides(k_pages), p.v_strides = paged::page_strides(v_pages);
  p.k_channels = attention::check_channels(check, options.k_channels, "k_channels", options.format, k_pages, p.dim);
  p.v_channels = attention::check_channels(check, options.v_channels, "v_channels", options.format, k_pages, p.dim);
  p.seq_lens = seq_lens.ptr<int32_t>();
  const bool host = host_checks_indices(q.device);
  if (host) check_lengths(check, p);
  p.splits = splits_of(options, p, host);
  if (q.numel() == 0) return;
  p.workspace = paged::check_workspace(check, workspace, paged_attention_workspace(q, cache, options), q);
  run_kernel("paged_attention", kKernels, q.device, native ? &Kernels::paged : &Kernels::paged_codes, p, stream);
}

}  // namespace tilewise
