// What attention weighed, recomputed from lse: exp(scale q k^T - lse), summed over the queries or its maxima over
// blocks. A block of threads owns the results of some keys and passes over the queries, in a fixed order: every result
// has one writer.
//
// An engine multiplies, keys as rows (K Q^T), so that a warp owns its keys for the whole pass: thread by thread it
// leaves kSlots keys x kColumns queries, and kLanesPerKey neighbouring lanes share a key. 16 keys x 16 queries are
// kSlots / kGroups x kGroupColumns of them in every lane of one warp. A reducer gets logarithms to base 2, -inf where
// nothing is weighed: a maximum then needs one exponential per result.
#pragma once
#include "attention/cuda/float_tile.h"
#include "attention/cuda/tile.h"

namespace tilewise::attention {

constexpr int kGroup = 16;  // what blocks of queries and keys are multiples of

struct ScoresArgs {
  ScoresParams p;
  int key_spans, query_spans;  // per head
  int span_keys, span_queries;
  bool chunks;  // every row consists of aligned 16 bytes
};

struct ScoresWork {
  int batch, head;
  int key, key_end;  // the block's
  int query, query_end;

  // The grid has one dimension, (sequence, head, queries, keys), keys fastest: blocks that run together share queries.
  SIMT_DEVICE explicit ScoresWork(const ScoresArgs& args) {
    const ScoresParams& p = args.p;
    const int index = static_cast<int>(block_idx().x), place = index / args.key_spans;
    batch = place / args.query_spans / p.q_heads;
    head = place / args.query_spans % p.q_heads;
    key = index % args.key_spans * args.span_keys;
    query = place % args.query_spans * args.span_queries;
    key_end = key + min_of(args.span_keys, p.keys - key);
    query_end = query + min_of(args.span_queries, p.rows - query);
  }
  SIMT_DEVICE int64_t head_index(const ScoresParams& p) const { return static_cast<int64_t>(batch) * p.q_heads + head; }
};

// fp16 and bf16 on tensor cores: a warp owns 32 keys.
template <class T, int D>
struct TensorScores {
  static constexpr int kThreads = 128, kMinBlocks = D == 64 ? 4 : D == 128 ? 2 : 1;
  static constexpr int kGroups = 2, kWarpKeys = kGroups * kGroup, kKeys = kThreads / kWarp * kWarpKeys;
  static constexpr int kQueries = D == 256 ? 32 : 64, kStep = 32;
  static constexpr int kSlots = 2 * kGroups, kColumns = kStep / 4, kGroupColumns = 4, kLanesPerKey = 4;
  static constexpr float kUnit = kLog2e;  // of scaled scores and lse before they are subtracted
  using Loader = TileLoader<D, kThreads, true, T>;
  struct Smem {
    alignas(128) T k[kKeys * D];
    alignas(128) T q[2][kQueries * D];
  };

  SIMT_DEVICE static int slot_key(int slot) { return warp_id() * kWarpKeys + 8 * slot + (lane_id() >> 2); }
  SIMT_DEVICE static int column_query(int column) { return 8 * (column / 2) + 2 * (lane_id() & 3) + column % 2; }

  SIMT_DEVICE static void load_keys(Smem& s, const ScoresArgs& args, const T* rows, int valid) {
    Loader(rows, args.p.k_strides.row, args.p.dim).template load<kKeys>(s.k, valid);
  }
  SIMT_DEVICE static void load_queries(Smem& s, int stage, const ScoresArgs& args, const T* rows, int valid) {
    Loader(rows, args.p.q_strides.row, args.p.dim).template load<kQueries>(s.q[stage], valid);
  }
  SIMT_DEVICE static void multiply(float (&dots)[kSlots][kColumns], const Smem& s, int stage, int first) {
    float acc[kGroups][kStep / 8][4] = {};
    multiply_transposed<D>(acc, s.k, warp_id() * kWarpKeys, s.q[stage], first);
#pragma unroll
    for (int i = 0; i < kSlots; i++)
#pragma unroll
      for (int j = 0; j < kColumns; j++) dots[i][j] = acc[i / 2][j / 2][2 * (i % 2) + j % 2];
  }
};

// Every type and alignment on the fp32 units: a warp owns 16 keys.
template <class T, int D>
struct FloatScores {
  static constexpr int kThreads = 128, kMinBlocks = 1;
  static constexpr int kGroups = 1, kWarpKeys = kGroup, kKeys = kThreads / kWarp * kWarpKeys;
  static constexpr int kQueries = kStreamRows<D>, kStep = kQueries;
  static constexpr int kSlots = kOwnRows, kColumns = kOwnColumns<D>, kGroupColumns = 2, kLanesPerKey = kLanesPerRow;
  static constexpr float kUnit = 1.f;  // differences of large numbers come before the factor log2(e), as in any.h
  struct Smem {
    alignas(128) float k[kKeys * kPitch<D>];
    alignas(128) float q[2][kQueries * kPitch<D>];
  };

