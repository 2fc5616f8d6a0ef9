// Backward for fp16 and bf16 on sm_90a: TMA, mbarriers, wgmma, warp specialisation; no atomics, one writer per
// gradient.
//
// Two kernels, as on sm_80 (backward.h), on one skeleton. A block owns 128 rows of two tensors and two others stream
// past, a tile of each at a time:
//
//                         owned      streamed   scores       further product   sums
//   BackwardQueriesSm90   Q, dout    K, V       S = Q K^T    dP = dout V^T     dq += dS K
//   BackwardKeysSm90      K, V       Q, dout    S^T = K Q^T  dP^T = V dout^T   dk += dS^T Q, dv += P^T dout
//
// One producer warp copies; each of two consumer warpgroups has 64 of the owned rows and what they accumulate. P and dS
// go from accumulator to A operand inside the registers, so that the groups share nothing but the streamed tiles: no
// barriers between them. The exponentials run beside the product of dP, and one group's arithmetic beside the other's
// products.
#pragma once
#include "attention/cuda/gradient.h"
#include "attention/cuda/ring.h"
#include "attention/cuda/tile.h"

namespace tilewise::attention {

struct BackwardSm90Args {
  TensorMap q, k, v, dout;  // (d, rows, heads, batch) with boxes of 64 columns
  BackwardParams b;
  int tiles;  // of owned rows, per sequence and head
  uint32_t* fault;
};

// What both kernels do alike. The streamed tiles have `Rows` rows.
template <class T, int D, int Rows, int Stages>
struct BackwardSm90 {
  static constexpr int kMinArch = kSm90a, kMinBlocks = 1, kThreads = 384;
  static constexpr int kGroupRows = 64, kOwned = 2 * kGroupRows, kAtoms = D / 64;
  static constexpr int kProducerWarps = 1;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // 128 (24 + 2 * 240) = 384 * 168 at launch
  static constexpr uint32_t kOwnedBytes = kGroupRows * D * sizeof(T), kTileBytes = Rows * D * sizeof(T);
  static constexpr int kGroup = 1, kConsumers = 3;  // named barriers; the first by group
  static_assert(D % 64 == 0 && Rows % 16 == 0, "whole atoms of 64 columns and whole steps of 16 rows");

  using Params = BackwardSm90Args;
  struct Smem {
    alignas(1024) T owned[2][2][kGroupRows * D];  // of the two tensors, per group; gradients leave from here
    alignas(1024) T tiles[Stages][2][Rows * D];
    alignas(16) float base[Stages][Rows], delta[Stages][Rows];  // of streamed queries
    alignas(8) uint64_t owned_full, full[Stages], empty[Stages];
  };
  using Scores = float[Rows / 2];  // of a thread: value i is in row lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) + ...
  using Sums = float[D / 2];       // likewise
  using Weights = uint32_t[Rows / 16][4];  // scores as A operand

  // Accumulators as masks see them: rows of a warp by `Columns` columns.
  template <int Columns>
  using Fragment = float[1][Columns / 8][4];

  // The columns of the scores from 8 j on.
  template <int Columns>
  SIMT_DEVICE static Fragment<Columns>& part_of(Scores& scores, int j) {
    return reinterpret_cast<Fragment<Columns>&>(scores[4 * j]);
  }

  using Ring = attention::Ring<Stages>;

  // ---- producer: one warp, whose `leader` issues the copies ----
  template <int BoxRows>
  SIMT_DEVICE static void load(T* to, const TensorMap& map, uint64_t* full, int64_t row, int head, int batch) {
#pragma unroll
    for (int atom = 0; atom < kAtoms; atom++)
      tma_load_4d(to + atom * BoxRows * 64, &map, full, atom * 64, static_cast<int>(row), head, batch);
  }
  SIMT_DEVICE static void load_owned(bool leader, Smem& s, const TensorMap& first, const TensorMap& second, int64_t row,
                                     int head, int batch) {
    if (!leader) return;
    mbar_arrive_expect_tx(&s.owned_full, 4 * kOwnedBytes);
    for (int g = 0; g < 2; g++) {
      load<kGroupRows>(s.owned[0][g], first, &s.owned_full, row + g * kGroupRows, head, batch);
      load<kGroupRows>(s.owned[1][g], second, &s.owned_full, row + g * kGroupRows, head, batch);
    }
  }
  SIMT_DEVICE static void load_tiles(bool leader, Smem& s, Ring& ring, const TensorMap& first, const TensorMap& second,
                                     int64_t row, int head, int batch) {
    const int stage = ring.stage();
    ring.used++;
    if (!leader) return;
    mbar_arrive_expect_tx(&s.full[stage], 2 * kTileBytes);
    load<Rows>(s.tiles[stage][0], first, &s.full[stage], row, head, batch);
    load<Rows>(s.tiles[stage][1], second, &s.full[stage], row, head, batch);
  }

