// How many ranges of keys the CUDA kernels over pages share out. Host code, of shapes alone: lengths are on the device,
// and the workspace is allocated before any kernel is chosen.
#pragma once
#include <algorithm>

#include "common/paged/params.h"

namespace tilewise::paged {

// Rows of (token, head of the group) in a block of each kernel; cuda/launch.h holds its kernels to them.
constexpr int kCodeRows = 8, kFewRows = 16, kManyRows = 64;  // on tensor cores; of codes, or of either
constexpr int kSingleRows = 4;                               // a warp per row, of any head

// What a block of the kernel that serves these has, if rows are aligned, and how many registers let run side by side.
struct CudaTile {
  bool of_key_head;  // its rows share a key head
  int rows, blocks_per_sm;
};
inline CudaTile cuda_tile(const AttentionParams& p) {
  const bool wide = p.dim == 128;
  if (p.type == Type::f32 || (p.dim != 64 && !wide)) return {false, kSingleRows, 6};
  const bool codes = p.format != Format::native;
  const int64_t rows = int64_t(p.tokens) * (p.q_heads / p.kv_heads);
  if (codes && rows <= kCodeRows) return {true, kCodeRows, 3};
  if (rows <= kFewRows) return {true, kFewRows, wide ? 2 : codes ? 3 : 4};
  return {true, kManyRows, wide ? 2 : 3};
}

// `units` blocks per range on `slots` places take ceil(units n / slots) rounds of 1 / n of the keys each. The fewest
// ranges within a sixteenth of the best, as each costs a partial result that is written and read; none at all where the
// GPU is four fifths full.
inline int64_t ranges(int64_t units, int64_t slots, int64_t most) {
  if (units * 5 >= slots * 4) return 1;
  const auto rounds = [=](int64_t n) { return double((units * n + slots - 1) / slots) / double(n); };
  const int64_t last = std::max<int64_t>(1, std::min(most, 4 * ((slots + units - 1) / units)));
  double best = rounds(1);
  for (int64_t n = 2; n <= last; n++) best = std::min(best, rounds(n));
  int64_t n = 1;
  while (rounds(n) * 16 > best * 17) n++;
  return n;
}

inline int cuda_splits(const AttentionParams& p) {
  constexpr int64_t kSms = 132, kMinKeys = 256;
  const CudaTile tile = cuda_tile(p);
  const int64_t heads = tile.of_key_head ? p.kv_heads : 1;
  const int64_t rows = int64_t(p.tokens) * p.q_heads / heads, tiles = (rows + tile.rows - 1) / tile.rows;
  const int64_t units = std::max<int64_t>(1, p.batch * heads * tiles);
  const int64_t capacity = int64_t(p.table.pages_per_row) * p.table.page_size;
  return int(ranges(units, kSms * tile.blocks_per_sm, capacity / kMinKeys));
}

// Floats of workspace for partial results.
inline int64_t workspace_floats(int64_t splits, int64_t rows, int64_t dim) {
  return splits > 1 ? splits * rows * (dim + 1) : 0;
}

}  // namespace tilewise::paged
