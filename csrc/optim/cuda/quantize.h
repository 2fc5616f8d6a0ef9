// Block-wise quantisation of a whole tensor, and back: a quad of lanes per block, as in a step.
#pragma once
#include "optim/cuda/codec.h"

namespace tilewise::optim {

struct CodecLaunch {
  CodecParams p;
  bool aligned;  // values, to 16 bytes
};

constexpr int kCodecThreads = 128;

struct Quantize {
  static constexpr int kThreads = kCodecThreads, kMinArch = 800;
  using Params = CodecLaunch;
  struct Smem {};
  using Lane = Quad<4>;
  using Values = float[Lane::kChunks][4];

  SIMT_DEVICE static void run(const Params& q, Smem&) {
    const Lane lane{thread_id() % kQuad};
    const int64_t block = (static_cast<int64_t>(block_idx().x) * kThreads + thread_id()) / kQuad;
    const bool valid = block * kBlock < q.p.n;
    Values x = {};
    if (valid) load(x, lane, q, block * kBlock);
    float top = 0;
#pragma unroll
    for (int c = 0; c < Lane::kChunks; c++) {
#pragma unroll
      for (int i = 0; i < 4; i++) top = fmaxf(top, fabsf(x[c][i]));
    }
    const float scale = q.p.is_signed ? signed_scale(top) : unsigned_scale(top);
    uint32_t words[4] = {};
    if (q.p.is_signed)
      encode(words, x, lane, SignedCodec(scale));
    else
      encode(words, x, lane, UnsignedCodec(scale));
    lane.store_codes(words, q.p.codes + block * kCodeBytes, valid);
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

  template <class Codec>
  SIMT_DEVICE static void encode(uint32_t (&words)[4], const Values& x, const Lane& lane, const Codec& codec) {
#pragma unroll
    for (int c = 0; c < Lane::kChunks; c++) {
#pragma unroll
      for (int i = 0; i < 4; i++) words[i] |= codec.encode(x[c][i]) << lane.shift(c);
    }
  }
};

struct Dequantize {
  static constexpr int kThreads = kCodecThreads, kMinArch = 800;
  using Params = CodecLaunch;
  struct Smem {
    float signed_values[16];
  };

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    if (thread_id() < 16) s.signed_values[thread_id()] = signed_value(thread_id());
    sync_block();
    const Quad<4> lane{thread_id() % kQuad};
    const int64_t block = (static_cast<int64_t>(block_idx().x) * kThreads + thread_id()) / kQuad;
    if (block * kBlock >= q.p.n) return;
    const float scale = q.p.scales[block * q.p.scale_stride];
    uint32_t words[4];
    lane.load_codes(words, q.p.codes + block * kCodeBytes);
#pragma unroll
    for (int c = 0; c < Quad<4>::kChunks; c++) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t code = words[i] >> lane.shift(c) & 15;
        x[i] = q.p.is_signed ? s.signed_values[code] * scale : unsigned_value(code) * (scale * kFourthPowerUnit);
      }
      store_run(x, q.p.values, block * kBlock + lane.element(c), q.p.n, q.aligned);
    }
  }
};

}  // namespace tilewise::optim
