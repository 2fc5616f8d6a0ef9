// Forward: softmax(Q K^T) V over blocks of keys, with running statistics (Dao et al., arXiv:2205.14135). Scores are in
// base 2: the scale times log2(e) is folded into the packed queries.
#pragma once
#include "attention/cpu/problem.h"
#include "attention/cpu/tile.h"

namespace tilewise {
namespace {

constexpr int kTiles = 512 / kLanes;  // tiles of a task: they share a block of keys while it is in the L2 cache
constexpr int kTaskQueries = kTiles * kLanes;
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kLowest = -3.402823466e38f;
// Probabilities are taken relative to a reference score, not to the running maximum: exact while no score exceeds it by
// more than this (in powers of two). Then the reference is raised to the maximum and the block is done again.
constexpr float kSlack = 16.f;

// One tile's state and the workspaces it shares with the others of its task.
struct ForwardTile {
  float* q;          // [d][lane], scaled
  float* out;        // [dv][lane], not normalised
  float* reference;  // [lane]
  float* sum;        // [lane] of probabilities
  bool started;
};
struct ForwardScratch {
  ForwardTile tiles[kTiles];
  float* probabilities;     // [key][lane] of one block
  float *block_sum, *peak;  // [lane]: of one block, the sum of probabilities and the highest score
  float *k, *v;             // [key][d] of one block, widened
};

inline int64_t forward_scratch_floats(const ForwardParams& p) {
  const int64_t d = round_up(p.dim, 16), dv = round_up(p.v_dim, 16);
  return kTiles * (d + dv + 4) * kLanes + (kKeys + 4) * kLanes + kKeys * (d + dv) + 64 * kTiles;
}

inline ForwardScratch carve(const ForwardParams& p, float* memory) {
  Carver carver{memory};
  ForwardScratch s;
  for (ForwardTile& tile : s.tiles)
    tile = {carver.take(p.dim * kLanes), carver.take(p.v_dim * kLanes), carver.take(kLanes), carver.take(kLanes),
            false};
  s.probabilities = carver.take(kKeys * kLanes);
  s.block_sum = carver.take(kLanes);
  s.peak = carver.take(kLanes);
  s.k = carver.take(kKeys * round_up(p.dim, W));
  s.v = carver.take(kKeys * round_up(p.v_dim, W));
  return s;
}

// Probabilities of one region for N vectors, with the statistics of the block.
template <int N, bool kMasked>
void score_region(const Region& region, int dim, const Rows& k, const ForwardTile& tile, const ForwardScratch& s) {
  const int lane = region.vector * W;
  VF reference[N], sum[N], peak[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; v++) {
    reference[v] = load(tile.reference + lane + v * W);
    sum[v] = load(s.block_sum + lane + v * W);
    peak[v] = load(s.peak + lane + v * W);
  }
  for_rows(region.end - region.begin, [&](auto block, int i) {
    constexpr int M = decltype(block)::value;
    const int key = region.begin + i;
    VF acc[M][N] = {};
    multiply<Operand::by_row>(acc, dim, k.data + key * k.stride, k.stride, tile.q + lane, kLanes);
    float* p = s.probabilities + key * kLanes + lane;
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) {
        VF score = acc[m][v];
        if (kMasked && v == 0) score = select(iota() >= set1i(key + m - region.diagonal), score, set1(-kInfinity));
        peak[v] = max(peak[v], score);
        VF e = exp2(score - reference[v]);
        sum[v] += e;
        store(p + m * kLanes + v * W, e);
      }
    }
  });
#pragma GCC unroll 8
  for (int v = 0; v < N; v++) {
    store(s.block_sum + lane + v * W, sum[v]);
    store(s.peak + lane + v * W, peak[v]);
  }
}

