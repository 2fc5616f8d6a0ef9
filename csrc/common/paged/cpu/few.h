// Few queries (plain decoding): lanes are head dimensions, and every key and value is read once, at memory speed.
#pragma once
#include "common/isa.h"
#include "common/paged/cpu/rows.h"
#include "common/paged/cpu/source.h"

namespace tilewise::paged {
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

template <class Source, class Visibility, int MQ>
struct FewTask {
  static constexpr int kVectors = Source::kVectors;
  // Units whose sums stay in registers.
  static constexpr int kRegisters = max_of(1, min_of(8, (W == 16 ? 16 : 8) / MQ) / kVectors);

  const Task<Visibility>& task;
  int dim, units;
  Softcap softcap;
  float q[MQ][kMaxHeadDim], out[MQ][kMaxHeadDim];  // in the order of the source's units
  float weights[MQ][kKeyBlock + W];
  float reference[MQ], total[MQ];

  FewTask(const Task<Visibility>& task) : task(task), dim(task.p.dim), units(Source::units(dim)), softcap(task.p) {
    for (int m = 0; m < MQ; m++) {
      float row[kMaxHeadDim];
      task.load_query(min_of(m, task.rows - 1), row, units * kVectors * W);
      for (int u = 0; u < units; u++)
        for (int v = 0; v < kVectors; v++) {
          store(q[m] + (u * kVectors + v) * W, load(row + Source::channel(u, v)));
          store(out[m] + (u * kVectors + v) * W, set1(0));
        }
      reference[m] = kLowest;
      total[m] = 0;
    }
  }

  void scores(const KeyRows& rows, const KeyRows& next) {
    for (int j0 = 0; j0 < rows.count; j0 += W) {
      VF dots[MQ][W];
      for (int j = 0; j < W; j++) {
        const char* k = rows.k[min_of(j0 + j, rows.count - 1)];
        next.prefetch(j0 + j);
        VF sum[MQ] = {};
        for (int u = 0; u < units; u++) {
          VF x[kVectors];
          Source::load_unit(k, u, x);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; v++)
#pragma GCC unroll 4
            for (int m = 0; m < MQ; m++) sum[m] += x[v] * load(q[m] + (u * kVectors + v) * W);
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
  float soften(int m, const KeyRows& rows) {
    if (softcap) softcap.apply(weights[m], rows.count);
    if (!task.keys.full(rows.first)) {
      const KeyBits seen = task.visible.seen(task.token(min_of(m, task.rows - 1)), rows.first);
      for (int j = 0; j < rows.count; j++)
        if (!seen[j]) weights[m][j] = -kInfinity;
    }
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

  template <int NU>
  TILEWISE_INLINE void add_units(const KeyRows& rows, int unit, const float (&shrink)[MQ]) {
    constexpr int NC = NU * kVectors;
    VF acc[MQ][NC];
#pragma GCC unroll 4
    for (int m = 0; m < MQ; m++)
#pragma GCC unroll 8
      for (int c = 0; c < NC; c++) acc[m][c] = VF{};
    for (int j = 0; j < rows.count; j++) {
#pragma GCC unroll 8
      for (int u = 0; u < NU; u++) {
        VF x[kVectors];
        Source::load_unit(rows.v[j], unit + u, x);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++)
#pragma GCC unroll 4
          for (int m = 0; m < MQ; m++) acc[m][u * kVectors + v] += x[v] * set1(weights[m][j]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MQ; m++)
#pragma GCC unroll 8
      for (int c = 0; c < NC; c++) {
        float* to = out[m] + (unit * kVectors + c) * W;
        store(to, load(to) * shrink[m] + acc[m][c]);
      }
  }

  void run() {
    const KeyRange& keys = task.keys;
    KeyRows rows, next;
    rows.find(task, keys.first, keys.block_end(keys.first), Source::kItem);
    for (int j = 0; j < rows.count; j++) rows.prefetch(j);
    while (rows.count) {
      const int64_t end = rows.first + rows.count;
      next.find(task, end, keys.block_end(end), Source::kItem);
      scores(rows, next);
      float shrink[MQ];
      for (int m = 0; m < MQ; m++) shrink[m] = soften(m, rows);
      int u = 0;
      for (; u + kRegisters <= units; u += kRegisters) add_units<kRegisters>(rows, u, shrink);
      for (; u < units; u++) add_units<1>(rows, u, shrink);
      rows = next;
    }
    for (int m = 0; m < task.rows; m++) write(m);
  }

  void write(int m) const {
    float row[kMaxHeadDim];
    for (int u = 0; u < units; u++)
      for (int v = 0; v < kVectors; v++) store(row + Source::channel(u, v), load(out[m] + (u * kVectors + v) * W));
    task.write(m, row, reference[m], total[m]);
  }
};

template <class Source, class Visibility>
void attend_few(const Task<Visibility>& task) {
  if (task.rows == 1)
    FewTask<Source, Visibility, 1>(task).run();
  else if (task.rows == 2)
    FewTask<Source, Visibility, 2>(task).run();
  else
    FewTask<Source, Visibility, 4>(task).run();
}

}  // namespace
}  // namespace tilewise::paged
