// Transforms of n = N1 * 16 * 16 points: one block of `Warps` warps.
//
// The ring is x^n = i as in two_factors.h. j = 256 j1 + 16 j2 + j3, k = k1 + N1 (k2 + 16 k3):
//   F1[k1][j1] = e((k1 - 1/4)(j1 - 1/4) / N1)      contracted by all warps, each with 256 / Warps columns (j2, j3)
//   W[k1][j2, j3] = e((k1 - 1/4)(16 j2 + j3) / n)  element-wise, one lane layout serves both directions
//   F[a][b] = e(a b / 16)                          factors 2 and 3, in registers; a warp owns N1 / Warps values of k1
//   T[k2][j3] = e(k2 j3 / 256)                     symmetric, 8 registers, both directions
// E[k1][j3][j2] (fp16, re and im planes in shared memory) is the one exchange each way, in place.
#pragma once
#include "fft_conv/cuda/fragments.h"
#include "fft_conv/cuda/rows.h"

namespace tilewise::fft_conv {

// A block may have 16 Blocks of the N1 values of k1, from 16 first on; then E has these rows only.
template <int N1, int Warps_, int Blocks = N1 / 16>
struct ThreeFactors {
  static constexpr int n = N1 * 256, A = N1 / 16, Warps = Warps_;
  static constexpr int J = 32 / Warps;          // column tiles of a warp in factor 1 = consecutive j3 of a lane
  static constexpr int kRows = 16 * Blocks;     // values of k1 of the block
  static constexpr int kUnits = kRows / Warps;  // and of a warp
  static constexpr int kTop = row_top(n);

  struct Tables {
    fp16 f1[A * A][2][256], f[2][256];
    uint4 t[2][32];
  };
  using Twiddles = uint4[N1][2][32];  // follow the Tables in memory
  static constexpr int kTableWords = static_cast<int>(sizeof(Tables) / 16);
  using Exchange = uint32_t[2][kRows * 128];
  using Operand = uint32_t[A][2][J];
  using Accumulators = float[A][J][4];
  struct Constants {  // the 16-point matrix as A and as B operands, and T
    FragmentA a;
    FragmentB b[2];
    uint4 t[2];
  };
  struct Fragments {  // [k2, k3] complex, fp16, C-fragment order
    uint32_t re[2][2], im[2][2];
  };

  // Word offset of the 16-byte chunk (j3, j2 / 8) of a row, swizzled: conflict-free along k1 and along j3.
  SIMT_DEVICE static int chunk(int row, int j3, int h) {
    const int q = 2 * j3 + h;
    return row * 128 + ((q ^ ((q >> 3) & 1) ^ (row & 7)) << 2);
  }
  // This warp's columns: j2 = 8 column_j2h() + 0..7, j3 = column_j3() + 0..J-1.
  SIMT_DEVICE static int column_j3() { return warp_id() % (16 / J) * J; }
  SIMT_DEVICE static int column_j2h() { return warp_id() / (16 / J); }

  // Where the 4 A groups of J elements of pack_operand() stand in the row, and the 4 A groups of J results.
  struct Input {
    int base = 2 * (lane_id() & 3) * 256 + (8 * column_j2h() + (lane_id() >> 2)) * 16 + column_j3();
    SIMT_HD static constexpr int offset(int i) { return (8 * (i >> 1) + (i & 1)) * 256; }
  };
  struct Output {
    int base = (lane_id() >> 2) * 256 + (8 * column_j2h() + 2 * (lane_id() & 3)) * 16 + column_j3();
    SIMT_HD static constexpr int offset(int i) { return 8 * (i >> 1) * 256 + (i & 1) * 16; }
  };
  SIMT_DEVICE static float& output(Accumulators& y, int group, int i) { return y[group >> 2][i][group & 3]; }

  // One row into fp16; returns its scale. Contains a block barrier.
  template <class T>
  SIMT_DEVICE static float load(Operand& x, float (&amax)[Warps], const T* row, const T* gate, const Extent& extent) {
    float v[4 * A][J];
    load_gated(v, row, gate, extent, Input());
    const float scale = scale_below(block_max(amax, max_abs(v)), kTop);
    pack_operand<A, J>(x, v, scale);
    return scale;
  }
  SIMT_DEVICE static float block_max(float (&slots)[Warps], float v) {
    v = warp_max(v);
    if (lane_id() == 0) slots[warp_id()] = v;
    sync_block();
#pragma unroll
    for (int i = 0; i < Warps; i++) v = fmaxf(v, slots[i]);
    return v;
  }

  SIMT_DEVICE static void factor1(Exchange& e, const Operand& x, const Tables& s, int first = 0) {
    const int lane = lane_id(), g = lane >> 2, t = lane & 3, j3 = column_j3(), j2h = column_j2h();
#pragma unroll 1
    for (int m = 0; m < Blocks; m++) {
      float ar[J][4], ai[J][4];
#pragma unroll
      for (int a = 0; a < A; a++) {
        uint32_t fr[4], fi[4];
        load_block(fr, s.f1[(first + m) * A + a][0], lane);
        load_block(fi, s.f1[(first + m) * A + a][1], lane);
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
      for (int j = 0; j < J; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int o = chunk(16 * m + 8 * h + g, j3 + j, j2h) + t;
          e[0][o] = pack2<fp16>(ar[j][2 * h], ar[j][2 * h + 1]);
          e[1][o] = pack2<fp16>(ai[j][2 * h], ai[j][2 * h + 1]);
        }
    }
  }

  SIMT_DEVICE static void load_constants(Constants& c, const Tables& s) {
    const int lane = lane_id();
    load_block(c.a.re, s.f[0], lane);
    load_block(c.a.im, s.f[1], lane);
    negate(c.a.neg, c.a.im);
    // Loaded again in the order b0, b1 | b0, b1 instead of copied: mma wants B in consecutive registers, and copies get
    // merged and made anew in the loop.
    const int swapped = (lane & 7) | (lane & 8) << 1 | (lane & 16) >> 1;
    uint32_t re[4], im[4];
    load_block(re, s.f[0], swapped);
    load_block(im, s.f[1], swapped);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      c.b[h] = {{re[2 * h], re[2 * h + 1]}, {im[2 * h], im[2 * h + 1]}, {}};
      negate(c.b[h].neg, c.b[h].im);
      c.t[h] = load16(&s.t[h][lane]);
    }
  }

