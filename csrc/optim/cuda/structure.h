// Second moments whose scales belong to rows and columns: where an element stands in its matrix, and what its row and
// column hold.
#pragma once
#include "optim/cuda/tensors.h"

namespace tilewise::optim {

// The parts of an entry's workspace (layout: params.h).
struct Workspace {
  float *column_partials, *row_partials, *scales;

  SIMT_DEVICE explicit Workspace(const Entry& t) {
    column_partials = t.workspace;
    row_partials = column_partials + ceil_div<int64_t>(t.rows, kTileRows) * t.columns;
    scales = row_partials + ceil_div<int64_t>(t.columns, kTileColumns) * t.rows;
  }
  SIMT_DEVICE float* inverse_mean(const Entry& t) const { return scales + t.rows + t.columns; }
};

// The launcher sees to it that neither side has 2^31 or more elements.
struct Place {
  uint32_t row, column;

  SIMT_DEVICE Place() : row(0), column(0) {}
  SIMT_DEVICE Place(int64_t element, const Entry& t) {
    const uint32_t width = static_cast<uint32_t>(t.columns);
    if (element >> 32 == 0) {
      row = static_cast<uint32_t>(element) / width;
      column = static_cast<uint32_t>(element) % width;
    } else {
      row = static_cast<uint32_t>(element / width);
      column = static_cast<uint32_t>(element % width);
    }
  }
  SIMT_DEVICE void advance(int elements, const Entry& t) {
    column += elements;
    while (column >= static_cast<uint32_t>(t.columns)) {
      column -= static_cast<uint32_t>(t.columns);
      row++;
    }
  }
};

// Visits Run elements from `at` on: use(i, what their row holds, what their column holds). `held` is rows + columns
// long; beyond the tensor's end the last row serves.
template <int Run, class Use>
SIMT_DEVICE void for_each_place(const float* held, Place at, const Entry& t, const Use& use) {
  const float* columns = held + t.rows;
#pragma unroll
  for (int i = 0; i < Run; i++) {
    const uint32_t last = static_cast<uint32_t>(t.rows) - 1;
    use(i, held[at.row < last ? at.row : last], columns[at.column]);
    at.advance(1, t);
  }
}

SIMT_DEVICE float rank1_scale(float row, float column) {
  return fmaxf(fminf(row, column), kMinUnsignedScale);
}

}  // namespace tilewise::optim
