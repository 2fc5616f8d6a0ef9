// What attention weighed: sums of its probabilities over queries, and their maxima over blocks. Probabilities come from
// lse as in the backward, tile by tile; no S x Sk matrix.
#pragma once
#include "attention/cpu/forward.h"

namespace tilewise {
namespace {

constexpr int kScoreKeys = 128;  // keys of a task, at most: whole blocks of any size that is served

struct ScoreScratch {
  float* q;               // [d][lane]
  float *lse, *lse_rest;  // [lane] in base 2, and what its rounding lost; infinite: a lane that weighs nothing
  int32_t* last_key;      // [lane]
  float* k;               // [key][d], widened
  float* kept;            // of the reducer
};
constexpr int kKeptVectors = max_of(kScoreKeys, kVectors* kScoreKeys / 16);

// Probabilities of keys [first, first + count) and one tile of queries go to keep(key - first, vector, probabilities).
template <class Keep>
void weigh_tile(const ScoresParams& p, const ScoreScratch& s, const Rows& k, int64_t first, int count,
                const Keep& keep) {
  const VF scale = set1(static_cast<float>(p.scale * kLog2e));
  for_rows(count, [&](auto block, int key) {
    constexpr int M = decltype(block)::value;
    VF acc[M][kVectors] = {};
    multiply_in_chains(acc, p.dim, k.data + key * k.stride, k.stride, s.q);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kVectors; v++) {
        const VI seen = load(s.last_key + v * W) >= set1i(static_cast<int32_t>(first + key + m));
        keep(key + m, v,
             select(seen, exp2((acc[m][v] * scale - load(s.lse + v * W)) - load(s.lse_rest + v * W)), VF{}));
      }
  });
}

// kept[key] = sums over the lanes' queries
struct ColumnSums {
  const ScoresParams& p;
  float* kept;
  int64_t head, first;  // head of all [b, hq]

  void start() const { fill(kept, kScoreKeys * W, 0); }
  void keep(int key, int, VF weights) const { store(kept + key * W, load(kept + key * W) + weights); }
  void end_tile(int64_t, int) const {}
  void finish(int count) const {
    for (int key = 0; key < count; key++) p.sums[head * p.keys + first + key] = reduce_add(load(kept + key * W));
  }
};

// kept[vector of the tile][block of keys]: a vector of queries never crosses a block of them
struct BlockMax {
  const ScoresParams& p;
  float* kept;
  int64_t head, first;

  static constexpr int kBlocks = kScoreKeys / 16;
  float* at(int vector, int block) const { return kept + (vector * kBlocks + block) * W; }
  float* out(int64_t row_block, int block) const {
    const int64_t rows = ceil_div(p.rows, p.block_q), columns = ceil_div(p.keys, p.block_k);
    return p.maxima + (head * rows + row_block) * columns + first / p.block_k + block;
  }
  void start() const {
    fill(kept, kVectors * kBlocks * W, 0);
    const int blocks = static_cast<int>(ceil_div(min_of<int64_t>(keys_of(p), p.keys - first), p.block_k));
    for (int64_t row = 0; row < ceil_div(p.rows, p.block_q); row++)
      for (int b = 0; b < blocks; b++) *out(row, b) = 0;
  }
  void keep(int key, int vector, VF weights) const {
    float* to = at(vector, key / p.block_k);
    store(to, max(weights, load(to)));
  }
  void end_tile(int64_t first_row, int count) const {
    const int blocks = static_cast<int>(ceil_div(count, p.block_k));
    for (int v = 0; v < kVectors && first_row + v * W < p.rows; v++)
      for (int b = 0; b < blocks; b++) {
        float* to = out((first_row + v * W) / p.block_q, b);
        *to = max_of(*to, reduce_max(load(at(v, b))));
        store(at(v, b), VF{});
      }
  }
  void finish(int) const {}
  static int keys_of(const ScoresParams& p) { return kScoreKeys / p.block_k * p.block_k; }
};

template <class T, class Reducer>
bool scores_task(const ScoresParams& p, const Runtime& rt, int64_t head, int64_t first, int count) {
  const int64_t padded = round_up(p.dim, 16);
  float* memory = scratch<float>(rt, kTaskScratch, padded * (kLanes + kScoreKeys) + 3 * kLanes + kKeptVectors * W + 64);
  if (!memory) return false;
  Carver carver{memory};
  const ScoreScratch s = {carver.take(p.dim * kLanes),
                          carver.take(kLanes),
                          carver.take(kLanes),
                          reinterpret_cast<int32_t*>(carver.take(kLanes)),
                          carver.take(kScoreKeys * padded),
                          carver.take(kKeptVectors * W)};
  const int64_t b = head / p.q_heads, q_head = head % p.q_heads, kv_head = q_head / (p.q_heads / p.kv_heads);
  const Rows k = as_floats(row_of<const T>(p.k, p.k_strides, b, kv_head, first), p.k_strides.row, count, p.dim, s.k);
  const float* lse = p.lse + head * p.rows;
  const Reducer reducer{p, s.kept, head, first};
  reducer.start();
  for (int64_t row = 0; row < p.rows; row += kLanes) {
    const int lanes = static_cast<int>(min_of<int64_t>(kLanes, p.rows - row));
    bool seen = false;
    for (int i = 0; i < kLanes; i++) {
      const bool exists = i < lanes && lse[row + i] != -kInfinity;
      const double exact = exists ? double(lse[row + i]) * kLog2e : 0;
      s.lse[i] = exists ? static_cast<float>(exact) : kInfinity;
      s.lse_rest[i] = exists ? static_cast<float>(exact - s.lse[i]) : 0;
      s.last_key[i] = !exists ? -1 : p.last_key ? p.last_key[row + i] : p.keys - 1;
      seen |= s.last_key[i] >= first;
    }
    if (!seen) continue;
    pack_tile(s.q, row_of<const T>(p.q, p.q_strides, b, q_head, row), p.q_strides.row, lanes, p.dim, 1);
    for (int lane = static_cast<int>(round_up(lanes, W)); lane < kLanes; lane += W)
      for (int d = 0; d < p.dim; d++) store(s.q + d * kLanes + lane, VF{});
    weigh_tile(p, s, k, first, count, [&](int key, int v, VF weights) { reducer.keep(key, v, weights); });
    reducer.end_tile(row, count);
  }
  reducer.finish(count);
  return true;
}

template <class Reducer>
const char* run_scores(const ScoresParams& p, const Runtime& rt, int keys) {
  const int64_t heads = int64_t(p.batch) * p.q_heads, chunks = ceil_div(p.keys, keys);
  return for_type(p.type, [&](auto type) {
    return run_tasks(rt, double(heads) * p.rows * p.keys * p.dim < kInlineFlops, heads * chunks, [&](int64_t i) {
      const int64_t first = i / heads * keys;
      return scores_task<decltype(type), Reducer>(p, rt, i % heads, first,
                                                  static_cast<int>(min_of<int64_t>(keys, p.keys - first)));
    });
  });
}

const char* column_sums(const ScoresParams& p, const Runtime& rt) {
  return run_scores<ColumnSums>(p, rt, kScoreKeys);
}
const char* block_max(const ScoresParams& p, const Runtime& rt) {
  return run_scores<BlockMax>(p, rt, BlockMax::keys_of(p));
}

}  // namespace
}  // namespace tilewise
