// Tiles of 16-bit matrices in shared memory, and the metadata of the sparse tensor cores.
#pragma once
#include "simt/simt.h"
#include "sparse/params.h"

namespace tilewise::sparse {

using namespace simt;

// A row-major tile of kCols elements per row, cut into 16-byte chunks. Chunks are permuted within their row so that the
// eight rows that ldmatrix reads at one chunk column lie in different banks.
template <class T, int kRows, int kCols>
struct Tile {
  static constexpr int kChunks = kCols / 8;
  static_assert(kChunks == 4 || kChunks == 8 || kChunks == 16, "rows of 64, 128 or 256 bytes");
  alignas(16) T data[kRows * kCols];

  SIMT_DEVICE T* chunk(int row, int c) {
    const int twist = kChunks == 4 ? row >> 1 & 3 : row & 7;
    return data + (row * kChunks + (c ^ twist)) * 8;
  }
};

// Fills a tile from src (row `stride` apart); elements outside `rows` x `cols` become zero. kAligned: src and stride
// are multiples of 16 bytes and cols of 8, so chunks travel by cp.async; else element by element.
template <bool kAligned, int kThreads, class T, int kRows, int kCols>
SIMT_DEVICE void load_tile(Tile<T, kRows, kCols>& tile, const T* src, int64_t stride, int64_t rows, int64_t cols) {
  constexpr int kChunks = kCols / 8;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; i++) {
    const int at = i * kThreads + thread_id(), row = at / kChunks, c = at % kChunks;
    T* dst = tile.chunk(row, c);
    if constexpr (kAligned) {
      cp_async16(dst, src + row * stride + c * 8, row < rows && c * 8 < cols);
    } else {
      uint32_t words[4] = {};
#pragma unroll
      for (int e = 0; e < 8; e++)
        if (row < rows && c * 8 + e < cols)
          words[e / 2] |= uint32_t(load2(src + row * stride + c * 8 + e)) << e % 2 * 16;
      store16(dst, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// The nibble of one group: positions of its first and second kept value.
struct Kept {
  int first, second;
};
SIMT_DEVICE Kept kept_of(uint32_t nibble) {
  return {int(nibble & 3), int(nibble >> 2 & 3)};
}
SIMT_DEVICE bool legal(Kept k) {
  return k.second > k.first;
}

// Bit 2 of every nibble of m whose two positions do not rise: 4 + second - first - 1 has that bit exactly where second
// > first, and never borrows from its neighbour.
SIMT_DEVICE uint32_t illegal_nibbles(uint32_t m) {
  return ~(((m >> 2 & 0x33333333u) | 0x44444444u) - (m & 0x33333333u) - 0x11111111u) & 0x44444444u;
}
// The tensor cores' behaviour is undefined for such nibbles: they become positions 0 and 1.
SIMT_DEVICE uint32_t legalized(uint32_t m, uint32_t illegal) {
  return (m & ~((illegal >> 2) * 15)) | illegal;
}

template <class T>
SIMT_DEVICE uint16_t half_bits(float v) {
  return from_f32<T>(v).bits;
}

}  // namespace tilewise::sparse
