// What the convolution kernels read besides the rows: factor tables and filter spectra, built by one launch.
#pragma once
#include "fft_conv/cuda/fft32.h"
#include "fft_conv/params.h"

namespace tilewise::fft_conv {

// n = n1 * n2, or n1 * 16 * 16 where n2 == 0.
struct Factors {
  int n1, n2;

  SIMT_HD int table_words() const {  // sizeof(TwoFactors::Tables) / 16, or that of ThreeFactors' Tables and Twiddles
    return n2 ? (n1 * n1 + n2 * n2 + 2 * n1 * n2) / 4 : n1 * n1 / 4 + 64 + 64 + n1 * 64;
  }
};

struct PrepareParams {
  const float* k;  // [h, filter_length], rows k_stride apart
  int64_t k_stride, filter_length;
  int length, n, heads;
  bool causal;
  Factors factors;        // fp16 only
  uint4* tables;          // fp16 only, else null
  uint4* spectrum;        // [h, n / 4] fp16 in fragment order, or null
  uint4* conj_spectrum;   // the same, conjugated, or null
  float* spectrum_scale;  // [h] power of two that undoes the scaling of both
  float2* spectrum32;     // [h, n] fp32 in bit-reversed order, or null
};

// Entries of the tables. Rows and columns of 16 x 16 blocks and of C fragments as in fragments.h.
struct TableEntries {
  SIMT_DEVICE static int slot_index(int slot, int n2) { return slot % 8 * (n2 / 8) + slot / 8; }

  // Word i of the blocks of a matrix: 8 consecutive columns, real or imaginary.
  template <class F>
  SIMT_DEVICE static uint4 block(int i, int blocks_per_row, float scale, F value) {
    const int index = i >> 6, imaginary = (i >> 5) & 1;
    const int row = 16 * (index / blocks_per_row) + (i & 15);
    const int column = 16 * (index % blocks_per_row) + 8 * ((i >> 4) & 1);
    uint32_t w[4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const float2 a = value(row, column + 2 * c), b = value(row, column + 2 * c + 1);
      w[c] = imaginary ? pack2<fp16>(a.y * scale, b.y * scale) : pack2<fp16>(a.x * scale, b.x * scale);
    }
    return {w[0], w[1], w[2], w[3]};
  }

  // A lane's word of a C fragment: re of rows g and g + 8, im of both.
  template <class F>
  SIMT_DEVICE static uint4 fragment(int row_block, int tile, int lane, F value) {
    const int row = 16 * row_block + (lane >> 2), column = 8 * tile + 2 * (lane & 3);
    const float2 a = value(row, column), b = value(row, column + 1);
    const float2 c = value(row + 8, column), d = value(row + 8, column + 1);
    return {pack2<fp16>(a.x, b.x), pack2<fp16>(c.x, d.x), pack2<fp16>(a.y, b.y), pack2<fp16>(c.y, d.y)};
  }

  // e((row - 1/4)(column - 1/4) / n1) / sqrt(n1)
  SIMT_DEVICE static uint4 first_factor(int i, int n1) {
    return block(i, n1 / 16, 1.f / sqrtf(static_cast<float>(n1)),
                 [n1](int r, int c) { return root((4 * r - 1) * (4 * c - 1), 16 * n1); });
  }

  SIMT_DEVICE static uint4 two_factors(int i, int n1, int n2) {
    const int n = n1 * n2;
    if (i < n1 * n1 / 4) return first_factor(i, n1);
    i -= n1 * n1 / 4;
    if (i < n2 * n2 / 4)
      return block(i, n2 / 16, 1.f / sqrtf(static_cast<float>(n2)),
                   [n2](int r, int c) { return root(slot_index(r, n2) * slot_index(c, n2), n2); });
    i -= n2 * n2 / 4;
    const auto twiddle = [n, n2](int k1, int slot) { return root((4 * k1 - 1) * slot_index(slot, n2), 4 * n); };
    if (i < n / 4) return fragment(i / 32 / (n2 / 8), i / 32 % (n2 / 8), i & 31, twiddle);
    i -= n / 4;  // [k1 block][j2 block][half of the k1 block]
    const int half = (i >> 5) & 1, j2_block = (i >> 6) % (n2 / 16), k1_block = (i >> 6) / (n2 / 16);
    return fragment(j2_block, 2 * k1_block + half, i & 31, [&](int slot, int k1) { return twiddle(k1, slot); });
  }

  SIMT_DEVICE static uint4 three_factors(int i, int n1) {
    const int n = n1 * 256;
    if (i < n1 * n1 / 4) return first_factor(i, n1);
    i -= n1 * n1 / 4;
    if (i < 64) return block(i, 1, .25f, [](int r, int c) { return root(r * c, 16); });
    i -= 64;
    if (i < 64) return fragment(0, i >> 5, i & 31, [](int k2, int j3) { return root(k2 * j3, 256); });
    i -= 64;
    const int k1 = i >> 6;
    return fragment(0, (i >> 5) & 1, i & 31,
                    [=](int j3, int j2) { return root((4 * k1 - 1) * (16 * j2 + j3), 4 * n); });
  }

