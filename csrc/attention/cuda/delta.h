// delta = rowsum(dout * out) - dlse, which the backward kernels subtract from dP: one warp per row.
#pragma once
#include "attention/cuda/sequence.h"

namespace tilewise::attention {

struct BackwardArgs {
  BackwardParams b;
  int tiles;  // of queries or keys, per sequence and head
  uint32_t* fault;
};

template <class T, int D>
struct Delta {
  static constexpr int kMinArch = 800, kThreads = 128, kRows = 64, kWarps = kThreads / kWarp;
  using Params = BackwardArgs;
  struct Smem {};

  SIMT_DEVICE static void run(const Params& args, Smem&) {
    const ForwardParams& p = args.b.forward;
    const Place place = find_place(args.tiles, p.q_heads);
    const Sequence seq = find_sequence(p, place.batch, args.fault);
    const T* out = row_pointer<T>(static_cast<const void*>(p.out), p.out_strides, seq.batch, place.head, seq.q_row);
    const T* dout = row_pointer<T>(args.b.dout, args.b.dout_strides, seq.batch, place.head, seq.q_row);
    const int64_t stats = stats_index(p, seq, place.head);
    float* delta = args.b.delta + stats;
    const float* dlse = args.b.dlse ? args.b.dlse + stats : nullptr;
    const int end = min_of((place.tile + 1) * kRows, seq.q_len);
    for (int row = place.tile * kRows + warp_id(); row < end; row += kWarps) {
      float sum = 0.f;
#pragma unroll
      for (int d = lane_id(); d < D;
           d += kWarp)  // two bytes per lane serve any alignment, and a warp reads whole lines
        sum += to_float(out[row * p.out_strides.row + d]) * to_float(dout[row * args.b.dout_strides.row + d]);
      sum = warp_sum(sum);
      if (lane_id() == 0) delta[row] = dlse ? sum - dlse[row] : sum;
    }
  }
};

}  // namespace tilewise::attention
