// Paged attention on AMX tiles: a task's rows in tiles of 32, each block of keys packed once for all of them.
#pragma once
#include "common/paged/cpu/attention.h"
#include "common/paged/cpu/team.h"
#include "common/tile_attention.h"

namespace tilewise::paged {
namespace {

constexpr int kMatrixRows = 2 * kTileRows, kMatrixTiles = kTaskRows / kMatrixRows;

// Row i of a tile sees the keys of the block that its bits name.
struct SeesBits {
  KeyBits bits[kMatrixRows];
  int count;

  TILEWISE_INLINE VF hide(VF score, int row, int key) const {
    const auto mask = __mmask16(bits[row].words[key / 64] >> key % 64) & lane_mask(max_of(0, count - key));
    return (VF)_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), __mmask16(mask), (__m512)score);
  }
};

template <class T, class Visibility>
struct MatrixTask {
  const Task<Visibility>& task;
  TileAttention<T> attention;
  int tiles;
  AttentionRows rows[kMatrixTiles];

  MatrixTask(const Task<Visibility>& task)
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
      attention.pack_queries(
          q, [&](int i) { return task.template query<T>(t * kMatrixRows + i); }, tile_rows(t), kMatrixRows);
    }
    return true;
  }

  // What the tiles see of a block of `count` keys from `first` on.
  struct Plan {
    const MatrixTask& work;
    int64_t first;
    int count;

    int rows(int t) const { return work.tile_rows(t); }
    int keys(int) const { return count; }
    template <class F>
    void see(int t, const F& f) const {
      const Task<Visibility>& task = work.task;
      if (task.keys.full(first)) return count % kTileDepth == 0 ? f(SeesAll()) : f(SeesUpTo{count, count});
      SeesBits sees;
      sees.count = count;
      for (int i = 0; i < rows(t); i++) sees.bits[i] = task.visible.seen(task.token(t * kMatrixRows + i), first);
      f(sees);
    }
  };

  void run() {
    const TileScope scope;
    const int block = min_of(attention.keys(), kKeyBlock / kTileDepth * kTileDepth);
    const KeyRange& keys = task.keys;
    const FloatRows<T> source(task.p.dim);
    KeyRows blocks[2];
    blocks[0].find(task, keys.first, keys.block_end(keys.first, block), source);
    for (int j = 0; j < blocks[0].count; j++) blocks[0].prefetch(j);
    for (int turn = 0; blocks[turn].count; turn ^= 1) {
      const KeyRows& now = blocks[turn];
      KeyRows& next = blocks[turn ^ 1];
      const int64_t end = now.first + now.count;
      next.find(task, end, keys.block_end(end, block), source);
      auto rows_of = [&](const char* const* at, const char* const* ahead) {
        return [=, &next](int i) {
          if (i < next.count) KeyRows::prefetch_row(ahead[i], next.row_bytes);
          return reinterpret_cast<const T*>(at[i]);
        };
      };
      attention.add_block(rows, tiles, rows_of(now.k, next.k), rows_of(now.v, next.v), now.count,
                          Plan{*this, now.first, now.count});
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

template <class T, class Visibility>
bool attend_on_tiles(const Task<Visibility>& task, const Runtime& rt) {
  const bool few = task.rows <= kFewRows && FloatRows<T>(task.p.dim).serves_few();
  if (few || task.p.softcap != 0) return attend_rows<FloatRows<T>>(task, rt);
  MatrixTask<T, Visibility> work(task);
  if (!work.start(rt)) return false;
  work.run();
  if (!work.finite()) return attend_rows<FloatRows<T>>(task, rt);
  work.write();
  return true;
}

template <class Visibility>
const char* attend_float_pages_on_tiles(const typename Visibility::Params& p, const Runtime& rt) {
  if (p.type == Type::bf16 && fits_team(p)) return attend_teams<FloatRows<Bf16>, Visibility>(p, rt);
  return with_type(p.type, [&](auto type) {
    using T = decltype(type);
    return run_tasks<Visibility>(
        p, rt, {}, [](const Task<Visibility>& task, const Runtime& rt) { return attend_on_tiles<T>(task, rt); });
  });
}

template <class Visibility>
const char* attend_code_pages_on_tiles(const typename Visibility::Params& p, const Runtime& rt) {
  if (!fits_team(p)) return attend_code_pages<Visibility>(p, rt);
  return with_codes(p.format, p.dim, [&](auto source) { return attend_teams<decltype(source), Visibility>(p, rt); });
}

}  // namespace
}  // namespace tilewise::paged
