// Filter gradient of 16-bit rows on tensor cores: dk = Re(inverse(sum over rows of G conj(U))), U and G the transforms
// of the gated u and dy. The sum over rows stays in fp32 registers; each block (or warp) writes what its rows give.
#pragma once
#include "fft_conv/cuda/conv.h"

namespace tilewise::fft_conv {

// sum += scale G conj(U)
SIMT_DEVICE void add_correlation(float (&sr)[4], float (&si)[4], const float (&gr)[4], const float (&gi)[4],
                                 const float (&ur)[4], const float (&ui)[4], float scale) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sr[i] += scale * (gr[i] * ur[i] + gi[i] * ui[i]);
    si[i] += scale * (gi[i] * ur[i] - gr[i] * ui[i]);
  }
}

// The surplus phase of the symmetric first factor cancels in G conj(U), while the inverse still takes it away: put it
// back. It is e(-(k1 - 1/4) / (4 N1)).
template <int N1>
SIMT_DEVICE float2 surplus_phase(int k1) {
  return cos_sin_pi(static_cast<float>(4 * k1 - 1) / (8 * N1));
}
// Scales and rotates the rows of a C tile by p[0], p[1], and packs it.
SIMT_DEVICE void rotate_pack(uint32_t (&zr)[2], uint32_t (&zi)[2], const float (&cr)[4], const float (&ci)[4],
                             const float2 (&p)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float a = cr[2 * r], b = cr[2 * r + 1], c = ci[2 * r], d = ci[2 * r + 1];
    zr[r] = pack2<fp16>(a * p[r].x - c * p[r].y, b * p[r].x - d * p[r].y);
    zi[r] = pack2<fp16>(a * p[r].y + c * p[r].x, b * p[r].y + d * p[r].x);
  }
}

template <int G>
SIMT_DEVICE float max_abs_pair(const float (&re)[G][4], const float (&im)[G][4]) {
  return fmaxf(max_abs<4>(re), max_abs<4>(im));
}

// The sum is complex: one bit less than a real row.
SIMT_DEVICE float sum_scale(float amax, int top) {
  return scale_below(amax, top - 1);
}

// Two factors: a warp has 16 values of k1 and every kGroups-th row of the block. Every warp writes a partial result.
template <class T, int N1, int N2>
struct FilterGrad2 {
  using F = TwoFactors<N1, N2>;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kMinArch = 800, kMinBlocks = F::n > 512 ? 2 : 4;
  static constexpr int kGroups = kWarps / F::A;
  using Params = FilterGradParams<T>;
  struct Smem {
    typename F::Tables tables;
  };

  SIMT_DEVICE static void run(const Params& p, Smem& s) {
    const int m = warp_id() % F::A, head = static_cast<int>(block_idx().x);
    copy_words<kThreads>(&s.tables, p.tables, sizeof(s.tables) / 16);
    finish_copies();
    const RowRange rows = rows_of_block(p);
    float sr[F::J][4] = {}, si[F::J][4] = {};
    for (int b = rows.begin + warp_id() / F::A; b < rows.end; b += kGroups) {
      float ur[F::J][4], ui[F::J][4], gr[F::J][4], gi[F::J][4];
      typename F::Operand x;
      const float u_scale = F::load(x, p.u.row(b, head), p.u_gate.row(b, head), {p.length, p.vector});
      F::forward(ur, ui, x, s.tables, m);
      const float g_scale = F::load(x, p.dy.row(b, head), p.dy_gate.row(b, head), {p.length, p.vector});
      F::forward(gr, gi, x, s.tables, m);
#pragma unroll
      for (int j = 0; j < F::J; j++)
        add_correlation(sr[j], si[j], gr[j], gi[j], ur[j], ui[j], reciprocal(u_scale) * reciprocal(g_scale));
    }
    write(p, s, sr, si, m, head);
  }

  SIMT_DEVICE static void write(const Params& p, const Smem& s, const float (&sr)[F::J][4], const float (&si)[F::J][4],
                                int m, int head) {
    const int lane = lane_id(), k1 = 16 * m + (lane >> 2);
    const float scale = sum_scale(warp_max(max_abs_pair(sr, si)), F::kTop);
    float2 phase[2] = {surplus_phase<N1>(k1), surplus_phase<N1>(k1 + 8)};
#pragma unroll
    for (int r = 0; r < 2; r++) phase[r] = {phase[r].x * scale, phase[r].y * scale};
    typename F::Fragments z;
#pragma unroll
    for (int j = 0; j < F::J; j++) rotate_pack(z.re[j], z.im[j], sr[j], si[j], phase);
    const size_t partial = static_cast<size_t>(block_idx().y) * kWarps + warp_id();
    const int planes = p.circular ? 2 : 1;
    float* out = p.partials + (partial * grid_dim().x + head) * planes * F::n;
#pragma unroll 1
    for (int plane = 0; plane < planes; plane++) {
      typename F::Accumulators y = {};
      F::inverse(y, z, s.tables, m);
      write_plane(out + plane * F::n, y, sqrtf(static_cast<float>(F::n)) * reciprocal(scale));
#pragma unroll
      for (int j = 0; j < F::J; j++)  // the imaginary part is the real part of -i z
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const uint32_t re = z.re[j][r];
          z.re[j][r] = z.im[j][r];
          z.im[j][r] = hneg2(re);
        }
    }
  }

  SIMT_DEVICE static void write_plane(float* out, typename F::Accumulators& y, float scale) {
    const typename F::Output at;
#pragma unroll
    for (int group = 0; group < 2 * F::A; group++)
#pragma unroll
      for (int i = 0; i < 2 * F::J; i += 4) {
        uint32_t w[4];
#pragma unroll
        for (int c = 0; c < 4; c++) w[c] = f32_bits(F::output(y, group, i + c) * scale);
        store16(out + at.base + F::Output::offset(group) + i, uint4{w[0], w[1], w[2], w[3]});
      }
  }
};

