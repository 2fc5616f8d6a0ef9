// Forward: softmax(Q K^T) V over blocks of keys, with running statistics (Dao et al., arXiv:2205.14135). Scores are in
// base 2: the scale times log2(e) is folded into the packed queries.
#pragma once
#include "attention/cpu/ruled.h"
#include "common/softmax.h"

namespace tilewise {
namespace {

constexpr int kTiles = 512 / kLanes;  // tiles of a task: they share a block of keys while it is in the L2 cache
constexpr int kTaskQueries = kTiles * kLanes;
constexpr int kPackedTiles = 3;  // from so many on it pays to pack the columns of a block
constexpr int kMostRaised = 2;   // blocks of a tile that are done twice before scores are stored first
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
  int raised;  // blocks that were done again because scores rose
};
struct ForwardScratch {
  ForwardTile tiles[kTiles];
  float* probabilities;     // [key][lane] of one block
  float *block_sum, *peak;  // [lane]: of one block, the sum of probabilities and the highest score
  MaskBits bits;            // of one block
  ToCome* to_come;          // of the bias
  float *k, *v;             // [key][d] of one block, widened
  float* v_panels;          // of one block (pack_columns)
};

inline int64_t forward_scratch_floats(const ForwardParams& p) {
  const int64_t d = round_up(p.dim, 16), dv = round_up(p.v_dim, 16);
  return kTiles * (d + dv + 4) * kLanes + (kKeys + 4 + kMaskWords) * kLanes + kKeys * (d + 2 * dv) + 64 * kTiles;
}

inline ForwardScratch carve(const ForwardParams& p, float* memory) {
  Carver carver{memory};
  ForwardScratch s;
  for (ForwardTile& tile : s.tiles)
    tile = {
        carver.take(p.dim * kLanes), carver.take(p.v_dim * kLanes), carver.take(kLanes), carver.take(kLanes), false, 0};
  s.probabilities = carver.take(kKeys * kLanes);
  s.block_sum = carver.take(kLanes);
  s.peak = carver.take(kLanes);
  s.bits.words = reinterpret_cast<int32_t*>(carver.take(kMaskWords * kLanes));
  s.k = carver.take(kKeys * round_up(p.dim, W));
  s.v = carver.take(kKeys * round_up(p.v_dim, W));
  s.v_panels = carver.take(kKeys * p.v_dim);
  return s;
}

// A product by row against a tile, between whose steps some of what is to come is asked for: `share` lines a key.
template <int M, int N>
TILEWISE_INLINE void multiply_and_ask(VF (&acc)[M][N], int depth, const float* a, int64_t lda, const float* tile,
                                      ToCome& to_come) {
  constexpr int kStep = 16;
  const int lines = static_cast<int>(ceil_div(M * to_come.share, ceil_div(depth, kStep)));
  for (int d = 0; d < depth; d += kStep) {
    multiply<Operand::by_row>(acc, min_of(kStep, depth - d), a + d, lda, tile + d * kLanes, kLanes);
    for (int i = 0; i < lines; i++) to_come.ask();
  }
}

// What becomes of a product before it is weighed: nothing, or what a causal region, a mask or the rules' extras hide or
// add. Extras stand where the probabilities will.
enum class Change { none, diagonal, mask, extra };

// What a change of one region needs to know, by value: stores of probabilities could be to anything behind a pointer.
struct Changed {
  MaskBits bits;
  float* probabilities;
  int lane, step, diagonal;  // of the region

