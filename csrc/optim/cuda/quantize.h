// Block-wise quantisation of a whole tensor, and back: some lanes per block, as in a step.
#pragma once
#include "optim/cuda/codec8.h"

namespace tilewise::optim {

struct CodecLaunch {
  CodecParams p;
  bool aligned;  // values, to 16 bytes
};

constexpr int kCodecThreads = 128;

template <class Codec>
struct Quantize {
  static constexpr int kThreads = kCodecThreads, kMinArch = 800;
  using Params = CodecLaunch;
  struct Smem {
    typename Codec::Tables tables;
  };
  using Lane = typename Codec::template Lane<4>;
  using Values = typename Lane::Values;

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    s.tables.fill();
    sync_block();
    const Lane lane{thread_id() % Codec::kLanes};
    const int64_t block = (static_cast<int64_t>(block_idx().x) * kThreads + thread_id()) / Codec::kLanes;
    const bool valid = block * Codec::kElements < q.p.n;
    Values x = {};
    if (valid) load(x, lane, q, block * Codec::kElements);
    float top = 0;
#pragma unroll
    for (int c = 0; c < Lane::kChunks; c++) {
#pragma unroll
      for (int i = 0; i < 4; i++) top = fmaxf(top, fabsf(x[c][i]));
    }
    const float scale = q.p.is_signed ? Codec::signed_scale(top) : Codec::unsigned_scale(top);
    typename Lane::Codes codes;
    if (q.p.is_signed)
      encode_lane(codes, lane, x, typename Codec::SignedEncoder(s.tables, scale));
    else
      encode_lane(codes, lane, x, typename Codec::UnsignedEncoder(s.tables, scale));
    lane.store_codes(codes, q.p.codes + block * Codec::kBytes, valid);
    if (valid && lane.part == 0) q.p.scales[block * q.p.scale_stride] = scale;
  }

  // Values that are not finite, and negative ones where unsigned, count as zero.
  SIMT_DEVICE static void load(Values& x, const Lane& lane, const Params& q, int64_t start) {
#pragma unroll
    for (int c = 0; c < Lane::kChunks; c++) {
      load_run(x[c], q.p.values, start + lane.element(c), q.p.n, q.aligned);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const bool usable = fabsf(x[c][i]) < INFINITY && (q.p.is_signed || x[c][i] > 0);
        x[c][i] = usable ? x[c][i] : 0;
      }
    }
  }
};

template <class Codec>
struct Dequantize {
  static constexpr int kThreads = kCodecThreads, kMinArch = 800;
  using Params = CodecLaunch;
  struct Smem {
    typename Codec::Tables tables;
  };
  using Lane = typename Codec::template Lane<4>;

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    s.tables.fill();
    sync_block();
    const Lane lane{thread_id() % Codec::kLanes};
    const int64_t block = (static_cast<int64_t>(block_idx().x) * kThreads + thread_id()) / Codec::kLanes;
    const bool valid = block * Codec::kElements < q.p.n;
    typename Lane::Codes codes;
    lane.load_codes(codes, q.p.codes + block * Codec::kBytes, valid);
    if (!valid) return;
    const float scale = q.p.scales[block * q.p.scale_stride];
    typename Lane::Values x;
    if (q.p.is_signed)
      decode_lane(x, lane, codes, typename Codec::SignedDecoder(s.tables, scale));
    else
      decode_lane(x, lane, codes, typename Codec::UnsignedDecoder(s.tables, scale));
#pragma unroll
    for (int c = 0; c < Lane::kChunks; c++)
      store_run(x[c], q.p.values, block * Codec::kElements + lane.element(c), q.p.n, q.aligned);
  }
};

}  // namespace tilewise::optim
