// Tiles of 16-bit values in shared memory, and the tensor-core products on them.
//
// A tile is row-major, D values per row, its 16-byte chunks XOR-swizzled by the row: ldmatrix, which reads one chunk of
// eight consecutive rows, then touches all 32 banks once.
//
// Fragments are those of mma.m16n8k16. With g = lane / 4 and t = lane % 4, value e of an accumulator acc[i][j] stands
// in row 16 i + g + 8 (e / 2), column 8 j + 2 t + e % 2. Two neighbouring accumulators, rounded to 16 bits, are the A
// operand of the next product, so probabilities never leave the registers.
#pragma once
#include "simt/simt.h"

namespace tilewise::attention {

using namespace simt;

constexpr int kChunk = 8;  // values in 16 bytes

template <int D>
SIMT_DEVICE int tile_at(int row, int chunk) {
  return row * D + ((chunk ^ (row & 7)) * kChunk);
}

// Copies rows of global memory into tiles. Every thread keeps one address: its chunk of the first row. If Padded, the
// rows have `dim` values, a multiple of 8, and the columns beyond become zero.
template <int D, int Threads, bool Padded, class T>
struct TileLoader {
  static constexpr int kChunks = D / kChunk, kRowsPerPass = Threads / kChunks;
  const T* from;
  int64_t stride;
  bool column_exists;

  SIMT_DEVICE TileLoader(const T* rows, int64_t row_stride, int dim)
      : from(rows + thread_id() / kChunks * row_stride + thread_id() % kChunks * kChunk),
        stride(row_stride),
        column_exists(!Padded || thread_id() % kChunks * kChunk < dim) {}

  SIMT_DEVICE void skip(int rows) { from += rows * stride; }

  // Starts the copy of Rows rows, all of which exist.
  template <int Rows>
  SIMT_DEVICE void load(T* tile) const {
    copy<Rows>(tile, [](int) { return true; });
  }
  // Starts the copy of rows [0, valid); the others become zero.
  template <int Rows>
  SIMT_DEVICE void load(T* tile, int valid) const {
    const int remaining = valid - thread_id() / kChunks;
    copy<Rows>(tile, [=](int row) { return row < remaining; });
  }

 private:
  template <int Rows, class Exists>
  SIMT_DEVICE void copy(T* tile, Exists exists) const {
    static_assert(Threads % kChunks == 0 && Rows % kRowsPerPass == 0, "whole passes");
    static_assert(kRowsPerPass % 8 == 0 || kRowsPerPass == 4, "one swizzle for all passes, or two");
    T* to = tile + tile_at<D>(thread_id() / kChunks, thread_id() % kChunks);
    T* to_odd = tile + tile_at<D>(thread_id() / kChunks + 4, thread_id() % kChunks) - 4 * D;
    const T* source = from;
#pragma unroll
    for (int row = 0; row < Rows; row += kRowsPerPass, source += kRowsPerPass * stride) {
      const bool copies = exists(row) && (!Padded || column_exists);
      cp_async16((row % 8 ? to_odd : to) + row * D, copies ? source : from, copies);
    }
  }
};

// The offset of the chunk that stands `columns` (a multiple of 16) behind the even or odd first chunk at offset `at`.
// Where tiles start and which row is meant does not matter to the swizzle as long as rows move by multiples of 8, so a
// lane needs four XORs per operand at most; all else is a constant that ldmatrix adds by itself.
template <int D>
SIMT_DEVICE int step_columns(int at, int columns) {
  return (at ^ (columns & 63)) + (columns & (D - 64));
}

// acc += A B^T: A is rows [a_row, a_row + 16 M) of tile a, B rows [b_row, b_row + 8 N) of tile b.
template <int D, int M, int N, class T>
SIMT_DEVICE void multiply_transposed(float (&acc)[M][N][4], const T* a, int a_row, const T* b, int b_row) {
  const int lane = lane_id();
  const int a_at = tile_at<D>(a_row + (lane & 15), lane >> 4);
  const int b_at = tile_at<D>(b_row + (lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
#pragma unroll(D / 32)  // all steps at once make ptxas prefetch so much that it spills
  for (int k = 0; k < D; k += 16) {
    uint32_t fa[M][4];
#pragma unroll
    for (int i = 0; i < M; i++) ldmatrix_x4(fa[i], a + 16 * i * D + step_columns<D>(a_at, k));
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t fb[4];
      ldmatrix_x4(fb, b + 8 * j * D + step_columns<D>(b_at, k));
#pragma unroll
      for (int i = 0; i < M; i++) {
        mma_m16n8k16<T>(acc[i][j], fa[i], fb[0], fb[1]);
        mma_m16n8k16<T>(acc[i][j + 1], fa[i], fb[2], fb[3]);
      }
    }
  }
}

// acc += A B: A is `weights`, rounded to T; B is rows [b_row, b_row + 8 K) of tile b.
template <int D, int M, int K, class T>
SIMT_DEVICE void multiply(float (&acc)[M][D / 8][4], const float (&weights)[M][K][4], const T* b, int b_row) {
  const int lane = lane_id();
  const int b_at = tile_at<D>(b_row + (lane & 15), lane >> 4);
#pragma unroll
  for (int k = 0; k < K; k += 2) {
    uint32_t fa[M][4];
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float (&x)[4] = weights[i][k + half];
        fa[i][2 * half] = pack2<T>(x[0], x[1]);
        fa[i][2 * half + 1] = pack2<T>(x[2], x[3]);
      }
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      uint32_t fb[4];
      ldmatrix_x4_trans(fb, b + 8 * k * D + step_columns<D>(b_at, 8 * j));
#pragma unroll
      for (int i = 0; i < M; i++) {
        mma_m16n8k16<T>(acc[i][j], fa[i], fb[0], fb[1]);
        mma_m16n8k16<T>(acc[i][j + 1], fa[i], fb[2], fb[3]);
      }
    }
  }
}

// Writes a warp's accumulators, rounded to T, to rows [0, valid) and columns [0, dim) of `target`, by way of its own
// rows [tile_row, tile_row + 16 M) of a tile that no other warp uses any more: every global store then moves 16 bytes.
template <int D, int M, class T>
SIMT_DEVICE void store_accumulators(T* target, int64_t row_stride, int valid, int dim, const float (&acc)[M][D / 8][4],
                                    T* tile, int tile_row) {
  const int lane = lane_id(), g = lane >> 2, t = lane & 3;
  sync_warp();
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        store4(tile + tile_at<D>(tile_row + 16 * i + g + 8 * h, j) + 2 * t,
               pack2<T>(acc[i][j][2 * h], acc[i][j][2 * h + 1]));
  sync_warp();
  constexpr int kChunks = D / kChunk;
#pragma unroll
  for (int i = 0; i < 16 * M * kChunks / kWarp; i++) {
    const int index = i * kWarp + lane, row = index / kChunks, chunk = index % kChunks;
    if (row < valid && chunk * kChunk < dim)
      store16(target + row * row_stride + chunk * kChunk, load16(tile + tile_at<D>(tile_row + row, chunk)));
  }
}

}  // namespace tilewise::attention