  Changed(const Region& r, const ForwardScratch& s)
      : bits(s.bits), probabilities(s.probabilities), lane(r.vector * W), step(r.step), diagonal(r.diagonal) {}
  // The score of a key of the block and vector v of the region.
  template <Change kChange>
  TILEWISE_INLINE VF score(VF score, int key, int v) const {
    if constexpr (kChange == Change::diagonal)
      if (v == 0) return select(iota() >= set1i(key * step - diagonal), score, set1(-kInfinity));
    if constexpr (kChange == Change::mask) return bits.hide(score, lane + v * W, key);
    if constexpr (kChange == Change::extra)
      return HeadRules::added(score, load(probabilities + key * kLanes + lane + v * W));
    return score;
  }
};

// Probabilities of one region for N vectors, with the statistics of the block.
template <int N, Change kChange>
void score_region(const Region& region, int dim, const Rows& k, const ForwardTile& tile, const ForwardScratch& s) {
  const Changed changed(region, s);
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
    if constexpr (kChange == Change::extra)
      multiply_and_ask(acc, dim, k.data + key * k.stride, k.stride, tile.q + lane, *s.to_come);
    else if constexpr (kChange == Change::mask)  // few keys may be left, whose rounding is not averaged
      multiply_in_chains<32>(acc, dim, k.data + key * k.stride, k.stride, tile.q + lane);
    else
      multiply<Operand::by_row>(acc, dim, k.data + key * k.stride, k.stride, tile.q + lane, kLanes);
    float* p = s.probabilities + key * kLanes + lane;
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) {
        const VF score = changed.template score<kChange>(acc[m][v], key + m, v);
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
constexpr ScoreRegion kScoreRegion[][4] = {
    {score_region<1, Change::none>, score_region<1, Change::diagonal>, score_region<1, Change::mask>,
     score_region<1, Change::extra>},
    {score_region<2, Change::none>, score_region<2, Change::diagonal>, score_region<2, Change::mask>,
     score_region<2, Change::extra>},
    {score_region<3, Change::none>, score_region<3, Change::diagonal>, score_region<3, Change::mask>,
     score_region<3, Change::extra>},
#if defined(__AVX512F__)
    {score_region<4, Change::none>, score_region<4, Change::diagonal>, score_region<4, Change::mask>,
     score_region<4, Change::extra>},
#endif
};

inline void score(const Region& r, Change change, int dim, const Rows& k, const ForwardTile& tile,
                  const ForwardScratch& s) {
  kScoreRegion[r.vectors - 1][static_cast<int>(change)](r, dim, k, tile, s);
}

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

// out += weights * values, and their sum.
template <class List>
void add_values(const ForwardParams& p, ForwardTile& tile, const ForwardScratch& s, const Columns& v,
                const List& regions, int vectors) {
  for (int i = 0; i < vectors; i++) store(tile.sum + i * W, load(tile.sum + i * W) + load(s.block_sum + i * W));
  for (const Region& r : regions) {
    const int lane = r.vector * W;
    kAccumulate[r.vectors - 1](p.v_dim, r.begin, r.end - r.begin, v, s.probabilities + r.begin * kLanes + lane,
                               tile.out + lane);
  }
}

// Adds the regions of a block of keys to a tile of `vectors` vectors that has a reference.
template <class List>
void attend(const ForwardParams& p, ForwardTile& tile, const ForwardScratch& s, const Rows& k, const Columns& v,
            const List& regions, int vectors) {
  for (int attempt = 0; attempt < 2; attempt++) {
    fill(s.block_sum, kLanes, 0);
    fill(s.peak, kLanes, kLowest);
    for (const Region& r : regions) score(r, r.masked ? Change::diagonal : Change::none, p.dim, k, tile, s);
    if (attempt == 1 || !exceeds(tile, s, vectors)) break;
    raise_reference(tile, s, vectors, p.v_dim);
  }
  add_values(p, tile, s, v, regions, vectors);
}

// The same under rules. Scores are stored before their weights are taken, so nothing is done twice, not even where the
// tile has no reference yet.
inline void attend_stored(const ForwardParams& p, const HeadRules& rules, const Place& at, const RuledRegions& regions,
                          ForwardTile& tile, const ForwardScratch& s, const Rows& k, const Columns& v) {
  fill(s.block_sum, kLanes, 0);
  fill(s.peak, kLanes, kLowest);
  for (const Region& r : regions) {
    kProductRegion[r.vectors - 1](r, p.dim, k, tile.q, s.probabilities);
    adjust_scores(rules, r, at, s.probabilities, s.peak);
  }
  if (!tile.started) fill(tile.reference, kLanes, kLowest);
  tile.started = true;
  if (exceeds(tile, s, at.vectors())) raise_reference(tile, s, at.vectors(), p.v_dim);
  for (const Region& r : regions) exponentiate(rules, r, at, tile.reference, s.probabilities, s.block_sum);
  add_values(p, tile, s, v, regions, at.vectors());
}

// The highest of a region's first scores: one of several keys is likely to be seen.
template <Change kChange>
void start_region(const Region& r, int dim, const Rows& k, ForwardTile& tile, const ForwardScratch& s) {
  const Changed changed(r, s);
  for (int v = 0; v < r.vectors; v++) {
    VF acc[kRows][1] = {}, peak = set1(kLowest);
    multiply<Operand::by_row>(acc, dim, k.data + r.begin * k.stride, k.stride, tile.q + v * W, kLanes);
    for (int m = 0; m < kRows; m++) peak = max(changed.template score<kChange>(acc[m][0], r.begin + m, v), peak);
    store(tile.reference + v * W, peak);
  }
  tile.started = true;
}

inline void start_changed(Change change, const Region& r, int dim, const Rows& k, ForwardTile& tile,
                          const ForwardScratch& s) {
  change == Change::mask ? start_region<Change::mask>(r, dim, k, tile, s)
                         : start_region<Change::extra>(r, dim, k, tile, s);
}

// The same where scores are weighed while they are in registers, as without rules. False where that cannot be: before a
// block that not all vectors of a tile without a reference begin with, or where scores rose too far.
inline bool attend_changed(const ForwardParams& p, const HeadRules& rules, const Place& at, const RuledRegions& regions,
                           ForwardTile& tile, ForwardScratch& s, const Rows& k, const Columns& v) {
  const bool masks = rules.only_masks();
  const Region& first = regions.list[0];
  if (!tile.started && (first.vectors < at.vectors() || !first.masked || first.end - first.begin < kRows)) return false;
  fill(s.block_sum, kLanes, 0);
  fill(s.peak, kLanes, kLowest);
  if (masks) s.bits.take(rules, at);
  ToCome to_come;
  if (rules.only_biased()) to_come = ToCome(rules, at);
  s.to_come = &to_come;
  for (const Region& r : regions)  // all before any is weighed: squares reach into the regions beside
    if (r.masked && !masks) write_extras(rules, r, at, s.probabilities);
  for (const Region& r : regions) {
    const Change change = !r.masked ? Change::none : masks ? Change::mask : Change::extra;
    if (!tile.started) start_changed(change, r, p.dim, k, tile, s);
    score(r, change, p.dim, k, tile, s);
  }
  if (exceeds(tile, s, at.vectors())) {
    tile.raised++;
    return false;
  }
  add_values(p, tile, s, v, regions, at.vectors());
  return true;
}

inline void attend_ruled(const ForwardParams& p, const HeadRules& rules, const Place& at, ForwardTile& tile,
                         ForwardScratch& s, const Rows& k, const Columns& v) {
  const RuledRegions regions(rules, p.rules, at);
  if (regions.size == 0) return;
  if (regions.plain && tile.started) return attend(p, tile, s, k, v, regions, at.vectors());
  if (rules.only_adds() && tile.raised < kMostRaised && attend_changed(p, rules, at, regions, tile, s, k, v)) return;
  attend_stored(p, rules, at, regions, tile, s, k, v);
}

// Normalises `count` rows of a tile and writes them to out(row) and lse(row); the first `blind` of them see no key.
template <class Out, class Lse>
void finish(const ForwardTile& tile, int count, int64_t blind, float sink, int v_dim, const Out& out, const Lse& lse) {
  float factors[kLanes];
  bool nothing[kLanes];
  for (int i = 0; i < kLanes; i++) {
    const RowEnd end = end_row(tile.reference[i], i < blind ? 0 : tile.sum[i], sink);
    factors[i] = end.factor;
    nothing[i] = end.nothing;
    if (i < count) *lse(i) = end.lse;
  }
  unpack_tile(out, tile.out, count, v_dim, factors);
  for (int i = 0; i < count; i++)
    if (nothing[i])
      for (int d = 0; d < v_dim; d++) out(i)[d] = {};
}

// The rows of a task: up to kTaskQueries queries of one head of a sequence, from `begin` on. Or, where all queries of
// all heads that share a key head fit one tile, these, so that keys and values are read once: row i is query i / heads
// of head `head` + i % heads.
struct TaskRows {
  const Sequence& seq;
  int64_t head;
  int heads, begin, queries;

  // Judged by sequence: packed sequences give the bits of separate ones.
  static int heads_of(const ForwardParams& p, const Sequence& seq) {
    const int group = p.q_heads / p.kv_heads;
    return causal_or_dense(p.rules) && int64_t(seq.queries) * group <= kLanes ? group : 1;
  }
  TaskRows(const ForwardParams& p, const Sequence& seq, int64_t head, int64_t block)
      : seq(seq),
        head(head),
        heads(heads_of(p, seq)),
        begin(static_cast<int>(block) * kTaskQueries),
        queries(min_of(kTaskQueries, seq.queries - begin)) {}

  int count() const { return queries * heads; }
  bool empty() const { return queries <= 0 || head % heads != 0; }  // the first head does the work of all

  // Where the rows of a tile, from row `first` on, lie in memory.
  template <class T>
  struct Pointers {
    T* row[kLanes];
    T* operator()(int64_t i) const { return row[i]; }
  };
  template <class T, class P>
  Pointers<T> in(P* base, const Strides& strides, int first, int count) const {
    Pointers<T> to;
    for (int i = 0; i < count; i++) {
      const int row = first + i, query = heads == 1 ? row : row / heads;
      to.row[i] = row_of<T>(base, strides, seq.batch, head + (row - query * heads), seq.q_row + begin + query);
    }
    return to;
  }
};

template <class T>
struct ForwardTask {
  const ForwardParams& p;
  const Sequence& seq;
  TaskRows rows;
  ForwardScratch s;
  const T *k, *v;  // the sequence's first

  int tiles() const { return static_cast<int>(ceil_div(rows.count(), kLanes)); }
  int rows_of(int t) const { return min_of(kLanes, rows.count() - t * kLanes); }
  int query_of(int t) const { return rows.begin + t * kLanes; }  // the first of tile t, which only one head can pass

  void load_tiles() {
    for (int t = 0; t < tiles(); t++) {
      ForwardTile& tile = s.tiles[t];
      pack_tile(tile.q, rows.in<const T>(p.q, p.q_strides, t * kLanes, rows_of(t)), rows_of(t), p.dim,
                static_cast<float>(p.scale * kLog2e));
      fill(tile.out, int64_t(p.v_dim) * kLanes, 0);
      fill(tile.sum, kLanes, 0);
    }
  }

  Rows k_block(int64_t key, int count) const {
    return as_floats(k + key * p.k_strides.row, p.k_strides.row, count, p.dim, s.k);
  }
  Columns v_block(int64_t key, int count) const {
    const Rows rows = as_floats(v + key * p.v_strides.row, p.v_strides.row, count, p.v_dim, s.v);
    if (tiles() < kPackedTiles) return {rows.data, rows.stride, count};
    return pack_columns(rows.data, rows.stride, count, p.v_dim, s.v_panels);
  }

  void attend_all() {
    const int64_t diagonal = diagonal_of(p, seq);
    const int64_t end = max_of<int64_t>(0, min_of<int64_t>(seq.keys, rows.begin + rows.queries + diagonal));
    for (int64_t key = 0; key < end; key += kKeys) {
      const int count = static_cast<int>(min_of<int64_t>(kKeys, end - key));
      const Rows k_rows = k_block(key, count);
      const Columns v_columns = v_block(key, count);
      for (int t = 0; t < tiles(); t++) {
        const int64_t first = query_of(t) + diagonal - key;  // the last key of the block that lane 0 sees
        const int visible = static_cast<int>(min_of<int64_t>(count, first + rows_of(t) / rows.heads));
        if (visible <= 0) continue;
        const int vectors = static_cast<int>(ceil_div(rows_of(t), W));
        if (!s.tiles[t].started) start(s.tiles[t], vectors, p.dim, k_rows);
        attend(p, s.tiles[t], s, k_rows, v_columns, Regions(visible, first, vectors, rows.heads), vectors);
      }
    }
  }

  void attend_ruled(const HeadRules& rules) {
    const int block = ruled_keys(p.rules);
    const int64_t first = rows.begin, last = first + rows.queries - 1;
    for (int64_t key = rules.next_seen(first, last, 0); key < seq.keys; key = rules.next_seen(first, last, key)) {
      key = key / block * block;
      const int count = static_cast<int>(min_of<int64_t>(block, seq.keys - key));
      const Rows k_rows = k_block(key, count);
      const Columns v_columns = v_block(key, count);
      for (int t = 0; t < tiles(); t++)
        tilewise::attend_ruled(p, rules, {query_of(t), key, rows_of(t), count}, s.tiles[t], s, k_rows, v_columns);
      key += block;
    }
  }

  void store_tiles(int64_t first_seeing, float sink) const {
    const Strides statistics = statistics_strides(p);
    for (int t = 0; t < tiles(); t++) {
      const int first = t * kLanes, count = rows_of(t);
      finish(s.tiles[t], count, (first_seeing - query_of(t)) * rows.heads, sink, p.v_dim,
             rows.in<T>(p.out, p.out_strides, first, count), rows.in<float>(p.lse, statistics, first, count));
    }
  }
};

template <class T>
bool forward_task(const ForwardParams& p, const Runtime& rt, int64_t b, int64_t head, int64_t block) {
  const Sequence seq = sequence_of(p, b);
  const TaskRows rows(p, seq, head, block);
  if (rows.empty()) return true;
  float* memory = scratch<float>(rt, kTaskScratch, forward_scratch_floats(p));
  if (!memory) return false;
  const int64_t kv_head = head / (p.q_heads / p.kv_heads);
  ForwardTask<T> task = {p,
                         seq,
                         rows,
                         carve(p, memory),
                         row_of<const T>(p.k, p.k_strides, seq.batch, kv_head, seq.k_row),
                         row_of<const T>(p.v, p.v_strides, seq.batch, kv_head, seq.k_row)};
  task.load_tiles();
  if (causal_or_dense(p.rules)) {
    task.attend_all();
    task.store_tiles(-diagonal_of(p, seq), -kInfinity);
  } else {
    HeadRules rules(p, seq, head);
    rules.foresee(rows.begin, rows.begin + rows.queries - 1, kLanes, ruled_keys(p.rules));
    task.attend_ruled(rules);
    task.store_tiles(0, rules.sink());
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