// Three factors: a block has 16 values of k1, that is 1 / Parts of the spectrum: the sums of more, next to two
// transforms on their way, do not fit the registers. The blocks of a row each read all of it, from L2.
template <class T, int N1>
struct FilterGrad3 {
  static constexpr int Warps = 8, Parts = N1 / 16;
  static constexpr int kThreads = 32 * Warps, kMinArch = 800, kMinBlocks = 1;
  using F = ThreeFactors<N1, Warps, 1>;
  using Params = FilterGradParams<T>;
  using Sum = float[F::kUnits * 2][4];
  struct Smem {
    typename F::Tables tables;
    uint4 twiddles[F::kRows][2][32];
    typename F::Exchange u, g;
    float slots[2][Warps];
  };
  // Grid (heads * Parts, groups of rows)
  SIMT_DEVICE static int head() { return static_cast<int>(block_idx().x) / Parts; }
  SIMT_DEVICE static int part() { return static_cast<int>(block_idx().x) % Parts; }

  SIMT_DEVICE static void run(const Params& p, Smem& s) {
    const int h = head();
    copy_words<kThreads>(&s.tables, p.tables, F::kTableWords);
    copy_words<kThreads>(s.twiddles, p.tables + F::kTableWords + part() * F::kRows * 64, F::kRows * 64);
    finish_copies();
    const RowRange rows = rows_of_block(p);
    Sum sr = {}, si = {};
    for (int b = rows.begin; b < rows.end; b++) {
      typename F::Operand x;
      const float u_scale = F::load(x, s.slots[0], p.u.row(b, h), p.u_gate.row(b, h), {p.length, p.vector});
      F::factor1(s.u, x, s.tables, part());
      const float g_scale = F::load(x, s.slots[1], p.dy.row(b, h), p.dy_gate.row(b, h), {p.length, p.vector});
      F::factor1(s.g, x, s.tables, part());
      sync_block();
      add_row(sr, si, s, reciprocal(u_scale) * reciprocal(g_scale));
      sync_block();
    }
    write(p, s, sr, si);
  }

  SIMT_DEVICE static void add_row(Sum& sr, Sum& si, const Smem& s, float scale) {
    const int lane = lane_id();
    typename F::Constants constants;
    F::load_constants(constants, s.tables);
#pragma unroll
    for (int q = 0; q < F::kUnits; q++) {
      const int row = q * Warps + warp_id();
      sync_warp();  // for the compiler: no loads of later units ahead of time, registers are short
      const uint4 w[2] = {load16(&s.twiddles[row][0][lane]), load16(&s.twiddles[row][1][lane])};
      float ur[2][4], ui[2][4], gr[2][4], gi[2][4];
      F::forward(ur, ui, s.u, constants, w, row);
      F::forward(gr, gi, s.g, constants, w, row);
#pragma unroll
      for (int h = 0; h < 2; h++) add_correlation(sr[2 * q + h], si[2 * q + h], gr[h], gi[h], ur[h], ui[h], scale);
    }
  }

  SIMT_DEVICE static void write(const Params& p, Smem& s, const Sum& sr, const Sum& si) {
    const int lane = lane_id();
    const float scale = sum_scale(F::block_max(s.slots[0], max_abs_pair(sr, si)), F::kTop);
    typename F::Constants constants;
    F::load_constants(constants, s.tables);
#pragma unroll
    for (int q = 0; q < F::kUnits; q++) {
      const int row = q * Warps + warp_id();
      const uint4 w[2] = {load16(&s.twiddles[row][0][lane]), load16(&s.twiddles[row][1][lane])};
      const float2 turn = surplus_phase<N1>(part() * F::kRows + row);
      const float2 phase[2] = {{turn.x * scale, turn.y * scale}, {turn.x * scale, turn.y * scale}};
      typename F::Fragments z;
#pragma unroll
      for (int h = 0; h < 2; h++) rotate_pack(z.re[h], z.im[h], sr[2 * q + h], si[2 * q + h], phase);
      F::inverse(s.u, z, constants, w, row);
    }
    sync_block();
    const int planes = p.circular ? 2 : 1, heads = static_cast<int>(grid_dim().x) / Parts;
    const size_t partial = static_cast<size_t>(block_idx().y) * Parts + part();
    float* out = p.partials + (partial * heads + head()) * planes * F::n;
    const float back = sqrtf(static_cast<float>(F::n)) * reciprocal(scale);
    write_plane<false>(out, s, back);
    if (p.circular) write_plane<true>(out + F::n, s, back);
  }

  template <bool Imaginary>
  SIMT_DEVICE static void write_plane(float* out, const Smem& s, float scale) {
    const typename F::Output at;
    typename F::Accumulators y = {};
    F::template inverse1<Imaginary>(y, s.u, s.tables, part());
#pragma unroll
    for (int group = 0; group < 4 * F::A; group++)
#pragma unroll
      for (int i = 0; i < F::J; i += 2) {
        const uint2 pair = {f32_bits(F::output(y, group, i) * scale), f32_bits(F::output(y, group, i + 1) * scale)};
        store8(out + at.base + F::Output::offset(group) + i, pair);
      }
  }
};

}  // namespace tilewise::fft_conv
