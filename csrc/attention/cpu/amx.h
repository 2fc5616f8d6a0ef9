// Forward on AMX tiles: rows are queries, so that scores, weights and outputs stand as the tile unit leaves them, and
// statistics are per row. Keys and values of a block are packed once for all queries of a task.
#pragma once
#include "attention/cpu/forward.h"
#include "common/tile_attention.h"

namespace tilewise {
namespace {

constexpr int kTileQueries = 2 * kTileRows;
constexpr int kTaskTiles = kTaskQueries / kTileQueries;
// Fewer queries do not pay for packing the keys. Judged by sequence: packed sequences give the bits of separate ones.
constexpr int kMinTileQueries = 16;

// What a task's tiles see of a block: row i of the task sees the keys below first + i.
struct BlockPlan {
  int64_t first;
  int queries, count;

  int rows(int t) const { return min_of(kTileQueries, queries - t * kTileQueries); }
  int keys(int t) const { return static_cast<int>(min_of<int64_t>(count, first + t * kTileQueries + rows(t) - 1)); }
  template <class F>
  void see(int t, const F& f) const {
    const int64_t row = first + t * kTileQueries;
    if (row >= count && count % kTileDepth == 0)
      f(SeesAll());
    else
      f(SeesUpTo{row, count});
  }
};

template <class T>
bool forward_tiles_task(const ForwardParams& p, const Runtime& rt, int64_t b, int64_t head, int64_t block) {
  const Sequence seq = sequence_of(p, b);
  const int begin = static_cast<int>(block) * kTaskQueries;
  if (begin >= seq.queries) return true;
  if (seq.queries < kMinTileQueries || !causal_or_dense(p.rules)) return forward_task<T>(p, rt, b, head, block);
  const int queries = min_of(kTaskQueries, seq.queries - begin);
  const int tiles = static_cast<int>(ceil_div(queries, kTileQueries));

  TileAttention<T> attention(p.dim, p.v_dim, static_cast<float>(p.scale * kLog2e), queries);
  const int64_t q_size = attention.query_size(kTileQueries);  // of one tile, as the next
  const int64_t state_size = kTileQueries * (attention.columns() + W + 1);
  char* memory = scratch<char>(rt, kTaskScratch,
                               attention.bytes(tiles) + tiles * (q_size * sizeof(Packed) + state_size * sizeof(float)));
  if (!memory) return false;
  attention.use(memory);
  Packed* packed = reinterpret_cast<Packed*>(memory + attention.bytes(tiles));
  float* state = reinterpret_cast<float*>(packed + tiles * q_size);
  fill(state, tiles * state_size, 0);

  const int64_t kv_head = head / (p.q_heads / p.kv_heads), diagonal = diagonal_of(p, seq);
  auto rows_of = [&](const void* base, const Strides& strides, int64_t at_head, int64_t first) {
    const T* row = row_of<const T>(base, strides, seq.batch, at_head, first);
    return [row, step = strides.row](int64_t i) { return row + i * step; };
  };
  auto queries_of = [&](int t) { return min_of(kTileQueries, queries - t * kTileQueries); };
  AttentionRows rows[kTaskTiles];
  for (int t = 0; t < tiles; t++, state += state_size) {
    float *out = state, *sums = out + kTileQueries * attention.columns();
    rows[t] = {packed + t * q_size, out, sums, sums + kTileQueries * W, false};
    attention.pack_queries(packed + t * q_size, rows_of(p.q, p.q_strides, head, seq.q_row + begin + t * kTileQueries),
                           queries_of(t), kTileQueries);
  }

  const TileScope scope;
  const int64_t end = max_of<int64_t>(0, min_of<int64_t>(seq.keys, begin + queries + diagonal));
  for (int64_t key = 0; key < end; key += attention.keys()) {
    const int count = static_cast<int>(min_of<int64_t>(attention.keys(), end - key));
    attention.add_block(rows, tiles, rows_of(p.k, p.k_strides, kv_head, seq.k_row + key),
                        rows_of(p.v, p.v_strides, kv_head, seq.k_row + key), count,
                        BlockPlan{begin + diagonal - key + 1, queries, count});
  }

  for (int t = 0; t < tiles; t++)
    if (!attention.finite(rows[t], queries_of(t))) return forward_task<T>(p, rt, b, head, block);

  const Strides statistics = statistics_strides(p);
  for (int t = 0; t < tiles; t++) {
    const int row = begin + t * kTileQueries;
    float* lse = row_of<float>(p.lse, statistics, seq.batch, head, seq.q_row + row);
    T* out = row_of<T>(p.out, p.out_strides, seq.batch, head, seq.q_row + row);
    attention.finish(
        rows[t], queries_of(t), [&](int i) { return out + i * p.out_strides.row; },
        [&](int i, float value) { lse[i] = value; });
  }
  return true;
}

const char* forward_on_tiles(const ForwardParams& p, const Runtime& rt) {
  return for_type(p.type, [&](auto type) {
    return for_query_blocks(p, rt, [&](int64_t b, int64_t head, int64_t block) {
      return forward_tiles_task<decltype(type)>(p, rt, b, head, block);
    });
  });
}

}  // namespace
}  // namespace tilewise
