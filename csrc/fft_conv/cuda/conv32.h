// fp32 rows, on fp32 arithmetic in shared memory: one block a row.
#pragma once
#include "fft_conv/cuda/conv.h"
#include "fft_conv/cuda/fft32.h"

namespace tilewise::fft_conv {

// x[i] = row * gate, turned a quarter bin; zeros up to n.
template <int Threads>
SIMT_DEVICE void load_row32(float2* x, const float* row, const float* gate, int length, int n) {
  for (int i = thread_id(); i < n; i += Threads) {
    float v = 0.f;
    if (i < length) v = gate ? row[i] * gate[i] : row[i];
    const float2 w = root(-i, 4 * n);
    x[swizzled(i)] = {v * w.x, v * w.y};
  }
  sync_block();
}

template <int Capacity>
struct Conv32 {
  static constexpr int kThreads = Capacity > 4096 ? 512 : 256, kMinArch = 800;
  using Fft = Fft32<kThreads>;
  struct Params {
    ConvParams<float> c;
    int n;
    bool conjugate;
  };
  struct Smem {
    float2 x[Capacity];
    DotSums<kThreads> dots;
  };

  SIMT_DEVICE static void run(const Params& p, Smem& s) {
    const int head = static_cast<int>(block_idx().x), n = p.n;
    const float2* spectrum = static_cast<const float2*>(p.c.spectrum) + static_cast<size_t>(head) * n;
    const RowRange rows = rows_of_block(p.c);
    s.dots.clear();
    for (int b = rows.begin; b < rows.end; b++) {
      load_row32<kThreads>(s.x, p.c.in.row(b, head), p.c.in_gate.row(b, head), p.c.length, n);
      Fft::forward(s.x, n);
      for (int i = thread_id(); i < n; i += kThreads) {
        const float2 k = p.conjugate ? conj(spectrum[i]) : spectrum[i];
        s.x[swizzled(i)] = s.x[swizzled(i)] * k;
      }
      sync_block();
      Fft::backward(s.x, n);
      s.dots.add(end_row(p, s, b, head));
      sync_block();
    }
    if (p.c.dots) s.dots.write(p.c.dots);
  }

  SIMT_DEVICE static float end_row(const Params& p, const Smem& s, int b, int head) {
    const float *in = p.c.in.row(b, head), *in_gate = p.c.in_gate.row(b, head);
    const float *gate0 = p.c.gate[0].row(b, head), *gate1 = p.c.gate[1].row(b, head);
    float *out0 = p.c.out[0].row(b, head), *out1 = p.c.out[1].row(b, head);
    const float skip = p.c.skip ? p.c.skip[head] : 0.f;
    float dot = 0.f;
    for (int i = thread_id(); i < p.c.length; i += kThreads) {
      const float2 w = root(-i, 4 * p.n), c = s.x[swizzled(i)];
      const float v = in_gate ? in[i] * in_gate[i] : in[i];
      float z = (c.x * w.x + c.y * w.y) / static_cast<float>(p.n);  // Re(conj(w) c)
      if (p.c.skip) z += skip * v;
      const float first = gate0 ? gate0[i] : 1.f, second = gate1 ? gate1[i] : 1.f;
      if (out0) out0[i] = z * first;
      if (out1) out1[i] = z * second;
      dot += v * first * second;
    }
    return dot;
  }
};

// Partials hold n real and n imaginary parts whether circular or not: they are also the sum over the rows, in L2.
template <int Capacity>
struct FilterGrad32 {
  static constexpr int kThreads = 256, kMinArch = 800, kHeld = Capacity / kThreads;
  using Fft = Fft32<kThreads>;
  struct Params {
    FilterGradParams<float> g;
    int n;
  };
  struct Smem {
    float2 x[Capacity];
  };

  SIMT_DEVICE static void run(const Params& p, Smem& s) {
    const int head = static_cast<int>(block_idx().x), n = p.n;
    const RowRange rows = rows_of_block(p.g);
    float* re = p.g.partials + (static_cast<size_t>(block_idx().y) * grid_dim().x + head) * 2 * n;
    for (int b = rows.begin; b < rows.end; b++) add_row(p, s, re, b, head, b == rows.begin);
    for (int i = thread_id(); i < n; i += kThreads) s.x[swizzled(i)] = {re[i], re[n + i]};
    sync_block();
    Fft::backward(s.x, n);
    for (int i = thread_id(); i < n; i += kThreads) {
      const float2 w = root(-i, 4 * n), c = conj(w) * s.x[swizzled(i)];
      re[i] = c.x / static_cast<float>(n);
      re[n + i] = c.y / static_cast<float>(n);
    }
  }

  // Every thread adds to its own elements of the sum.
  SIMT_DEVICE static void add_row(const Params& p, Smem& s, float* re, int b, int head, bool first) {
    const int n = p.n;
    load_row32<kThreads>(s.x, p.g.u.row(b, head), p.g.u_gate.row(b, head), p.g.length, n);
    Fft::forward(s.x, n);
    float2 u[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      const int at = thread_id() + i * kThreads;
      u[i] = at < n ? s.x[swizzled(at)] : float2{0.f, 0.f};
    }
    sync_block();
    load_row32<kThreads>(s.x, p.g.dy.row(b, head), p.g.dy_gate.row(b, head), p.g.length, n);
    Fft::forward(s.x, n);
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      const int at = thread_id() + i * kThreads;
      if (at >= n) continue;
      const float2 product = s.x[swizzled(at)] * conj(u[i]);
      re[at] = first ? product.x : re[at] + product.x;
      re[n + at] = first ? product.y : re[n + at] + product.y;
    }
    sync_block();
  }
};

}  // namespace tilewise::fft_conv