  // Twiddle, factors 2 and 3 of one row of E (one k1, whose twiddles are w) -> C fragments [k2, k3].
  SIMT_DEVICE static void forward(float (&cr)[2][4], float (&ci)[2][4], const Exchange& e, const Constants& c,
                                  const uint4 (&w)[2], int row) {
    const int lane = lane_id();
    uint32_t xr[4], xi[4];
    // tiles (j3 lo, j2 lo), (j3 lo, j2 hi), (j3 hi, j2 lo), (j3 hi, j2 hi)
    const int o = chunk(row, ((lane >> 4) << 3) + (lane & 7), (lane >> 3) & 1);
    ldmatrix_x4(xr, &e[0][o]);
    ldmatrix_x4(xi, &e[1][o]);
    Fragments z;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      multiply<false>(xr[h], xi[h], w[h].x, w[h].z);
      multiply<false>(xr[2 + h], xi[2 + h], w[h].y, w[h].w);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float dr[4], di[4];
      multiply_add<true>(dr, di, c.a, {xr[2 * h], xr[2 * h + 1]}, {xi[2 * h], xi[2 * h + 1]});  // [k2, j3]
      pack_multiply<false>(z.re[h], z.im[h], dr, di, c.t[h]);
    }
    const uint32_t ar[4] = {z.re[0][0], z.re[0][1], z.re[1][0], z.re[1][1]};
    const uint32_t ai[4] = {z.im[0][0], z.im[0][1], z.im[1][0], z.im[1][1]};
#pragma unroll
    for (int h = 0; h < 2; h++) multiply_b(cr[h], ci[h], ar, ai, c.b[h]);
  }

  // Inverse of factors 3 and 2 and conjugate twiddle: [k2, k3] -> one row of E.
  SIMT_DEVICE static void inverse(Exchange& e, const Fragments& z, const Constants& c, const uint4 (&w)[2], int row) {
    const int lane = lane_id(), g = lane >> 2, t = lane & 3;
    uint32_t yr[2][2], yi[2][2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float dr[4], di[4];
      multiply_add_conj_a<true>(dr, di, c.a, {z.re[0][r], z.re[1][r]}, {z.im[0][r], z.im[1][r]});  // [j3, k2]
      pack_multiply<true>(yr[r], yi[r], dr, di, c.t[r]);
    }
    const uint32_t ar[4] = {yr[0][0], yr[0][1], yr[1][0], yr[1][1]};
    const uint32_t ai[4] = {yi[0][0], yi[0][1], yi[1][0], yi[1][1]};
    sync_warp();  // orders this unit's ldmatrix reads before the stores
#pragma unroll
    for (int h = 0; h < 2; h++) {  // [j3, j2] = y conj(F)
      float dr[4], di[4];
      multiply_conj_b(dr, di, ar, ai, c.b[h]);
      pack_multiply<true>(yr[h], yi[h], dr, di, w[h]);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int o = chunk(row, 8 * r + g, h) + t;
        e[0][o] = yr[h][r];
        e[1][o] = yi[h][r];
      }
    }
  }

  // Real (or imaginary) part of the inverse of factor 1: adds E to C fragments [j1, (j2, j3)].
  template <bool Imaginary>
  SIMT_DEVICE static void inverse1(Accumulators& y, const Exchange& e, const Tables& s, int first = 0) {
    const int lane = lane_id(), j3 = column_j3(), j2h = column_j2h();
#pragma unroll 1
    for (int m = 0; m < Blocks; m++) {
      uint32_t zr[J][2], zi[J][2];
#pragma unroll
      for (int j = 0; j < J; j += 2) {  // tiles (k1 lo, j), (k1 hi, j), (k1 lo, j + 1), (k1 hi, j + 1)
        const int o = chunk(16 * m + (lane & 15), j3 + j + (lane >> 4), j2h);
        uint32_t q[4];
        ldmatrix_x4_trans(q, &e[Imaginary][o]);  // Im(z) = Re(-i z)
        zr[j][0] = q[0], zr[j][1] = q[1], zr[j + 1][0] = q[2], zr[j + 1][1] = q[3];
        ldmatrix_x4_trans(q, &e[!Imaginary][o]);
        if constexpr (Imaginary) negate(q, q);
        zi[j][0] = q[0], zi[j][1] = q[1], zi[j + 1][0] = q[2], zi[j + 1][1] = q[3];
      }
#pragma unroll
      for (int a = 0; a < A; a++) {
        uint32_t fr[4], fi[4];
        load_block(fr, s.f1[a * A + first + m][0], lane);
        load_block(fi, s.f1[a * A + first + m][1], lane);
#pragma unroll
        for (int j = 0; j < J; j++) {
          mma<false>(y[a][j], fr, zr[j][0], zr[j][1]);
          mma<false>(y[a][j], fi, zi[j][0], zi[j][1]);
        }
      }
    }
  }
};

}  // namespace tilewise::fft_conv
