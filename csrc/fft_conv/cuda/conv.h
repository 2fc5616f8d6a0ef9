// Fused FFT convolution of 16-bit rows on tensor cores: gate, transform, product, inverse, skip, gate in one kernel.
// Grid (heads, groups of rows): a block keeps its head's tables and spectrum for all of its rows.
#pragma once
#include "fft_conv/cuda/three_factors.h"
#include "fft_conv/cuda/two_factors.h"

namespace tilewise::fft_conv {

// Copies 16-byte words to shared memory, all threads together; the caller commits and waits.
template <int Threads>
SIMT_DEVICE void copy_words(void* dst, const uint4* src, int words) {
  for (int i = thread_id(); i < words; i += Threads) cp_async16(static_cast<uint4*>(dst) + i, src + i);
}
SIMT_DEVICE void finish_copies() {
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
}

struct RowRange {
  int begin, end;
};
template <class Params>
SIMT_DEVICE RowRange rows_of_block(const Params& p) {
  const int begin = static_cast<int>(block_idx().y) * p.rows_per_block, end = begin + p.rows_per_block;
  return {begin, end < p.batch ? end : p.batch};
}

// Every thread's share of the block's dot products: in shared memory, since no register is free for it.
template <int Threads>
struct DotSums {
  float of_thread[Threads];

  SIMT_DEVICE void clear() { of_thread[thread_id()] = 0.f; }
  SIMT_DEVICE void add(float v) { of_thread[thread_id()] += v; }
  // The block's sum, in a fixed order; by all threads together.
  SIMT_DEVICE void write(float* dots) {
    sync_block();
    if (warp_id() != 0) return;
    float sum = 0.f;
    for (int i = lane_id(); i < Threads; i += kWarp) sum += of_thread[i];
    sum = warp_sum(sum);
    if (lane_id() == 0) dots[static_cast<size_t>(block_idx().y) * grid_dim().x + block_idx().x] = sum;
  }
};

// One warp a row.
template <class T, int N1, int N2>
struct Conv2 {
  using F = TwoFactors<N1, N2>;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kMinArch = 800;
  static constexpr int kMinBlocks = F::n > 512 ? 2 : F::n > 256 ? 4 : 6;
  using Params = ConvParams<T>;
  struct Smem {
    typename F::Tables tables;
    uint4 spectrum[F::A][F::J][32];
    DotSums<kThreads> dots;
  };

  SIMT_DEVICE static void run(const Params& p, Smem& s) {
    const int head = static_cast<int>(block_idx().x);
    copy_words<kThreads>(&s.tables, p.tables, sizeof(s.tables) / 16);
    copy_words<kThreads>(s.spectrum, static_cast<const uint4*>(p.spectrum) + static_cast<size_t>(head) * (F::n / 4),
                         F::n / 4);
    finish_copies();
    const RowRange rows = rows_of_block(p);
    s.dots.clear();
    for (int b = rows.begin + warp_id(); b < rows.end; b += kWarps) row(p, s, b, head);
    if (p.dots) s.dots.write(p.dots);
  }

