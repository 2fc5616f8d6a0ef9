// FlashAttention-3 (Shah et al., arXiv:2407.08608) forward for fp16 and bf16 on sm_90a: TMA, mbarriers, wgmma, warp
// specialisation, ping-pong, persistent blocks.
//
// A block is one producer warpgroup (keys_sm90.h) and two consumer warpgroups of 64 queries each.
// A consumer issues Q K^T of a tile of keys and then P V of the tile before, so that its softmax runs beside P V and,
// because the groups take turns at issuing, beside the products of the other group. Tiles of keys go downwards: those
// that need masking come first.
#pragma once
#include "attention/cuda/general.h"
#include "attention/cuda/keys_sm90.h"
#include "attention/cuda/mask.h"

namespace tilewise::attention {

// 2^x on the FMA units, for x <= 0: within 3e-6 of it, so that lse keeps its accuracy. The polynomial is exactly 1 at
// 0, so that everything from -127 down, -inf too, gives exactly 0. NaN is lost: it gives 0 as well.
SIMT_DEVICE float exp2_fma(float x) {
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: rounds to an integer, which it leaves in the low bits
  x = fmaxf(x, -127.f);
  const float shifted = x + kShift, f = x - (shifted - kShift);
  float power = fmaf(0.00958285f, f, 0.05590642f);
  power = fmaf(fmaf(fmaf(power, f, 0.24024099f), f, 0.69312419f), f, 1.f);
  return bits_f32(f32_bits(power) + (f32_bits(shifted) << 23));
}

template <class T, int D, int Keys, class Mask, template <class, int, int> class KeySource = BoxedKeys>
struct ForwardSm90 {
  using Source = KeySource<T, D, Keys>;
  static constexpr int kMinArch = kSm90a, kMinBlocks = 1, kThreads = 384;
  static constexpr int kGroupQueries = 64, kQueries = 2 * kGroupQueries, kKeys = Keys, kStages = kForwardStages,
                       kAtoms = D / 64;
  static constexpr int kProducerWarps = Source::kWarps;
  static_assert(Source::kProducerRegisters + 2 * Source::kConsumerRegisters == 3 * 168, "those of launch, shared out");
  static constexpr uint32_t kQueryBytes = kGroupQueries * D * sizeof(T), kKeyBytes = kKeys * D * sizeof(T);
  static constexpr int kTurn = 1, kGroup = 3, kConsumers = 5;  // named barriers; the first two by group
  static constexpr float kSlack = 8.f;  // the output is rescaled only when a row's maximum grew by more than 2^kSlack
  static constexpr int kOnFma = D == 64 ? 8 : 0;  // one in so many exponentials, where the special units would limit
  static_assert(D % 64 == 0 && kKeys % 16 == 0, "whole atoms of 64 columns and whole steps of 16 keys");

  using Params = ForwardSm90Args;
  struct Smem {
    alignas(1024) T q[2][kGroupQueries * D];  // per group; outputs leave from here
    alignas(1024) T k[kStages][kKeys * D];
    alignas(1024) T v[kStages][kKeys * D];
    alignas(8) uint64_t q_full[2], q_empty[2], k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  };
  using Scores = float[kKeys / 2];  // of a thread: value i is in row lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) + ...
  using Fragment = float[1][kKeys / 8][4];  // the same as masks see them: rows of a warp by keys
  using Output = float[D / 2];
  using Weights = uint32_t[kKeys / 16][4];  // scores as A operand

  using Stages = typename Source::Stages;

  SIMT_DEVICE static Work work_at(const Params& a, int index) {
    const ForwardParams& p = a.p;
    const int begin = index / (a.section * a.tiles) * a.section;
    const int heads = min_of(a.section, p.q_heads * p.batch - begin), place = index - begin * a.tiles;
    const int head = begin + place % heads, tile = place / heads, sequence = head / p.q_heads;
    Work w = {find_sequence(p, sequence, a.fault), sequence, head % p.q_heads,
              (Mask::kLongestTileLast ? a.tiles - 1 - tile : tile) * kQueries};
    if (a.seq_lens) w.seq.k_len = paged::length_of(a.table, a.seq_lens, sequence, a.fault);
    return w;
  }
  // Tiles of keys go from this one down; -1: nobody sees a key.
  SIMT_DEVICE static int first_tile(const Mask& mask, const Work& w) {
    return mask.template tile_below<kQueries, kKeys>(w.first, ceil_div(mask.key_end(w.first + kQueries), kKeys));
  }
  SIMT_DEVICE static int next_tile(const Mask& mask, const Work& w, int tile) {
    return mask.template tile_below<kQueries, kKeys>(w.first, tile);
  }
  SIMT_DEVICE static int work_count(const Params& a) { return a.tiles * a.p.q_heads * a.p.batch; }

