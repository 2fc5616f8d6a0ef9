// The one inner loop of the family. Lanes are queries: scores are computed as S^T = K Q^T and outputs as O^T = V^T P^T,
// so K and V are only ever broadcast operands (never transposed or packed), softmax statistics are vertical vectors,
// and the same register block serves all seven products of forward and backward.
#pragma once
#include "common/isa.h"

namespace tilewise {
namespace {

// Register block: kRows broadcasts against kVectors vectors of accumulators.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;  // 24 accumulators of 32 registers
#else
constexpr int kRows = 4, kVectors = 3;  // 12 of 16
#endif
constexpr int kLanes = kVectors * W;  // queries of a tile

template <int N>
struct Int {
  static constexpr int value = N;
};

enum class Operand { by_row, by_column };

// acc[m][v] += a(m) * b[v] for one k; a(m) is a[m * step].
template <int M, int N>
TILEWISE_INLINE void multiply_step(VF (&acc)[M][N], const float* a, int64_t step, const float* b) {
  VF row[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; v++) row[v] = load(b + v * W);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    const VF x = set1(a[m * step]);
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) acc[m][v] += x * row[v];
  }
}

// acc[m][v] += sum over k of a(m, k) * b[k][v], where a(m, k) is a[m * lda + k] by row, a[k * lda + m] by column.
// Blocks too small to cover the latency of an FMA sum over k in several chains.
template <Operand kOperand, int M, int N>
TILEWISE_INLINE void multiply(VF (&acc)[M][N], int depth, const float* a, int64_t lda, const float* b, int64_t ldb) {
  constexpr bool kByRow = kOperand == Operand::by_row;
  constexpr int kChains = max_of(1, min_of(4, kRows * kVectors / (M * N)));
  const int64_t across = kByRow ? lda : 1, along = kByRow ? 1 : lda;
  int k = 0;
  if constexpr (W == 4) {  // no FMA: every term is rounded twice, so sums restart sooner
    constexpr int kShort = 16;
    for (; k + kShort < depth; k += kShort) {
      VF part[M][N] = {};
      for (int i = 0; i < kShort; i++, a += along, b += ldb) multiply_step(part, a, across, b);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) acc[m][v] += part[m][v];
    }
  }
  if constexpr (kChains > 1) {
    VF chains[kChains][M][N] = {};
    for (; k + kChains <= depth; k += kChains, a += kChains * along, b += kChains * ldb)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; c++) multiply_step(chains[c], a + c * along, across, b + c * ldb);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; c++)
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) acc[m][v] += chains[c][m][v];
  }
  for (; k < depth; k++, a += along, b += ldb) multiply_step(acc, a, across, b);
}

// The same by row against a tile, in sums of a few terms that are added up: with 16, a quarter of the rounding of one
// chain of 64, for results that are looked at one by one.
template <int kChain = 16, int M, int N>
TILEWISE_INLINE void multiply_in_chains(VF (&acc)[M][N], int depth, const float* a, int64_t lda, const float* tile) {
  multiply<Operand::by_row>(acc, min_of(kChain, depth), a, lda, tile, kLanes);
  for (int d = kChain; d < depth; d += kChain) {
    VF part[M][N] = {};
    multiply<Operand::by_row>(part, min_of(kChain, depth - d), a + d, lda, tile + d * kLanes, kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) acc[m][v] += part[m][v];
  }
}

// Calls body(Int<M>, i) for blocks of kRows rows, then of 4, 2 and 1 until all `count` are covered.
template <class F>
TILEWISE_INLINE void for_rows(int count, const F& body) {
  int i = 0;
  for (; i + kRows <= count; i += kRows) body(Int<kRows>{}, i);
  if constexpr (kRows > 4) {
    if (i + 4 <= count) body(Int<4>{}, i), i += 4;
  }
  if (i + 2 <= count) body(Int<2>{}, i), i += 2;
  if (i < count) body(Int<1>{}, i);
}

// c[m][v] += acc[m][v]. Products are summed from zero and then added: shorter chains of roundings.
template <int M, int N>
TILEWISE_INLINE void add_block(const VF (&acc)[M][N], float* c, int64_t ldc) {
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) store(c + m * ldc + v * W, load(c + m * ldc + v * W) + acc[m][v]);
}

// Rows whose columns are the broadcast operand: as they lie, or in panels.
struct Columns {
  const float* data;
  int64_t stride;  // of rows; 0: panels
  int depth;       // rows of a panel
};

// Panels: the columns of one block of for_rows() side by side, row by row, so that they are read without gaps. (Rows of
// 512 bytes share an eighth of the L1 cache's sets, which do not keep a block's until the next columns are read.)
inline Columns pack_columns(const float* rows, int64_t stride, int depth, int columns, float* space) {
  for_rows(columns, [&](auto block, int m) {
    constexpr int M = decltype(block)::value;
    float* to = space + int64_t(m) * depth;
    for (int k = 0; k < depth; k++) __builtin_memcpy(to + k * M, rows + k * stride + m, M * sizeof(float));
  });
  return {space, 0, depth};
}

// c[m][lane] += sum over k < depth of a(m, first + k) * b[k][lane] for N vectors of lanes; b and c are tiles.
template <int N>
void accumulate(int columns, int first, int depth, const Columns& a, const float* b, float* c) {
  for_rows(columns, [&](auto block, int m) {
    constexpr int M = decltype(block)::value;
    VF acc[M][N] = {};
    const bool panels = a.stride == 0;
    const float* from = a.data + (panels ? int64_t(m) * a.depth + first * M : first * a.stride + m);
    multiply<Operand::by_column>(acc, depth, from, panels ? M : a.stride, b, kLanes);
    add_block(acc, c + m * kLanes, kLanes);
  });
}

// table[n - 1] works on n vectors of lanes.
using Accumulate = void (*)(int, int, int, const Columns&, const float*, float*);
constexpr Accumulate kAccumulate[] = {accumulate<1>, accumulate<2>, accumulate<3>,
#if defined(__AVX512F__)
                                      accumulate<4>
#endif
};

}  // namespace
}  // namespace tilewise
