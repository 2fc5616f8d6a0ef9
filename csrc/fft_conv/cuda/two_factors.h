// Transforms of n = N1 N2 <= 2048 points: one warp, everything in registers (no exchange, no shuffle, no barrier).
//
// Ring x^n = i ("right angle"): X[k] = sum_j x[j] e(j (k - 1/4) / n), e(x) = exp(-2 pi i x), a quarter-bin shift inside
// the first factor and the twiddle. With j = j1 N2 + j2, k = k1 + N1 k2:
//   F1[k1][j1] = e((k1 - 1/4)(j1 - 1/4) / N1)   T[k1][j2] = e((k1 - 1/4) j2 / n)   F2[j2][k2] = e(j2 k2 / N2)
// F1's symmetric form has a surplus phase that depends on k1 alone and cancels against the inverse's conjugate. j2 and
// k2 are in slot order, index(slot) = (slot % 8)(N2 / 8) + slot / 8, so that a lane's tiles are consecutive elements.
#pragma once
#include "fft_conv/cuda/fragments.h"
#include "fft_conv/cuda/rows.h"

namespace tilewise::fft_conv {

template <int N1, int N2>
struct TwoFactors {
  static constexpr int n = N1 * N2;
  static constexpr int A = N1 / 16, B = N2 / 16;  // blocks of 16 in each factor
  static constexpr int J = N2 / 8;                // column tiles
  static constexpr int kTop = row_top(n);

  struct Tables {
    fp16 f1[A * A][2][256], f2[B * B][2][256];
    uint4 twiddle[A][J][32], twiddle_t[A][B][2][32];  // T in C-fragment order of [k1, j2] and of [j2, k1]
  };
  using Operand = uint32_t[A][2][J];
  using Accumulators = float[A][J][4];
  struct Fragments {  // [16 values of k1, N2] complex, fp16, C-fragment order
    uint32_t re[J][2], im[J][2];
  };

  // Where the 4 A groups of J elements of pack_operand() stand in the row, and the 2 A groups of 2 J results.
  struct Input {
    int base = 2 * (lane_id() & 3) * N2 + (lane_id() >> 2) * J;
    SIMT_HD static constexpr int offset(int i) { return (8 * (i >> 1) + (i & 1)) * N2; }
  };
  struct Output {
    int base = (lane_id() >> 2) * N2 + (lane_id() & 3) * 2 * J;
    SIMT_HD static constexpr int offset(int i) { return 8 * i * N2; }
  };
  SIMT_DEVICE static float& output(Accumulators& y, int group, int i) {
    return y[group / 2][i % J][2 * (group & 1) + i / J];
  }

  // One row into fp16; returns its scale.
  template <class T>
  SIMT_DEVICE static float load(Operand& x, const T* row, const T* gate, const Extent& extent) {
    float v[4 * A][J];
    load_gated(v, row, gate, extent, Input());
    const float scale = scale_below(warp_max(max_abs(v)), kTop);
    pack_operand<A, J>(x, v, scale);
    return scale;
  }

  // First factor and twiddle for 16 values of k1.
  SIMT_DEVICE static void factor1(Fragments& z, const Operand& x, const Tables& s, int m) {
    const int lane = lane_id();
    float ar[J][4], ai[J][4];
#pragma unroll
    for (int a = 0; a < A; a++) {
      uint32_t fr[4], fi[4];
      load_block(fr, s.f1[m * A + a][0], lane);
      load_block(fi, s.f1[m * A + a][1], lane);
#pragma unroll
      for (int j = 0; j < J; j++) {
        if (a == 0) {
          mma<true>(ar[j], fr, x[a][0][j], x[a][1][j]);
          mma<true>(ai[j], fi, x[a][0][j], x[a][1][j]);
        } else {
          mma<false>(ar[j], fr, x[a][0][j], x[a][1][j]);
          mma<false>(ai[j], fi, x[a][0][j], x[a][1][j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < J; j++) pack_multiply<false>(z.re[j], z.im[j], ar[j], ai[j], load16(&s.twiddle[m][j][lane]));
  }

  // x -> C fragments [k1, k2] for 16 values of k1.
  SIMT_DEVICE static void forward(float (&cr)[J][4], float (&ci)[J][4], const Operand& x, const Tables& s, int m) {
    const int lane = lane_id();
    Fragments z;
    factor1(z, x, s, m);
#pragma unroll
    for (int c = 0; c < B; c++) {
      FragmentA a = {{z.re[2 * c][0], z.re[2 * c][1], z.re[2 * c + 1][0], z.re[2 * c + 1][1]},
                     {z.im[2 * c][0], z.im[2 * c][1], z.im[2 * c + 1][0], z.im[2 * c + 1][1]},
                     {}};
      negate(a.neg, a.im);
#pragma unroll
      for (int b = 0; b < B; b++) {
        uint32_t fr[4], fi[4];
        load_block(fr, s.f2[b * B + c][0], lane);
        load_block(fi, s.f2[b * B + c][1], lane);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          if (c == 0) {
            multiply_add<true>(cr[2 * b + h], ci[2 * b + h], a, {fr[h], fr[h + 2]}, {fi[h], fi[h + 2]});
          } else {
            multiply_add<false>(cr[2 * b + h], ci[2 * b + h], a, {fr[h], fr[h + 2]}, {fi[h], fi[h + 2]});
          }
        }
      }
    }
  }

  // Real part of the inverse for 16 values of k1: adds to C fragments [j1, j2].
  SIMT_DEVICE static void inverse(Accumulators& y, const Fragments& z, const Tables& s, int m) {
    const int lane = lane_id();
#pragma unroll
    for (int b = 0; b < B; b++) {  // 16 values of j2
      float dr[2][4], di[2][4];
#pragma unroll
      for (int c = 0; c < B; c++) {
        FragmentA f;
        load_block(f.re, s.f2[b * B + c][0], lane);
        load_block(f.im, s.f2[b * B + c][1], lane);
        negate(f.neg, f.im);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint32_t br[2] = {z.re[2 * c][h], z.re[2 * c + 1][h]}, bi[2] = {z.im[2 * c][h], z.im[2 * c + 1][h]};
          if (c == 0) {
            multiply_add_conj_a<true>(dr[h], di[h], f, br, bi);
          } else {
            multiply_add_conj_a<false>(dr[h], di[h], f, br, bi);
          }
        }
      }
      uint32_t wr[2][2], wi[2][2];
#pragma unroll
      for (int h = 0; h < 2; h++) pack_multiply<true>(wr[h], wi[h], dr[h], di[h], load16(&s.twiddle_t[m][b][h][lane]));
#pragma unroll
      for (int a = 0; a < A; a++) {
        uint32_t fr[4], fi[4];
        load_block(fr, s.f1[a * A + m][0], lane);
        load_block(fi, s.f1[a * A + m][1], lane);
#pragma unroll
        for (int r = 0; r < 2; r++) {
          mma<false>(y[a][2 * b + r], fr, wr[0][r], wr[1][r]);
          mma<false>(y[a][2 * b + r], fi, wi[0][r], wi[1][r]);
        }
      }
    }
  }
};

}  // namespace tilewise::fft_conv
