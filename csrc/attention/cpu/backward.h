// Backward: probabilities are recomputed from lse, block by block. With P and dP = dO V^T as tiles,
//   dS = scale * P * (dP - delta), delta = rowsum(dO * O);  dV += P^T dO;  dK += dS^T Q;  dQ += dS K.
#pragma once
#include "attention/cpu/forward.h"
#include "attention/cpu/runs.h"

namespace tilewise {
namespace {

constexpr int kBackwardTiles = 4;  // tiles of queries that pass over the keys together
constexpr int kBackwardQueries = kBackwardTiles * kLanes;

struct BackwardTile {
  float *q, *dout, *dq;   // [d][lane], [dv][lane], [d][lane]; q scaled to base 2, dout by the scale
  float *lse, *lse_rest;  // [lane]: lse in base 2, and what its rounding lost
  float* delta;           // [lane], times the scale
};
struct BackwardScratch {
  BackwardTile tiles[kBackwardTiles];
  float *p, *ds;              // [key][lane] of one block
  float *q_rows, *dout_rows;  // [query][d] widened, padded to whole vectors
  float *k, *v;               // [key][d] of one block, widened
  float *dk, *dv;             // [key of the run][d], padded
};

inline int64_t backward_scratch_floats(const ForwardParams& p, int64_t keys) {
  const int64_t d = round_up(p.dim, 16), dv = round_up(p.v_dim, 16);
  return kBackwardTiles * (2 * d + dv + 4) * kLanes + 2 * kKeys * kLanes +
         (kBackwardQueries + kKeys + keys) * (d + dv) + 1024;
}

inline BackwardScratch carve(const ForwardParams& p, int64_t keys, float* memory) {
  const int64_t d = round_up(p.dim, W), dv = round_up(p.v_dim, W);
  Carver carver{memory};
  BackwardScratch s;
  for (BackwardTile& tile : s.tiles)
    tile = {carver.take(d * kLanes), carver.take(dv * kLanes), carver.take(d * kLanes),
            carver.take(kLanes),     carver.take(kLanes),      carver.take(kLanes)};
  s.p = carver.take(kKeys * kLanes);
  s.ds = carver.take(kKeys * kLanes);
  s.q_rows = carver.take(kBackwardQueries * d);
  s.dout_rows = carver.take(kBackwardQueries * dv);
  s.k = carver.take(kKeys * d);
  s.v = carver.take(kKeys * dv);
  s.dk = carver.take(keys * d);
  s.dv = carver.take(keys * dv);
  return s;
}

// P and dS of one region, for N vectors of lanes.
template <int N, bool kMasked>
void gradient_region(const Region& region, int dim, int v_dim, const Rows& k, const Rows& v, const BackwardTile& tile,
                     float* p_tile, float* ds_tile) {
  const int lane = region.vector * W;
  for_rows(region.end - region.begin, [&](auto block, int i) {
    constexpr int M = decltype(block)::value;
    const int key = region.begin + i;
    float* p = p_tile + key * kLanes + lane;
    float* ds = ds_tile + key * kLanes + lane;
    {
      VF acc[M][N] = {};
      multiply<Operand::by_row>(acc, dim, k.data + key * k.stride, k.stride, tile.q + lane, kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) {
          VF e = exp2(acc[m][v] - load(tile.lse + lane + v * W) - load(tile.lse_rest + lane + v * W));
          if (kMasked && v == 0) e = select(iota() >= set1i(key + m - region.diagonal), e, VF{});
          store(p + m * kLanes + v * W, e);
        }
      }
    }
    VF acc[M][N] = {};
    multiply<Operand::by_row>(acc, v_dim, v.data + key * v.stride, v.stride, tile.dout + lane, kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) {
        const int at = m * kLanes + v * W;
        store(ds + at, load(p + at) * (acc[m][v] - load(tile.delta + lane + v * W)));
      }
    }
  });
}

using GradientRegion = void (*)(const Region&, int, int, const Rows&, const Rows&, const BackwardTile&, float*, float*);
constexpr GradientRegion kGradientRegion[][2] = {
    {gradient_region<1, false>, gradient_region<1, true>},
    {gradient_region<2, false>, gradient_region<2, true>},
    {gradient_region<3, false>, gradient_region<3, true>},
#if defined(__AVX512F__)
    {gradient_region<4, false>, gradient_region<4, true>},
#endif
};

