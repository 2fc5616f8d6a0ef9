// Keys and values in shared memory as right operands of mma: rows of 16-bit numbers, `Pitch` apart, which ldmatrix
// reads.
#pragma once
#include "simt/simt.h"

namespace tilewise::paged {

using namespace simt;

template <class T, int Pitch>
struct OperandRows {
  static_assert(Pitch % 64 == 0 || Pitch % 16 == 8, "eight rows of a column of chunks are in different banks");
  // Position of 16-byte chunk c of row r. Rows of whole 128 bytes want the XOR; with 16 more, the address of one chunk
  // does for all.
  SIMT_DEVICE static int at(int r, int c) { return r * Pitch + ((Pitch % 64 ? c : c ^ (r & 7)) << 3); }

  // Channels 16 kk .. of keys first .. first + 15: b[0] and b[1] of the first eight, b[2] and b[3] of the others.
  SIMT_DEVICE static void load_keys(uint32_t (&b)[4], const T* k, int first, int kk) {
    const int lane = lane_id();
    ldmatrix_x4(b, k + at(first + (lane & 7) + ((lane >> 4) << 3), kk * 2 + ((lane >> 3) & 1)));
  }
  // Values first .. first + 15 of channels 16 d ..: b[0] and b[1] of the first eight channels.
  SIMT_DEVICE static void load_values(uint32_t (&b)[4], const T* v, int first, int d) {
    const int lane = lane_id();
    ldmatrix_x4_trans(b, v + at(first + (lane & 15), d * 2 + (lane >> 4)));
  }
};

}  // namespace tilewise::paged
