// fp32 tiles in shared memory and products on the fp32 units, for the kernels of any.h.
//
// Thread (r, c) = (thread / 8, thread % 8) owns rows 4 r .. 4 r + 3 of what is accumulated: in a product of rows the
// columns c + 8 j, in a weighted sum the columns 4 c + 32 j .. + 3. Eight consecutive lanes share their rows (one
// broadcast) and read eight different rows or chunks of the other operand; the padding of four floats per row spreads
// those over all banks. The threads of a row are lanes of one warp.
#pragma once
#include "attention/cuda/sequence.h"

namespace tilewise::attention {

constexpr int kOwnRows = 4, kLanesPerRow = 8;
template <int D>
constexpr int kStreamRows = D == 256 ? 16 : 32;  // rows of a streamed tile = columns of the scores
template <int D>
constexpr int kOwnColumns = kStreamRows<D> / kLanesPerRow;
template <int D>
constexpr int kWeightPitch = kStreamRows<D> + 4;
template <int D>
constexpr int kPitch = D + 4;
template <int D>
constexpr int kOwnChunks = D / 4 / kLanesPerRow;

SIMT_DEVICE int own_row() {
  return thread_id() / kLanesPerRow * kOwnRows;
}
SIMT_DEVICE int own_column() {
  return thread_id() % kLanesPerRow;
}

SIMT_DEVICE float4 load_float4(const float* p) {
  return *reinterpret_cast<const float4*>(p);
}

// Copies rows [0, valid), `dim` values each, into a tile, converted; the rest becomes zero. `chunks` says that every
// row consists of aligned 16 bytes, which fp32 rows use for asynchronous copies; anything else goes through registers,
// one value at a time.
template <int Rows, int D, int Threads, class T>
SIMT_DEVICE void load_float_tile(float* tile, const T* source, int64_t row_stride, int valid, int dim, bool chunks) {
  if constexpr (is_same_v<T, float>) {
    if (chunks) {
      for (int i = thread_id(); i < Rows * D / 4; i += Threads) {
        const int row = i / (D / 4), d = i % (D / 4) * 4;
        const bool exists = row < valid && d < dim;
        cp_async16(tile + row * kPitch<D> + d, exists ? source + row * row_stride + d : source, exists);
      }
      return;
    }
  }
  for (int i = thread_id(); i < Rows * D; i += Threads) {
    const int row = i / D, d = i % D;
    tile[row * kPitch<D> + d] = row < valid && d < dim ? to_float(source[row * row_stride + d]) : 0.f;
  }
}

// dots[i][j] = a[own_row + i] . b[own_column + 8 j]
template <int D>
SIMT_DEVICE void multiply_rows(float (&dots)[kOwnRows][kOwnColumns<D>], const float* a, const float* b) {
#pragma unroll
  for (int i = 0; i < kOwnRows; i++)
#pragma unroll
    for (int j = 0; j < kOwnColumns<D>; j++) dots[i][j] = 0.f;
#pragma unroll(D > 64 ? 1 : 4)  // more makes ptxas prefetch so much that it spills
  for (int d = 0; d < D; d += 4) {
    float4 x[kOwnRows], y[kOwnColumns<D>];
#pragma unroll
    for (int i = 0; i < kOwnRows; i++) x[i] = load_float4(a + (own_row() + i) * kPitch<D> + d);
#pragma unroll
    for (int j = 0; j < kOwnColumns<D>; j++) y[j] = load_float4(b + (own_column() + kLanesPerRow * j) * kPitch<D> + d);
#pragma unroll
    for (int i = 0; i < kOwnRows; i++)
#pragma unroll
      for (int j = 0; j < kOwnColumns<D>; j++) {
        float sum = fmaf(x[i].x, y[j].x, dots[i][j]);
        sum = fmaf(x[i].y, y[j].y, sum);
        sum = fmaf(x[i].z, y[j].z, sum);
        dots[i][j] = fmaf(x[i].w, y[j].w, sum);
      }
  }
}

// Hands a thread's weights to the other threads of its rows.
template <int D>
SIMT_DEVICE void share_weights(float* shared, const float (&weights)[kOwnRows][kOwnColumns<D>]) {
  sync_warp();  // the previous weights have been read
#pragma unroll
  for (int i = 0; i < kOwnRows; i++)
#pragma unroll
    for (int j = 0; j < kOwnColumns<D>; j++)
      shared[(own_row() + i) * kWeightPitch<D> + own_column() + kLanesPerRow * j] = weights[i][j];
  sync_warp();
}

// acc += weights b, over the rows of a streamed tile
template <int D>
SIMT_DEVICE void add_weighted(float (&acc)[kOwnRows][kOwnChunks<D>][4], const float* weights, const float* b) {
#pragma unroll 2
  for (int k = 0; k < kStreamRows<D>; k += 4) {
    float4 w[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; i++) w[i] = load_float4(weights + (own_row() + i) * kWeightPitch<D> + k);
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
#pragma unroll
      for (int c = 0; c < kOwnChunks<D>; c++) {
        const float4 y = load_float4(b + (k + kk) * kPitch<D> + 4 * own_column() + 4 * kLanesPerRow * c);
#pragma unroll
        for (int i = 0; i < kOwnRows; i++) {
          const float x = kk == 0 ? w[i].x : kk == 1 ? w[i].y : kk == 2 ? w[i].z : w[i].w;
          acc[i][c][0] = fmaf(x, y.x, acc[i][c][0]);
          acc[i][c][1] = fmaf(x, y.y, acc[i][c][1]);
          acc[i][c][2] = fmaf(x, y.z, acc[i][c][2]);
          acc[i][c][3] = fmaf(x, y.w, acc[i][c][3]);
        }
      }
  }
}

// Stores factor[i] * acc to rows [0, valid) and columns [0, dim) of `target`; the threads of a row write neighbouring
// values.
template <int D, class T>
SIMT_DEVICE void store_float_rows(T* target, int64_t row_stride, int valid, int dim,
                                  const float (&acc)[kOwnRows][kOwnChunks<D>][4], const float (&factor)[kOwnRows]) {
#pragma unroll
  for (int i = 0; i < kOwnRows; i++) {
    const int row = own_row() + i;
    if (row >= valid) continue;
#pragma unroll
    for (int c = 0; c < kOwnChunks<D>; c++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int d = 4 * own_column() + 4 * kLanesPerRow * c + e;
        if (d < dim) target[row * row_stride + d] = from_float<T>(acc[i][c][e] * factor[i]);
      }
  }
}

// Bits of scores, shared like their computation: a word is made of what several lanes know.
//
// words[i] bit b: column b of own row i. bits(i, column) answers for half of the columns.
template <int D, class Bits>
SIMT_DEVICE void row_words(uint32_t (&words)[kOwnRows], Bits bits) {
  constexpr int kHalf = kStreamRows<D> / 2;
  const int first = lane_id() & ~(kLanesPerRow - 1);
  const uint32_t own = bits(own_column() / 2, own_column() % 2 * kHalf);
#pragma unroll
  for (int i = 0; i < kOwnRows; i++) {
    const uint32_t low = shfl(own, first + 2 * i);
    words[i] = low | shfl(own, first + 2 * i + 1) << kHalf;
  }
}
// Byte j, bit i of the result: own row i, column own_column + 8 j. bits(column) answers for the eight rows that this
// thread and its neighbour eight lanes away own.
template <int D, class Bits>
SIMT_DEVICE uint32_t column_words(Bits bits) {
  constexpr int kHalf = kOwnColumns<D> / 2;
  const int neighbour = lane_id() / kLanesPerRow % 2;
  uint32_t own = 0;
#pragma unroll
  for (int n = 0; n < kHalf; n++) own |= bits(own_column() + kLanesPerRow * (neighbour * kHalf + n)) << 8 * n;
  const uint32_t low = shfl(own, lane_id() & ~kLanesPerRow);
  return (low | shfl(own, lane_id() | kLanesPerRow) << 8 * kHalf) >> kOwnRows * neighbour;
}

}  // namespace tilewise::attention