  // ---- consumers ----
  struct Group {
    int index;
    uint64_t owned, tiles;  // descriptors of the first tensors; of stage 0
    Ring ring;

    SIMT_DEVICE explicit Group(const Smem& s)
        : index(shfl(warp_id(), 0) / 4 - 1),  // shfl tells the compiler that it is uniform
          owned(wgmma_desc_sw128(smem_addr(s.owned[0][index]), 16, 1024)),
          tiles(wgmma_desc_sw128(smem_addr(s.tiles[0][0]), Rows * 128, 1024)) {}
    SIMT_DEVICE uint64_t second_owned() const { return wgmma_desc_advance(owned, 2 * kOwnedBytes); }
    SIMT_DEVICE int warp_row() const { return index * kGroupRows + (warp_id() & 3) * 16; }
  };

  // owned tile^T: both operands have their columns in rows; 16 of them are 32 bytes within an atom.
  SIMT_DEVICE static void issue_scores(Scores& scores, uint64_t owned, uint64_t tile) {
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
      const uint32_t column = d % 4 * 32;
      wgmma_ss<T, Rows, 0>(scores, wgmma_desc_advance(owned, d / 4 * (kGroupRows * 128) + column),
                           wgmma_desc_advance(tile, d / 4 * (Rows * 128) + column), d > 0);
    }
    wgmma_commit();
  }
  // sums += weights tile: 16 rows are 2048 bytes, and the next 64 columns an atom on (the descriptor's LBO).
  SIMT_DEVICE static void issue_sums(Sums& sums, const Weights& weights, uint64_t tile) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Rows / 16; i++) wgmma_rs<T, D, 1>(sums, weights[i], wgmma_desc_advance(tile, i * 2048), true);
    wgmma_commit();
  }
  // Accumulators, in pairs, are the A operand of the next product. This is those of columns [8 j, 8 j + 8 N).
  template <int N>
  SIMT_DEVICE static void to_weights(Weights& weights, const float (&part)[1][N][4], int j) {
#pragma unroll
    for (int i = 0; i < 2 * N; i++)
      weights[(2 * j + i) / 4][(2 * j + i) % 4] = pack2<T>(part[0][i / 2][i % 2 * 2], part[0][i / 2][i % 2 * 2 + 1]);
  }

  // Waits for the streamed tiles; a descriptor of the first. Their rows from `valid` on are another sequence's, which
  // zeros from the other factor would not keep out: 0 * NaN is NaN.
  SIMT_DEVICE static uint64_t await_tiles(Smem& s, const Group& c, int valid) {
    const int stage = c.ring.stage();
    c.ring.await_full(s.full);
    if (valid < Rows) clear_rows<Rows, D, 2>(s.tiles[stage][0], valid, kConsumers);
    return wgmma_desc_advance(c.tiles, static_cast<uint32_t>(stage) * (2 * kTileBytes));
  }
  // The stage of the tiles before the current ones is free.
  SIMT_DEVICE static void release_before(Smem& s, const Group& c) {
    if (c.ring.used == 0) return;
    release(&s.empty[(c.ring.used - 1) % Stages]);
  }

  // Writes a warp's 16 rows of a gradient, [0, valid) of them, by way of what the group owned.
  SIMT_DEVICE static void store(Smem& s, const Group& c, int which, Sums& sums, float factor, T* to, int64_t row_stride,
                                int valid, int dim) {
    auto& fragment = reinterpret_cast<Fragment<D>&>(sums);
    scale_accumulators(fragment[0], factor);
    store_accumulators<D>(to, row_stride, valid, dim, fragment, s.owned[which][c.index], (warp_id() & 3) * 16);
  }

  SIMT_DEVICE static void init_barriers(Smem& s) {
    mbar_init(&s.owned_full, 1);
    Ring::init(s.full, s.empty);
  }
  template <class Kernel>
  SIMT_DEVICE static void run(const Params& a, Smem& s) {
    run_roles<Kernel, kProducerRegisters, kConsumerRegisters>(a, s);
  }
};

