// Forward on AMX tiles: rows are queries, so that scores, weights and outputs stand as the tile unit leaves them, and
// statistics are per row. Keys and values of a block are packed once for all queries of a task.
#pragma once
#include "attention/cpu/amx_rules.h"
#include "attention/cpu/forward.h"
#include "common/tile_attention.h"
#include "common/tile_overlap.h"

namespace tilewise {
namespace {

constexpr int kTileQueries = 2 * kTileRows;
constexpr int kTaskTiles = kTaskQueries / kTileQueries;
// The backward, and in float32 the forward, is left to vectors below this: in parts of float32 fewer queries do not pay
// for packing the keys, and both passes have to agree about the bits of scores. Judged by sequence, so that packed
// sequences give the bits of separate ones.
constexpr int kMinTileQueries = 16;

// What a task's tiles see of a block: row i of the task sees the keys below first + i / heads.
struct BlockPlan {
  int64_t first;
  int size, heads, count;  // rows, and those that see the same; keys

  int rows(int t) const { return min_of(kTileQueries, size - t * kTileQueries); }
  int keys(int t) const {
    return static_cast<int>(min_of<int64_t>(count, first + (t * kTileQueries + rows(t) - 1) / heads));
  }
  void meanwhile() const {}
  template <class F>
  void see(int t, const F& f) const {
    if (first + t * kTileQueries / heads >= count && count % kTileDepth == 0)
      f(SeesAll());
    else if (heads == 1)
      f(SeesUpTo{first + t * kTileQueries, count});
    else
      f(SeesInSteps{first, count, heads, t * kTileQueries});
  }
};

// The same under rules: rows from `row`, keys from `key` of the sequence on.
struct RuledPlan {
  const HeadRules& rules;
  int64_t row, key;
  int queries, count;
  int32_t* kept;  // [kKeptWords]
  Sight sights[kTaskTiles];

  RuledPlan(const HeadRules& rules, int64_t row, int64_t key, int queries, int count, int32_t* kept)
      : rules(rules), row(row), key(key), queries(queries), count(count), kept(kept) {
    for (int t = 0; t * kTileQueries < queries; t++) {
      const int64_t first = row + t * kTileQueries;
      sights[t] = rules.over(first, first + rows(t) - 1, key, key + count);
    }
  }

  int rows(int t) const { return min_of(kTileQueries, queries - t * kTileQueries); }
  int keys(int t) const { return sights[t] == Sight::none ? 0 : count; }
  void meanwhile() const {}
  template <class F>
  void see(int t, const F& f) const {
    const bool masked = sights[t] != Sight::all || rules.adds() || count % kTileDepth != 0;
    if (!masked && !rules.changes_scores() && !rules.drops()) return f(SeesAll());
    const int64_t first = row + t * kTileQueries;
    const bool whole = count % kTileDepth == 0;
    if (whole && sights[t] == Sight::all && rules.plainly_biased() && !rules.drops())
      return rules.with_bias(first, key,
                             [&](const auto* from) { f(Biased{from, rules.bias_stride(), rules.ahead(first)}); });
    if (whole && rules.only_masks()) return f(Masked{rules.mask_row(first) + key / 32, rules.mask_stride()});
    if (rules.drops())
      for (int j = 0; j < count; j += 32) kept_bits(rules, first, key + j, kept + j / 32 * kKeptRows);
    f(Ruled{rules, first, key, masked, kept});
  }
};

// A softcap makes weights alike, and torch's error in float32 small: the products of three parts missed the accuracy
// bound by 4 % in two of seven draws. Such calls stay with the vectors, which keep it.
template <class T>
bool too_alike(const ForwardParams& p) {
  return kParts<T> == 3 && p.rules.softcap > 0;
}

template <class T, class Operands>
struct ForwardTilesTask {
  const ForwardParams& p;
  const Sequence& seq;
  const TaskRows& rows;
  using Overlapped = OverlappedAttention<Bf16>;
  TileAttention<T, Operands> attention;
  Overlapped overlapped;
  AttentionRows states[kTaskTiles];

  ForwardTilesTask(const ForwardParams& p, const TaskRows& rows)
      : p(p),
        seq(rows.seq),
        rows(rows),
        attention(p.dim, p.v_dim, static_cast<float>(p.scale * kLog2e), rows.count(),
                  p.rules.blocks ? p.rules.block_k : kTileDepth),
        overlapped(p.dim, p.v_dim, static_cast<float>(p.scale * kLog2e)) {}

  // Two tiles have too little to put beside each other.
  bool overlaps() const {
    return kParts<T> == 1 && causal_or_dense(p.rules) && tiles() > 2 && Overlapped::serves(p.dim, p.v_dim);
  }
  int tiles() const { return static_cast<int>(ceil_div(rows.count(), kTileQueries)); }
  int rows_of(int t) const { return min_of(kTileQueries, rows.count() - t * kTileQueries); }
  int64_t query_size() const { return attention.query_size(kTileQueries); }  // of one tile, as the next
  int64_t state_size() const { return kTileQueries * (attention.columns() + W + 1); }
  int64_t block_bytes() const { return overlaps() ? overlapped.bytes(tiles()) : attention.bytes(tiles()); }
  int64_t bytes() const {
    return block_bytes() + tiles() * (query_size() * sizeof(Packed) + state_size() * sizeof(float));
  }