  SIMT_DEVICE static int slot_key(int slot) { return own_row() + slot; }
  SIMT_DEVICE static int column_query(int column) { return own_column() + kLanesPerRow * column; }

  SIMT_DEVICE static void load_keys(Smem& s, const ScoresArgs& args, const T* rows, int valid) {
    load_float_tile<kKeys, D, kThreads>(s.k, rows, args.p.k_strides.row, valid, args.p.dim, args.chunks);
  }
  SIMT_DEVICE static void load_queries(Smem& s, int stage, const ScoresArgs& args, const T* rows, int valid) {
    load_float_tile<kQueries, D, kThreads>(s.q[stage], rows, args.p.q_strides.row, valid, args.p.dim, args.chunks);
  }
  SIMT_DEVICE static void multiply(float (&dots)[kSlots][kColumns], const Smem& s, int stage, int) {
    multiply_rows<D>(dots, s.k, s.q[stage]);
  }
};

template <class Engine>
struct ColumnSums {
  static constexpr int kSpanKeys = Engine::kKeys;
  struct Smem {};
  float sums[Engine::kSlots] = {};

  SIMT_DEVICE ColumnSums(const ScoresArgs&, const ScoresWork&, Smem&) {}

  SIMT_DEVICE void begin_tile(int) {}
  SIMT_DEVICE void add(Smem&, const float (&logs)[Engine::kSlots][Engine::kColumns], int) {
#pragma unroll
    for (int i = 0; i < Engine::kSlots; i++)
#pragma unroll
      for (int j = 0; j < Engine::kColumns; j++) sums[i] += exp2_approx(logs[i][j]);
  }
  SIMT_DEVICE void end_tile(Smem&) {}
  SIMT_DEVICE void finish(const ScoresParams& p, const ScoresWork& work, const Smem&) {
#pragma unroll
    for (int i = 0; i < Engine::kSlots; i++) {
      const float sum = warp_sum(sums[i], Engine::kLanesPerKey);
      const int key = work.key + Engine::slot_key(i);
      if (lane_id() % Engine::kLanesPerKey == 0 && key < work.key_end) p.sums[work.head_index(p) * p.keys + key] = sum;
    }
  }
};

// Maxima of 16 keys and a block of queries gather in a warp, then in shared memory, where those of a block of keys
// meet. A block of threads owns whole blocks, at most kSpanKeys x kSpanQueries.
template <class Engine>
struct BlockMax {
  static constexpr int kSpanKeys = 128, kSpanQueries = 512;
  static constexpr int kRows = kSpanQueries / kGroup, kColumns = kSpanKeys / kGroup;
  struct Smem {
    float tops[kRows][kColumns];  // [block of queries][16 keys]
  };
  uint32_t starts = 0;  // bit n: a block of queries starts with queries 16 n of the span
  int first_query, row = 0, column = 0;
  float tops[Engine::kGroups];  // of block `row`

