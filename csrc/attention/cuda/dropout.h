// The random bits of dropout: Philox4x32-10 (Salmon et al., 2011). One evaluation decides eight consecutive keys of a
// query; it takes about 60 instructions, so the kernels let every lane evaluate different keys and exchange the
// verdicts (bits.h): about 8 instructions per weight, and 3 for comparisons.
#pragma once
#include "simt/simt.h"

namespace tilewise::attention {

using namespace simt;

constexpr int kDrawnKeys = 8;  // weights decided by one evaluation

SIMT_DEVICE uint4 philox(uint64_t key, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0, k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t x = static_cast<uint64_t>(a) * 0xD2511F53u, y = static_cast<uint64_t>(c) * 0xCD9E8D57u;
    a = static_cast<uint32_t>(y >> 32) ^ b ^ k0;
    c = static_cast<uint32_t>(x >> 32) ^ d ^ k1;
    b = static_cast<uint32_t>(y);
    d = static_cast<uint32_t>(x);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(a, b, c, d);
}

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
