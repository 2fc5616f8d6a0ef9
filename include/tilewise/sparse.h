// Linear layers with sparse weights: y = x W^T + bias. R rows of x, I inputs, O outputs, Z kept values.
//
// All floating tensors of a call share one dtype (f32, f16, bf16); sums are kept in f32. x, dy may have any row stride;
// everything else is contiguous.
//
// 2:4 weights keep two of every four consecutive inputs. `values` [O, I / 2] holds the kept values in the order of
// their inputs. `indices` u8[O, ceil(I / 8)] holds a nibble per group of four inputs, the low nibble first: bits 0-1
// are the position of the group's first kept value, bits 2-3 that of its second, which is larger. The unused last
// nibble of an odd number of groups is 0. It is also the order in which the sparse tensor cores want their metadata.
//
// CSR weights: crow i32[O + 1], col i32[Z] with increasing columns in every row, values [Z].
#pragma once
#include "tilewise/tensor.h"

namespace tilewise {

// y [R, O] = x [R, I] W^T + bias [O] (null: none)
void nm_linear(const Tensor& x, const Tensor& values, const Tensor& indices, const Tensor* bias, const Tensor& y,
               void* stream = nullptr);
// dx [R, I] = dy [R, O] W
void nm_linear_dx(const Tensor& dy, const Tensor& values, const Tensor& indices, const Tensor& dx,
                  void* stream = nullptr);
// dvalues [O, I / 2] = the kept positions of dy^T x
void nm_linear_dvalues(const Tensor& dy, const Tensor& x, const Tensor& indices, const Tensor& dvalues,
                       void* stream = nullptr);
// total [O] = the sum of the rows of dy [R, O]
void column_sum(const Tensor& dy, const Tensor& total, void* stream = nullptr);

// A CSR matrix with its cut into tiles of kCsrRows rows by `tile` columns, each of which works from the first-level
// cache. CPU only.
struct CsrMatrix {
  Tensor crow, col;
  int64_t columns;  // I
  int64_t tile;     // columns per tile
  Tensor tile_ptr;  // i32[row blocks * column tiles + 1], row block first: where each tile's records begin
  Tensor records;   // i32[n, 4]: row, first entry, number of entries, sum of the numbers before; a run of one row's
                    // entries within the tile
  Tensor within;    // u8[Z]: each entry's column within its tile, in the order of the records
};
constexpr int kCsrRows = 128;

// `order` i32[Z] (null: as they stand) says which value belongs to which entry: so the transposed matrix shares values.
void csr_linear(const Tensor& x, const Tensor& values, const CsrMatrix& matrix, const Tensor* order, const Tensor* bias,
                const Tensor& y, void* stream = nullptr);
// dvalues [Z] = the entries of dy^T x
void csr_linear_dvalues(const Tensor& dy, const Tensor& x, const CsrMatrix& matrix, const Tensor& dvalues,
                        void* stream = nullptr);

}  // namespace tilewise
