// The family's only argument checks, and the choice of its kernels.
#include "tilewise/sparse.h"

#include <algorithm>
#include <utility>

#include "common/check.h"
#include "common/dispatch.h"
#include "sparse/params.h"

namespace tilewise {

TILEWISE_KERNEL_SET(sparse)

namespace {

using namespace sparse;

Type type_of(const Tensor& t) {
  return t.dtype == DType::f32 ? Type::f32 : t.dtype == DType::bf16 ? Type::bf16 : Type::f16;
}

// A matrix whose rows may lie apart: x and dy.
void check_rows(const Check& check, const Tensor& t, const char* name, int64_t columns) {
  check.dtype(t, name, {DType::f32, DType::f16, DType::bf16});
  check.shape(t, name, {kAny, columns});
  check.last_dim_contiguous(t, name);
}

// Everything else: dense, and like `as`.
void check_dense(const Check& check, const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
                 const Tensor& as, const char* as_name) {
  check.same_dtype(t, name, as, as_name);
  check.shape(t, name, shape);
  check.same_device(t, name, as, as_name);
  check.contiguous(t, name);
}

void check_output(const Check& check, const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
                  const Tensor& as, const char* as_name) {
  check_dense(check, t, name, shape, as, as_name);
  check.no_overlap(t, name, as, as_name);
}

int64_t row_stride(const Tensor& t) {
  return t.shape[0] > 1 ? t.strides[0] : t.shape[1];
}

// Each group's two positions in rising order. Eight bytes at a time: with `first` and `second` the two positions of
// every nibble, 4 + second - first - 1 has bit 2 set exactly where second > first, and never borrows.
bool legal_nibbles(const uint8_t* p, int64_t count) {
  constexpr uint64_t kFours = 0x4444444444444444, kOnes = 0x1111111111111111, kLow = 0x3333333333333333;
  uint64_t ok = kFours;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t m;
    __builtin_memcpy(&m, p + i, 8);
    ok &= ((m >> 2 & kLow) | kFours) - (m & kLow) - kOnes;
  }
  for (; i < count; i++) ok &= (((p[i] >> 2 & 0x33u) | 0x44u) - (p[i] & 0x33u) - 0x11u) | ~uint64_t{0xff};
  return (ok & kFours) == kFours;
}

void check_nm_indices(const Check& check, const Tensor& indices, int64_t out, int64_t in, const Tensor& as,
                      const char* as_name) {
  const int64_t row_bytes = (in + 7) / 8;
  check.that(in % 4 == 0, "weight", "has %ld input columns, expected a multiple of 4", static_cast<long>(in));
  check.dtype(indices, "indices", {DType::u8});
  check.shape(indices, "indices", {out, row_bytes});
  check.same_device(indices, "indices", as, as_name);
  check.contiguous(indices, "indices");
  if (!host_checks_indices(indices.device) || in == 0) return;
  const auto* p = indices.ptr<uint8_t>();
  const bool half = in % 8 != 0;  // the last byte of each row holds one group
  if (!half && legal_nibbles(p, out * row_bytes)) return;
  for (int64_t o = 0; o < out; o++) {
    const uint8_t* row = p + o * row_bytes;
    const uint8_t last = half ? row[row_bytes - 1] : 0x44;
    const bool ok = legal_nibbles(row, row_bytes - half) && (last >> 4 == 0) == half && (last & 3) < (last >> 2 & 3);
    check.that(ok, "indices",
               "row %ld holds a group that is not two rising positions (nibbles 4, 8, 9, c, d, e), expected only those",
               static_cast<long>(o));
  }
}

bool indices_below(const int32_t* p, int64_t count, int64_t bound) {
  bool ok = true;
  for (int64_t i = 0; i < count; i++) ok &= static_cast<uint32_t>(p[i]) < static_cast<uint32_t>(bound);
  return ok;
}

void check_crow(const Check& check, const Tensor& crow, int64_t nnz) {
  const auto* p = crow.ptr<int32_t>();
  const int64_t out = crow.shape[0] - 1;
  bool rising = p[0] == 0 && p[out] == nnz;
  for (int64_t i = 0; i < out; i++) rising &= p[i] <= p[i + 1];
  check.that(rising, "weight.crow", "does not rise from 0 to %ld (the number of values), expected that",
             static_cast<long>(nnz));
}

bool bytes_below(const uint8_t* p, int64_t count, int64_t bound) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < count; i++) largest = p[i] > largest ? p[i] : largest;
  return count == 0 || largest < bound;
}

