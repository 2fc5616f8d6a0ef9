// Tree attention on AMX tiles: a task's rows in tiles of 32, each block of keys packed once for all of them.
#pragma once
#include "common/tile_attention.h"
#include "speculative/cpu/attention.h"

namespace tilewise {
namespace {

constexpr int kMatrixRows = 2 * kTileRows, kMatrixTiles = kTaskRows / kMatrixRows;

// Row i of a tile sees node first_node + key where its ancestor bits say so.
struct SeesNodes {
  const uint64_t* bits[kMatrixRows];  // of the rows' nodes; null beyond the last row
  int words, first_node, count;

  TILEWISE_INLINE VF hide(VF score, int row, int key) const {
    const int node = first_node + key, word = node / kWordBits, shift = node % kWordBits;
    uint64_t seen = 0;
    if (bits[row] && word < words) seen = bits[row][word] >> shift;
    if (bits[row] && shift > kWordBits - W && word + 1 < words) seen |= bits[row][word + 1] << (kWordBits - shift);
    const auto mask = __mmask16(seen) & lane_mask(max_of(0, count - key));
    return (VF)_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), __mmask16(mask), (__m512)score);
  }
};

template <class T>
struct MatrixTask {
  const Task<T>& task;
  TileAttention<T> attention;
  int tiles;
  AttentionRows rows[kMatrixTiles];

  MatrixTask(const Task<T>& task)
      : task(task),
        attention(task.p.dim, task.p.dim, task.p.scale * kLog2e, task.rows),
        tiles(static_cast<int>(ceil_div(task.rows, kMatrixRows))) {}

  int tile_rows(int t) const { return min_of(kMatrixRows, task.rows - t * kMatrixRows); }

  bool start(const Runtime& rt) {
    const int64_t q_size = attention.query_size(kMatrixRows), state = kMatrixRows * (attention.columns() + W + 1);
    char* memory =
        scratch<char>(rt, 2, attention.bytes(tiles) + tiles * (q_size * sizeof(Packed) + state * sizeof(float)));
    if (!memory) return false;
    attention.use(memory);
    Packed* q = reinterpret_cast<Packed*>(memory + attention.bytes(tiles));
    float* at = reinterpret_cast<float*>(q + tiles * q_size);
    for (int64_t i = 0; i < tiles * state; i++) at[i] = 0;
    for (int t = 0; t < tiles; t++, q += q_size, at += state) {
      float* sums = at + kMatrixRows * attention.columns();
      rows[t] = {q, at, sums, sums + kMatrixRows * W, false};
      attention.pack_queries(q, [&](int i) { return task.query(t * kMatrixRows + i); }, tile_rows(t), kMatrixRows);
    }
    return true;
  }

  // What the tiles see of a block of `count` keys of the prefix (node < 0), or of the nodes from `node` on.
  struct Plan {
    const MatrixTask& work;
    int count, node;

    int rows(int t) const { return work.tile_rows(t); }
    int keys(int) const { return count; }
    template <class F>
    void see(int t, const F& f) const {
      if (node < 0) return count % kTileDepth == 0 ? f(SeesAll()) : f(SeesUpTo{count, count});
      SeesNodes sees = {{}, work.task.p.words, node, count};
      for (int i = 0; i < rows(t); i++) sees.bits[i] = work.task.bits(t * kMatrixRows + i);
      f(sees);
    }
  };

  void run() {
    const TileScope scope;
    const int block = min_of(attention.keys(), kKeyBlock / kTileDepth * kTileDepth), dim = task.p.dim;
    KeyRows<T> blocks[2];
    blocks[0].find(task, task.first_key, block_end(task, task.first_key, block));
    for (int j = 0; j < blocks[0].count; j++) blocks[0].prefetch(j, dim);
    for (int turn = 0; blocks[turn].count; turn ^= 1) {
      const KeyRows<T>& now = blocks[turn];
      KeyRows<T>& next = blocks[turn ^ 1];
      const int64_t end = now.first + now.count;
      next.find(task, end, block_end(task, end, block));
      auto rows_of = [&](const T* const* at, const T* const* ahead) {
        return [=, &next](int i) {
          if (i < next.count) prefetch_row(ahead[i], dim);
          return at[i];
        };
      };
      attention.add_block(rows, tiles, rows_of(now.k, next.k), rows_of(now.v, next.v), now.count,
                          Plan{*this, now.count, now.first < task.prefix ? -1 : int(now.first - task.prefix)});
    }
  }

  bool finite() const {
    for (int t = 0; t < tiles; t++)
      if (!attention.finite(rows[t], tile_rows(t))) return false;
    return true;
  }

  void write() const {
    float row[kMaxHeadDim + W];
    for (int r = 0; r < task.rows; r++) {
      const AttentionRows& tile = rows[r / kMatrixRows];
      const int i = r % kMatrixRows;
      attention.read_row(tile, i, [&](int d, VF value) { store(row + d, value); });
      task.write(r, row, tile.reference[i], reduce_add(load(tile.sums + i * W)));
    }
  }
};

template <class T>
bool attend_on_tiles(const Task<T>& task, const Runtime& rt) {
  MatrixTask<T> work(task);
  if (!work.start(rt)) return false;
  work.run();
  if (!work.finite()) return attend_tiles(task, rt);
  work.write();
  return true;
}

const char* tree_attention_on_tiles(const TreeAttentionParams& p, const Runtime& rt) {
  return tree_attention_with([](const auto& task, const Runtime& rt) { return attend_on_tiles(task, rt); }, p, rt);
}

}  // namespace
}  // namespace tilewise
