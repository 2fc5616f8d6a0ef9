// Tensor maps of the Hopper kernels. Host code.
#pragma once
#include "attention/params.h"
#include "simt/simt.h"

namespace tilewise::attention {

// Whether tensor maps can describe these: they step along every dimension, so none of more than one element may stand
// still.
inline bool has_tensor_map(const Strides& s, int64_t batch, int64_t heads, int64_t rows) {
  return (batch <= 1 || s.batch > 0) && (heads <= 1 || s.head > 0) && (rows <= 1 || s.row > 0);
}

// (d, rows, heads, batch) in boxes of 64 columns by `box_rows`. A dimension of extent one may have any stride.
inline const char* make_map(simt::TensorMap& map, const void* base, const Strides& s, int dim, int64_t rows, int heads,
                            int batch, int box_rows) {
  const auto bytes = [](int64_t stride, int64_t extent) {
    return static_cast<uint64_t>(extent <= 1 ? 16 : stride * 2);
  };
  const uint64_t dims[4] = {static_cast<uint64_t>(dim), static_cast<uint64_t>(rows), static_cast<uint64_t>(heads),
                            static_cast<uint64_t>(batch)};
  const uint64_t strides[3] = {bytes(s.row, rows), bytes(s.head, heads), bytes(s.batch, batch)};
  const uint32_t box[4] = {64, static_cast<uint32_t>(box_rows), 1, 1};
  return simt::make_tensor_map_sw128(&map, base, 2, 4, dims, strides, box);
}

}  // namespace tilewise::attention