// dq of one tile of queries. Rows of the accumulators are queries, columns of the scores are keys.
template <class T, int D, int Keys, int Stages, class Mask>
struct BackwardQueriesSm90 : BackwardSm90<T, D, Keys, Stages> {
  using Base = BackwardSm90<T, D, Keys, Stages>;
  using typename Base::Group;
  using typename Base::Params;
  using typename Base::Ring;
  using typename Base::Scores;
  using typename Base::Smem;
  using typename Base::Sums;
  using typename Base::Weights;
  using Slopes = typename Mask::template Slopes<Keys / 8>;
  static constexpr int kQueries = Base::kOwned;
  static constexpr int kOwnedBox = Base::kGroupRows, kQueryBox = kOwnedBox, kKeyBox = Keys;

  SIMT_DEVICE static Work work_at(const Params& a) {
    return find_work<kQueries>(a.b.forward, a.tiles, a.b.forward.q_heads, Mask::kLongestTileLast, a.fault);
  }
  SIMT_DEVICE static int end_of(const Mask& mask, const Work& w) {
    return ceil_div(mask.key_end(w.first + kQueries), Keys);
  }
  SIMT_DEVICE static int next_tile(const Mask& mask, const Work& w, int tile, int end) {
    return mask.template tile_above<kQueries, Keys>(w.first, tile, end);
  }

  SIMT_DEVICE static void produce(const Params& a, Smem& s) {
    const ForwardParams& p = a.b.forward;
    const Work w = work_at(a);
    if (w.first >= w.seq.q_len) return;
    const Mask mask(p, w);
    const int end = end_of(mask, w), kv_head = kv_head_of(p, w.head);
    const bool leader = elect_one();
    int tile = next_tile(mask, w, -1, end);
    if (tile < end) Base::load_owned(leader, s, a.q, a.dout, w.seq.q_row + w.first, w.head, w.seq.batch);
    for (Ring ring; tile < end; tile = next_tile(mask, w, tile, end)) {
      ring.await_empty(s.empty);
      Base::load_tiles(leader, s, ring, a.k, a.v, w.seq.k_row + tile * Keys, kv_head, w.seq.batch);
    }
  }

  // Adds the keys from `key` on. The sum stays in flight.
  SIMT_DEVICE static void step(Smem& s, const Group& c, const Mask& mask, const QueryRows<1>& rows, float scale_log2,
                               int query, int key, bool masked, int valid, Scores& scores, Scores& dp, Weights& weights,
                               Sums& dq) {
    const uint64_t k = Base::await_tiles(s, c, valid);
    wgmma_fence();
    Base::issue_scores(scores, c.owned, k);
    Base::issue_scores(dp, c.second_owned(), wgmma_desc_advance(k, Base::kTileBytes));
    wgmma_wait<1>(scores);
    auto& p = Base::template part_of<Keys>(scores, 0);
    auto& ds = Base::template part_of<Keys>(dp, 0);
    Slopes slopes;
    if (masked) mask.template adjust_keys<T, true>(p, query, key, &slopes);
#pragma unroll
    for (int j = 0; j < Keys / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) p[0][j][e] = exp2_approx(p[0][j][e] * scale_log2 - rows.base[0][e / 2]);
    Base::release_before(s, c);  // a branch: within one basic block nvcc moves the wait above the exponentials
    wgmma_wait<0>(dp);
    mask.drop_keys(ds, query, key);
    mask.scale_weights(ds);
#pragma unroll
    for (int j = 0; j < Keys / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) ds[0][j][e] = p[0][j][e] * (ds[0][j][e] - rows.delta[0][e / 2]);
    mask.follow(ds, slopes);
    Base::to_weights(weights, ds, 0);
    Base::issue_sums(dq, weights, k);
  }

