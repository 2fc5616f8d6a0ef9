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
  Source source;
  int units;
  Softcap softcap;
  float q[MQ][kMaxHeadDim], out[MQ][kMaxHeadDim];  // in the order of the source's units
  float weights[MQ][kKeyBlock + W];
  float reference[MQ], total[MQ];
  float q_sum[MQ], zeros[MQ];  // sum of the query; what the zeros of the values add to every channel

  FewTask(const Task<Visibility>& task) : task(task), source(task.p.dim), units(source.units()), softcap(task.p) {
    for (int m = 0; m < MQ; m++) {
      float row[kMaxHeadDim];
      task.load_query(min_of(m, task.rows - 1), row, units * kVectors * W);
      for (int u = 0; u < units; u++)
        for (int v = 0; v < kVectors; v++) {
          store(q[m] + (u * kVectors + v) * W, load(row + source.channel(u, v)));
          store(out[m] + (u * kVectors + v) * W, set1(0));
        }
      reference[m] = kLowest;
      total[m] = zeros[m] = q_sum[m] = 0;
      for (int d = 0; d < task.p.dim; d++) q_sum[m] += row[d];
    }
  }

  void scores(const KeyRows& rows, const KeyRows& next) {
    for (int j0 = 0; j0 < rows.count; j0 += W) {
      VF dots[MQ][W];
      VI pairs = {};
      for (int j = 0; j < W; j++) {
        const char* k = rows.k[min_of(j0 + j, rows.count - 1)];
        next.prefetch_key(j0 + j);
        if constexpr (Source::kScaled) pairs[j] = source.pair(k);
        VF sum[MQ] = {};
        for (int u = 0; u < units; u++) {
          VF x[kVectors];
          source.load_unit(k, u, x);
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
        if constexpr (Source::kScaled)
          dots[m][0] = dots[m][0] * ScaleZero::scale(pairs) + ScaleZero::zero(pairs) * q_sum[m];
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

  // The values' scales become part of the weights, their zeros one number for all channels.
  void scale_values(const KeyRows& rows, const float (&shrink)[MQ]) {
    VF sum[MQ] = {};
    for (int j0 = 0; j0 < rows.count; j0 += W) {
      VI pairs = {};
      for (int j = j0; j < min_of(rows.count, j0 + W); j++) pairs[j - j0] = source.pair(rows.v[j]);
#pragma GCC unroll 4
      for (int m = 0; m < MQ; m++) {
        const VF weight = load(weights[m] + j0);
        sum[m] += weight * ScaleZero::zero(pairs);
        store(weights[m] + j0, weight * ScaleZero::scale(pairs));
      }
    }
    for (int m = 0; m < MQ; m++) zeros[m] = zeros[m] * shrink[m] + reduce_add(sum[m]);
  }

  template <int NU>
  TILEWISE_INLINE void add_units(const KeyRows& rows, const KeyRows& next, int unit, const float (&shrink)[MQ]) {
    constexpr int NC = NU * kVectors;
    VF acc[MQ][NC];
#pragma GCC unroll 4
    for (int m = 0; m < MQ; m++)
#pragma GCC unroll 8
      for (int c = 0; c < NC; c++) acc[m][c] = VF{};
    for (int j = 0; j < rows.count; j++) {
      if (unit == 0) next.prefetch_value(j);
#pragma GCC unroll 8
      for (int u = 0; u < NU; u++) {
        VF x[kVectors];
        source.load_unit(rows.v[j], unit + u, x);
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
    rows.find(task, keys.first, keys.block_end(keys.first), source);
    for (int j = 0; j < rows.count; j++) rows.prefetch(j);
    while (rows.count) {
      const int64_t end = rows.first + rows.count;
      next.find(task, end, keys.block_end(end), source);
      scores(rows, next);
      float shrink[MQ];
      for (int m = 0; m < MQ; m++) shrink[m] = soften(m, rows);
      if constexpr (Source::kScaled) scale_values(rows, shrink);
      int u = 0;
      for (; u + kRegisters <= units; u += kRegisters) add_units<kRegisters>(rows, next, u, shrink);
      for (; u < units; u++) add_units<1>(rows, next, u, shrink);
      rows = next;
    }
    for (int m = 0; m < task.rows; m++) write(m);
  }

  void write(int m) const {
    float row[kMaxHeadDim];
    for (int u = 0; u < units; u++)
      for (int v = 0; v < kVectors; v++) {
        VF sum = load(out[m] + (u * kVectors + v) * W);
        if constexpr (Source::kScaled) sum += zeros[m];
        store(row + source.channel(u, v), sum);
      }
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
