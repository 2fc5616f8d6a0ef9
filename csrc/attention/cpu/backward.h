// Backward, run of keys by run of keys, over tiles of queries.
#pragma once
#include "attention/cpu/option_gradients.h"
#include "attention/cpu/runs.h"

namespace tilewise {
namespace {

template <class T>
struct BackwardTask {
  const BackwardParams& b;
  const ForwardParams& p;
  const KeyRun& run;
  const Sequence& seq;
  const BackwardScratch s;

  const T* rows(const void* base, const Strides& strides, int64_t head, int64_t row) const {
    return row_of<const T>(base, strides, seq.batch, head, row);
  }

  // Up to kBackwardQueries queries of a head, as rows.
  struct Queries {
    int64_t head;
    int begin, count;
    Rows q, dout;
    int tiles() const { return static_cast<int>(ceil_div(count, kLanes)); }
    int lanes(int t) const { return min_of(kLanes, count - t * kLanes); }
  };

  Queries load_queries(int64_t head, int begin) const {
    Queries g = {head, begin, min_of(kBackwardQueries, seq.queries - begin), {}, {}};
    for (int t = 0; t < g.tiles(); t++) {
      load_tile<T>(b, seq, s.tiles[t], head, begin + t * kLanes, g.lanes(t), p.scale);
      fill(s.tiles[t].dq, int64_t(p.dim) * kLanes, 0);
    }
    g.q = as_vectors(rows(p.q, p.q_strides, head, seq.q_row + begin), p.q_strides.row, g.count, p.dim, s.q_rows);
    g.dout = as_vectors(rows(b.dout, b.dout_strides, head, seq.q_row + begin), b.dout_strides.row, g.count, p.v_dim,
                        s.dout_rows);
    return g;
  }

  void store_queries(const Queries& g) const {
    float ones[kLanes];
    fill(ones, kLanes, 1);
    for (int t = 0; t < g.tiles(); t++) {
      const int64_t row = g.begin + t * kLanes;
      const float* dq = s.tiles[t].dq;
      if (run.partial)
        unpack_tile(run.partial_row(p, g.head, row), p.dim, dq, g.lanes(t), p.dim, ones);
      else
        unpack_tile(row_of<T>(b.dq, b.dq_strides, seq.batch, g.head, seq.q_row + row), b.dq_strides.row, dq, g.lanes(t),
                    p.dim, ones);
    }
  }

  // meet(t, meeting) for every tile of queries and the `count` keys from `key` of the run on.
  template <class F>
  void meet_tiles(const Queries& g, int64_t key, int count, const F& meet) const {
    const T* k = rows(p.k, p.k_strides, run.kv_head, seq.k_row + run.first_key + key);
    const T* v = rows(p.v, p.v_strides, run.kv_head, seq.k_row + run.first_key + key);
    const Rows k_rows = as_floats(k, p.k_strides.row, count, p.dim, s.k);
    const Rows v_rows = as_floats(v, p.v_strides.row, count, p.v_dim, s.v);
    const Columns k_columns = g.tiles() < kPackedTiles
                                  ? Columns{k_rows.data, k_rows.stride, count}
                                  : pack_columns(k_rows.data, k_rows.stride, count, p.dim, s.k_panels);
    for (int t = 0; t < g.tiles(); t++)
      meet(t, Meeting{k_rows,
                      v_rows,
                      k_columns,
                      {g.q.data + t * kLanes * g.q.stride, g.q.stride},
                      {g.dout.data + t * kLanes * g.dout.stride, g.dout.stride},
                      s.dk + key * round_up(p.dim, W),
                      s.dv + key * round_up(p.v_dim, W),
                      count,
                      g.lanes(t)});
  }