using ScoreRegion = void (*)(const Region&, int, const Rows&, const ForwardTile&, const ForwardScratch&);
constexpr ScoreRegion kScoreRegion[][2] = {
    {score_region<1, false>, score_region<1, true>},
    {score_region<2, false>, score_region<2, true>},
    {score_region<3, false>, score_region<3, true>},
#if defined(__AVX512F__)
    {score_region<4, false>, score_region<4, true>},
#endif
};

// The score of the first key is a good reference for most rows. Nothing lower than the lowest finite number serves: a
// row of -inf keeps probability zero.
inline void start(ForwardTile& tile, int vectors, int dim, const Rows& k) {
  for (int v = 0; v < vectors; v++) {
    VF acc[1][1] = {};
    multiply<Operand::by_row>(acc, dim, k.data, 0, tile.q + v * W, kLanes);
    store(tile.reference + v * W, max(set1(kLowest), acc[0][0]));
  }
  tile.started = true;
}

// Whether some score of the block is too far above its lane's reference (or is NaN).
inline bool exceeds(const ForwardTile& tile, const ForwardScratch& s, int vectors) {
  VI bad = {};
  for (int v = 0; v < vectors; v++) bad |= ~(load(s.peak + v * W) - load(tile.reference + v * W) <= set1(kSlack));
  return any(bad);
}

inline void raise_reference(ForwardTile& tile, const ForwardScratch& s, int vectors, int v_dim) {
  for (int v = 0; v < vectors; v++) {
    const VF before = load(tile.reference + v * W), after = max(before, load(s.peak + v * W));
    const VF factor = exp2(before - after);
    store(tile.reference + v * W, after);
    store(tile.sum + v * W, load(tile.sum + v * W) * factor);
    for (int d = 0; d < v_dim; d++) {
      float* out = tile.out + d * kLanes + v * W;
      store(out, load(out) * factor);
    }
  }
}

// Adds a block of `count` keys to a tile of `vectors` vectors; lane i sees key j iff j <= first + i.
inline void attend(const ForwardParams& p, ForwardTile& tile, const ForwardScratch& s, const Rows& k, const Rows& v,
                   int count, int64_t first, int vectors) {
  if (!tile.started) start(tile, vectors, p.dim, k);
  const Regions regions(count, first, vectors);
  for (int attempt = 0; attempt < 2; attempt++) {
    fill(s.block_sum, kLanes, 0);
    fill(s.peak, kLanes, kLowest);
    for (const Region& r : regions) kScoreRegion[vectors - r.vector - 1][r.masked](r, p.dim, k, tile, s);
    if (attempt == 1 || !exceeds(tile, s, vectors)) break;
    raise_reference(tile, s, vectors, p.v_dim);
  }
  for (int i = 0; i < vectors; i++) store(tile.sum + i * W, load(tile.sum + i * W) + load(s.block_sum + i * W));
  for (const Region& r : regions) {
    const int lane = r.vector * W;
    kAccumulate[vectors - r.vector - 1](p.v_dim, r.end - r.begin, v.data + r.begin * v.stride, v.stride,
                                        s.probabilities + r.begin * kLanes + lane, tile.out + lane);
  }
}

// Normalises `count` queries of a tile and writes them; the first `blind` of them see no key at all.
template <class T>
void finish(const ForwardTile& tile, int count, int64_t blind, T* out, int64_t stride, int v_dim, float* lse) {
  float factors[kLanes];
  for (int i = 0; i < kLanes; i++) {
    const float sum = tile.sum[i];
    const bool nothing = i < blind || sum == 0;
    factors[i] = nothing ? 0 : 1 / sum;
    if (i < count) lse[i] = nothing ? -kInfinity : static_cast<float>((tile.reference[i] + __builtin_log2(sum)) * kLn2);
  }
  unpack_tile(out, stride, tile.out, count, v_dim, factors);
  for (int i = 0; i < blind && i < count; i++)
    for (int d = 0; d < v_dim; d++) out[i * stride + d] = from_float<T>(0);
}

