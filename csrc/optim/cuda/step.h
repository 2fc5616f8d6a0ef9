// One step of tensors whose moments are held in blocks of codes: a few lanes hold a block, 32 elements each. The second
// moment may also be rank-1 (codes under scales of rows and columns) or factored (no codes at all).
#pragma once
#include "optim/cuda/codec.h"
#include "optim/cuda/master.h"
#include "optim/cuda/rule.h"
#include "optim/cuda/structure.h"

namespace tilewise::optim {

// Sixteen bytes of parameters.
template <class P>
constexpr int kRunOf = 16 / sizeof(P);

// kStructured: the second moment is rank-1 or factored. They have kernels of their own, for in common ones their
// look-ups would take registers that are not there.
template <class P, class Codec, bool kStructured>
struct BlockStep {
  static constexpr int kThreads = kStepThreads, kMinBlocks = 2, kMinArch = 800;
  static constexpr int kRun = kRunOf<P>;
  static_assert(kThreads * kLaneElements == kChunk, "a thread block takes one chunk");
  using Params = TensorTable;
  struct Smem {
    typename Codec::Tables tables;
    StepNumbers numbers;
  };
  using Lane = typename Codec::template Lane<kRun>;
  using Values = typename Lane::Values;
  static constexpr int kChunks = Lane::kChunks, kParts = 4, kPart = kChunks / kParts;

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    if (skipped(q.c.device)) return;
    const int chunk = static_cast<int>(block_idx().x);
    const Entry& t = q.tensor_of(chunk);
    if (thread_id() == 0) s.numbers = numbers_of(t, q.c);
    s.tables.fill();
    sync_block();
    const int64_t first = static_cast<int64_t>(chunk - t.first_unit) * kChunk;
    const int64_t block = first / Codec::kElements + thread_id() / Codec::kLanes;
    const Lane lane{thread_id() % Codec::kLanes};
    BlockStep(q, t, s, lane, block).run();
  }

 private:
  const CallConstants& c;
  const Entry& t;
  const Smem& s;
  const Lane lane;
  const int64_t block, start;
  const bool valid;  // all lanes of a block; those of others go along for the collectives

  SIMT_DEVICE BlockStep(const Params& q, const Entry& t, const Smem& s, const Lane& lane, int64_t block)
      : c(q.c),
        t(t),
        s(s),
        lane(lane),
        block(block),
        start(block * Codec::kElements),
        valid(block * Codec::kElements < t.n) {}

  SIMT_DEVICE uint8_t* codes_of(void* codes) const { return static_cast<uint8_t*>(codes) + block * Codec::kBytes; }
  SIMT_DEVICE bool has_first() const { return t.first_format != Format::none; }
  SIMT_DEVICE bool is_rank1() const { return kStructured && Codec::kBits == 4 && t.second_format == Format::rank1; }
  SIMT_DEVICE bool has_second_codes() const { return kStructured ? is_rank1() : t.second_format != Format::none; }

  SIMT_DEVICE void run() const {
    Values m = {}, v = {};
    decode(m, v);
    if (valid) update(m, v);
    if (valid && t.n - start < Codec::kElements) {
      clear_tail(m);
      clear_tail(v);
    }
    sync_warp();  // a block's lanes have all read its old codes and scales
    if (has_first()) write_first(m);
    if (has_second_codes()) write_second(v);
  }

  // ---- before ----
  SIMT_DEVICE void decode(Values& m, Values& v) const {
    typename Lane::Codes codes;
    if (has_first()) {
      lane.load_codes(codes, codes_of(t.first), valid);
      const float scale = valid ? t.first_scales[block] : 0;
      decode_lane(m, lane, codes, typename Codec::SignedDecoder(s.tables, scale));
    }
    if (has_second_codes()) {
      lane.load_codes(codes, codes_of(t.second), valid);
      const float scale = valid && !is_rank1() ? t.second_scales[block] : 1;
      decode_lane(v, lane, codes, typename Codec::UnsignedDecoder(s.tables, scale));
    }
  }

