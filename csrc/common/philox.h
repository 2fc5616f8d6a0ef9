// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), one counter per vector lane.
#pragma once
#include "common/isa.h"

namespace tilewise {
namespace {

// The halves of the 64-bit products of every lane with m.
TILEWISE_INLINE void multiply_wide(VU a, uint32_t m, VU& high, VU& low) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, by = _mm512_set1_epi32(int32_t(m));
  const __m512i even = _mm512_mul_epu32(x, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), by);
  low = (VU)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (VU)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, by = _mm256_set1_epi32(int32_t(m));
  const __m256i even = _mm256_mul_epu32(x, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), by);
  low = (VU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (VU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < W; i++) {
    const uint64_t product = uint64_t(a[i]) * m;
    low[i] = uint32_t(product);
    high[i] = uint32_t(product >> 32);
  }
#endif
}

struct Philox {
  uint32_t key[2];

  explicit Philox(uint64_t seed = 0) : key{uint32_t(seed), uint32_t(seed >> 32)} {}

  // The four words of counter (a, b, c, 0).
  TILEWISE_INLINE void words(VU a, VU b, VU c, VU (&to)[4]) const {
    VU d = {};
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++, k0 += 0x9e3779b9, k1 += 0xbb67ae85) {
      VU high_a, low_a, high_c, low_c;
      multiply_wide(a, 0xd2511f53, high_a, low_a);
      multiply_wide(c, 0xcd9e8d57, high_c, low_c);
      a = high_c ^ b ^ k0;
      c = high_a ^ d ^ k1;
      b = low_c;
      d = low_a;
    }
    to[0] = a, to[1] = b, to[2] = c, to[3] = d;
  }
};

}  // namespace
}  // namespace tilewise
