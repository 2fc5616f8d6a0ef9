// Random bits from a counter: Philox4x32-10 (Salmon et al., 2011), about 60 instructions for four words.
#pragma once
#include "simt/simt.h"

namespace simt {

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

}  // namespace simt