  SIMT_DEVICE static void row(const Params& p, Smem& s, int b, int head) {
    const int lane = lane_id();
    typename F::Operand x;
    const float in_scale = F::load(x, p.in.row(b, head), p.in_gate.row(b, head), {p.length, p.vector});
    typename F::Accumulators y = {};
#pragma unroll 1
    for (int m = 0; m < F::A; m++) {
      float cr[F::J][4], ci[F::J][4];
      F::forward(cr, ci, x, s.tables, m);
      sync_warp();  // for the compiler: no loads of the way back ahead of time, registers are short
      typename F::Fragments z;
#pragma unroll
      for (int j = 0; j < F::J; j++)
        pack_multiply<false>(z.re[j], z.im[j], cr[j], ci[j], load16(&s.spectrum[m][j][lane]));
      F::inverse(y, z, s.tables, m);
    }
    const RowEnd<T> end = {p, b, head, in_scale};
    const typename F::Output at;
    const auto value = [&y](int group, int i) -> float& { return F::output(y, group, i); };
    constexpr int V = 2 * F::J, G = 2 * F::A;
    end.template add_skip<V, G>(at, value);
    Words<V> gates[G];
    end.load_gates(gates, at);
    end.template store<V, G>(gates, at, value, [&s](float dot) { s.dots.add(dot); });
  }
};

// One block a row at a time.
template <class T, int N1, int Warps, bool SpectrumInSmem>
struct Conv3 {
  using F = ThreeFactors<N1, Warps>;
  static constexpr int kThreads = 32 * Warps, kMinArch = 800;
  static constexpr int kMinBlocks = N1 == 16 ? 4 : N1 == 32 ? 2 : 1;
  using Params = ConvParams<T>;
  struct Smem {
    typename F::Tables tables;
    typename F::Twiddles twiddles;
    uint4 spectrum[SpectrumInSmem ? N1 : 1][2][32];
    typename F::Exchange exchange;
    float slots[Warps];
    DotSums<kThreads> dots;
  };

  SIMT_DEVICE static void run(const Params& p, Smem& s) {
    const int head = static_cast<int>(block_idx().x);
    const uint4* spectrum = static_cast<const uint4*>(p.spectrum) + static_cast<size_t>(head) * (F::n / 4);
    copy_words<kThreads>(&s.tables, p.tables, F::kTableWords);
    copy_words<kThreads>(s.twiddles, p.tables + F::kTableWords, N1 * 64);
    if constexpr (SpectrumInSmem) copy_words<kThreads>(s.spectrum, spectrum, F::n / 4);
    finish_copies();
    const RowRange rows = rows_of_block(p);
    s.dots.clear();
    for (int b = rows.begin; b < rows.end; b++) {
      typename F::Operand x;
      const float in_scale = F::load(x, s.slots, p.in.row(b, head), p.in_gate.row(b, head), {p.length, p.vector});
      F::factor1(s.exchange, x, s.tables);
      sync_block();
      units(s, SpectrumInSmem ? &s.spectrum[0][0][0] : spectrum);
      sync_block();
      end_row(s, {p, b, head, in_scale});
    }
    if (p.dots) s.dots.write(p.dots);
  }

  // A warp's values of k1, one at a time: a 16 x 16 transform, product and inverse in registers.
  SIMT_DEVICE static void units(Smem& s, const uint4* spectrum) {
    const int lane = lane_id();
    typename F::Constants constants;  // for these lines only: 32 registers
    F::load_constants(constants, s.tables);
#pragma unroll 1
    for (int q = 0; q < F::kUnits; q++) {
      const int k1 = q * Warps + warp_id();
      const uint4 k[2] = {load16(spectrum + k1 * 64 + lane), load16(spectrum + k1 * 64 + 32 + lane)};
      const uint4 w[2] = {load16(&s.twiddles[k1][0][lane]), load16(&s.twiddles[k1][1][lane])};
      float cr[2][4], ci[2][4];
      F::forward(cr, ci, s.exchange, constants, w, k1);
      typename F::Fragments z;
#pragma unroll
      for (int h = 0; h < 2; h++) pack_multiply<false>(z.re[h], z.im[h], cr[h], ci[h], k[h]);
      F::inverse(s.exchange, z, constants, w, k1);
    }
  }

  SIMT_DEVICE static void end_row(Smem& s, const RowEnd<T>& end) {
    const typename F::Output at;
    constexpr int V = F::J, G = 4 * F::A;
    Words<V> gates[G];
    end.load_gates(gates, at);  // on their way during the last factor
    typename F::Accumulators y = {};
    const auto value = [&y](int group, int i) -> float& { return F::output(y, group, i); };
    end.template add_skip<V, G>(at, value);
    F::template inverse1<false>(y, s.exchange, s.tables);
    end.template store<V, G>(gates, at, value, [&s](float dot) { s.dots.add(dot); });
  }
};

}  // namespace tilewise::fft_conv
