// Tiles of the backward: probabilities are recomputed from lse, block by block. With P and dP = dO V^T as tiles,
//   dS = scale * P * (dP - delta), delta = rowsum(dO * O);  dV += P^T dO;  dK += dS^T Q;  dQ += dS K.
#pragma once
#include "attention/cpu/forward.h"

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
  float* k_panels;            // of one block (pack_columns)
  float *dk, *dv;             // [key of the run][d], padded
};

inline int64_t backward_scratch_floats(const ForwardParams& p, int64_t keys) {
  const int64_t d = round_up(p.dim, 16), dv = round_up(p.v_dim, 16);
  return kBackwardTiles * (2 * d + dv + 4) * kLanes + 2 * kKeys * kLanes +
         (kBackwardQueries + kKeys + keys) * (d + dv) + kKeys * d + 1024;
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
  s.k_panels = carver.take(kKeys * d);
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

// One block of keys and one tile of queries, each as the products need them.
struct Meeting {
  Rows k, v;  // of the block
  Columns k_columns;
  Rows q, dout;      // of the tile
  float *dk, *dv;    // of the block
  int count, lanes;  // keys, queries
};

// Adds P and dS of regions, as they stand in s.p and s.ds, to the tile's dq and to the block's dk and dv.
template <class List>
void add_gradients(const ForwardParams& p, const BackwardTile& tile, const BackwardScratch& s, const Meeting& m,
                   const List& regions) {
  const int d = static_cast<int>(round_up(p.dim, W)), dv = static_cast<int>(round_up(p.v_dim, W));
  for (const Region& r : regions) {
    const int lane = r.vector * W, keys = r.end - r.begin, at = r.begin * kLanes + lane;
    const int lanes = min_of(r.vectors * W, m.lanes - lane);
    kAccumulate[r.vectors - 1](p.dim, r.begin, keys, m.k_columns, s.ds + at, tile.dq + lane);
    const Rows q = {m.q.data + lane * m.q.stride, m.q.stride},
               dout = {m.dout.data + lane * m.dout.stride, m.dout.stride};
    outer(keys, lanes, s.p + at, dout, m.dv + r.begin * dv, dv);
    outer(keys, lanes, s.ds + at, q, m.dk + r.begin * d, d);
  }
}

// Lane i sees key j of the block iff j <= first + i.
inline void differentiate(const ForwardParams& p, const BackwardTile& tile, const BackwardScratch& s, const Meeting& m,
                          int64_t first) {
  const Regions regions(m.count, first, static_cast<int>(ceil_div(m.lanes, W)));
  for (const Region& r : regions)
    kGradientRegion[r.vectors - 1][r.masked](r, p.dim, p.v_dim, m.k, m.v, tile, s.p, s.ds);
  add_gradients(p, tile, s, m, regions);
}

inline void differentiate_ruled(const ForwardParams& p, const HeadRules& rules, const Place& at,
                                const BackwardTile& tile, const BackwardScratch& s, const Meeting& m) {
  const RuledRegions regions(rules, p.rules, at);
  for (const Region& r : regions) {
    if (regions.plain) {
      kGradientRegion[r.vectors - 1][0](r, p.dim, p.v_dim, m.k, m.v, tile, s.p, s.ds);
      continue;
    }
    kProductRegion[r.vectors - 1](r, p.dim, m.k, tile.q, s.p);
    kProductRegion[r.vectors - 1](r, p.v_dim, m.v, tile.dout, s.ds);
    adjust_gradients(rules, r, at, {tile.lse, tile.lse_rest, tile.delta}, true, s.p, s.ds);
  }
  add_gradients(p, tile, s, m, regions);
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

// A tile of `count` queries from `row` of the sequence on; dout and delta times `scale`.
template <class T>
void load_tile(const BackwardParams& b, const Sequence& seq, const BackwardTile& tile, int64_t head, int64_t row,
               int count, float scale) {
  const ForwardParams& p = b.forward;
  const Strides statistics = statistics_strides(p);
  const int64_t at = seq.q_row + row;
  pack_tile(tile.q, row_of<const T>(p.q, p.q_strides, seq.batch, head, at), p.q_strides.row, count, p.dim,
            static_cast<float>(p.scale * kLog2e));
  pack_tile(tile.dout, row_of<const T>(b.dout, b.dout_strides, seq.batch, head, at), b.dout_strides.row, count, p.v_dim,
            scale);
  const float* lse = row_of<const float>(p.lse, statistics, seq.batch, head, at);
  const float* delta = row_of<const float>(b.delta, statistics, seq.batch, head, at);
  for (int i = 0; i < kLanes; i++) {
    // An infinite lse makes every probability zero: padding, and queries that see no key.
    const bool seen = i < count && lse[i] != -kInfinity;
    const double exact = double(lse[i < count ? i : 0]) * kLog2e;
    tile.lse[i] = seen ? static_cast<float>(exact) : kInfinity;
    tile.lse_rest[i] = seen ? static_cast<float>(exact - tile.lse[i]) : 0;
    tile.delta[i] = i < count ? delta[i] * scale : 0;
  }
}

}  // namespace
}  // namespace tilewise
