// Argument checks of what reads or writes paged caches.
#pragma once
#include <algorithm>
#include <climits>

#include "common/check.h"
#include "common/paged/splits.h"

namespace tilewise::paged {

constexpr int64_t kMaxExtent = INT_MAX;  // kernels count positions, tokens and pages in 32 bits

inline Type type_of(const Tensor& t) {
  return t.dtype == DType::f32 ? Type::f32 : t.dtype == DType::f16 ? Type::f16 : Type::bf16;
}

inline PageStrides page_strides(const Tensor& t) {
  return {t.strides[0], t.strides[1], t.strides[2]};
}

// Pages of tokens: k_pages and v_pages alike but for their strides.
inline void check_pools(const Check& check, const Tensor& k_pages, const Tensor& v_pages) {
  check.last_dim_contiguous(k_pages, "k_pages");
  check.shape(v_pages, "v_pages", {k_pages.shape[0], k_pages.shape[1], k_pages.shape[2], k_pages.shape[3]});
  check.same_dtype(v_pages, "v_pages", k_pages, "k_pages");
  check.same_device(v_pages, "v_pages", k_pages, "k_pages");
  check.last_dim_contiguous(v_pages, "v_pages");
  check.that(k_pages.shape[1] >= 1, "k_pages", "has page size %ld, expected at least 1", k_pages.shape[1]);
  check.that(k_pages.shape[2] >= 1, "k_pages", "has %ld heads, expected at least 1", k_pages.shape[2]);
  check.that(k_pages.shape[0] <= kMaxExtent && k_pages.shape[1] <= kMaxExtent, "k_pages",
             "has %ld pages of %ld tokens, expected at most %ld of each", k_pages.shape[0], k_pages.shape[1],
             kMaxExtent);
}

// Pages of numbers.
inline void check_cache(const Check& check, const Tensor& k_pages, const Tensor& v_pages) {
  check.dims(k_pages, "k_pages", 4);
  check.dtype(k_pages, "k_pages", {DType::f32, DType::f16, DType::bf16});
  check_pools(check, k_pages, v_pages);
  check.that(k_pages.shape[3] >= 1 && k_pages.shape[3] <= kMaxHeadDim, "k_pages", "has head dim %ld, expected 1 to %d",
             k_pages.shape[3], kMaxHeadDim);
}

inline BlockTable check_block_table(const Check& check, const Tensor& table, const Tensor& k_pages, int64_t batch) {
  check.dtype(table, "block_table", {DType::i32});
  check.shape(table, "block_table", {batch, kAny});
  check.same_device(table, "block_table", k_pages, "k_pages");
  check.last_dim_contiguous(table, "block_table");
  check.that(table.shape[1] * k_pages.shape[1] <= kMaxExtent, "block_table",
             "has %ld pages of %ld tokens per row, expected at most %ld tokens", table.shape[1], k_pages.shape[1],
             kMaxExtent);
  return {table.ptr<int32_t>(), table.strides[0], int(table.shape[1]), int(k_pages.shape[1]), int(k_pages.shape[0])};
}

// Positions [start, end) of sequence b stand in existing pages; for the host, before a CPU kernel follows the table.
// `from`: the first of them that is looked up at all.
inline void check_pages(const Check& check, const BlockTable& table, int64_t b, const char* name, int64_t start,
                        int64_t end, int64_t from = 0) {
  const int64_t capacity = int64_t(table.pages_per_row) * table.page_size;
  check.that(start >= 0 && end <= capacity, name,
             "of sequence %ld is %ld and its last position would be %ld, expected positions in [0, %ld) (block_table)",
             b, start, end - 1, capacity);
  const int32_t* row = table.pages + b * table.row_stride;
  for (int64_t i = from / table.page_size; i * table.page_size < end; i++)
    check.that(row[i] >= 0 && row[i] < table.pool, "block_table", "[%ld, %ld] is %d, expected 0 <= page < %d", b, i,
               row[i], table.pool);
}

inline float* check_workspace(const Check& check, const Tensor* workspace, int64_t needed, const Tensor& q) {
  if (needed == 0) return nullptr;
  check.that(workspace && workspace->dtype == DType::f32 && workspace->contiguous() && workspace->numel() >= needed,
             "workspace", "has %ld elements, expected a contiguous float32 tensor of at least %ld",
             workspace ? workspace->numel() : 0, needed);
  check.same_device(*workspace, "workspace", q, "q");
  return workspace->ptr<float>();
}

}  // namespace tilewise::paged
