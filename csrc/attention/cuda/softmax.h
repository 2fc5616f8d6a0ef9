// Online softmax (Milakov and Gimelshein 2018) on accumulator fragments: after each tile of keys the running maximum,
// the running sum and the weighted values are those of all keys so far. Scores arrive unscaled; exp2 of one
// multiply-add, with log2(e) folded into the scale, gives a probability.
#pragma once
#include "attention/cuda/sequence.h"

namespace tilewise::attention {

// A thread's rows: row 16 i + g + 8 h of the warp is rows [i][h]. `sum` covers this thread's columns only.
template <int M>
struct SoftmaxRows {
  float max[M][2], sum[M][2];

  SIMT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        max[i][h] = -INFINITY;
        sum[i][h] = 0.f;
      }
  }

  // Turns scores into probabilities relative to the new maximum, and rescales what was summed before.
  template <int N, int V>
  SIMT_DEVICE void update(float (&scores)[M][N][4], float (&acc)[M][V][4], float scale_log2) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float top = max[i][h];
#pragma unroll
        for (int j = 0; j < N; j++) top = fmaxf(top, fmaxf(scores[i][j][2 * h], scores[i][j][2 * h + 1]));
        top = fmaxf(top, shfl_xor(top, 1));
        top = fmaxf(top, shfl_xor(top, 2));
        const float base = top == -INFINITY ? 0.f : top * scale_log2;  // nothing seen yet: exp2(-inf) must stay 0
        const float correction = exp2_approx(max[i][h] * scale_log2 - base);
        max[i][h] = top;
        float total = 0.f;
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; e++) {
            scores[i][j][e] = exp2_approx(scores[i][j][e] * scale_log2 - base);
            total += scores[i][j][e];
          }
        sum[i][h] = sum[i][h] * correction + total;
#pragma unroll
        for (int j = 0; j < V; j++) {
          acc[i][j][2 * h] *= correction;
          acc[i][j][2 * h + 1] *= correction;
        }
      }
  }

  // Divides by the sums and leaves the natural-log normalisers in `max`: -inf for a row that saw nothing, whose values
  // are 0; NaN passes through.
  template <int V>
  SIMT_DEVICE void finish(float (&acc)[M][V][4], float scale_log2) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float total = sum[i][h];
        total += shfl_xor(total, 1);
        total += shfl_xor(total, 2);
        const float inverse = total == 0.f ? 0.f : 1.f / total;
        max[i][h] = total == 0.f ? -INFINITY : max[i][h] * scale_log2 * kLn2 + logf(total);
#pragma unroll
        for (int j = 0; j < V; j++) {
          acc[i][j][2 * h] *= inverse;
          acc[i][j][2 * h + 1] *= inverse;
        }
      }
  }
};

}  // namespace tilewise::attention