  void queries(int64_t head, int begin) const {
    const Queries g = load_queries(head, begin);
    const int64_t diagonal = diagonal_of(p, seq) - run.first_key;
    const int64_t end = min_of<int64_t>(run.keys, begin + g.count + diagonal);
    for (int64_t key = 0; key < end; key += kKeys)
      meet_tiles(g, key, static_cast<int>(min_of<int64_t>(kKeys, end - key)), [&](int t, Meeting m) {
        const int64_t first = begin + t * kLanes + diagonal - key;
        m.count = static_cast<int>(min_of<int64_t>(m.count, first + m.lanes));
        if (m.count > 0) differentiate(p, s.tiles[t], s, m, first);
      });
    store_queries(g);
  }

  void ruled_queries(int64_t head, int begin) const {
    const HeadRules rules(p, seq, head);
    const int64_t end = run.first_key + run.keys, last = min_of(begin + kBackwardQueries, seq.queries) - 1;
    const int block = ruled_keys(p.rules);
    int64_t key = rules.next_seen(begin, last, run.first_key);
    if (key >= end) return clear_queries(head, begin);
    const Queries g = load_queries(head, begin);
    for (; key < end; key = rules.next_seen(begin, last, key)) {
      key -= (key - run.first_key) % block;
      const int count = static_cast<int>(min_of<int64_t>(block, end - key));
      meet_tiles(g, key - run.first_key, count, [&](int t, const Meeting& m) {
        differentiate_ruled(p, rules, {begin + t * kLanes, key, m.lanes, count}, s.tiles[t], s, m);
      });
      key += block;
    }
    store_queries(g);
  }

  void clear_queries(int64_t head, int begin) const {
    for (int i = begin; i < min_of(begin + kBackwardQueries, seq.queries); i++) {
      T* dq = row_of<T>(b.dq, b.dq_strides, seq.batch, head, seq.q_row + i);
      float* partial = run.partial ? run.partial_row(p, head, i) : nullptr;
      for (int d = 0; d < p.dim; d++) partial ? void(partial[d] = 0) : void(dq[d] = from_float<T>(0));
    }
  }

  void operator()() const {
    const int d = static_cast<int>(round_up(p.dim, W)), dv = static_cast<int>(round_up(p.v_dim, W));
    fill(s.dk, int64_t(run.keys) * d, 0);
    fill(s.dv, int64_t(run.keys) * dv, 0);
    const int64_t group = p.q_heads / p.kv_heads, first_query = run.first_query(p) / kLanes * kLanes;
    const bool ruled = !causal_or_dense(p.rules);
    for (int64_t head = run.kv_head * group; head < (run.kv_head + 1) * group; head++)
      for (int64_t q = first_query; q < seq.queries; q += kBackwardQueries)
        ruled ? ruled_queries(head, static_cast<int>(q)) : queries(head, static_cast<int>(q));
    const int64_t at = seq.k_row + run.first_key;
    narrow_rows(row_of<T>(b.dk, b.dk_strides, seq.batch, run.kv_head, at), b.dk_strides.row, s.dk, d, run.keys, p.dim);
    narrow_rows(row_of<T>(b.dv, b.dv_strides, seq.batch, run.kv_head, at), b.dv_strides.row, s.dv, dv, run.keys,
                p.v_dim);
  }
};

template <class T>
bool backward_task(const BackwardParams& b, const Runtime& rt, const KeyRun& run) {
  const ForwardParams& p = b.forward;
  float* memory = scratch<float>(rt, kTaskScratch, backward_scratch_floats(p, run.keys));
  if (!memory) return false;
  BackwardTask<T>{b, p, run, run.seq, carve(p, run.keys, memory)}();
  return true;
}

template <class T>
const char* backward_typed(const BackwardParams& b, const Runtime& rt) {
  const Rules& rules = b.forward.rules;
  const int block = causal_or_dense(rules) ? kKeys : ruled_keys(rules);
  const char* failure = run_backward<T>(b, rt, split_keys(b.forward, block), false,
                                        [&](const KeyRun& run) { return backward_task<T>(b, rt, run); });
  return failure ? failure : option_gradients<T>(b, rt);
}

const char* backward(const BackwardParams& b, const Runtime& rt) {
  return for_type(b.forward.type, [&](auto type) { return backward_typed<decltype(type)>(b, rt); });
}

}  // namespace
}  // namespace tilewise