  SIMT_DEVICE static void consume(const Params& a, Smem& s) {
    const BackwardParams& b = a.b;
    const ForwardParams& p = b.forward;
    const Work w = work_at(a);
    if (w.first >= w.seq.q_len) return;
    const Mask mask(p, w);
    Group c(s);
    const int end = end_of(mask, w), query = w.first + c.warp_row();
    const int full = mask.full_key_end(w.first + c.index * Base::kGroupRows) / Keys;
    const float scale_log2 = mask.softmax_scale(p.scale) * kLog2e;
    int tile = next_tile(mask, w, -1, end);
    Sums dq = {};
    if (tile < end) {
      const QueryRows<1> rows(b, stats_index(p, w.seq, w.head), query, w.seq.q_len);
      Scores scores, dp;
      Weights weights;
      mbar_wait(&s.owned_full, 0);
      for (; tile < end; tile = next_tile(mask, w, tile, end), c.ring.used++) {
        const int valid = p.cu_seqlens_k ? w.seq.k_len - tile * Keys : Keys;  // TMA leaves zeros past a tensor's end
        step(s, c, mask, rows, scale_log2, query, tile * Keys, Mask::kGeneral || tile >= full, valid, scores, dp,
             weights, dq);
      }
      wgmma_wait<0>(dq);
    }
    bar_sync(Base::kGroup + c.index, 128);  // every warp of the group has done with the queries
    T* to = row_pointer<T>(b.dq, b.dq_strides, w.seq.batch, w.head, w.seq.q_row + query);
    Base::store(s, c, 0, dq, p.scale, to, b.dq_strides.row, w.seq.q_len - query, p.dim);
  }

  SIMT_DEVICE static void run(const Params& a, Smem& s) { Base::template run<BackwardQueriesSm90>(a, s); }
};

// dk and dv of one tile of keys. Rows of the accumulators are keys, columns of the scores are queries.
template <class T, int D, int Queries, int Stages, class Mask, Part kPart = Part::dk_dv>
struct BackwardKeysSm90 : BackwardSm90<T, D, Queries, Stages> {
  using Base = BackwardSm90<T, D, Queries, Stages>;
  using typename Base::Group;
  using typename Base::Params;
  using typename Base::Ring;
  using typename Base::Scores;
  using typename Base::Smem;
  using typename Base::Sums;
  using typename Base::Weights;
  static constexpr bool kWantsDk = kPart != Part::dv, kWantsDv = kPart != Part::dk;
  static constexpr int kKeys = Base::kOwned;
  static constexpr int kKeyBox = Base::kGroupRows, kQueryBox = Queries;
  // Whether the next scores are issued behind the sum of dk: else the registers of its operands are wanted.
  static constexpr bool kDkInFlight = Mask::kGeneral || D == 64;
  // Queries that the mask adjusts at a time.
  static constexpr int kPartQueries = Mask::kGeneral ? 32 : Queries, kParts = Queries / kPartQueries;
  using Walk = QueryWalk<Queries, kKeys, Mask>;
  using Slopes = typename Mask::template Slopes<kPartQueries / 8>;
  struct Gradients {
    Sums dk = {}, dv = {};
  };

  SIMT_DEVICE static Work work_at(const Params& a) {
    return find_work<kKeys>(a.b.forward, a.tiles, a.b.forward.kv_heads, false, a.fault);
  }
  SIMT_DEVICE static Walk walk_of(const ForwardParams& p, Mask& mask, const Work& w) {
    const int heads = p.q_heads / p.kv_heads;
    return Walk(mask, w.first, w.head * heads, heads);
  }

