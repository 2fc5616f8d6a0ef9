// Many queries: lanes are queries. S^T = K Q^T and O^T = V^T P^T, so keys and values are only ever broadcast operands,
// read once for all queries of their head; softmax statistics are vertical.
#pragma once
#include "common/isa.h"
#include "common/paged/cpu/rows.h"
#include "common/paged/cpu/source.h"

namespace tilewise::paged {
namespace {

constexpr int kTileVectors = W == 16 ? 4 : 3;
constexpr int kTile = kTileVectors * W;  // queries of a tile, one bit each in a 64-bit lane mask
constexpr int kTaskTiles = 512 / kTile;
constexpr int kTaskRows = kTaskTiles * kTile;
constexpr float kRedoAbove = 60;  // scores may exceed the running reference by 2^60 before a block is worked again

// Rows of the register block for NV vectors of queries: rows x NV accumulators, NV operands and a broadcast.
template <int NV>
constexpr int kBlockRows = W == 16 ? (NV <= 2   ? 12
                                      : NV == 3 ? 8
                                                : 6)
                                   : (NV == 1   ? 8
                                      : NV == 2 ? 5
                                                : 4);

// A head dimension known to the compiler, or not (N = 0).
template <int N>
struct Dim {
  int n;
  constexpr operator int() const { return N ? N : n; }
};

#define TILEWISE_UNROLL _Pragma("GCC unroll 16")

// acc[m][v] += sum_k a[m * a_row + k * a_step] * b[k][v]
template <int MR, int NV>
TILEWISE_INLINE void product(VF (&acc)[MR][NV], int count, const float* a, int64_t a_row, int64_t a_step,
                             const float* b) {
  for (int k = 0; k < count; k++, a += a_step, b += NV * W) {
    VF x[NV];
    TILEWISE_UNROLL for (int v = 0; v < NV; v++) x[v] = load(b + v * W);
    TILEWISE_UNROLL for (int m = 0; m < MR; m++) {
      const VF s = set1(a[m * a_row]);
      TILEWISE_UNROLL for (int v = 0; v < NV; v++) acc[m][v] += s * x[v];
    }
  }
}

// Scores of MR keys. Sums of kDotChain terms are added up: one long chain would lose a bit against torch.
constexpr int kDotChain = 32;
template <int MR, int NV, class D>
TILEWISE_INLINE void dots(VF (&acc)[MR][NV], D dim, const float* k, const float* q) {
  product<MR, NV>(acc, min_of(kDotChain, int(dim)), k, dim, 1, q);
  for (int d = kDotChain; d < dim; d += kDotChain) {
    VF part[MR][NV] = {};
    product<MR, NV>(part, min_of(kDotChain, int(dim) - d), k + d, dim, 1, q + int64_t(d) * (NV * W));
    TILEWISE_UNROLL for (int m = 0; m < MR; m++) TILEWISE_UNROLL for (int v = 0; v < NV; v++) acc[m][v] += part[m][v];
  }
}

template <int N>
struct Rows {
  static constexpr int value = N;
};
// Calls f(Rows<r>, first row) for register blocks of MR rows, then of 4, then of 1.
template <int MR, class F>
TILEWISE_INLINE void for_row_blocks(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + MR <= n; i += MR) f(Rows<MR>(), i);
  if constexpr (MR > 4)
    for (; i + 4 <= n; i += 4) f(Rows<4>(), i);
  for (int64_t left = n - i; left > 0; left--) f(Rows<1>(), n - left);
}

// One block of keys, widened to float.
struct KeyBlock {
  float *k, *v;    // [kKeyBlock, dim]
  float* weights;  // [kKeyBlock, queries of a tile]
  int count;
};

// Queries of one tile and their running result.
struct QueryTile {
  float *q, *out;            // [dim, lanes]
  float *reference, *total;  // [lanes]
  const uint64_t* seen;      // [count] lane masks of the block's keys; null: all lanes see all keys
  Softcap softcap;
};

template <int NV>
TILEWISE_INLINE VF hide(VF score, uint64_t seen, int v) {
  const VI lane_bits = set1i(1) << iota();
  const VI visible = (set1i(int32_t(seen >> v * W & ((uint64_t(1) << W) - 1))) & lane_bits) != 0;
  return select(visible, score, set1(-kInfinity));
}

// weights = exp2(scores - reference), as if the reference from earlier blocks still bounded the scores. Returns false
// where it does not: then the block is worked again by exact_weights.
template <int NV, class D, class Ahead>
TILEWISE_INLINE bool weights_at_reference(D dim, const KeyBlock& block, const QueryTile& tile, const Ahead& ahead) {
  VF reference[NV], largest[NV], sum[NV];
  TILEWISE_UNROLL for (int v = 0; v < NV; v++) {
    reference[v] = largest[v] = load(tile.reference + v * W);
    sum[v] = set1(0);
  }
  for_row_blocks<kBlockRows<NV>>(block.count, [&](auto rows, int64_t i) {
    constexpr int MR = decltype(rows)::value;
    VF acc[MR][NV] = {};
    ahead(i, MR);
    dots<MR, NV>(acc, dim, block.k + i * dim, tile.q);
    TILEWISE_UNROLL for (int m = 0; m < MR; m++) TILEWISE_UNROLL for (int v = 0; v < NV; v++) {
      largest[v] = max(largest[v], acc[m][v]);
      const VF e = exp2(acc[m][v] - reference[v]);
      sum[v] += e;
      store(block.weights + (i + m) * (NV * W) + v * W, e);
    }
  });
  VI ok = set1i(-1);
  TILEWISE_UNROLL for (int v = 0; v < NV; v++) ok &= largest[v] - reference[v] < set1(kRedoAbove);
  if (any(~ok)) return false;
  TILEWISE_UNROLL for (int v = 0; v < NV; v++) store(tile.total + v * W, load(tile.total + v * W) + sum[v]);
  return true;
}

// The same with the reference raised to the block's largest score; rescales what was summed before, and hides keys.
template <int NV, class D, class Ahead>
TILEWISE_INLINE void exact_weights(D dim, const KeyBlock& block, const QueryTile& tile, const Ahead& ahead,
                                   VF (&rescale)[NV]) {
  VF largest[NV], sum[NV];
  TILEWISE_UNROLL for (int v = 0; v < NV; v++) largest[v] = load(tile.reference + v * W);
  for_row_blocks<kBlockRows<NV>>(block.count, [&](auto rows, int64_t i) {
    constexpr int MR = decltype(rows)::value;
    VF acc[MR][NV] = {};
    ahead(i, MR);
    dots<MR, NV>(acc, dim, block.k + i * dim, tile.q);
    TILEWISE_UNROLL for (int m = 0; m < MR; m++) TILEWISE_UNROLL for (int v = 0; v < NV; v++) {
      VF score = acc[m][v];
      if (tile.softcap) score = tile.softcap(score);
      if (tile.seen) score = hide<NV>(score, tile.seen[i + m], v);
      largest[v] = max(largest[v], score);
      store(block.weights + (i + m) * (NV * W) + v * W, score);
    }
  });
  TILEWISE_UNROLL for (int v = 0; v < NV; v++) {
    rescale[v] = exp2(load(tile.reference + v * W) - largest[v]);
    sum[v] = load(tile.total + v * W) * rescale[v];
    store(tile.reference + v * W, largest[v]);
  }
  for (int j = 0; j < block.count; j++) TILEWISE_UNROLL for (int v = 0; v < NV; v++) {
      float* at = block.weights + j * (NV * W) + v * W;
      const VF e = exp2(load(at) - largest[v]);
      sum[v] += e;
      store(at, e);
    }
  TILEWISE_UNROLL for (int v = 0; v < NV; v++) store(tile.total + v * W, sum[v]);
}

// `fresh`: no earlier block has set the reference.
template <int NV, class D, class Ahead>
void add_block(D dim, const KeyBlock& block, const QueryTile& tile, bool fresh, const Ahead& ahead) {
  VF rescale[NV];
  TILEWISE_UNROLL for (int v = 0; v < NV; v++) rescale[v] = set1(1);
  const bool exact = fresh || tile.seen || tile.softcap;
  if (exact)
    exact_weights<NV>(dim, block, tile, ahead, rescale);
  else if (!weights_at_reference<NV>(dim, block, tile, ahead))
    exact_weights<NV>(dim, block, tile, [](int64_t, int) {}, rescale);
  constexpr int kOutRows = NV <= 3 && W == 16 ? 8 : 4;
  for_row_blocks<kOutRows>(dim, [&](auto rows, int64_t d) {
    constexpr int MR = decltype(rows)::value;
    VF acc[MR][NV] = {};  // a block's sum starts from zero: shorter chains of additions, smaller rounding errors
    float* out = tile.out + d * (NV * W);
    product<MR, NV>(acc, block.count, block.v + d, 1, dim, block.weights);
    TILEWISE_UNROLL for (int m = 0; m < MR; m++) TILEWISE_UNROLL for (int v = 0; v < NV; v++) {
      float* to = out + m * (NV * W) + v * W;
      store(to, load(to) * rescale[v] + acc[m][v]);
    }
  });
}

template <class D, class Ahead>
void add_block(int vectors, D dim, const KeyBlock& block, const QueryTile& tile, bool fresh, const Ahead& ahead) {
  if (vectors == 1) return add_block<1>(dim, block, tile, fresh, ahead);
  if (vectors == 2) return add_block<2>(dim, block, tile, fresh, ahead);
  if constexpr (kTileVectors == 4)
    if (vectors == 4) return add_block<4>(dim, block, tile, fresh, ahead);
  add_block<3>(dim, block, tile, fresh, ahead);
}

// Prefetches the next block's rows while the first tile's scores are computed.
struct Prefetch {
  const KeyRows* next;  // null: nothing

