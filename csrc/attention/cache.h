// Checks of caches whose rows have a format.
#pragma once
#include "attention/params.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/paged/checks.h"
#include "tilewise/attention.h"

namespace tilewise::attention {

// Pages of bytes.
inline void check_codes(const Check& check, const Tensor& k_pages, const Tensor& v_pages) {
  check.dims(k_pages, "k_pages", 4);
  check.dtype(k_pages, "k_pages", {DType::u8});
  paged::check_pools(check, k_pages, v_pages);
}

// The rows are those of heads of `dim` channels, which `name` has.
inline void check_rows(const Check& check, const Tensor& pages, CacheFormat format, int64_t dim, const char* name) {
  check.that(dim >= 1 && dim <= paged::kMaxHeadDim, name, "has head dim %ld, expected 1 to %d", dim,
             paged::kMaxHeadDim);
  const int64_t expected = format == CacheFormat::native ? dim : cache_row_bytes(format, dim);
  if (format == CacheFormat::native)
    check.that(pages.shape[3] == dim, name, "has head dim %ld, expected %ld (k_pages's)", dim, pages.shape[3]);
  else
    check.that(pages.shape[3] == expected, "k_pages", "has rows of %ld bytes, expected %ld for head dim %ld",
               pages.shape[3], expected, dim);
}

inline const float* check_channels(const Check& check, const Tensor* channels, const char* name, CacheFormat format,
                                   const Tensor& pages, int64_t dim) {
  if (!channels) return nullptr;
  check.that(format != CacheFormat::native && format != CacheFormat::bfp12, name,
             "is given, expected none for this format");
  check.dtype(*channels, name, {DType::f32});
  check.shape(*channels, name, {pages.shape[2], dim});
  check.contiguous(*channels, name);
  check.same_device(*channels, name, pages, "k_pages");
  return channels->ptr<float>();
}

}  // namespace tilewise::attention