  SIMT_DEVICE static void produce(const Params& a, Smem& s) {
    const BackwardParams& b = a.b;
    const ForwardParams& p = b.forward;
    const Work w = work_at(a);
    if (w.first >= w.seq.k_len) return;
    Mask mask(p, w);
    const bool leader = elect_one();
    Walk at = walk_of(p, mask, w);
    if (!at.done()) Base::load_owned(leader, s, a.k, a.v, w.seq.k_row + w.first, w.head, w.seq.batch);
    for (Ring ring; !at.done(); at.advance(mask, w.first)) {
      QueryStats stats[Queries / kWarp];  // on their way while the stage is awaited
      const int64_t of_head = stats_index(p, w.seq, at.head);
#pragma unroll
      for (int i = 0; i < Queries / kWarp; i++)
        stats[i] = query_stats(b, of_head, at.first + i * kWarp + lane_id(), w.seq.q_len);
      ring.await_empty(s.empty);
#pragma unroll
      for (int i = 0; i < Queries / kWarp; i++) {
        s.base[ring.stage()][i * kWarp + lane_id()] = stats[i].base;
        s.delta[ring.stage()][i * kWarp + lane_id()] = stats[i].delta;
      }
      sync_warp();  // the leader's arrival speaks for all
      Base::load_tiles(leader, s, ring, a.q, a.dout, w.seq.q_row + at.first, at.head, w.seq.batch);
    }
  }

  // Scores become P.
  SIMT_DEVICE static void weigh(const Smem& s, int stage, const Mask& mask, float scale_log2, int query, int key,
                                bool masked, Scores& scores, Slopes (&slopes)[kParts]) {
#pragma unroll
    for (int i = 0; i < kParts; i++) {
      auto& p = Base::template part_of<kPartQueries>(scores, i * kPartQueries / 8);
      if (masked) mask.template adjust_queries<T, true>(p, query + i * kPartQueries, key, &slopes[i]);
#pragma unroll
      for (int j = 0; j < kPartQueries / 8; j++) {
        const uint2 base = load8(&s.base[stage][i * kPartQueries + 8 * j + 2 * (lane_id() & 3)]);
#pragma unroll
        for (int e = 0; e < 4; e++)
          p[0][j][e] = exp2_approx(p[0][j][e] * scale_log2 - bits_f32(e % 2 ? base.y : base.x));
      }
    }
  }
  // P as dv wants it: without what was dropped.
  SIMT_DEVICE static void keep(const Mask& mask, int query, int key, Scores& scores, Weights& weights) {
#pragma unroll
    for (int i = 0; i < kParts; i++) {
      const auto& p = Base::template part_of<kPartQueries>(scores, i * kPartQueries / 8);
      float kept[1][kPartQueries / 8][4];
#pragma unroll
      for (int j = 0; j < kPartQueries / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) kept[0][j][e] = p[0][j][e];
      mask.drop_queries(kept, query + i * kPartQueries, key);
      Base::to_weights(weights, kept, i * kPartQueries / 8);
    }
  }
  // dP becomes dS.
  SIMT_DEVICE static void differentiate(const Smem& s, int stage, const Mask& mask, int query, int key, Scores& scores,
                                        Scores& dp, const Slopes (&slopes)[kParts], Weights& weights) {
#pragma unroll
    for (int i = 0; i < kParts; i++) {
      const auto& p = Base::template part_of<kPartQueries>(scores, i * kPartQueries / 8);
      auto& ds = Base::template part_of<kPartQueries>(dp, i * kPartQueries / 8);
      mask.drop_queries(ds, query + i * kPartQueries, key);
      mask.scale_weights(ds);
#pragma unroll
      for (int j = 0; j < kPartQueries / 8; j++) {
        const uint2 delta = load8(&s.delta[stage][i * kPartQueries + 8 * j + 2 * (lane_id() & 3)]);
#pragma unroll
        for (int e = 0; e < 4; e++) ds[0][j][e] = p[0][j][e] * (ds[0][j][e] - bits_f32(e % 2 ? delta.y : delta.x));
      }
      mask.follow(ds, slopes[i]);
      Base::to_weights(weights, ds, i * kPartQueries / 8);
    }
  }

