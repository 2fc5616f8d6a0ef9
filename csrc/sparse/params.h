// What every backend of the family receives. Plain C: the per-ISA objects include it too.
#pragma once
#include "common/runtime.h"

namespace tilewise::sparse {

enum class Type : int { f32, bf16, f16 };

constexpr int kCsrRowBlock = 128;
constexpr int64_t kFewCsrRows = 2;  // up to here the plan is not used

struct NmForwardParams {
  const void* x;           // [rows, in]
  const void* values;      // [out, in / 2]
  const uint8_t* indices;  // [out, ceil(in / 8)]
  const void* bias;        // [out], or null
  void* y;                 // [rows, out]
  int64_t rows, in, out, x_stride;
  Type type;
};

struct NmGradInputParams {
  const void* dy;          // [rows, out]
  const void* values;      // [out, in / 2]
  const uint8_t* indices;  // [out, ceil(in / 8)]
  void* dx;                // [rows, in]
  int64_t rows, in, out, dy_stride;
  Type type;
};

struct NmGradValuesParams {
  const void* dy;          // [rows, out]
  const void* x;           // [rows, in]
  const uint8_t* indices;  // [out, ceil(in / 8)]
  void* dvalues;           // [out, in / 2]
  int64_t rows, in, out, dy_stride, x_stride;
  Type type;
};

struct ColumnSumParams {
  const void* dy;  // [rows, out]
  void* total;     // [out]
  int64_t rows, out, dy_stride;
  Type type;
};

struct CsrTiling {
  const int32_t* tile_ptr;  // [row blocks, column tiles] + 1
  const int32_t* records;   // [n, 4]: row, first entry, count, sum of the counts before
  const uint8_t* within;    // [nnz], in the order of the records: column within the tile
  int64_t tile;             // columns per tile
};

struct CsrForwardParams {
  const void* x;         // [rows, in]
  const void* values;    // [nnz]
  const int32_t* crow;   // [out + 1]
  const int32_t* col;    // [nnz]
  const int32_t* order;  // [nnz], or null: values[order[e]] belongs to entry e
  const void* bias;      // [out], or null
  void* y;               // [rows, out]
  CsrTiling tiling;
  int64_t rows, in, out, nnz, x_stride;
  Type type;
};

struct CsrGradValuesParams {
  const void* dy;       // [rows, out]
  const void* x;        // [rows, in]
  const int32_t* crow;  // [out + 1]
  const int32_t* col;   // [nnz]
  void* dvalues;        // [nnz]
  CsrTiling tiling;
  int64_t rows, in, out, nnz, dy_stride, x_stride;
  Type type;
};

// The family's kernels on one machine; null = not available there.
struct Kernels {
  KernelFn<NmForwardParams> nm_forward;
  KernelFn<NmGradInputParams> nm_grad_input;
  KernelFn<NmGradValuesParams> nm_grad_values;
  KernelFn<ColumnSumParams> column_sum;
  KernelFn<CsrForwardParams> csr_forward;
  KernelFn<CsrGradValuesParams> csr_grad_values;
};

}  // namespace tilewise::sparse