  SIMT_DEVICE BlockMax(const ScoresArgs& args, const ScoresWork& work, Smem& s) : first_query(work.query) {
    static_assert(kRows == 32, "a bit each");
    for (int n = 0; n < kRows; n += args.p.block_q / kGroup) starts |= 1u << n;
    for (int i = thread_id(); i < kRows * kColumns; i += Engine::kThreads)
      s.tops[i / kColumns][i % kColumns] = -INFINITY;
    clear();
  }
  SIMT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < Engine::kGroups; i++) tops[i] = -INFINITY;
  }

  SIMT_DEVICE void begin_tile(int key) { column = (key + warp_id() * Engine::kWarpKeys) / kGroup; }
  SIMT_DEVICE void add(Smem& s, const float (&logs)[Engine::kSlots][Engine::kColumns], int query) {
    constexpr int kSlots = Engine::kSlots / Engine::kGroups;  // of 16 keys
#pragma unroll
    for (int j = 0; j < Engine::kColumns; j++) {
      if (j % Engine::kGroupColumns == 0) enter(s, (query - first_query) / kGroup + j / Engine::kGroupColumns);
#pragma unroll
      for (int i = 0; i < Engine::kSlots; i++) tops[i / kSlots] = fmaxf(tops[i / kSlots], logs[i][j]);
    }
  }
  // The next values are of queries 16 n to 16 n + 15 of the span.
  SIMT_DEVICE void enter(Smem& s, int n) {
    const int next = popc(starts & ((2u << n) - 1)) - 1;
    if (next == row) return;
    end_tile(s);
    row = next;
  }
  // Queries come in order, so a warp is here once for every block that it saw.
  SIMT_DEVICE void end_tile(Smem& s) {
#pragma unroll
    for (int i = 0; i < Engine::kGroups; i++) {
      const float top = warp_max(tops[i]);
      if (lane_id() == 0) s.tops[row][column + i] = top;
    }
    clear();
  }
  SIMT_DEVICE void finish(const ScoresParams& p, const ScoresWork& work, const Smem& s) {
    sync_block();  // every warp's maxima are there
    const int down = ceil_div(work.query_end - work.query, p.block_q), columns = p.block_k / kGroup;
    const int across = ceil_div(work.key_end - work.key, p.block_k), all_across = ceil_div(p.keys, p.block_k);
    const int64_t first_row = work.head_index(p) * ceil_div(p.rows, p.block_q) + work.query / p.block_q;
    float* maxima = p.maxima + first_row * all_across + work.key / p.block_k;
    for (int i = thread_id(); i < down * across; i += Engine::kThreads) {
      const int r = i / across, block = i % across;
      float top = -INFINITY;
      for (int c = 0; c < columns; c++) top = fmaxf(top, s.tops[r][block * columns + c]);
      maxima[static_cast<int64_t>(r) * all_across + block] = exp2_approx(top);
    }
  }
};

template <class T, class Engine, template <class> class Reducer>
struct Scores {
  static constexpr int kMinArch = 800, kThreads = Engine::kThreads, kMinBlocks = Engine::kMinBlocks;
  static constexpr int kKeys = Engine::kKeys, kQueries = Engine::kQueries, kWarps = kThreads / kWarp;
  static constexpr int kSlots = Engine::kSlots, kColumns = Engine::kColumns;
  using Params = ScoresArgs;
  using Reduce = Reducer<Engine>;
  struct Smem {
    typename Engine::Smem tiles;
    float lse[2][kQueries];     // in the engine's unit, +inf where nothing is weighed
    int32_t last[2][kQueries];  // key that the query sees, -1: none
    int32_t begins[kWarps], ends[kWarps];
    typename Reduce::Smem reducer;
  };
  // What a thread knows of its query of a tile.
  struct Stats {
    float lse;
    int last;