  // ---- producer ----
  SIMT_DEVICE static void load_queries(const Params& a, Smem& s, const Work& w, int group) {
    mbar_arrive_expect_tx(&s.q_full[group], kQueryBytes);
    const int row = static_cast<int>(w.seq.q_row) + w.first + group * kGroupQueries;
#pragma unroll
    for (int atom = 0; atom < kAtoms; atom++)
      tma_load_4d(s.q[group] + atom * kGroupQueries * 64, &a.q, &s.q_full[group], atom * 64, row, w.head, w.seq.batch);
  }

  SIMT_DEVICE static void produce(const Params& a, Smem& s) {
    const ForwardParams& p = a.p;
    const bool leader = warp_id() == 0 && elect_one();
    Source source{a, leader};
    Stages keys, values;
    int queries = 0;  // tiles loaded
    for (int index = static_cast<int>(block_idx().x); index < work_count(a); index += static_cast<int>(grid_dim().x)) {
      const Work w = work_at(a, index);
      const Mask mask(p, w);
      int tile = w.first < w.seq.q_len ? first_tile(mask, w) : -1;
      if (tile < 0) continue;
      // In the order in which they are used: K, Q, K, V, K, V, ... V.
      const int kv_head = kv_head_of(p, w.head);
      PagePlace place = source.look_up(w, tile), next_place = place;
      source.template load<false>(s.k[0], s.k_full, s.k_empty, keys, w, tile, place, kv_head);
      for (int g = 0; g < 2; g++) {
        if (queries > 0) mbar_wait(&s.q_empty[g], static_cast<uint32_t>(queries - 1) & 1);
        if (leader) load_queries(a, s, w, g);
      }
      queries++;
      for (int next; tile >= 0; tile = next, place = next_place) {
        next = next_tile(mask, w, tile);
        if (next >= 0) {
          next_place = source.look_up(w, next);
          source.template load<false>(s.k[0], s.k_full, s.k_empty, keys, w, next, next_place, kv_head);
        }
        source.template load<true>(s.v[0], s.v_full, s.v_empty, values, w, tile, place, kv_head);
      }
    }
    source.finish();
  }

  // ---- consumers ----
  // What a group carries from tile to tile.
  struct State {
    uint64_t q, k, v;  // descriptors; of stage 0
    int group;
    Stages keys, values;
    bool adding;                          // P V of the tile before is in flight
    bool outgrown;                        // some row's maximum moved: the output is to be rescaled
    float max[2], sum[2], correction[2];  // max in units of log2
  };