  TILEWISE_INLINE void operator()(int64_t i, int n) const {
    if (next)
      for (int64_t j = i; j < i + n; j++) next->prefetch(j);
  }
};

// The working memory of one task.
template <class Source, class Visibility>
struct TileTask {
  const Task<Visibility>& task;
  Source source;
  int tiles;
  float *q, *out, *reference, *total;
  KeyBlock block;
  uint64_t seen[kKeyBlock];  // of the block at hand, by one tile's lanes

  TileTask(const Task<Visibility>& task) : task(task), source(task.p.dim), tiles(int(ceil_div(task.rows, kTile))) {}
  int tile_rows(int t) const { return min_of(kTile, task.rows - t * kTile); }
  int vectors(int t) const { return int(ceil_div(tile_rows(t), W)); }

  bool allocate(const Runtime& rt) {
    const int64_t dim = task.p.dim, per_tile = (2 * dim + 2) * kTile;
    const int64_t floats = tiles * per_tile + kKeyBlock * (2 * dim + kTile) + 64;
    float* memory = scratch<float>(rt, 2, floats);
    if (!memory) return false;
    q = memory;
    out = q + tiles * dim * kTile;
    reference = out + tiles * dim * kTile;
    total = reference + tiles * kTile;
    block.weights = total + tiles * kTile;
    block.k = block.weights + kKeyBlock * kTile;
    block.v = block.k + kKeyBlock * dim;
    return true;
  }