  // Of a part of the chunks. Rank-1: v holds codes at scale 1; factored: nothing yet.
  SIMT_DEVICE void read_structure(float (*v)[kRun], int part, const Place& at, float inverse_mean) const {
    const bool rank1 = is_rank1();
#pragma unroll
    for (int n = 0; n < kPart; n++) {
      Place place = at;
      place.advance(lane.element(part + n), t);
      for_each_place<kRun>(t.second_scales, place, t, [&](int i, float row, float column) {
        v[n][i] = rank1 ? v[n][i] * rank1_scale(row, column) : row * inverse_mean * column;
      });
    }
  }

  // ---- the step, in parts that have their loads in flight together ----
  SIMT_DEVICE void update(Values& m, Values& v) const {
    const Update rule = {c, s.numbers, has_first(), kStructured && !is_rank1()};
    const ParamRun<P, kRun> params = {t, c, s.numbers.step_number};
    const Place at = kStructured ? Place(start, t) : Place();
    const float inverse_mean = kStructured && !is_rank1() ? *Workspace(t).inverse_mean(t) : 1;
#pragma unroll
    for (int part = 0; part < kChunks; part += kPart) {
      float p[kPart][kRun], g[kPart][kRun];
#pragma unroll
      for (int n = 0; n < kPart; n++) {
        params.load(p[n], start + lane.element(part + n));
        load_grad(g[n], t, start + lane.element(part + n), t.n, t.aligned);
      }
      if constexpr (kStructured) read_structure(v + part, part, at, inverse_mean);
      rule(p, g, m + part, v + part);
#pragma unroll
      for (int n = 0; n < kPart; n++) {
        params.store(p[n], start + lane.element(part + n));
        restart_bad(m[part + n], v[part + n]);
      }
    }
  }

  // Moments that are not finite restart from zero, so that one bad gradient does not reach the other elements of the
  // block through its scale.
  SIMT_DEVICE static void restart_bad(float (&m)[kRun], float (&v)[kRun]) {
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      const bool finite = fabsf(m[i]) < INFINITY && v[i] < INFINITY;
      m[i] = finite ? m[i] : 0;
      v[i] = finite ? v[i] : 0;
    }
  }

  // Codes beyond the tensor's end mean nothing and must not reach the others through the scale either.
  SIMT_DEVICE void clear_tail(Values& x) const {
    const int left = static_cast<int>(t.n - start);
#pragma unroll
    for (int n = 0; n < kChunks; n++) {
#pragma unroll
      for (int i = 0; i < kRun; i++) x[n][i] = lane.element(n) + i < left ? x[n][i] : 0;
    }
  }

  // ---- after ----
  SIMT_DEVICE static float largest(const Values& x) {
    float top = 0;
#pragma unroll
    for (int n = 0; n < kChunks; n++) {
#pragma unroll
      for (int i = 0; i < kRun; i++) top = fmaxf(top, fabsf(x[n][i]));
    }
    return top;
  }

  SIMT_DEVICE void write_first(const Values& m) const {
    const float scale = Codec::signed_scale(largest(m));
    typename Lane::Codes codes;
    encode_lane(codes, lane, m, typename Codec::SignedEncoder(s.tables, scale));
    lane.store_codes(codes, codes_of(t.first), valid);
    if (valid && lane.part == 0) t.first_scales[block] = scale;
  }

  SIMT_DEVICE void write_second(const Values& v) const {
    typename Lane::Codes codes;
    if constexpr (kStructured) {
      encode_rank1(codes, v);
    } else {
      const float scale = Codec::unsigned_scale(largest(v));
      encode_lane(codes, lane, v, typename Codec::UnsignedEncoder(s.tables, scale));
      if (valid && lane.part == 0) t.second_scales[block] = scale;
    }
    lane.store_codes(codes, codes_of(t.second), valid);
  }

  SIMT_DEVICE void encode_rank1(typename Lane::Codes& codes, const Values& v) const {
    lane.clear(codes);
    if (!valid) return;
    const Workspace work(t);
    const Place at(start, t);
#pragma unroll
    for (int n = 0; n < kChunks; n++) {
      Place place = at;
      place.advance(lane.element(n), t);
      for_each_place<kRun>(work.scales, place, t, [&](int i, float row, float column) {
        const typename Codec::UnsignedEncoder encoder(s.tables, rank1_scale(row, column));
        lane.put(codes, n, i, encoder.encode(v[n][i]));
      });
    }
  }
};

}  // namespace tilewise::optim
