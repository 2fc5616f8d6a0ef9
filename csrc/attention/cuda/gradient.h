// What the backward kernels of all architectures share: the rows that they subtract from, and the tiles that they walk.
//
// With P = exp(S - lse), dP = dout V^T and dS = P (dP - delta):  dv = P^T dout,  dk = scale dS^T Q,  dq = scale dS K.
#pragma once
#include "attention/cuda/delta.h"
#include "attention/cuda/general.h"
#include "attention/cuda/mask.h"

namespace tilewise::attention {

// The exponent that P subtracts. A row that saw nothing has lse -inf and no gradient: +inf makes its P zero.
SIMT_DEVICE float exponent_base(float lse) {
  return lse == -INFINITY ? INFINITY : lse * kLog2e;
}

// What belongs to one query; those past the end have no weights.
struct QueryStats {
  float base, delta;
};
SIMT_DEVICE QueryStats query_stats(const BackwardParams& b, int64_t stats, int query, int q_len) {
  if (query >= q_len) return {INFINITY, 0.f};
  return {exponent_base(b.forward.lse[stats + query]), b.delta[stats + query]};
}

// Of a thread's rows: row 16 i + g + 8 h of the warp is rows [i][h], as in SoftmaxRows.
template <int M>
struct QueryRows {
  float base[M][2], delta[M][2];

  SIMT_DEVICE QueryRows(const BackwardParams& b, int64_t stats, int query, int q_len) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const QueryStats of = query_stats(b, stats, query + 16 * i + 8 * h + (lane_id() >> 2), q_len);
        base[i][h] = of.base;
        delta[i][h] = of.delta;
      }
  }
};

// The tiles of queries that a tile of keys walks: head by head, in each those between `begin` and `end` that may see a
// key of the tile.
template <int Queries, int Keys, class Mask>
struct QueryWalk {
  int head, first, begin, end, heads_end;

  // `mask` follows the head that the walk is at.
  SIMT_DEVICE QueryWalk(Mask& mask, int key, int first_head, int heads)
      : head(first_head),
        first(0),
        begin(mask.query_begin(key) / Queries * Queries),
        end(mask.query_end(key, key + Keys)),
        heads_end(first_head + heads) {
    first = begin - Queries;
    if (begin >= end)
      head = heads_end;
    else
      advance(mask, key);
  }
  SIMT_DEVICE bool done() const { return head >= heads_end; }
  SIMT_DEVICE void advance(Mask& mask, int key) {
    step();
    if constexpr (Mask::kGeneral)
      for (; !done(); step()) {
        mask.head = head;
        if (!mask.template blocked<Queries, Keys>(first, key)) return;
      }
  }

 private:
  SIMT_DEVICE void step() {
    first += Queries;
    if (first < end) return;
    first = begin;
    head++;
  }
};

template <int M>
SIMT_DEVICE void scale_accumulators(float (&acc)[M][4], float scale) {
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) acc[i][e] *= scale;
}

}  // namespace tilewise::attention
