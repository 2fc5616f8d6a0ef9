// Tensor-core fragments of complex fp16 matrices: real and imaginary parts in separate registers.
//
// The column index of a C fragment is the next contraction index for free, either as the A operand (rows stay rows) or
// as the B operand (rows become columns). All factor matrices are symmetric, so one A fragment (a0..a3) is also the two
// B fragments (a0, a2), (a1, a3), in both directions. Values between factors are fp16, sums fp32.
#pragma once
#include "simt/simt.h"

namespace tilewise::fft_conv {

using namespace simt;

// One 16 x 16 block = 512 bytes: four 8 x 8 blocks in A-fragment order (0,0), (1,0), (0,1), (1,1).
SIMT_DEVICE void load_block(uint32_t (&r)[4], const fp16* block, int lane) {
  ldmatrix_x4(r, block + lane * 8);
}

template <int N>
SIMT_DEVICE void negate(uint32_t (&out)[N], const uint32_t (&in)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) out[i] = hneg2(in[i]);
}

// (r, i) *= (tr, ti) or its conjugate, two packed values at a time.
template <bool Conj>
SIMT_DEVICE void multiply(uint32_t& r, uint32_t& i, uint32_t tr, uint32_t ti) {
  const uint32_t product = hmul2(i, ti), cross = hmul2(r, ti);
  r = hfma2(r, tr, Conj ? product : hneg2(product));
  i = hfma2(i, tr, Conj ? hneg2(cross) : cross);
}

// Packs a complex C tile to fp16 (rows g, g + 8) and multiplies it by a table entry: re of both rows, im of both rows.
template <bool Conj>
SIMT_DEVICE void pack_multiply(uint32_t (&zr)[2], uint32_t (&zi)[2], const float (&cr)[4], const float (&ci)[4],
                               const uint4& w) {
  zr[0] = pack2<fp16>(cr[0], cr[1]);
  zr[1] = pack2<fp16>(cr[2], cr[3]);
  zi[0] = pack2<fp16>(ci[0], ci[1]);
  zi[1] = pack2<fp16>(ci[2], ci[3]);
  multiply<Conj>(zr[0], zi[0], w.x, w.z);
  multiply<Conj>(zr[1], zi[1], w.y, w.w);
}

// D = A B if First, else D += A B.
template <bool First>
SIMT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (First) {
    mma_m16n8k16_zero_fp16(d, a, b0, b1);
  } else {
    mma_m16n8k16<fp16>(d, a, b0, b1);
  }
}

// Operands of a complex product. `neg` is the negated imaginary part; an operand that never needs it leaves it out.
struct FragmentA {
  uint32_t re[4], im[4], neg[4];
};
struct FragmentB {
  uint32_t re[2], im[2], neg[2];
};

// D (+)= A B, through -im(A)
template <bool First>
SIMT_DEVICE void multiply_add(float (&dr)[4], float (&di)[4], const FragmentA& a, const uint32_t (&br)[2],
                              const uint32_t (&bi)[2]) {
  mma<First>(dr, a.re, br[0], br[1]);
  mma<First>(di, a.re, bi[0], bi[1]);
  mma<false>(dr, a.neg, bi[0], bi[1]);
  mma<false>(di, a.im, br[0], br[1]);
}

// D (+)= conj(A) B, through -im(A)
template <bool First>
SIMT_DEVICE void multiply_add_conj_a(float (&dr)[4], float (&di)[4], const FragmentA& a, const uint32_t (&br)[2],
                                     const uint32_t (&bi)[2]) {
  mma<First>(dr, a.re, br[0], br[1]);
  mma<First>(di, a.re, bi[0], bi[1]);
  mma<false>(dr, a.im, bi[0], bi[1]);
  mma<false>(di, a.neg, br[0], br[1]);
}

// D = A B, through -im(B)
SIMT_DEVICE void multiply_b(float (&dr)[4], float (&di)[4], const uint32_t (&ar)[4], const uint32_t (&ai)[4],
                            const FragmentB& b) {
  mma<true>(dr, ar, b.re[0], b.re[1]);
  mma<true>(di, ar, b.im[0], b.im[1]);
  mma<false>(dr, ai, b.neg[0], b.neg[1]);
  mma<false>(di, ai, b.re[0], b.re[1]);
}

// D = A conj(B), through -im(B)
SIMT_DEVICE void multiply_conj_b(float (&dr)[4], float (&di)[4], const uint32_t (&ar)[4], const uint32_t (&ai)[4],
                                 const FragmentB& b) {
  mma<true>(dr, ar, b.re[0], b.re[1]);
  mma<true>(di, ai, b.re[0], b.re[1]);
  mma<false>(dr, ai, b.im[0], b.im[1]);
  mma<false>(di, ar, b.neg[0], b.neg[1]);
}

}  // namespace tilewise::fft_conv
