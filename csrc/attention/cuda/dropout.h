// The random bits of dropout. One evaluation of Philox decides eight consecutive keys of a query; it takes about 60
// instructions, so the kernels let every lane evaluate different keys and exchange the verdicts (bits.h): about 8
// instructions per weight, and 3 for comparisons.
#pragma once
#include "simt/philox.h"

namespace tilewise::attention {

using namespace simt;

constexpr int kDrawnKeys = 8;  // weights decided by one evaluation

// Bit i: whether random number i of the eight is at least `threshold`.
SIMT_DEVICE uint32_t kept_of(const uint4& random, uint32_t threshold) {
  const uint32_t words[4] = {random.x, random.y, random.z, random.w};
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    kept |= ((words[i] & 0xffff) >= threshold ? 1u : 0u) << 2 * i;
    kept |= ((words[i] >> 16) >= threshold ? 2u : 0u) << 2 * i;
  }
  return kept;
}

}  // namespace tilewise::attention
