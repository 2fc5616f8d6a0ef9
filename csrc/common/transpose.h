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

#if defined(__AVX512F__)
// The same for 16 x 16 floats in memory, in half the shuffles: 128-bit lanes change places while they are loaded.
inline void transpose_in_memory(float* block) {
  VF turned[W];
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    VF row[4];  // lane l of row[i]: columns 4 c to 4 c + 3 of row 4 l + i
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const float* from = block + i * W + 4 * c;
      __m512 v = _mm512_castps128_ps512(_mm_load_ps(from));
      v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_load_ps(from + 4 * W));
      v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_load_ps(from + 8 * W));
      row[i] = (VF)_mm512_mask_broadcast_f32x4(v, 0xf000, _mm_load_ps(from + 12 * W));
    }
    const __m512 low01 = _mm512_unpacklo_ps((__m512)row[0], (__m512)row[1]);
    const __m512 high01 = _mm512_unpackhi_ps((__m512)row[0], (__m512)row[1]);
    const __m512 low23 = _mm512_unpacklo_ps((__m512)row[2], (__m512)row[3]);
    const __m512 high23 = _mm512_unpackhi_ps((__m512)row[2], (__m512)row[3]);
    turned[4 * c] = (VF)_mm512_shuffle_ps(low01, low23, 0x44);
    turned[4 * c + 1] = (VF)_mm512_shuffle_ps(low01, low23, 0xee);
    turned[4 * c + 2] = (VF)_mm512_shuffle_ps(high01, high23, 0x44);
    turned[4 * c + 3] = (VF)_mm512_shuffle_ps(high01, high23, 0xee);
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) store(block + i * W, turned[i]);
}
#endif

}  // namespace
}  // namespace tilewise
