// The small kernels that options need besides those of attention itself.
#pragma once
#include "attention/cuda/delta.h"

namespace tilewise::attention {

// dsink = -sum over a head's rows of exp(sink - lse) delta: the sink's share of the weights, which no value answers
// for. One block per head and a fixed order.
struct SinkGradient {
  static constexpr int kMinArch = 800, kThreads = 256, kWarps = kThreads / kWarp;
  using Params = BackwardArgs;
  struct Smem {
    float sums[kWarps];
  };

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const ForwardParams& p = args.b.forward;
    const int head = static_cast<int>(block_idx().x);
    const float sink = p.rules.sink_logits[head];
    float sum = 0.f;
    for (int sequence = 0; sequence < p.batch; sequence++) {
      const Sequence seq = find_sequence(p, sequence, args.fault);
      const int64_t stats = stats_index(p, seq, head);
      for (int row = thread_id(); row < seq.q_len; row += kThreads) {
        const float lse = p.lse[stats + row];
        if (lse != -INFINITY) sum -= exp2_approx((sink - lse) * kLog2e) * args.b.delta[stats + row];
      }
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) s.sums[warp_id()] = sum;
    sync_block();
    if (thread_id() > 0) return;
    for (int i = 1; i < kWarps; i++) sum += s.sums[i];
    args.b.dsink[head] = sum;
  }
};

// A boolean mask as bits: every warp packs 32 words of one row, a ballot each.
struct PackMask {
  static constexpr int kMinArch = 800, kThreads = 128, kWarps = kThreads / kWarp;
  struct Params {
    PackMaskParams p;
    int64_t words, strips;  // per row; a strip is what one warp packs
  };
  struct Smem {};

  SIMT_DEVICE static void run(const Params& args, Smem&) {
    const PackMaskParams& p = args.p;
    const int64_t index = static_cast<int64_t>(block_idx().x) * kWarps + warp_id();
    const int64_t row = index / args.strips, first = index % args.strips * kWarp;
    if (row >= p.sizes[0] * p.sizes[1] * p.sizes[2]) return;
    const uint8_t* from = p.mask + row / p.sizes[2] / p.sizes[1] * p.strides[0] +
                          row / p.sizes[2] % p.sizes[1] * p.strides[1] + row % p.sizes[2] * p.strides[2];
    uint32_t own = 0;
    for (int i = 0; i < kWarp && first + i < args.words; i++) {
      const int64_t key = (first + i) * 32 + lane_id();
      const uint32_t word = warp_ballot(key < p.keys && from[key * p.key_stride] != 0);
      if (lane_id() == i) own = word;
    }
    if (first + lane_id() < args.words) p.words[row * args.words + first + lane_id()] = own;
  }
};

}  // namespace tilewise::attention
