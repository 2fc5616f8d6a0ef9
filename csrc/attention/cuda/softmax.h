// Online softmax (Milakov and Gimelshein 2018) on accumulator fragments: after each tile of keys the running maximum,
// the running sum and the weighted values are those of all keys so far. Scores arrive unscaled; exp2 of one
// multiply-add, with log2(e) folded into the scale, gives a probability.
#pragma once
#include "attention/cuda/sequence.h"

namespace tilewise::attention {

// A thread's rows: row 16 i + g + 8 h of the warp is rows [i][h]. `sum` covers this thread's columns only.
template <int M>
struct SoftmaxRows {
  // Below every score, yet finite: differences to it are never NaN, even while a row has seen nothing.
  static constexpr float kLowest = -3e38f;
  static constexpr float kSlack = 8.f;
  float scale_log2;
  float max[M][2], sum[M][2];  // max in units of log2

  SIMT_DEVICE explicit SoftmaxRows(float scale) : scale_log2(scale * kLog2e) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        max[i][h] = kLowest;
        sum[i][h] = 0.f;
      }
  }

  // Turns scores into probabilities relative to `max` and adds them up. The maximum follows only when a row of the warp
  // outgrows it by more than 2^kSlack: probabilities then stay small enough for fp16 and lose no precision, and most
  // tiles leave `acc` alone. The branch stands behind the sums for a reason: without it ptxas delays these additions
  // until after the products that follow, and spills.
  template <int N, int V>
  SIMT_DEVICE void update(float (&scores)[M][N][4], float (&acc)[M][V][4]) {
    float top[M][2], total[M][2] = {};
    bool outgrown = false;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float t = -INFINITY;
#pragma unroll
        for (int j = 0; j < N; j++) t = fmaxf(t, fmaxf(scores[i][j][2 * h], scores[i][j][2 * h + 1]));
        t = fmaxf(t, shfl_xor(t, 1));
        t = fmaxf(t, shfl_xor(t, 2));
        top[i][h] = fmaxf(max[i][h], t * scale_log2);
        outgrown |= top[i][h] > max[i][h] + kSlack;
      }
    outgrown = warp_any(outgrown);
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (!outgrown) top[i][h] = max[i][h];
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; e++) {
            scores[i][j][e] = exp2_approx(scores[i][j][e] * scale_log2 - top[i][h]);
            total[i][h] += scores[i][j][e];
          }
      }
    if (outgrown) raise(top, acc);
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) sum[i][h] += total[i][h];
  }

  template <int V>
  SIMT_DEVICE void raise(const float (&top)[M][2], float (&acc)[M][V][4]) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float correction = exp2_approx(max[i][h] - top[i][h]);
        max[i][h] = top[i][h];
        sum[i][h] *= correction;
#pragma unroll
        for (int j = 0; j < V; j++) {
          acc[i][j][2 * h] *= correction;
          acc[i][j][2 * h + 1] *= correction;
        }
      }
  }

  // One more key, without a value.
  template <int V>
  SIMT_DEVICE void add_sink(float sink, float (&acc)[M][V][4]) {
    const float score = sink * kLog2e;
    float top[M][2];
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) top[i][h] = fmaxf(max[i][h], score);
    raise(top, acc);
    if ((lane_id() & 3) != 0) return;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) sum[i][h] += exp2_approx(score - top[i][h]);
  }

  // Divides by the sums, multiplies by `factor` and leaves the natural-log normalisers in `max`: -inf for a row that
  // saw nothing, whose values are 0; NaN passes through.
  template <int V>
  SIMT_DEVICE void finish(float (&acc)[M][V][4], float factor = 1.f) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float total = sum[i][h];
        total += shfl_xor(total, 1);
        total += shfl_xor(total, 2);
        const float inverse = total == 0.f ? 0.f : rcp_approx(total) * factor;
        max[i][h] = total == 0.f ? -INFINITY : (max[i][h] + log2_approx(total)) * kLn2;
#pragma unroll
        for (int j = 0; j < V; j++) {
          acc[i][j][2 * h] *= inverse;
          acc[i][j][2 * h + 1] *= inverse;
        }
      }
  }
};

}  // namespace tilewise::attention