// c[key][d] += sum over `lanes` of a[key][lane] * b[lane][d], for N vectors along d; b and c have rows of `padded`.
template <int N>
void outer_strip(int keys, int lanes, const float* a, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  for_rows(keys, [&](auto block, int j) {
    VF acc[decltype(block)::value][N] = {};
    multiply<Operand::by_row>(acc, lanes, a + j * kLanes, kLanes, b, b_stride);
    add_block(acc, c + j * c_stride, c_stride);
  });
}

using OuterStrip = void (*)(int, int, const float*, const float*, int64_t, float*, int64_t);
constexpr OuterStrip kOuterStrip[] = {outer_strip<1>, outer_strip<2>, outer_strip<3>,
#if defined(__AVX512F__)
                                      outer_strip<4>
#endif
};

inline void outer(int keys, int lanes, const float* a, const Rows& b, float* c, int padded) {
  for (int d = 0; d < padded; d += kLanes) {
    const int vectors = min_of(kVectors, (padded - d) / W);
    kOuterStrip[vectors - 1](keys, lanes, a, b.data + d, b.stride, c + d, padded);
  }
}

// One block of keys against one tile of `lanes` queries: adds to the tile's dq and to the block's dk and dv.
inline void differentiate(const ForwardParams& p, const BackwardTile& tile, const BackwardScratch& s, const Rows& k,
                          const Rows& v, const Rows& q, const Rows& dout, float* dk, float* dv, int count,
                          int64_t first, int lanes) {
  const int vectors = static_cast<int>(ceil_div(lanes, W));
  const Regions regions(count, first, vectors);
  for (const Region& r : regions)
    kGradientRegion[vectors - r.vector - 1][r.masked](r, p.dim, p.v_dim, k, v, tile, s.p, s.ds);
  const int d = static_cast<int>(round_up(p.dim, W)), dv_padded = static_cast<int>(round_up(p.v_dim, W));
  for (const Region& r : regions) {
    const int lane = r.vector * W, keys = r.end - r.begin, at = r.begin * kLanes + lane;
    kAccumulate[vectors - r.vector - 1](p.dim, keys, k.data + r.begin * k.stride, k.stride, s.ds + at, tile.dq + lane);
    const Rows q_seen = {q.data + lane * q.stride, q.stride}, dout_seen = {dout.data + lane * dout.stride, dout.stride};
    outer(keys, lanes - lane, s.p + at, dout_seen, dv + r.begin * dv_padded, dv_padded);
    outer(keys, lanes - lane, s.ds + at, q_seen, dk + r.begin * d, d);
  }
}

