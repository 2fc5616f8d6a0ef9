// A square of floats, one vector a row, turned on its diagonal.
#pragma once
#include "common/simd.h"

namespace tilewise {
namespace {

// In-register transpose of a W x W block: log2(W) rounds of interleaving rows i and i + W / 2.
TILEWISE_INLINE void transpose(VF (&rows)[W]) {
#pragma GCC unroll 8
  for (int round = 1; round < W; round *= 2) {
    VI low, high;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      low[i] = i % 2 * W + i / 2;
      high[i] = low[i] + W / 2;
    }
    VF mixed[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; i++) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) rows[i] = mixed[i];
  }
}

}  // namespace
}  // namespace tilewise