// The plan's records: within their row block and row, in the order that `position` says, each entry once; and each
// entry's column within its tile.
void check_records(const Check& check, const CsrMatrix& m, int64_t out, int64_t nnz) {
  const int64_t across = (m.columns + m.tile - 1) / m.tile, tiles = (out + kCsrRows - 1) / kCsrRows * across;
  const int64_t count = m.records.shape[0];
  check.shape(m.tile_ptr, "weight.plan", {tiles + 1});
  check.shape(m.within, "weight.plan", {nnz});
  const int32_t *ptr = m.tile_ptr.ptr<int32_t>(), *crow = m.crow.ptr<int32_t>();
  bool ok = ptr[0] == 0 && ptr[tiles] == count;
  for (int64_t i = 0; i < tiles; i++) ok &= ptr[i] <= ptr[i + 1];
  int64_t position = 0;
  for (int64_t i = 0; ok && i < tiles; i++) {
    const int64_t begin = position, column = i % across * m.tile;
    const int64_t first_row = i / across * kCsrRows, end_row = first_row + kCsrRows < out ? first_row + kCsrRows : out;
    for (const int32_t* r = m.records.ptr<int32_t>() + 4 * ptr[i]; r < m.records.ptr<int32_t>() + 4 * ptr[i + 1];
         r += 4) {
      ok = ok && r[0] >= first_row && r[0] < end_row && r[2] >= 0 && r[1] >= crow[r[0]] &&
           int64_t{r[1]} + r[2] <= crow[r[0] + 1] && r[3] == position;
      if (!ok) break;
      position += r[2];
    }
    ok = ok && position <= nnz &&
         bytes_below(m.within.ptr<uint8_t>() + begin, position - begin, std::min(m.tile, m.columns - column));
  }
  check.that(ok && position == nnz, "weight.plan", "does not belong to this matrix, expected CSR's own");
}

void check_csr(const Check& check, const CsrMatrix& m, int64_t nnz, const Tensor& as, const char* as_name,
               bool with_plan = true) {
  if (!host_checks_indices(as.device))
    check.fail(ErrorKind::not_implemented, "weight", "is CSR on CUDA, expected CSR on CPU or another format");
  for (auto [t, name] : {std::pair{&m.crow, "weight.crow"},
                         {&m.col, "weight.col"},
                         {&m.tile_ptr, "weight.plan"},
                         {&m.records, "weight.plan"},
                         {&m.within, "weight.plan"}}) {
    check.dtype(*t, name, {t == &m.within ? DType::u8 : DType::i32});
    check.same_device(*t, name, as, as_name);
    check.contiguous(*t, name);
  }
  check.dims(m.crow, "weight.crow", 1);
  check.that(m.crow.shape[0] >= 1, "weight.crow", "is empty, expected one entry more than rows");
  check.shape(m.col, "weight.col", {nnz});
  check.shape(m.records, "weight.plan", {kAny, 4});
  check.that(m.columns >= 0 && m.columns < INT32_MAX, "weight", "has %ld columns, expected less than 2^31",
             static_cast<long>(m.columns));
  check.that(m.tile >= 1 && m.tile <= 256, "weight.plan", "has tiles of %ld columns, expected 1 to 256",
             static_cast<long>(m.tile));
  check_crow(check, m.crow, nnz);
  if (with_plan) return check_records(check, m, m.crow.shape[0] - 1, nnz);  // which is followed instead of `col`
  check.that(indices_below(m.col.ptr<int32_t>(), nnz, m.columns), "weight.col",
             "holds a column out of range, expected 0 <= column < %ld", static_cast<long>(m.columns));
}

CsrTiling tiling_of(const CsrMatrix& m) {
  return {m.tile_ptr.ptr<int32_t>(), m.records.ptr<int32_t>(), m.within.ptr<uint8_t>(), m.tile};
}

}  // namespace

void nm_linear(const Tensor& x, const Tensor& values, const Tensor& indices, const Tensor* bias, const Tensor& y,
               void* stream) {
  const Check check("linear");
  check.dims(x, "x", 2);
  check.dims(values, "weight.values", 2);
  const int64_t rows = x.shape[0], out = values.shape[0], in = 2 * values.shape[1];
  check_rows(check, x, "x", in);
  check_dense(check, values, "weight.values", {out, in / 2}, x, "x");
  check_nm_indices(check, indices, out, in, x, "x");
  if (bias) check_dense(check, *bias, "bias", {out}, x, "x");
  check_output(check, y, "y", {rows, out}, x, "x");
  if (rows == 0 || out == 0) return;
  const NmForwardParams params = {
      x.data,        values.data, indices.ptr<uint8_t>(), bias ? bias->data : nullptr, y.data, rows, in, out,
      row_stride(x), type_of(x)};
  run_kernel("linear", kKernels, x.device, &Kernels::nm_forward, params, stream);
}

void nm_linear_dx(const Tensor& dy, const Tensor& values, const Tensor& indices, const Tensor& dx, void* stream) {
  const Check check("linear backward");
  check.dims(dy, "dy", 2);
  check.dims(values, "weight.values", 2);
  const int64_t rows = dy.shape[0], out = values.shape[0], in = 2 * values.shape[1];
  check_rows(check, dy, "dy", out);
  check_dense(check, values, "weight.values", {out, in / 2}, dy, "dy");
  check_nm_indices(check, indices, out, in, dy, "dy");
  check_output(check, dx, "dx", {rows, in}, dy, "dy");
  if (rows == 0 || in == 0) return;
  const NmGradInputParams params = {dy.data, values.data, indices.ptr<uint8_t>(), dx.data,    rows,
                                    in,      out,         row_stride(dy),         type_of(dy)};
  run_kernel("linear backward", kKernels, dy.device, &Kernels::nm_grad_input, params, stream);
}

