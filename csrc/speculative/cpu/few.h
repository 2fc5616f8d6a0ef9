// Few queries (plain decoding): lanes are head dimensions, and every key and value is read once, at memory speed.
#pragma once
#include "common/isa.h"
#include "speculative/cpu/rows.h"

namespace tilewise {
namespace {

constexpr int kFewRows = 4;

// Adds up each of W vectors: lane i of v[0] becomes the sum of v[i]. Each of the log2(W) rounds halves their number;
// the shuffles are known to the compiler only because N is.
template <int N = W / 2>
TILEWISE_INLINE void sums_into_first(VF (&v)[W]) {
  VI low, high;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    low[i] = (i / N % 2 ? W : 0) + i / (2 * N) * 2 * N + i % N;
    high[i] = low[i] + N;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) v[i] = __builtin_shuffle(v[i], v[i + N], low) + __builtin_shuffle(v[i], v[i + N], high);
  if constexpr (N > 1) sums_into_first<N / 2>(v);
}

template <class T, int MQ>
struct FewTask {
  const Task<T>& task;
  int dim;
  float q[MQ][kMaxHeadDim], out[MQ][kMaxHeadDim];
  float weights[MQ][kKeyBlock + W];
  float reference[MQ], total[MQ];

  FewTask(const Task<T>& task) : task(task), dim(task.p.dim) {
    const float factor = task.p.scale * kLog2e;
    for (int m = 0; m < MQ; m++) {
      const T* from = task.query(min_of(m, task.rows - 1));
      for (int d = 0; d < dim; d += W) {
        store(q[m] + d, load(from + d) * factor);
        store(out[m] + d, set1(0));
      }
      reference[m] = kLowest;
      total[m] = 0;
    }
  }

  void scores(const KeyRows<T>& rows, const KeyRows<T>& next) {
    for (int j0 = 0; j0 < rows.count; j0 += W) {
      VF dots[MQ][W];
      for (int j = 0; j < W; j++) {
        const T* k = rows.k[min_of(j0 + j, rows.count - 1)];
        next.prefetch(j0 + j, dim);
        VF sum[MQ] = {};
        for (int d = 0; d < dim; d += W) {
          const VF x = load(k + d);
#pragma GCC unroll 4
          for (int m = 0; m < MQ; m++) sum[m] += x * load(q[m] + d);
        }
#pragma GCC unroll 4
        for (int m = 0; m < MQ; m++) dots[m][j] = sum[m];
      }
#pragma GCC unroll 4
      for (int m = 0; m < MQ; m++) {
        sums_into_first(dots[m]);
        store(weights[m] + j0, dots[m][0]);
      }
    }
  }

  // Scores to weights; returns by how much the earlier result shrinks.
  float soften(int m, const KeyRows<T>& rows) {
    const int64_t first_node = rows.first - task.prefix;
    if (first_node >= 0)
      for (int j = 0; j < rows.count; j++)
        if (!task.sees(min_of(m, task.rows - 1), first_node + j)) weights[m][j] = -kInfinity;
    for (int j = rows.count; j < round_up(rows.count, W); j++) weights[m][j] = -kInfinity;
    VF largest = set1(reference[m]);
    for (int j = 0; j < rows.count; j += W) largest = max(largest, load(weights[m] + j));
    const float top = reduce_max(largest), shrink = exp2_scalar(reference[m] - top);
    VF sum = {};
    for (int j = 0; j < rows.count; j += W) {
      const VF e = exp2(load(weights[m] + j) - top);
      store(weights[m] + j, e);
      sum += e;
    }
    reference[m] = top;
    total[m] = total[m] * shrink + reduce_add(sum);
    return shrink;
  }

  template <int NC>
  TILEWISE_INLINE void add_columns(const KeyRows<T>& rows, int d, const float (&shrink)[MQ]) {
    VF acc[MQ][NC];
#pragma GCC unroll 4
    for (int m = 0; m < MQ; m++)
#pragma GCC unroll 8
      for (int c = 0; c < NC; c++) acc[m][c] = VF{};
    for (int j = 0; j < rows.count; j++) {
      const T* v = rows.v[j] + d;
#pragma GCC unroll 8
      for (int c = 0; c < NC; c++) {
        const VF x = load(v + c * W);
#pragma GCC unroll 4
        for (int m = 0; m < MQ; m++) acc[m][c] += x * set1(weights[m][j]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MQ; m++)
#pragma GCC unroll 8
      for (int c = 0; c < NC; c++) {
        float* to = out[m] + d + c * W;
        store(to, load(to) * shrink[m] + acc[m][c]);
      }
  }

  void run() {
    constexpr int kColumns = (W == 16 ? 16 : 8) / MQ > 8 ? 8 : (W == 16 ? 16 : 8) / MQ;  // vectors kept in registers
    KeyRows<T> rows, next;
    rows.find(task, task.first_key, block_end(task, task.first_key));
    for (int j = 0; j < rows.count; j++) rows.prefetch(j, dim);
    while (rows.count) {
      const int64_t end = rows.first + rows.count;
      next.find(task, end, block_end(task, end));
      scores(rows, next);
      float shrink[MQ];
      for (int m = 0; m < MQ; m++) shrink[m] = soften(m, rows);
      int d = 0;
      for (; d + kColumns * W <= dim; d += kColumns * W) add_columns<kColumns>(rows, d, shrink);
      for (; d < dim; d += W) add_columns<1>(rows, d, shrink);
      rows = next;
    }
    for (int m = 0; m < task.rows; m++) task.write(m, out[m], reference[m], total[m]);
  }
};

template <class T>
bool attend_few(const Task<T>& task, const Runtime&) {
  if (task.rows == 1)
    FewTask<T, 1>(task).run();
  else if (task.rows == 2)
    FewTask<T, 2>(task).run();
  else
    FewTask<T, 4>(task).run();
  return true;
}

}  // namespace
}  // namespace tilewise
