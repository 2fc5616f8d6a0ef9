// Writing paged caches: checked arguments to the kernels' parameters, and the choice of the kernels.
#include "attention/cache.h"

namespace tilewise {

TILEWISE_KERNEL_SET(attention)

namespace {

using attention::CacheWriteParams;
using attention::Kernels;

void set_rotation(const Check& check, const CacheWriteOptions& options, const Tensor& pages, int64_t batch,
                  int64_t tokens, CacheWriteParams& p) {
  check.that(!options.cos == !options.sin, options.cos ? "sin" : "cos", "is missing, expected both or none");
  if (!options.cos) return;
  const Tensor &cos = *options.cos, &sin = *options.sin;
  for (const auto& [t, name] : {std::pair{&cos, "cos"}, {&sin, "sin"}}) {
    check.dtype(*t, name, {DType::f32});
    check.shape(*t, name, {kAny, tokens, kAny});
    check.contiguous(*t, name);
    check.same_device(*t, name, pages, "k_pages");
  }
  check.that(cos.shape[0] == batch || cos.shape[0] == 1, "cos", "has batch %ld, expected %ld or 1", cos.shape[0],
             batch);
  check.that(2 * cos.shape[2] <= p.dim, "cos", "has %ld angles, expected at most %d (half of the head dim)",
             cos.shape[2], p.dim / 2);
  check.shape(sin, "sin", {cos.shape[0], cos.shape[1], cos.shape[2]});
  p.cos = cos.ptr<float>(), p.sin = sin.ptr<float>();
  p.rotary = int(2 * cos.shape[2]);
  p.rotary_batch = cos.shape[0] == 1 ? 0 : tokens * cos.shape[2];
  p.interleaved = options.interleaved;
}

void check_indices(const Check& check, const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
                   const Tensor& pages) {
  check.dtype(t, name, {DType::i32});
  check.shape(t, name, shape);
  check.same_device(t, name, pages, "k_pages");
  check.contiguous(t, name);
}

// What both ways of writing have in common.
void set_cache(const Check& check, const Tensor& k_pages, const Tensor& block_table, const CacheWriteOptions& options,
               int64_t dim, CacheWriteParams& p) {
  check.output(k_pages, "k_pages");
  p.table = paged::check_block_table(check, block_table, k_pages, p.batch);
  p.k_pages = k_pages.data;
  p.k_strides = paged::page_strides(k_pages);
  p.kv_heads = int(k_pages.shape[2]), p.dim = int(dim);
  p.format = paged::Format(options.format);
  p.k_channels = attention::check_channels(check, options.k_channels, "k_channels", options.format, k_pages, dim);
  p.v_channels = attention::check_channels(check, options.v_channels, "v_channels", options.format, k_pages, dim);
  set_rotation(check, options, k_pages, p.batch, p.tokens, p);
}

}  // namespace

int64_t cache_row_bytes(CacheFormat format, int64_t dim) {
  const auto groups = [dim](int64_t channels) { return (dim + channels - 1) / channels; };
  switch (format) {
    case CacheFormat::int8: return groups(16) * 16 + 4;
    case CacheFormat::int4: return groups(32) * 16 + 4;
    case CacheFormat::int2: return groups(64) * 16 + 4;
    case CacheFormat::bfp12: return groups(32) * 17;
    case CacheFormat::native: break;
  }
  return 0;  // native rows are counted in numbers
}

void cache_append(const Cache& cache, const Tensor& start, const Tensor& k, const Tensor& v,
                  const CacheWriteOptions& options, void* stream) {
  const Check check("cache_append");
  const Tensor &k_pages = cache.k_pages, &v_pages = cache.v_pages;
  const bool native = options.format == CacheFormat::native;
  native ? paged::check_cache(check, k_pages, v_pages) : attention::check_codes(check, k_pages, v_pages);
  check.dims(k, "k", 4);
  check.dtype(k, "k", {DType::f32, DType::f16, DType::bf16});
  attention::check_rows(check, k_pages, options.format, k.shape[3], "k");
  check.shape(k, "k", {kAny, k_pages.shape[2], kAny, kAny});
  check.shape(v, "v", {k.shape[0], k.shape[1], k.shape[2], k.shape[3]});
  check.same_dtype(v, "v", k, "k");
  if (native) check.same_dtype(k, "k", k_pages, "k_pages");
  check.output(v_pages, "v_pages");
  check.no_overlap(v_pages, "v_pages", k_pages, "k_pages");
  for (const auto& [t, name] : {std::pair{&k, "k"}, {&v, "v"}}) {
    check.same_device(*t, name, k_pages, "k_pages");
    check.last_dim_contiguous(*t, name);
    check.no_overlap(k_pages, "k_pages", *t, name);
    check.no_overlap(v_pages, "v_pages", *t, name);
  }
  check.that(k.shape[0] <= paged::kMaxExtent && k.shape[2] <= paged::kMaxExtent, "k",
             "has %ld sequences of %ld tokens, expected less than 2^31", k.shape[0], k.shape[2]);
  CacheWriteParams p = {};
  p.batch = int(k.shape[0]), p.tokens = int(k.shape[2]);
  check_indices(check, start, "start", {k.shape[0]}, k_pages);
  set_cache(check, k_pages, cache.block_table, options, k.shape[3], p);
  if (k.numel() == 0) return;
  if (host_checks_indices(k.device))
    for (int64_t b = 0; b < p.batch; b++) {
      const int64_t first = start.ptr<int32_t>()[b];
      paged::check_pages(check, p.table, b, "start", first, first + p.tokens, std::max<int64_t>(first, 0));
    }
  p.v_pages = v_pages.data;
  p.v_strides = paged::page_strides(v_pages);
  p.start = start.ptr<int32_t>();
  p.k = k.data, p.v = v.data;
  p.k_input = {k.strides[0], k.strides[2], k.strides[1]};
  p.v_input = {v.strides[0], v.strides[2], v.strides[1]};
  p.type = paged::type_of(k);
  run_kernel("cache_append", kKernels, k.device, &Kernels::cache_write, p, stream);
}

void cache_rotate(const Tensor& k_pages, const Tensor& block_table, const Tensor& positions, int64_t dim,
                  const CacheWriteOptions& options, void* stream) {
  const Check check("cache_rotate");
  options.format == CacheFormat::native ? paged::check_cache(check, k_pages, k_pages)
                                        : attention::check_codes(check, k_pages, k_pages);
  attention::check_rows(check, k_pages, options.format, dim, "dim");
  check_indices(check, positions, "positions", {kAny, kAny}, k_pages);
  CacheWriteParams p = {};
  p.batch = int(positions.shape[0]), p.tokens = int(positions.shape[1]);
  set_cache(check, k_pages, block_table, options, dim, p);
  check.that(options.cos, "cos", "is missing, expected the angles' cosines");
  if (positions.numel() == 0) return;
  if (host_checks_indices(k_pages.device))
    for (int64_t i = 0; i < positions.numel(); i++) {
      const int64_t at = positions.ptr<int32_t>()[i];
      paged::check_pages(check, p.table, i / p.tokens, "positions", at, at + 1, std::max<int64_t>(at, 0));
    }
  p.positions = positions.ptr<int32_t>();
  p.type = paged::type_of(k_pages);
  run_kernel("cache_rotate", kKernels, k_pages.device, &Kernels::cache_write, p, stream);
}

}  // namespace tilewise
