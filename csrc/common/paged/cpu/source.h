// What the rows of a page hold. A source hands out a row in units of kVectors vectors, each of W channels:
//   kItem                        bytes of an element, in which strides count
//   kVectors, units(dim)         vectors of a unit, units of a row
//   channel(unit, vector)        the first of the vector's channels
//   load_unit(row, unit, x)
//   whole_units(dim)             no unit reaches beyond the row
#pragma once
#include "common/isa.h"
#include "common/paged/params.h"

namespace tilewise::paged {
namespace {

template <class T>
struct FloatRows {
  static constexpr int kItem = sizeof(T), kVectors = 1;

  static int units(int dim) { return int(ceil_div(dim, W)); }
  static bool whole_units(int dim) { return dim % W == 0; }
  static int channel(int unit, int) { return unit * W; }
  static TILEWISE_INLINE void load_unit(const char* row, int unit, VF (&x)[1]) {
    x[0] = load(reinterpret_cast<const T*>(row) + unit * W);
  }
  static void widen(float* to, const char* row, int dim) {
    const T* from = reinterpret_cast<const T*>(row);
    int d = 0;
    for (; d + W <= dim; d += W) store(to + d, load(from + d));
    if (d < dim) store(to + d, load(from + d, dim - d), dim - d);
  }
};

}  // namespace
}  // namespace tilewise::paged
