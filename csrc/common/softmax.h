// The end of a row of softmax, of any kernel on CPU.
#pragma once
#include "common/simd.h"

namespace tilewise {
namespace {

struct RowEnd {
  bool nothing;  // to attend to: the row is zero
  float factor;  // of what was summed
  float lse;     // natural logarithm
};

// `sum` of weights relative to `reference` (a power of two), which the weight of a `sink` (natural logarithm, -inf for
// none) joins.
inline RowEnd end_row(float reference, float sum, float sink = -kInfinity) {
  constexpr double kLog2OfE = 1.4426950408889634, kLnOf2 = 0.6931471805599453;
  if (sum == 0) return {true, 0, sink};
  if (sink == -kInfinity) return {false, 1 / sum, static_cast<float>((reference + __builtin_log2(sum)) * kLnOf2)};
  // Relative to the higher of reference and sink nothing overflows, however far apart they are.
  const double sink_log2 = sink * kLog2OfE, top = max_of<double>(reference, sink_log2);
  const double weight = __builtin_exp2(reference - top), total = sum * weight + __builtin_exp2(sink_log2 - top);
  return {false, static_cast<float>(weight / total), static_cast<float>((top + __builtin_log2(total)) * kLnOf2)};
}

}  // namespace
}  // namespace tilewise
