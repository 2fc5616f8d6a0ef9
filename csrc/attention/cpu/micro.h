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

// The same by row against a tile, in sums of 16 terms that are added up: a quarter of the rounding of one chain of 64,
// for results that are looked at one by one.
template <int M, int N>
TILEWISE_INLINE void multiply_in_chains(VF (&acc)[M][N], int depth, const float* a, int64_t lda, const float* tile) {
  constexpr int kChain = 16;
  for (int d = 0; d < depth; d += kChain) {
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

// c[m][lane] += sum over k < depth of a(m, k) * b[k][lane] for N vectors of lanes; b and c are tiles.
template <int N>
void accumulate(int rows, int depth, const float* a, int64_t lda, const float* b, float* c) {
  for_rows(rows, [&](auto block, int m) {
    VF acc[decltype(block)::value][N] = {};
    multiply<Operand::by_column>(acc, depth, a + m, lda, b, kLanes);
    add_block(acc, c + m * kLanes, kLanes);
  });
}

// table[n - 1] works on n vectors of lanes.
using Accumulate = void (*)(int, int, const float*, int64_t, const float*, float*);
constexpr Accumulate kAccumulate[] = {accumulate<1>, accumulate<2>, accumulate<3>,
#if defined(__AVX512F__)
                                      accumulate<4>
#endif
};

}  // namespace
}  // namespace tilewise