  SIMT_DEVICE static uint4 entry(int i, const Factors& f) {
    return f.n2 ? two_factors(i, f.n1, f.n2) : three_factors(i, f.n1);
  }
};

// Grid (heads + table blocks): a filter's spectrum per block, then the tables.
template <int Capacity>
struct Prepare {
  static constexpr int kThreads = 256, kMinArch = 800, kTableBlocks = 8;
  using Params = PrepareParams;
  using Fft = Fft32<kThreads>;
  struct Smem {
    float2 x[Capacity];
    float slots[kThreads / kWarp];
  };

  SIMT_DEVICE static void run(const Params& p, Smem& s) {
    const int block = static_cast<int>(block_idx().x);
    if (block < p.heads) {
      spectrum(p, s, block);
    } else {
      tables(p, block - p.heads);
    }
  }

  SIMT_DEVICE static void tables(const Params& p, int block) {
    for (int i = block * kThreads + thread_id(); i < p.factors.table_words(); i += kTableBlocks * kThreads)
      store16(p.tables + i, TableEntries::entry(i, p.factors));
  }

  // Taps j = m, m + length, ...: a circular filter wraps around; a causal one has no use for taps beyond the row.
  SIMT_DEVICE static float tap(const Params& p, const float* k, int m) {
    float sum = 0.f;
    if (m < 0 || m >= p.length) return sum;
    const int64_t end = p.causal && p.filter_length > p.length ? p.length : p.filter_length;
    for (int64_t j = m; j < end; j += p.length) sum += k[j];
    return sum;
  }

  // In the ring x^n = i, x^(m - length) = -i x^(n + m - length): a circular convolution is the linear one with the
  // filter and its copy one period earlier, and any n >= length will do, since aliases of what is kept are imaginary.
  SIMT_DEVICE static void spectrum(const Params& p, Smem& s, int head) {
    const float* k = p.k + head * p.k_stride;
    for (int i = thread_id(); i < p.n; i += kThreads) {
      const int earlier = i + p.length - p.n;
      const float2 c = {tap(p, k, i), p.causal || earlier < 1 ? 0.f : -tap(p, k, earlier)};
      s.x[swizzled(i)] = c * root(-i, 4 * p.n);  // moves the bins by a quarter
    }
    sync_block();
    Fft::forward(s.x, p.n);
    if (p.spectrum32) {
      for (int i = thread_id(); i < p.n; i += kThreads)
        p.spectrum32[static_cast<size_t>(head) * p.n + i] = s.x[swizzled(i)];
    } else {
      write_fragments(p, s, head, scale(p, s, head));
    }
  }

  SIMT_DEVICE static float scale(const Params& p, Smem& s, int head) {
    float m = 0.f;
    for (int i = thread_id(); i < p.n; i += kThreads) m = fmaxf(m, fmaxf(fabsf(s.x[i].x), fabsf(s.x[i].y)));
    m = warp_max(m);
    if (lane_id() == 0) s.slots[warp_id()] = m;
    sync_block();
    for (int i = 0; i < kThreads / kWarp; i++) m = fmaxf(m, s.slots[i]);
    // The next power of two above, at least 2^-32 (see scale_below).
    const uint32_t field = (f32_bits(m) >> 23) + 1;
    const float above = bits_f32((field < 127 - 32 ? 127 - 32 : field > 253 ? 253 : field) << 23);
    if (thread_id() == 0) p.spectrum_scale[head] = above;
    return 1.f / above;
  }

  SIMT_DEVICE static void write_fragments(const Params& p, const Smem& s, int head, float scale) {
    const int shift = 32 - log2_floor(p.n), n1 = p.factors.n1, n2 = p.factors.n2;
    const auto at = [&](int k) {
      const float2 v = s.x[swizzled(static_cast<int>(bit_reverse(static_cast<uint32_t>(k)) >> shift))];
      return float2{v.x * scale, v.y * scale};
    };
    for (int i = thread_id(); i < p.n / 4; i += kThreads) {
      const int tile = i >> 5, lane = i & 31, k1 = tile >> 1;
      const uint4 w =
          n2 ? TableEntries::fragment(tile / (n2 / 8), tile % (n2 / 8), lane,
                                      [&](int r, int c) { return at(r + n1 * TableEntries::slot_index(c, n2)); })
             : TableEntries::fragment(0, tile & 1, lane, [&](int k2, int k3) { return at(k1 + n1 * (k2 + 16 * k3)); });
      const size_t to = static_cast<size_t>(head) * (p.n / 4) + i;
      if (p.spectrum) store16(p.spectrum + to, w);
      if (p.conj_spectrum) store16(p.conj_spectrum + to, uint4{w.x, w.y, hneg2(w.z), hneg2(w.w)});
    }
  }
};

}  // namespace tilewise::fft_conv