  auto keys_from(const void* base, const Strides& strides, int64_t key) const {
    const int64_t kv_head = rows.head / (p.q_heads / p.kv_heads);
    const T* row = row_of<const T>(base, strides, seq.batch, kv_head, seq.k_row + key);
    return [row, step = strides.row](int64_t i) { return row + i * step; };
  }

  void load_tiles(char* memory) {
    overlaps() ? overlapped.use(memory) : attention.use(memory);
    Packed* packed = reinterpret_cast<Packed*>(memory + block_bytes());
    float* state = reinterpret_cast<float*>(packed + tiles() * query_size());
    fill(state, tiles() * state_size(), 0);
    for (int t = 0; t < tiles(); t++, state += state_size(), packed += query_size()) {
      float *out = state, *sums = out + kTileQueries * attention.columns();
      states[t] = {packed, out, sums, sums + kTileQueries * W, false};
      attention.pack_queries(packed, rows.in<const T>(p.q, p.q_strides, t * kTileQueries, rows_of(t)), rows_of(t),
                             kTileQueries);
    }
  }

  template <class Plan>
  void attend(int64_t key, int count, const Plan& plan) {
    attention.add_block(states, tiles(), keys_from(p.k, p.k_strides, key), keys_from(p.v, p.v_strides, key), count,
                        plan);
  }
  void attend(int64_t key, int count, const BlockPlan& plan) {
    const auto k = keys_from(p.k, p.k_strides, key), v = keys_from(p.v, p.v_strides, key);
    if constexpr (kParts<T> == 1)
      if (overlaps()) return overlapped.add_block(states, tiles(), k, v, count, plan);
    attention.add_block(states, tiles(), k, v, count, plan);
  }

  void attend_all() {
    const int64_t diagonal = diagonal_of(p, seq);
    const int64_t end = max_of<int64_t>(0, min_of<int64_t>(seq.keys, rows.begin + rows.queries + diagonal));
    for (int64_t key = 0; key < end; key += attention.keys()) {
      const int count = static_cast<int>(min_of<int64_t>(attention.keys(), end - key));
      attend(key, count, BlockPlan{rows.begin + diagonal - key + 1, rows.count(), rows.heads, count});
    }
  }

  void attend_ruled(const HeadRules& rules) {
    int32_t kept[kKeptWords];
    const int64_t first = rows.begin, last = first + rows.queries - 1, block = attention.keys();
    for (int64_t key = 0; (key = rules.next_seen(first, last, key)) < seq.keys; key += block) {
      key = key / block * block;
      const int count = static_cast<int>(min_of<int64_t>(block, seq.keys - key));
      attend(key, count, RuledPlan(rules, first, key, rows.queries, count, kept));
    }
  }

  bool finite() const {
    for (int t = 0; t < tiles(); t++)
      if (!attention.finite(states[t], rows_of(t))) return false;
    return true;
  }

  void store_tiles(float sink) const {
    const Strides statistics = statistics_strides(p);
    for (int t = 0; t < tiles(); t++) {
      const int first = t * kTileQueries, count = rows_of(t);
      const auto lse = rows.in<float>(p.lse, statistics, first, count);
      attention.finish(
          states[t], count, rows.in<T>(p.out, p.out_strides, first, count),
          [&](int i, float value) { *lse(i) = value; }, sink);
    }
  }
};

template <class T, class Operands>
bool forward_tiles_task(const ForwardParams& p, const Runtime& rt, int64_t b, int64_t head, int64_t block) {
  const Sequence seq = sequence_of(p, b);
  const TaskRows rows(p, seq, head, block);
  if (rows.empty()) return true;
  if (kParts<T> == 3 && (seq.queries < kMinTileQueries || too_alike<T>(p)))
    return forward_task<T>(p, rt, b, head, block);
  ForwardTilesTask<T, Operands> task(p, rows);
  char* memory = scratch<char>(rt, kTaskScratch, task.bytes());
  if (!memory) return false;
  task.load_tiles(memory);
  const TileScope scope;
  HeadRules rules(p, seq, head);
  rules.foresee(rows.begin, rows.begin + rows.queries - 1, kTileQueries, task.attention.keys());
  causal_or_dense(p.rules) ? task.attend_all() : task.attend_ruled(rules);
  if (!task.finite()) return forward_task<T>(p, rt, b, head, block);
  task.store_tiles(rules.sink());
  return true;
}

// f(an element, its operands).
template <class F>
const char* with_operands(Type type, const Runtime& rt, const F& f) {
  if (type == Type::f16 && rt.fp16_tiles) return f(Fp16(), NativeFp16Operands());
  return for_type(type, [&](auto element) { return f(element, Bf16Operands<decltype(element)>()); });
}

const char* forward_on_tiles(const ForwardParams& p, const Runtime& rt) {
  return with_operands(p.type, rt, [&](auto element, auto operands) {
    return for_query_blocks(p, rt, [&](int64_t b, int64_t head, int64_t block) {
      return forward_tiles_task<decltype(element), decltype(operands)>(p, rt, b, head, block);
    });
  });
}

}  // namespace
}  // namespace tilewise