void nm_linear_dvalues(const Tensor& dy, const Tensor& x, const Tensor& indices, const Tensor& dvalues, void* stream) {
  const Check check("linear backward");
  check.dims(dy, "dy", 2);
  check.dims(x, "x", 2);
  const int64_t rows = dy.shape[0], out = dy.shape[1], in = x.shape[1];
  check_rows(check, dy, "dy", out);
  check_rows(check, x, "x", in);
  check.shape(x, "x", {rows, in});
  check.same_dtype(x, "x", dy, "dy");
  check.same_device(x, "x", dy, "dy");
  check_nm_indices(check, indices, out, in, dy, "dy");
  check_output(check, dvalues, "dvalues", {out, in / 2}, dy, "dy");
  check.no_overlap(dvalues, "dvalues", x, "x");
  if (out == 0 || in == 0) return;
  const NmGradValuesParams params = {dy.data, x.data, indices.ptr<uint8_t>(), dvalues.data,  rows,
                                     in,      out,    row_stride(dy),         row_stride(x), type_of(dy)};
  run_kernel("linear backward", kKernels, dy.device, &Kernels::nm_grad_values, params, stream);
}

void column_sum(const Tensor& dy, const Tensor& total, void* stream) {
  const Check check("column_sum");
  check.dims(dy, "dy", 2);
  check_rows(check, dy, "dy", kAny);
  check_output(check, total, "total", {dy.shape[1]}, dy, "dy");
  if (dy.shape[1] == 0) return;
  const ColumnSumParams params = {dy.data, total.data, dy.shape[0], dy.shape[1], row_stride(dy), type_of(dy)};
  run_kernel("column_sum", kKernels, dy.device, &Kernels::column_sum, params, stream);
}

void csr_linear(const Tensor& x, const Tensor& values, const CsrMatrix& matrix, const Tensor* order, const Tensor* bias,
                const Tensor& y, void* stream) {
  const Check check("linear");
  check.dims(x, "x", 2);
  check.dims(values, "weight.values", 1);
  const int64_t rows = x.shape[0], in = matrix.columns, nnz = values.shape[0];
  check_rows(check, x, "x", in);
  check_dense(check, values, "weight.values", {nnz}, x, "x");
  check_csr(check, matrix, nnz, x, "x", rows > kFewCsrRows);
  const int64_t out = matrix.crow.shape[0] - 1;
  if (order) {
    check.dtype(*order, "weight.order", {DType::i32});
    check.shape(*order, "weight.order", {nnz});
    check.same_device(*order, "weight.order", x, "x");
    check.contiguous(*order, "weight.order");
    check.that(indices_below(order->ptr<int32_t>(), nnz, nnz), "weight.order",
               "holds an index out of range, expected 0 <= index < %ld", static_cast<long>(nnz));
  }
  if (bias) check_dense(check, *bias, "bias", {out}, x, "x");
  check_output(check, y, "y", {rows, out}, x, "x");
  if (rows == 0 || out == 0) return;
  const CsrForwardParams params = {x.data,
                                   values.data,
                                   matrix.crow.ptr<int32_t>(),
                                   matrix.col.ptr<int32_t>(),
                                   order ? order->ptr<int32_t>() : nullptr,
                                   bias ? bias->data : nullptr,
                                   y.data,
                                   tiling_of(matrix),
                                   rows,
                                   in,
                                   out,
                                   nnz,
                                   row_stride(x),
                                   type_of(x)};
  run_kernel("linear", kKernels, x.device, &Kernels::csr_forward, params, stream);
}

void csr_linear_dvalues(const Tensor& dy, const Tensor& x, const CsrMatrix& matrix, const Tensor& dvalues,
                        void* stream) {
  const Check check("linear backward");
  check.dims(dy, "dy", 2);
  check.dims(x, "x", 2);
  check.dims(dvalues, "dvalues", 1);
  const int64_t rows = dy.shape[0], in = matrix.columns, nnz = dvalues.shape[0];
  check_csr(check, matrix, nnz, dy, "dy");
  const int64_t out = matrix.crow.shape[0] - 1;
  check_rows(check, dy, "dy", out);
  check_rows(check, x, "x", in);
  check.shape(x, "x", {rows, in});
  check.same_dtype(x, "x", dy, "dy");
  check.same_device(x, "x", dy, "dy");
  check_output(check, dvalues, "dvalues", {nnz}, dy, "dy");
  check.no_overlap(dvalues, "dvalues", x, "x");
  if (nnz == 0) return;
  const CsrGradValuesParams params = {dy.data,
                                      x.data,
                                      matrix.crow.ptr<int32_t>(),
                                      matrix.col.ptr<int32_t>(),
                                      dvalues.data,
                                      tiling_of(matrix),
                                      rows,
                                      in,
                                      out,
                                      nnz,
                                      row_stride(dy),
                                      row_stride(x),
                                      type_of(dy)};
  run_kernel("linear backward", kKernels, dy.device, &Kernels::csr_grad_values, params, stream);
}

}  // namespace tilewise