  // Adds the queries from `query` on. The sums stay in flight. Without branches about, dv is added to beside the
  // arithmetic of dS; with them, ptxas wants nothing in flight while operands are made (C7513).
  SIMT_DEVICE static void step(Smem& s, const Group& c, const Mask& mask, float scale_log2, int query, int key,
                               bool masked, int valid, Scores& scores, Scores& dp, Weights& p_weights,
                               Weights& ds_weights, Gradients& sums) {
    const uint64_t q = Base::await_tiles(s, c, valid), dout = wgmma_desc_advance(q, Base::kTileBytes);
    const int stage = c.ring.stage();
    wgmma_wait<kDkInFlight>(sums.dv);
    wgmma_fence();
    Base::issue_scores(scores, c.owned, q);
    if (kWantsDk) Base::issue_scores(dp, c.second_owned(), dout);
    wgmma_wait<kWantsDk>(scores);
    Slopes slopes[kParts];
    weigh(s, stage, mask, scale_log2, query, key, masked, scores, slopes);
    Base::release_before(s, c);  // as above
    if (kWantsDk && Mask::kGeneral) wgmma_wait<0>(dp);
    if (kWantsDv) keep(mask, query, key, scores, p_weights);
    if (kWantsDv && !Mask::kGeneral) Base::issue_sums(sums.dv, p_weights, dout);
    if (kWantsDk && !Mask::kGeneral) wgmma_wait<1>(dp);
    if (kWantsDk) differentiate(s, stage, mask, query, key, scores, dp, slopes, ds_weights);
    if (kWantsDv && Mask::kGeneral) Base::issue_sums(sums.dv, p_weights, dout);
    if (kWantsDk) Base::issue_sums(sums.dk, ds_weights, q);
  }

  SIMT_DEVICE static void consume(const Params& a, Smem& s) {
    const BackwardParams& b = a.b;
    const ForwardParams& p = b.forward;
    const Work w = work_at(a);
    if (w.first >= w.seq.k_len) return;
    Mask mask(p, w);
    Group c(s);
    const int group_key = w.first + c.index * Base::kGroupRows, key = w.first + c.warp_row();
    const int full = mask.full_query_begin(group_key + Base::kGroupRows);
    const float scale_log2 = mask.softmax_scale(p.scale) * kLog2e;
    Gradients sums;
    Walk at = walk_of(p, mask, w);
    if (!at.done()) {
      Scores scores, dp;
      Weights p_weights, ds_weights;
      mbar_wait(&s.owned_full, 0);
      for (; !at.done(); at.advance(mask, w.first), c.ring.used++) {
        const int valid = p.cu_seqlens_q ? w.seq.q_len - at.first : Queries;  // TMA leaves zeros past a tensor's end
        step(s, c, mask, scale_log2, at.first, key, Mask::kGeneral || at.first < full, valid, scores, dp, p_weights,
             ds_weights, sums);
      }
      wgmma_wait<0>(sums.dk);
      wgmma_wait<0>(sums.dv);
    }
    bar_sync(Base::kGroup + c.index, 128);  // every warp of the group has done with the keys and values
    store_gradients(b, s, c, w, key, sums);
  }

  SIMT_DEVICE static void store_gradients(const BackwardParams& b, Smem& s, const Group& c, const Work& w, int key,
                                          Gradients& sums) {
    const ForwardParams& p = b.forward;
    const int valid = w.seq.k_len - key;
    if (kWantsDk) {
      T* to = row_pointer<T>(b.dk, b.dk_strides, w.seq.batch, w.head, w.seq.k_row + key);
      Base::store(s, c, 0, sums.dk, p.scale, to, b.dk_strides.row, valid, p.dim);
    }
    if (kWantsDv) {
      float factor = 1.f;
      if constexpr (Mask::kGeneral) factor = Mask(p, w).weight_scale();
      T* to = row_pointer<T>(b.dv, b.dv_strides, w.seq.batch, w.head, w.seq.k_row + key);
      Base::store(s, c, 1, sums.dv, factor, to, b.dv_strides.row, valid, p.v_dim);
    }
  }

  SIMT_DEVICE static void run(const Params& a, Smem& s) { Base::template run<BackwardKeysSm90>(a, s); }
};

}  // namespace tilewise::attention