template <class T>
bool forward_task(const ForwardParams& p, const Runtime& rt, int64_t b, int64_t head, int64_t block) {
  const Sequence seq = sequence_of(p, b);
  const int begin = static_cast<int>(block) * kTaskQueries;
  if (begin >= seq.queries) return true;
  float* memory = scratch<float>(rt, kTaskScratch, forward_scratch_floats(p));
  if (!memory) return false;
  ForwardScratch s = carve(p, memory);

  const int queries = min_of(kTaskQueries, seq.queries - begin), tiles = static_cast<int>(ceil_div(queries, kLanes));
  const int64_t kv_head = head / (p.q_heads / p.kv_heads), diagonal = diagonal_of(p, seq);
  const T* q = row_of<const T>(p.q, p.q_strides, seq.batch, head, seq.q_row + begin);
  const T* k = row_of<const T>(p.k, p.k_strides, seq.batch, kv_head, seq.k_row);
  const T* v = row_of<const T>(p.v, p.v_strides, seq.batch, kv_head, seq.k_row);
  auto queries_of = [&](int t) { return min_of(kLanes, queries - t * kLanes); };
  for (int t = 0; t < tiles; t++) {
    ForwardTile& tile = s.tiles[t];
    pack_tile(tile.q, q + t * kLanes * p.q_strides.row, p.q_strides.row, queries_of(t), p.dim,
              static_cast<float>(p.scale * kLog2e));
    fill(tile.out, int64_t(p.v_dim) * kLanes, 0);
    fill(tile.sum, kLanes, 0);
  }

  const int64_t end = max_of<int64_t>(0, min_of<int64_t>(seq.keys, begin + queries + diagonal));
  for (int64_t key = 0; key < end; key += kKeys) {
    const int count = static_cast<int>(min_of<int64_t>(kKeys, end - key));
    const Rows k_rows = as_floats(k + key * p.k_strides.row, p.k_strides.row, count, p.dim, s.k);
    const Rows v_rows = as_floats(v + key * p.v_strides.row, p.v_strides.row, count, p.v_dim, s.v);
    for (int t = 0; t < tiles; t++) {
      const int64_t first = begin + t * kLanes + diagonal - key;  // the last key of the block that lane 0 sees
      const int visible = static_cast<int>(min_of<int64_t>(count, first + queries_of(t)));
      if (visible <= 0) continue;
      attend(p, s.tiles[t], s, k_rows, v_rows, visible, first, static_cast<int>(ceil_div(queries_of(t), W)));
    }
  }

  const Strides statistics = statistics_strides(p);
  for (int t = 0; t < tiles; t++) {
    const int row = begin + t * kLanes;
    float* lse = row_of<float>(p.lse, statistics, seq.batch, head, seq.q_row + row);
    T* out = row_of<T>(p.out, p.out_strides, seq.batch, head, seq.q_row + row);
    finish(s.tiles[t], queries_of(t), -(row + diagonal), out, p.out_strides.row, p.v_dim, lse);
  }
  return true;
}

// task(batch, head, block of kTaskQueries queries) for all of a call.
template <class Task>
const char* for_query_blocks(const ForwardParams& p, const Runtime& rt, const Task& task) {
  const int64_t heads = int64_t(p.batch) * p.q_heads, blocks = ceil_div(p.seq_q, kTaskQueries);
  return run_tasks(rt, runs_inline(p), heads * blocks, [&](int64_t i) {
    const int64_t head = i % heads, block = blocks - 1 - i / heads;  // causal: the longest first
    return task(head / p.q_heads, head % p.q_heads, block);
  });
}

const char* forward(const ForwardParams& p, const Runtime& rt) {
  return for_type(p.type, [&](auto type) {
    return for_query_blocks(p, rt, [&](int64_t b, int64_t head, int64_t block) {
      return forward_task<decltype(type)>(p, rt, b, head, block);
    });
  });
}

}  // namespace
}  // namespace tilewise