  // Q K^T: both operands have their columns in rows; 16 of them are 32 bytes within an atom.
  SIMT_DEVICE static void issue_scores(Scores& scores, uint64_t q, uint64_t k) {
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
      const uint32_t column = d % 4 * 32;
      wgmma_ss<T, kKeys, 0>(scores, wgmma_desc_advance(q, d / 4 * (kGroupQueries * 128) + column),
                            wgmma_desc_advance(k, d / 4 * (kKeys * 128) + column), d > 0);
    }
    wgmma_commit();
  }
  // O += P V: 16 keys are 2048 bytes.
  SIMT_DEVICE static void issue_output(Output& out, const Weights& weights, uint64_t v) {
#pragma unroll
    for (int i = 0; i < kKeys / 16; i++) wgmma_rs<T, D, 1>(out, weights[i], wgmma_desc_advance(v, i * 2048), true);
    wgmma_commit();
  }
  // Accumulators, in pairs, are the A operand of the next product.
  SIMT_DEVICE static void to_weights(Weights& weights, const Scores& scores) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; i++) weights[i / 4][i % 4] = pack2<T>(scores[2 * i], scores[2 * i + 1]);
  }

  SIMT_DEVICE static Fragment& as_fragment(Scores& scores) { return reinterpret_cast<Fragment&>(scores); }
  SIMT_DEVICE static int warp_query(const Work& w, const State& c) {
    return w.first + c.group * kGroupQueries + (warp_id() & 3) * 16;
  }

  // Scores become weights relative to c.max, which moves only when it must: at the first tile, and when a row
  // outgrows it by more than 2^kSlack.
  SIMT_DEVICE static void soften(Scores& scores, State& c, float scale_log2) {
    bool outgrown = false;
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = max_nan(scores[2 * h], scores[2 * h + 1]);
#pragma unroll
      for (int j = 1; j < kKeys / 8; j++) {
        top = max_nan(top, max_nan(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
      }
      top = max_nan(top, shfl_xor(top, 1));
      top = max_nan(top, shfl_xor(top, 2));
      top *= scale_log2;
      const bool grows = !(top <= c.max[h] + kSlack);  // of a NaN, too; not while both are -inf
      const float before = c.max[h], after = grows ? top : before;
      base[h] = after == -INFINITY ? 0.f : after;
      c.correction[h] = exp2_approx(before - base[h]);
      c.max[h] = after;
      outgrown |= grows;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float even = 0.f, odd = 0.f * base[h];  // NaN for the rows that meet NaN or infinity, which exp2_fma loses
#pragma unroll
      for (int j = 0; j < kKeys / 8; j++) {
        float &x = scores[4 * j + 2 * h], &y = scores[4 * j + 2 * h + 1];
        x = exp2_approx(x * scale_log2 - base[h]);
        y = y * scale_log2 - base[h];
        y = kOnFma && j % (kOnFma / 2) == 0 ? exp2_fma(y) : exp2_approx(y);
        even += x;
        odd += y;
      }
      c.sum[h] = c.sum[h] * c.correction[h] + (even + odd);
    }
    c.outgrown = warp_any(outgrown);
  }

  SIMT_DEVICE static uint64_t wait_for(uint64_t* full, const Stages& ring, uint64_t first_stage) {
    ring.await_full(full);
    return wgmma_desc_advance(first_stage, static_cast<uint32_t>(ring.stage()) * kKeyBytes);
  }

  // Ends the P V in flight, and makes weights of the newest scores.
  SIMT_DEVICE static void finish_adding(Smem& s, State& c, Output& out, const Scores& scores, Weights& weights) {
    wgmma_wait<0>(out);
    if (c.adding) {
      release(&s.v_empty[c.values.stage()]);
      c.values.used++;
    }
    if (c.outgrown) {
#pragma unroll
      for (int i = 0; i < D / 2; i++) out[i] *= c.correction[i / 2 % 2];
    }
    to_weights(weights, scores);
  }

  // Scores of the tile of keys from `key` on become weights; what follows them takes the place of what was.
  template <bool Masked>
  SIMT_DEVICE static void weigh(const Mask& mask, State& c, int query, int key, float scale_log2, Scores& scores) {
    mask.template adjust_keys<T, Masked>(as_fragment(scores), query, key);
    soften(scores, c, scale_log2);
    mask.drop_keys(as_fragment(scores), query, key);
  }

  // The wait for P V stands at the top, a loop iteration behind its issue: within one basic block nvcc moves it above
  // the softmax, and nothing would overlap P V.
  template <bool Masked>
  SIMT_DEVICE static void step(Smem& s, const Mask& mask, State& c, int query, int key, float scale_log2, Output& out,
                               Scores& scores, Weights& weights) {
    finish_adding(s, c, out, scores, weights);
    const uint64_t k = wait_for(s.k_full, c.keys, c.k);
    bar_sync(kTurn + c.group, 2 * 128);
    wgmma_fence();
    issue_scores(scores, c.q, k);
    const uint64_t v = wait_for(s.v_full, c.values, c.v);
    wgmma_fence();  // ptxas wants one behind the branches of the wait (C7519)
    issue_output(out, weights, v);
    c.adding = true;
    bar_arrive(kTurn + (c.group ^ 1), 2 * 128);
    uint64_t* k_empty = &s.k_empty[c.keys.stage()];
    c.keys.used++;
    wgmma_wait<1>(scores);
    release(k_empty);
    weigh<Masked>(mask, c, query, key, scale_log2, scores);
  }

  SIMT_DEVICE static void attend(const Params& a, Smem& s, const Mask& mask, const Work& w, int tile, State& c,
                                 Output& out) {
    const float scale_log2 = mask.softmax_scale(a.p.scale) * kLog2e;
    const int query = warp_query(w, c);
    Scores scores;
    Weights weights;
    {  // the last keys come first: Q K^T and softmax alone
      const uint64_t k = wait_for(s.k_full, c.keys, c.k);
      wgmma_fence();
      issue_scores(scores, c.q, k);
      wgmma_wait<0>(scores);
      release(&s.k_empty[c.keys.stage()]);
      c.keys.used++;
      weigh<true>(mask, c, query, tile * kKeys, scale_log2, scores);
      c.outgrown = c.adding = false;
    }
    // TMA leaves zeros past the end of the tensor only.
    const bool foreign = a.p.cu_seqlens_k || (a.seq_lens && Source::kBoxed);
    if (foreign && (tile + 1) * kKeys > w.seq.k_len) {
      wait_for(s.v_full, c.values, c.v);
      // Rows of another sequence, or stale: their weights are zero, but 0 * NaN is NaN.
      clear_rows<kKeys, D, 1>(s.v[c.values.stage()], w.seq.k_len - tile * kKeys, kConsumers);
    }
    tile = next_tile(mask, w, tile);
    if constexpr (Mask::kLongestTileLast) {
      const int full = mask.full_key_end(w.first + c.group * kGroupQueries) / kKeys;
      for (; tile >= full && tile >= 0; tile = next_tile(mask, w, tile))
        step<true>(s, mask, c, query, tile * kKeys, scale_log2, out, scores, weights);
    }
    if constexpr (!Mask::kGeneral)
      for (; tile >= 0; tile--) step<false>(s, mask, c, query, tile * kKeys, scale_log2, out, scores, weights);
    finish_adding(s, c, out, scores, weights);
    const uint64_t v = wait_for(s.v_full, c.values, c.v);
    wgmma_fence();
    issue_output(out, weights, v);
    wgmma_wait<0>(out);
    release(&s.v_empty[c.values.stage()]);
    c.values.used++;
  }

  // A further score of every row, without a value; one lane of a row counts it.
  SIMT_DEVICE static void add_sink(State& c, Output& out, float sink) {
    const float score = sink * kLog2e;
    if (score == -INFINITY) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float top = fmaxf(c.max[h], score), correction = exp2_approx(c.max[h] - top);
      c.max[h] = top;
      c.sum[h] = c.sum[h] * correction + ((lane_id() & 3) == 0 ? exp2_approx(score - top) : 0.f);
#pragma unroll
      for (int i = 0; i < D / 4; i++) out[4 * (i / 2) + 2 * h + i % 2] *= correction;
    }
  }

  // 16-byte chunk of a row of the group's output, which is staged in the layout that the queries had.
  SIMT_DEVICE static T* staged(Smem& s, int group, int row, int chunk) {
    return s.q[group] + chunk / 8 * (kGroupQueries * 64) + row * 64 + ((chunk % 8) ^ (row % 8)) * 8;
  }

  SIMT_DEVICE static void store(const Params& a, Smem& s, const Work& w, const State& c, const Output& out,
                                float factor) {
    const ForwardParams& p = a.p;
    const int first = w.first + c.group * kGroupQueries, warp_row = (warp_id() & 3) * 16, t = lane_id() & 3;
    float* lse = p.lse + stats_index(p, w.seq, w.head);
    bar_sync(kGroup + c.group, 128);  // every warp of the group has done with the queries
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = c.sum[h];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      const float inverse = sum == 0.f ? 0.f : rcp_approx(sum) * factor;
      const int row = warp_row + (lane_id() >> 2) + 8 * h;
#pragma unroll
      for (int chunk = 0; chunk < D / 8; chunk++)
        store4(staged(s, c.group, row, chunk) + 2 * t,
               pack2<T>(out[4 * chunk + 2 * h] * inverse, out[4 * chunk + 2 * h + 1] * inverse));
      if (t == 0 && first + row < w.seq.q_len)
        lse[first + row] = sum == 0.f ? -INFINITY : (c.max[h] + log2_approx(sum)) * kLn2;
    }
    p.cu_seqlens_q ? store_rows(a, s, w, c.group, warp_row) : store_box(a, s, w, c.group);
    release(&s.q_empty[c.group]);
  }
  // The tensor ends where the sequence does: TMA leaves out the rows beyond.
  SIMT_DEVICE static void store_box(const Params& a, Smem& s, const Work& w, int group) {
    fence_proxy_async();
    bar_sync(kGroup + group, 128);
    if ((warp_id() & 3) == 0 && elect_one()) {
#pragma unroll
      for (int atom = 0; atom < kAtoms; atom++)
        tma_store_4d(&a.out, s.q[group] + atom * kGroupQueries * 64, atom * 64, w.first + group * kGroupQueries, w.head,
                     w.seq.batch);
      bulk_commit();
      bulk_wait_read<0>();
    }
  }
  SIMT_DEVICE static void store_rows(const Params& a, Smem& s, const Work& w, int group, int warp_row) {
    const ForwardParams& p = a.p;
    const int first = w.first + group * kGroupQueries, chunks = p.v_dim / 8;
    T* out = row_pointer<T>(p.out, p.out_strides, w.seq.batch, w.head, w.seq.q_row + first);
    sync_warp();
    for (int i = lane_id(); i < 16 * chunks; i += kWarp) {
      const int row = warp_row + i / chunks, chunk = i % chunks;
      if (first + row < w.seq.q_len)
        store16(out + row * p.out_strides.row + chunk * 8, load16(staged(s, group, row, chunk)));
    }
    fence_proxy_async();  // the next queries arrive through the async proxy
  }
  // Nobody sees a key. Not by way of shared memory: the producer skips such tiles, the buffer is not ours.
  SIMT_DEVICE static void store_nothing(const Params& a, const Work& w, int group, float lse) {
    const ForwardParams& p = a.p;
    const int first = w.first + group * kGroupQueries, chunks = p.v_dim / 8;
    T* out = row_pointer<T>(p.out, p.out_strides, w.seq.batch, w.head, w.seq.q_row + first);
    for (int i = thread_id() & 127; i < kGroupQueries * chunks; i += 128) {
      const int row = i / chunks, chunk = i % chunks;
      if (first + row >= w.seq.q_len) break;
      store16(out + row * p.out_strides.row + chunk * 8, uint4{0, 0, 0, 0});
      if (chunk == 0) p.lse[stats_index(p, w.seq, w.head) + first + row] = lse;
    }
  }

  // Of masks that have them: a sink's score, and what makes up for dropped weights.
  SIMT_DEVICE static float sink_of(const Mask& mask) {
    if constexpr (Mask::kGeneral)
      return mask.sink();
    else
      return -INFINITY;
  }
  SIMT_DEVICE static float factor_of(const Mask& mask) {
    if constexpr (Mask::kGeneral)
      return mask.weight_scale();
    else
      return 1.f;
  }

  SIMT_DEVICE static void consume(const Params& a, Smem& s) {
    State c;
    c.group = shfl(warp_id(), 0) / 4 - 1;  // shfl tells the compiler that it is uniform
    c.q = wgmma_desc_sw128(smem_addr(s.q[c.group]), 16, 1024);
    c.k = wgmma_desc_sw128(smem_addr(s.k[0]), 16, 1024);
    c.v = wgmma_desc_sw128(smem_addr(s.v[0]), kKeys * 128, 1024);  // keys in rows: the next 64 columns are an atom on
    int queries = 0;                                               // tiles seen
    if (c.group == 1) bar_arrive(kTurn, 2 * 128);                  // group 0 begins
    for (int index = static_cast<int>(block_idx().x); index < work_count(a); index += static_cast<int>(grid_dim().x)) {
      const Work w = work_at(a, index);
      if (w.first >= w.seq.q_len) continue;
      const Mask mask(a.p, w);
      const int tile = first_tile(mask, w);
      if (tile < 0) {
        store_nothing(a, w, c.group, sink_of(mask));
        continue;
      }
      Output out = {};
#pragma unroll
      for (int h = 0; h < 2; h++) c.max[h] = -INFINITY, c.sum[h] = 0.f;
      mbar_wait(&s.q_full[c.group], static_cast<uint32_t>(queries++) & 1);
      attend(a, s, mask, w, tile, c, out);
      if constexpr (Mask::kGeneral) add_sink(c, out, mask.sink());
      store(a, s, w, c, out, factor_of(mask));
    }
    if (c.group == 0) bar_sync(kTurn, 2 * 128);  // takes the last arrival of group 1
  }

  SIMT_DEVICE static void init_barriers(Smem& s) {
    for (int i = 0; i < 2; i++) {
      mbar_init(&s.q_full[i], 1);
      mbar_init(&s.q_empty[i], 4);  // the warps of a group
    }
    Stages::init(s.k_full, s.k_empty);
    Stages::init(s.v_full, s.v_empty);
  }

  SIMT_DEVICE static void run(const Params& a, Smem& s) {
    run_roles<ForwardSm90, Source::kProducerRegisters, Source::kConsumerRegisters>(a, s);
  }
};

}  // namespace tilewise::attention
