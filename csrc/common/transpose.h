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

#if defined(__AVX2__)
// Lane l: floats 4 c to 4 c + 3 of row 4 l + i.
template <class Row>
TILEWISE_INLINE VF load_part(const Row& row, int i, int c) {
#if defined(__AVX512F__)
  __m512 part = _mm512_castps128_ps512(_mm_loadu_ps(row(i) + 4 * c));
  part = _mm512_mask_broadcast_f32x4(part, 0x00f0, _mm_loadu_ps(row(4 + i) + 4 * c));
  part = _mm512_mask_broadcast_f32x4(part, 0x0f00, _mm_loadu_ps(row(8 + i) + 4 * c));
  return (VF)_mm512_mask_broadcast_f32x4(part, 0xf000, _mm_loadu_ps(row(12 + i) + 4 * c));
#else
  const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(row(i) + 4 * c));
  return (VF)_mm256_insertf128_ps(low, _mm_loadu_ps(row(4 + i) + 4 * c), 1);
#endif
}
// From four such parts the four columns.
TILEWISE_INLINE void turn_parts(VF (&parts)[4]) {
  VI low, high, front, back;  // within lanes: unpack, then two of one and two of the other
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    const int lane = i / 4 * 4, other = i % 2 * W, half = i % 4 / 2;
    low[i] = other + lane + half;
    high[i] = low[i] + 2;
    front[i] = half * W + lane + i % 2;
    back[i] = front[i] + 2;
  }
  const VF low01 = __builtin_shuffle(parts[0], parts[1], low), high01 = __builtin_shuffle(parts[0], parts[1], high);
  const VF low23 = __builtin_shuffle(parts[2], parts[3], low), high23 = __builtin_shuffle(parts[2], parts[3], high);
  parts[0] = __builtin_shuffle(low01, low23, front);
  parts[1] = __builtin_shuffle(low01, low23, back);
  parts[2] = __builtin_shuffle(high01, high23, front);
  parts[3] = __builtin_shuffle(high01, high23, back);
}
#endif

// Of W rows of W floats in memory, the columns, one vector each; row(i) gives the address of row i. Each row is read at
// once: rows a power of two apart push each other out of the cache.
template <class Row>
TILEWISE_INLINE void load_turned(const Row& row, VF (&columns)[W]) {
#if defined(__AVX2__)
  if constexpr (sizeof(*row(0)) == 4) {
    VF parts[W / 4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
      for (int c = 0; c < W / 4; c++) parts[c][i] = load_part(row, i, c);
#pragma GCC unroll 4
    for (int c = 0; c < W / 4; c++) {
      turn_parts(parts[c]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) columns[4 * c + i] = parts[c][i];
    }
    return;
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) columns[i] = load(row(i));
  transpose(columns);
}

#if defined(__AVX512F__)
// Columns 4 c to 4 c + 3 of sixteen such rows. Half the shuffles of transpose(): 128-bit lanes change places while they
// are loaded.
template <class Row>
TILEWISE_INLINE void load_columns(const Row& row, int c, VF (&columns)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) columns[i] = load_part(row, i, c);
  turn_parts(columns);
}
inline void transpose_in_memory(float* block) {
  VF turned[W];
  load_turned([&](int i) { return block + i * W; }, turned);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) store(block + i * W, turned[i]);
}
#endif

}  // namespace
}  // namespace tilewise
