// delta = rowsum(dout * out) - dlse, which the backward kernels subtract from dP: one warp per row.
#pragma once
#include "attention/cuda/sequence.h"

namespace tilewise::attention {

struct BackwardArgs {
  BackwardParams b;
  int tiles;  // of queries or keys, per sequence and head
  uint32_t* fault;
};

// What one launch over tiles of keys computes. Where both accumulators do not fit, they go one at a time.
enum class Part { dk_dv, dk, dv };

template <class T>
struct Delta {
  static constexpr int kMinArch = 800, kThreads = 128, kRows = 64, kWarps = kThreads / kWarp;
  using Params = BackwardArgs;
  struct Smem {};

  SIMT_DEVICE static void run(const Params& args, Smem&) {
    const ForwardParams& p = args.b.forward;
    const Work work = find_work<kRows>(p, args.tiles, p.q_heads, false, args.fault);
    const Sequence& seq = work.seq;
    const T* out = row_pointer<T>(static_cast<const void*>(p.out), p.out_strides, seq.batch, work.head, seq.q_row);
    const T* dout = row_pointer<T>(args.b.dout, args.b.dout_strides, seq.batch, work.head, seq.q_row);
    const int64_t stats = stats_index(p, seq, work.head);
    float* delta = args.b.delta + stats;
    const float* dlse = args.b.dlse ? args.b.dlse + stats : nullptr;
    const int end = min_of(work.first + kRows, seq.q_len);
    for (int row = work.first + warp_id(); row < end; row += kWarps) {
      float sum = 0.f;
      // two bytes per lane serve any alignment, and a warp reads whole lines
      for (int d = lane_id(); d < p.v_dim; d += kWarp)
        sum += to_float(out[row * p.out_strides.row + d]) * to_float(dout[row * args.b.dout_strides.row + d]);
      sum = warp_sum(sum);
      if (lane_id() == 0) delta[row] = dlse ? sum - dlse[row] : sum;
    }
  }
};

}  // namespace tilewise::attention
