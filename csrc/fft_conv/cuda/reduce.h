// Sums of what the blocks left behind, in a fixed order: gradients are deterministic.
#pragma once
#include "simt/simt.h"

namespace tilewise::fft_conv {

using namespace simt;

struct ReduceParams {
  const float* partials;  // [count, h, planes, n]
  const float* dots;      // [dot_count, h]
  float* dk;              // [h, filter_length] or null
  float* dskip;           // [h] or null
  int64_t filter_length;
  int count, dot_count, planes, n, length;
  bool circular;
};

// Grid (heads, chunks of taps).
struct ReduceGradients {
  static constexpr int kThreads = 256, kMinArch = 800;
  using Params = ReduceParams;
  struct Smem {};

  SIMT_DEVICE static void run(const Params& p, Smem&) {
    const int head = static_cast<int>(block_idx().x);
    const int64_t j = static_cast<int64_t>(block_idx().y) * kThreads + thread_id();
    if (p.dk && j < p.filter_length) p.dk[head * p.filter_length + j] = tap(p, head, j);
    if (p.dskip && j == 0) {
      float sum = 0.f;
      for (int i = 0; i < p.dot_count; i++) sum += p.dots[static_cast<size_t>(i) * grid_dim().x + head];
      p.dskip[head] = sum;
    }
  }

  // A correlation at lag m; a circular one adds lag m - length, which the ring keeps at -i x^(n + m - length).
  SIMT_DEVICE static float tap(const Params& p, int head, int64_t j) {
    if (p.length == 0 || (!p.circular && j >= p.length)) return 0.f;
    const int m = static_cast<int>(j % p.length);
    float sum = 0.f;
    for (int i = 0; i < p.count; i++) {
      const float* re = p.partials + (static_cast<size_t>(i) * grid_dim().x + head) * p.planes * p.n;
      sum += re[m];
      if (p.circular && m > 0) sum -= re[p.n + p.n + m - p.length];
    }
    return sum;
  }
};

}  // namespace tilewise::fft_conv
