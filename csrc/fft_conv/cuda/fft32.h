// Complex fp32 transforms of n = 2^8 .. 2^14 points in shared memory, by all threads of a block: filter spectra, and
// the fp32 convolution. Forward: natural order in, bit-reversed out; backward: the reverse, unnormalised.
#pragma once
#include "simt/simt.h"

namespace tilewise::fft_conv {

using namespace simt;

constexpr int kSmallestFft = 256, kLargestFft = 16384;

SIMT_DEVICE float2 operator+(float2 a, float2 b) {
  return {a.x + b.x, a.y + b.y};
}
SIMT_DEVICE float2 operator-(float2 a, float2 b) {
  return {a.x - b.x, a.y - b.y};
}
SIMT_DEVICE float2 operator*(float2 a, float2 b) {
  return {a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x};
}
SIMT_DEVICE float2 conj(float2 a) {
  return {a.x, -a.y};
}
SIMT_DEVICE float2 times_i(float2 a) {
  return {-a.y, a.x};
}

// e(numerator / denominator) = exp(-2 pi i numerator / denominator); the denominator is a power of two.
SIMT_DEVICE float2 root(int numerator, int denominator) {
  return cos_sin_pi(-2.f * static_cast<float>(numerator & (denominator - 1)) / static_cast<float>(denominator));
}

// Where element i lies: without it, the passes of small spans would meet in the same banks.
SIMT_DEVICE int swizzled(int i) {
  return i ^ ((i >> 4) & 3) * 5;
}

SIMT_DEVICE int log2_floor(int n) {
  int bits = 0;
  while (n >> (bits + 1)) bits++;
  return bits;
}

template <int Threads>
struct Fft32 {
  struct Slots {
    int at[4];
  };
  // The four elements of butterfly i at this span, a quarter of the span apart.
  SIMT_DEVICE static Slots slots(int i, int quarter, int j) {
    const int first = (i - j) * 4 + j;
    return {{swizzled(first), swizzled(first + quarter), swizzled(first + 2 * quarter), swizzled(first + 3 * quarter)}};
  }

  // Two radix-2 steps of decimation in frequency at once; the last step stands alone if log2 n is odd.
  SIMT_DEVICE static void forward(float2* x, int n) {
    int span = n;
    for (; span >= 4; span /= 4) {
      const int quarter = span / 4;
      for (int i = thread_id(); i < n / 4; i += Threads) {
        const int j = i & (quarter - 1);
        const Slots s = slots(i, quarter, j);
        const float2 a = x[s.at[0]], b = x[s.at[1]], c = x[s.at[2]], d = x[s.at[3]];
        const float2 w = root(j, span), ww = w * w;
        const float2 even = a + c, odd = b + d, lo = a - c, hi = times_i(d - b);
        x[s.at[0]] = even + odd;
        x[s.at[1]] = (even - odd) * ww;
        x[s.at[2]] = (lo + hi) * w;
        x[s.at[3]] = (lo - hi) * (ww * w);
      }
      sync_block();
    }
    if (span == 2) pairs(x, n);
  }

  SIMT_DEVICE static void backward(float2* x, int n) {
    int span = 4;
    if (log2_floor(n) & 1) {
      pairs(x, n);
      span = 8;
    }
    for (; span <= n; span *= 4) {
      const int quarter = span / 4;
      for (int i = thread_id(); i < n / 4; i += Threads) {
        const int j = i & (quarter - 1);
        const Slots s = slots(i, quarter, j);
        const float2 w = conj(root(j, span)), ww = w * w;
        const float2 a = x[s.at[0]], b = x[s.at[1]] * ww, c = x[s.at[2]] * w, d = x[s.at[3]] * (ww * w);
        const float2 even = a + b, lo = a - b, odd = c + d, hi = times_i(c - d);
        x[s.at[0]] = even + odd;
        x[s.at[1]] = lo + hi;
        x[s.at[2]] = even - odd;
        x[s.at[3]] = lo - hi;
      }
      sync_block();
    }
  }

  SIMT_DEVICE static void pairs(float2* x, int n) {
    for (int i = thread_id(); i < n / 2; i += Threads) {
      const int first = swizzled(2 * i), second = swizzled(2 * i + 1);
      const float2 a = x[first], b = x[second];
      x[first] = a + b;
      x[second] = a - b;
    }
    sync_block();
  }
};

}  // namespace tilewise::fft_conv
