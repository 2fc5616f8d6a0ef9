// The 128 values of a block in registers, and their maxima.
#pragma once
#include "common/isa.h"
#include "optim/params.h"

namespace tilewise {
namespace {

using namespace optim;

constexpr int kVectors = kBlock / W;  // vectors in a block
using BlockValues = VF[kVectors];

TILEWISE_INLINE VF absmax(VF a, VF b) {
#if defined(__AVX512F__)
  return (VF)_mm512_range_ps((__m512)a, (__m512)b, 0xb);
#else
  return max(a, abs(b));
#endif
}
TILEWISE_INLINE float signed_scale(const BlockValues& x) {
  VF top = set1(0);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) top = absmax(top, x[i]);
  return max_of(reduce_max(top), kMinSignedScale);
}

// Of values that are >= 0 or NaN: the order of their bits as unsigned integers is that of the floats, with infinity and
// NaN above all others. So a result from kInfinityBits on says that something is not finite.
constexpr uint32_t kInfinityBits = 0x7f800000;
TILEWISE_INLINE uint32_t max_bits(const BlockValues& x) {
#if defined(__AVX512F__)
  __m512i top = (__m512i)x[0];
#pragma GCC unroll 8
  for (int i = 1; i < kVectors; i++) top = _mm512_max_epu32(top, (__m512i)x[i]);
  return _mm512_reduce_max_epu32(top);
#elif defined(__AVX2__)
  __m256i top = (__m256i)x[0];
#pragma GCC unroll 16
  for (int i = 1; i < kVectors; i++) top = _mm256_max_epu32(top, (__m256i)x[i]);
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1))));
#else
  VU top = (VU)x[0];
  for (int i = 1; i < kVectors; i++) {
    const VU bits = (VU)x[i];
    top = bits > top ? bits : top;
  }
  uint32_t result = top[0];
  for (int lane = 1; lane < W; lane++) result = max_of<uint32_t>(result, top[lane]);
  return result;
#endif
}
TILEWISE_INLINE VU max(VU a, VU b) {
#if defined(__AVX512F__)
  return (VU)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VU)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}
struct Tops {
  uint32_t a, b;
};
// Of the lanes of a, and of those of b.
TILEWISE_INLINE Tops tops_of(VU a, VU b) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, y = (__m512i)b;  // a's in the lower half from here on, b's in the upper one
  __m512i top = _mm512_max_epu32(_mm512_shuffle_i32x4(x, y, 0x44), _mm512_shuffle_i32x4(x, y, 0xee));
  top = _mm512_max_epu32(top, _mm512_shuffle_i32x4(top, top, 0xb1));
  top = _mm512_max_epu32(top, _mm512_shuffle_epi32(top, _MM_PERM_BADC));
  top = _mm512_max_epu32(top, _mm512_shuffle_epi32(top, _MM_PERM_CDAB));
  return {uint32_t(_mm_cvtsi128_si32(_mm512_castsi512_si128(top))),
          uint32_t(_mm_cvtsi128_si32(_mm512_extracti32x4_epi32(top, 2)))};
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, y = (__m256i)b;  // a's in the lower half from here on, b's in the upper one
  __m256i top = _mm256_max_epu32(_mm256_permute2x128_si256(x, y, 0x20), _mm256_permute2x128_si256(x, y, 0x31));
  top = _mm256_max_epu32(top, _mm256_shuffle_epi32(top, 0x4e));
  top = _mm256_max_epu32(top, _mm256_shuffle_epi32(top, 0xb1));
  return {uint32_t(_mm_cvtsi128_si32(_mm256_castsi256_si128(top))),
          uint32_t(_mm_cvtsi128_si32(_mm256_extracti128_si256(top, 1)))};
#else
  Tops top = {a[0], b[0]};
  for (int lane = 1; lane < W; lane++) top = {max_of<uint32_t>(top.a, a[lane]), max_of<uint32_t>(top.b, b[lane])};
  return top;
#endif
}

}  // namespace
}  // namespace tilewise