    SIMT_DEVICE Stats(const ScoresParams& p, const ScoresWork& work, int first) : lse(INFINITY), last(-1) {
      const int query = first + thread_id();
      if (thread_id() >= kQueries || query >= work.query_end) return;
      const float exact = p.lse[work.head_index(p) * p.rows + query];
      if (exact == -INFINITY) return;
      lse = exact * Engine::kUnit;
      last = p.last_key ? min_of(p.last_key[query], p.keys - 1) : p.keys - 1;
    }
    SIMT_DEVICE void store(Smem& s, int stage) const {
      if (thread_id() >= kQueries) return;
      s.lse[stage][thread_id()] = lse;
      s.last[stage][thread_id()] = last;
    }
  };

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const ScoresParams& p = args.p;
    ScoresWork work(args);
    Reduce reducer(args, work, s.reducer);
    const ScoresWork span = work;
    if (p.last_key) find_queries(p, s, work);
    for (int key = work.key; key < work.key_end && work.query < work.query_end; key += kKeys) {
      sync_block();  // every warp has done with the tiles before
      reducer.begin_tile(key - work.key);
      pass(args, s, work, key, reducer);
      reducer.end_tile(s.reducer);
    }
    reducer.finish(p, span, s.reducer);
  }

  // Leaves the queries from the first to the last that see a key of the block, in whole groups.
  SIMT_DEVICE static void find_queries(const ScoresParams& p, Smem& s, ScoresWork& work) {
    int begin = work.query_end, end = work.query;
    for (int query = work.query + thread_id(); query < work.query_end; query += kThreads)
      if (p.last_key[query] >= work.key) begin = min_of(begin, query), end = query + 1;
    begin = redux_min(begin);
    end = redux_max(end);
    if (lane_id() == 0) s.begins[warp_id()] = begin, s.ends[warp_id()] = end;
    sync_block();
    for (int i = 0; i < kWarps; i++) begin = min_of(begin, s.begins[i]), end = max_of(end, s.ends[i]);
    work.query += (begin - work.query) / kGroup * kGroup;
    work.query_end = end;
  }

  SIMT_DEVICE static void load_queries(const ScoresArgs& args, Smem& s, int stage, const ScoresWork& work, int first) {
    const T* rows = row_pointer<T>(args.p.q, args.p.q_strides, work.batch, work.head, first);
    Engine::load_queries(s.tiles, stage, args, rows, work.query_end - first);
  }

  // All queries past one tile of keys.
  SIMT_DEVICE static void pass(const ScoresArgs& args, Smem& s, const ScoresWork& work, int key, Reduce& reducer) {
    const ScoresParams& p = args.p;
    const int kv_head = work.head / (p.q_heads / p.kv_heads);
    Engine::load_keys(s.tiles, args, row_pointer<T>(p.k, p.k_strides, work.batch, kv_head, key), work.key_end - key);
    load_queries(args, s, 0, work, work.query);
    Stats(p, work, work.query).store(s, 0);
    cp_async_commit();
    Stats later(p, work, work.query + kQueries);  // of the next tile, on their way while this one is worked on
    int stage = 0;
    for (int query = work.query; query < work.query_end; query += kQueries, stage ^= 1) {
      const int next = query + kQueries;
      cp_async_wait<0>();
      sync_block();  // this stage has arrived, and every warp has done with the other one
      if (next < work.query_end) {
        load_queries(args, s, stage ^ 1, work, next);
        later.store(s, stage ^ 1);
        later = Stats(p, work, next + kQueries);
      }
      cp_async_commit();
#pragma unroll 1
      for (int first = 0; first < kQueries; first += Engine::kStep) step(args, s, stage, first, query, key, reducer);
    }
  }

  // Queries [first, first + kStep) of a tile; `query` and `key` are those at the begin of the tiles.
  SIMT_DEVICE static void step(const ScoresArgs& args, Smem& s, int stage, int first, int query, int key,
                               Reduce& reducer) {
    const int own = key + warp_id() * Engine::kWarpKeys;
    const int last = s.last[stage][first + lane_id() % Engine::kStep];
    const int farthest = redux_max(last);
    const int nearest = redux_min(last);
    if (farthest < own) return;
    float logs[kSlots][kColumns];
    Engine::multiply(logs, s.tiles, stage, first);
    const float scale = args.p.scale * Engine::kUnit;
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
      const float lse = s.lse[stage][first + Engine::column_query(j)];
#pragma unroll
      for (int i = 0; i < kSlots; i++) logs[i][j] = fmaf(logs[i][j], scale, -lse) * (kLog2e / Engine::kUnit);
    }
    if (nearest < own + Engine::kWarpKeys - 1) hide(logs, s, stage, first, key);
    reducer.add(s.reducer, logs, query + first);
  }

  SIMT_DEVICE static void hide(float (&logs)[kSlots][kColumns], const Smem& s, int stage, int first, int key) {
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
      const int last = s.last[stage][first + Engine::column_query(j)] - key;
#pragma unroll
      for (int i = 0; i < kSlots; i++)
        if (Engine::slot_key(i) > last) logs[i][j] = -INFINITY;
    }
  }
};

}  // namespace tilewise::attention
