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
// Columns 4 c to 4 c + 3 of sixteen rows of sixteen floats, one vector each; row(i) gives the address of row i. Half
// the shuffles of transpose(): 128-bit lanes change places while they are loaded.
template <class Row>
TILEWISE_INLINE void load_columns(const Row& row, int c, VF (&columns)[4]) {
  __m512 v[4];  // lane l of v[i]: the four columns of row 4 l + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_castps128_ps512(_mm_loadu_ps(row(i) + 4 * c));
    v[i] = _mm512_mask_broadcast_f32x4(v[i], 0x00f0, _mm_loadu_ps(row(4 + i) + 4 * c));
    v[i] = _mm512_mask_broadcast_f32x4(v[i], 0x0f00, _mm_loadu_ps(row(8 + i) + 4 * c));
    v[i] = _mm512_mask_broadcast_f32x4(v[i], 0xf000, _mm_loadu_ps(row(12 + i) + 4 * c));
  }
  const __m512 low01 = _mm512_unpacklo_ps(v[0], v[1]), high01 = _mm512_unpackhi_ps(v[0], v[1]);
  const __m512 low23 = _mm512_unpacklo_ps(v[2], v[3]), high23 = _mm512_unpackhi_ps(v[2], v[3]);
  columns[0] = (VF)_mm512_shuffle_ps(low01, low23, 0x44);
  columns[1] = (VF)_mm512_shuffle_ps(low01, low23, 0xee);
  columns[2] = (VF)_mm512_shuffle_ps(high01, high23, 0x44);
  columns[3] = (VF)_mm512_shuffle_ps(high01, high23, 0xee);
}
inline void transpose_in_memory(float* block) {
  VF turned[4][4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) load_columns([&](int i) { return block + i * W; }, c, turned[c]);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) store(block + i * W, turned[i / 4][i % 4]);
}
#endif

}  // namespace
}  // namespace tilewise