  void pack_queries() {
    const int dim = task.p.dim;
    float row[kMaxHeadDim];
    for (int t = 0; t < tiles; t++) {
      float* to = q + int64_t(t) * dim * kTile;
      const int stride = vectors(t) * W;
      for (int lane = 0; lane < stride; lane++) {
        const bool real = lane < tile_rows(t);
        if (real) task.load_query(t * kTile + lane, row, dim);
        for (int d = 0; d < dim; d++) to[d * stride + lane] = real ? row[d] : 0;
      }
    }
    for (int64_t i = 0; i < int64_t(tiles) * dim * kTile; i += W) store(out + i, set1(0));
    for (int64_t i = 0; i < int64_t(tiles) * kTile; i += W) {
      store(reference + i, set1(kLowest));
      store(total + i, set1(0));
    }
  }

  // Which lanes of tile t see which keys of a block; `count` shrinks to the last key that any of them sees.
  const uint64_t* find_seen(int t, int64_t first_key, int& count) {
    for (int j = 0; j < count; j++) seen[j] = 0;
    for (int lane = 0; lane < tile_rows(t);) {
      const int token = task.token(t * kTile + lane), from = lane;
      while (lane < tile_rows(t) && task.token(t * kTile + lane) == token) lane++;
      const uint64_t lanes = ~uint64_t(0) >> (64 - (lane - from)) << from;
      task.visible.seen(token, first_key).each(count, [&](int i) { seen[i] |= lanes; });
    }
    while (count > 0 && !seen[count - 1]) count--;
    return seen;
  }

  template <class D>
  void run(D dim) {
    const KeyRange& keys = task.keys;
    const Softcap softcap(task.p);
    KeyRows rows, next;
    rows.find(task, keys.first, keys.block_end(keys.first), source);
    for (int j = 0; j < rows.count; j++) rows.prefetch(j);
    bool fresh = true;
    while (rows.count) {
      const int64_t end = rows.first + rows.count;
      next.find(task, end, keys.block_end(end), source);
      for (int j = 0; j < rows.count; j++) source.widen(block.k + j * dim, rows.k[j]);
      for (int j = 0; j < rows.count; j++) source.widen(block.v + j * dim, rows.v[j]);
      for (int t = 0; t < tiles; t++) {
        block.count = rows.count;
        QueryTile tile = {q + int64_t(t) * dim * kTile,
                          out + int64_t(t) * dim * kTile,
                          reference + t * kTile,
                          total + t * kTile,
                          nullptr,
                          softcap};
        if (!keys.full(rows.first)) tile.seen = find_seen(t, rows.first, block.count);
        if (block.count) add_block(vectors(t), dim, block, tile, fresh, Prefetch{t == 0 ? &next : nullptr});
      }
      fresh = false;
      rows = next;
    }
  }

  void write() {
    const int dim = task.p.dim;
    float row[kMaxHeadDim + W];
    for (int r = 0; r < task.rows; r++) {
      const int t = r / kTile, lane = r % kTile, stride = vectors(t) * W;
      const float* from = out + int64_t(t) * dim * kTile + lane;
      for (int d = 0; d < dim; d++) row[d] = from[d * stride];
      task.write(r, row, reference[t * kTile + lane], total[t * kTile + lane]);
    }
  }
};

template <class Source, class Visibility>
bool attend_tiles(const Task<Visibility>& task, const Runtime& rt) {
  TileTask<Source, Visibility> work(task);
  if (!work.allocate(rt)) return false;
  work.pack_queries();
  if (task.p.dim == 64)
    work.run(Dim<64>());
  else if (task.p.dim == 128)
    work.run(Dim<128>());
  else
    work.run(Dim<0>{task.p.dim});
  work.write();
  return true;
}

}  // namespace
}  // namespace tilewise::paged