// Rows that are read as whole vectors: in place only if they are floats and need no padding.
template <class T>
TILEWISE_INLINE Rows as_vectors(const T* rows, int64_t stride, int count, int dim, float* space) {
  if constexpr (sizeof(T) == 4)
    if (dim % W == 0) return {rows, stride};
  const int padded = static_cast<int>(round_up(dim, W));
  widen_rows(space, padded, rows, stride, count, dim);
  return {space, padded};
}

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

  void load_tile(const BackwardTile& tile, int64_t head, int row, int count) const {
    const Strides statistics = statistics_strides(p);
    const int64_t at = seq.q_row + row;
    pack_tile(tile.q, rows(p.q, p.q_strides, head, at), p.q_strides.row, count, p.dim,
              static_cast<float>(p.scale * kLog2e));
    pack_tile(tile.dout, rows(b.dout, b.dout_strides, head, at), b.dout_strides.row, count, p.v_dim, p.scale);
    const float* lse = row_of<const float>(p.lse, statistics, seq.batch, head, at);
    const float* delta = row_of<const float>(b.delta, statistics, seq.batch, head, at);
    for (int i = 0; i < kLanes; i++) {
      // An infinite lse makes every probability zero: padding, and queries that see no key.
      const bool seen = i < count && lse[i] != -kInfinity;
      const double exact = double(lse[i < count ? i : 0]) * kLog2e;
      tile.lse[i] = seen ? static_cast<float>(exact) : kInfinity;
      tile.lse_rest[i] = seen ? static_cast<float>(exact - tile.lse[i]) : 0;
      tile.delta[i] = i < count ? delta[i] * p.scale : 0;
    }
    fill(tile.dq, int64_t(p.dim) * kLanes, 0);
  }

  void store_tile(const BackwardTile& tile, int64_t head, int row, int count) const {
    float ones[kLanes];
    fill(ones, kLanes, 1);
    const int64_t at = seq.q_row + row;
    if (run.partial) {
      unpack_tile(run.partial_row(p, head, row), p.dim, tile.dq, count, p.dim, ones);
    } else {
      unpack_tile(row_of<T>(b.dq, b.dq_strides, seq.batch, head, at), b.dq_strides.row, tile.dq, count, p.dim, ones);
    }
  }

  // The keys of this run against up to kBackwardQueries queries from `begin` on.
  void queries(int64_t head, int begin) const {
    const int count = min_of(kBackwardQueries, seq.queries - begin), tiles = static_cast<int>(ceil_div(count, kLanes));
    const int64_t diagonal = diagonal_of(p, seq) - run.first_key;
    auto lanes_of = [&](int t) { return min_of(kLanes, count - t * kLanes); };
    for (int t = 0; t < tiles; t++) load_tile(s.tiles[t], head, begin + t * kLanes, lanes_of(t));
    const Rows q = as_vectors(rows(p.q, p.q_strides, head, seq.q_row + begin), p.q_strides.row, count, p.dim, s.q_rows);
    const Rows dout = as_vectors(rows(b.dout, b.dout_strides, head, seq.q_row + begin), b.dout_strides.row, count,
                                 p.v_dim, s.dout_rows);
    const T* k = rows(p.k, p.k_strides, run.kv_head, seq.k_row + run.first_key);
    const T* v = rows(p.v, p.v_strides, run.kv_head, seq.k_row + run.first_key);
    const int64_t end = min_of<int64_t>(run.keys, begin + count + diagonal);
    for (int64_t key = 0; key < end; key += kKeys) {
      const int block = static_cast<int>(min_of<int64_t>(kKeys, end - key));
      const Rows k_rows = as_floats(k + key * p.k_strides.row, p.k_strides.row, block, p.dim, s.k);
      const Rows v_rows = as_floats(v + key * p.v_strides.row, p.v_strides.row, block, p.v_dim, s.v);
      for (int t = 0; t < tiles; t++) {
        const int64_t first = begin + t * kLanes + diagonal - key;
        const int visible = static_cast<int>(min_of<int64_t>(block, first + lanes_of(t)));
        if (visible <= 0) continue;
        const Rows q_tile = {q.data + t * kLanes * q.stride, q.stride};
        const Rows dout_tile = {dout.data + t * kLanes * dout.stride, dout.stride};
        differentiate(p, s.tiles[t], s, k_rows, v_rows, q_tile, dout_tile, s.dk + key * round_up(p.dim, W),
                      s.dv + key * round_up(p.v_dim, W), visible, first, lanes_of(t));
      }
    }
    for (int t = 0; t < tiles; t++) store_tile(s.tiles[t], head, begin + t * kLanes, lanes_of(t));
  }

  void operator()() const {
    const int d = static_cast<int>(round_up(p.dim, W)), dv = static_cast<int>(round_up(p.v_dim, W));
    fill(s.dk, int64_t(run.keys) * d, 0);
    fill(s.dv, int64_t(run.keys) * dv, 0);
    const int64_t group = p.q_heads / p.kv_heads, first_query = run.first_query(p) / kLanes * kLanes;
    for (int64_t head = run.kv_head * group; head < (run.kv_head + 1) * group; head++)
      for (int64_t q = first_query; q < seq.queries; q += kBackwardQueries) queries(head, static_cast<int>(q));
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
  return run_backward<T>(b, rt, split_keys(b.forward, kKeys), false,
                         [&](const KeyRun& run) { return backward_task<T>(b, rt, run); });
}

const char* backward(const BackwardParams& b, const Runtime& rt) {
  return for_type(b.forward.type, [&](auto type) { return backward_typed<decltype(type)>(b, rt); });
}

}  // namespace
}  // namespace tilewise
