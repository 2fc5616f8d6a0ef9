// Attention over a paged cache on the tensor cores (sm_80 mma.sync), in the manner of flash decoding: the tokens and
// heads that share a key head are the rows of one tile, so K and V are read once for all of them; blocks share out the
// keys, and MergeSplits (rows.h) joins their results. Key tiles are gathered through the block table with cp.async, one
// ahead of the tile that is multiplied.
//
// The four warps of a block either have 16 rows each and read all keys of a tile, or share one tile of rows and have a
// quarter of the keys each: a warp then waits for nobody until the four results are joined at the end.
//
// What a token sees is a policy:
//   Params, kWords                      kernel parameters; 32-bit words of shared memory for a row
//   Visibility(params, b, first, last, fault)   of tokens first to last; a warp makes it together
//   first, end                          nobody sees a key outside
//   full(key, count)                    all see all of these
//   load_word(params, b, token, w)      of a row's shared memory
//   row(token, words) -> Row            row.sees(key), row.blind(): it sees nothing, also no key that is seen by all
// What pages hold is another (NumberPages in numbers.h, CodePages in codes.h, WidenedPages in widened.h):
//   kItem                               bytes of an element, in which strides count
//   kKeyWarps                           warps that share out the keys of a tile: 1 or 4
//   kParts                              1: a warp's 16 rows of mma are 16 rows of queries; 2: they are 8, and the same
//                                       8 rows' second parts: what rounding the first to bf16 has lost
//   kMinBlocks                          blocks that the registers of a multiprocessor must hold
//   Stage                               a tile of keys and values in shared memory, as it was copied
//   Shared                              stages[2], of which one is multiplied; or stages[1] and the `tile` into which
//                                       widen(tile, stage) turns it, by all threads of a block, to be multiplied
//   copy(stage, first, k, v, k_row, v_row)      starts to copy 16 keys and values; a lane knows the rows of one
//   Queries, start_queries(), Queries(...)      a warp's rows as operands of mma
//   scores(x, queries, tile, first, scale)      scaled scores in units of log2, of keys from `first` on
//   Output                              accumulators: rescale(h, factor), add(x, tile, first), store(row, rows)
#pragma once
#include "common/paged/cuda/pages.h"

namespace tilewise::paged {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

template <class Params>
struct Args {
  Params p;
  uint32_t* fault;
};

// Where one block's or warp's result goes: the output itself, or its share of the workspace.
SIMT_DEVICE int64_t workspace_row(const AttentionParams& p, int b, int token, int head) {
  return ((int64_t)b * p.tokens + token) * p.q_heads + head;
}
SIMT_DEVICE float* partial_out(const AttentionParams& p, int split, int64_t row) {
  const int64_t rows = (int64_t)p.batch * p.tokens * p.q_heads;
  return p.workspace + (split * rows + row) * p.dim;
}
SIMT_DEVICE float* partial_lse(const AttentionParams& p, int split, int64_t row) {
  const int64_t rows = (int64_t)p.batch * p.tokens * p.q_heads;
  return p.workspace + p.splits * rows * p.dim + split * rows + row;
}
SIMT_DEVICE int64_t offset(const TokenStrides& s, int b, int token, int head) {
  return b * s.batch + token * s.token + head * s.head;
}

// limit * tanh(x / limit) for scores in powers of two: by exp2, and by a polynomial where that cancels.
SIMT_DEVICE float softcap(float x, float limit) {
  const float y = x / limit, y2 = y * y;
  const float bounded = fminf(fmaxf(y, -20.f), 20.f);
  const float far = 1.f - 2.f / (1.f + exp2_approx(bounded * (2.f * kLog2e)));
  float near = -5.70498872745e-3f;
  near = near * y2 + 2.06390887954e-2f;
  near = near * y2 - 5.37397155531e-2f;
  near = near * y2 + 1.33314422036e-1f;
  near = near * y2 - 3.33332819422e-1f;
  near = y + y * y2 * near;
  return y == y ? limit * (fabsf(y) < 0.625f ? near : far) : y;
}

// Two tiles: one is multiplied as it stands while the other is copied.
template <class Stage>
struct TwoStages {
  Stage stages[2];
};

constexpr int kTileThreads = 128, kTileWarps = kTileThreads / kWarp;
constexpr int kTileKeys = 64, kGathered = kTileKeys / kTileWarps;  // keys of a tile; those that one warp copies

// What a block works on: rows of (token, head of the group), and a range of keys.
struct PagedTile {
  int b, kv_head, group, first_row, rows, split;
  int first_tile, tiles;  // of keys

  SIMT_DEVICE int token(int r) const { return (first_row + r) / group; }
  SIMT_DEVICE int head(int r) const { return kv_head * group + (first_row + r) % group; }
  SIMT_DEVICE int64_t offset_of(const TokenStrides& s, int r) const { return offset(s, b, token(r), head(r)); }
};

template <class T, int D, class Visibility, class Pages>
struct PagedAttention {
  static constexpr int kThreads = kTileThreads, kMinArch = 800, kMinBlocks = Pages::kMinBlocks;
  static constexpr int kKeys = kTileKeys, kKeyWarps = Pages::kKeyWarps;
  static constexpr int kWarpKeys = kKeys / kKeyWarps, kOwnRows = 2 / Pages::kParts;  // of a warp; of a thread
  static constexpr int kWarpRows = 8 * kOwnRows, kRows = kTileWarps / kKeyWarps * kWarpRows;
  static_assert(kKeyWarps == 1 || kKeyWarps == kTileWarps, "a warp reads what all copied, or what itself did");
  using Params = Args<typename Visibility::Params>;
  using Stage = typename Pages::Stage;
  using Shared = typename Pages::Shared;
  static constexpr int kStages = sizeof(Shared::stages) / sizeof(typename Pages::Stage);
  using Queries = typename Pages::Queries;
  using Output = typename Pages::Output;
  using Scores = float[kWarpKeys / 8][4];

  // What the warps that share out the keys found for each row. The pitch spreads the rows of a warp over the banks.
  struct Partial {
    alignas(16) float out[kKeyWarps][kRows][D + 8];
    float top[kKeyWarps][kRows], sum[kKeyWarps][kRows];
  };
  struct Smem {
    union {
      Shared pages;
      Partial partial;
    };
    uint32_t words[kRows][Visibility::kWords ? Visibility::kWords : 1];
  };
  struct Running {
    float top[kOwnRows], sum[kOwnRows];  // per row: largest score (base 2), this thread's share of the sum of weights
  };

  SIMT_DEVICE static int warp_row() { return warp_id() / kKeyWarps * kWarpRows; }
  SIMT_DEVICE static int own_row(int h) { return warp_row() + lane_id() / 4 + h * 8; }
  SIMT_DEVICE static int warp_key() { return warp_id() % kKeyWarps * kWarpKeys; }

  SIMT_DEVICE static PagedTile find_tile(const AttentionParams& p) {
    PagedTile t;
    t.b = (int)block_idx().z / p.kv_heads;
    t.kv_head = (int)block_idx().z % p.kv_heads;
    t.group = p.q_heads / p.kv_heads;
    t.first_row = (int)block_idx().x * kRows;
    t.rows = p.tokens * t.group - t.first_row < kRows ? p.tokens * t.group - t.first_row : kRows;
    t.split = (int)block_idx().y;
    return t;
  }

  // Shares out the tiles of keys, which start at multiples of kKeys.
  SIMT_DEVICE static void find_keys(const AttentionParams& p, const Visibility& visible, PagedTile& t) {
    const int begin = visible.first / kKeys,
              all = visible.end > visible.first ? ceil_div(visible.end, kKeys) - begin : 0;
    const int share = ceil_div(all, p.splits), from = t.split * share;
    t.first_tile = begin + from;
    t.tiles = all - from < share ? all - from : share;
  }

  // Each warp gathers 16 keys: a lane looks one of them up, and hands its address to the lanes that copy it.
  SIMT_DEVICE static void load_keys(const Params& a, const PagedTile& t, const Visibility& visible, int tile,
                                    Stage& stage) {
    const AttentionParams& p = a.p;
    const int first = warp_id() * kGathered, key = tile * kKeys + first + lane_id() % kGathered;
    const bool wanted = key >= visible.first && key < visible.end;
    const Place place = wanted ? place_of(p.table, t.b, key, a.fault) : Place{-1, 0};
    const int64_t k_row = place.page < 0 ? -1 : place.offset(p.k_strides) * Pages::kItem;
    const int64_t v_row = place.page < 0 ? -1 : place.offset(p.v_strides) * Pages::kItem;
    const char* k_head = static_cast<const char*>(p.k_pages) + t.kv_head * p.k_strides.head * Pages::kItem;
    const char* v_head = static_cast<const char*>(p.v_pages) + t.kv_head * p.v_strides.head * Pages::kItem;
    Pages::copy(stage, first, k_head, v_head, k_row, v_row);
    cp_async_commit();
  }

  SIMT_DEVICE static void load_words(const Params& a, const PagedTile& t, Smem& s) {
    constexpr int kWords = Visibility::kWords;
    if constexpr (kWords > 0)
      for (int i = thread_id(); i < kRows * kWords; i += kThreads) {
        const int r = i / kWords, w = i % kWords;
        s.words[r][w] = r < t.rows ? Visibility::load_word(a.p, t.b, t.token(r), w) : 0;
      }
  }

  // Those who copy keys for each other.
  SIMT_DEVICE static void sync_copies() {
    if constexpr (kKeyWarps == 1)
      sync_block();
    else
      sync_warp();
  }

  // Tile j as it is multiplied, while the next one is copied.
  SIMT_DEVICE static const auto& next_tile(const Params& a, const PagedTile& t, const Visibility& visible, int j,
                                           Shared& s) {
    const bool more = j + 1 < t.tiles;
    if constexpr (kStages == 1) {
      cp_async_wait<0>();
      sync_block();  // all has arrived, and everyone has multiplied the tile before
      Pages::widen(s.tile, s.stages[0]);
      sync_block();  // everyone has read the stage
      if (more) load_keys(a, t, visible, t.first_tile + j + 1, s.stages[0]);
      return s.tile;
    } else {
      sync_copies();  // everyone has read the stage that is filled next
      if (more)
        load_keys(a, t, visible, t.first_tile + j + 1, s.stages[(j + 1) & 1]);
      else
        cp_async_commit();
      cp_async_wait<1>();
      sync_copies();
      return s.stages[j & 1];
    }
  }

  // Hides what a row must not see, and turns scores into weights relative to the row's new maximum.
  SIMT_DEVICE static void weights(Scores& x, Output& out, Running& run, const PagedTile& t, const Visibility& visible,
                                  int first_key, float limit, const Smem& s) {
    const int lane = lane_id();
    const bool masked = !visible.full(first_key, kWarpKeys);
#pragma unroll
    for (int h = 0; h < kOwnRows; h++) {
      const int r = own_row(h);
      const auto row = visible.row(t.token(r), s.words[r]);
      float top = run.top[h];
#pragma unroll
      for (int n = 0; n < kWarpKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = x[n][2 * h + e];
          if (limit != 0.f) score = softcap(score, limit);
          if (masked && !row.sees(first_key + n * 8 + lane % 4 * 2 + e)) score = -INFINITY;
          top = fmaxf(top, score);
        }
      top = fmaxf(top, shfl_xor(top, 1));
      top = fmaxf(top, shfl_xor(top, 2));
      const float base = top == -INFINITY ? 0.f : top, shrink = exp2_approx(run.top[h] - base);
      run.top[h] = top;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kWarpKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = x[n][2 * h + e];
          score = exp2_approx(score - base);
          sum += score;
        }
      run.sum[h] = run.sum[h] * shrink + sum;
      out.rescale(h, shrink);
    }
  }

  SIMT_DEVICE static void run(const Params& a, Smem& s) {
    const AttentionParams& p = a.p;
    PagedTile t = find_tile(p);
    const Visibility visible(a.p, t.b, t.token(0), t.token(t.rows - 1), a.fault);
    find_keys(p, visible, t);
    Output out;
    Running running;
#pragma unroll
    for (int h = 0; h < kOwnRows; h++) running.top[h] = -INFINITY, running.sum[h] = 0.f;
    const bool active = warp_row() < t.rows;  // a warp without rows only helps to load
    load_words(a, t, s);
    if (t.tiles > 0) {
      Pages::template start_queries<kRows>(p, t, s.pages);
      load_keys(a, t, visible, t.first_tile, s.pages.stages[0]);
      cp_async_wait<0>();
    }
    sync_block();
    if (t.tiles > 0) attend(a, t, visible, active, out, running, s);
    sync_block();
    if (active) save(out, running, s.partial);
    sync_block();
    store(p, t, visible, s);
  }

  SIMT_DEVICE static void attend(const Params& a, const PagedTile& t, const Visibility& visible, bool active,
                                 Output& out, Running& running, Smem& s) {
    const AttentionParams& p = a.p;
    const float scale = p.scale * kLog2e, limit = p.softcap * kLog2e;
    const Queries q(p, t, s.pages, warp_row());
    sync_block();  // the queries have been read where keys come to stand
    for (int j = 0; j < t.tiles; j++) {
      const auto& tile = next_tile(a, t, visible, j, s.pages);
      if (!active) continue;
      Scores x = {};
      Pages::scores(x, q, tile, warp_key(), scale);
      weights(x, out, running, t, visible, (t.first_tile + j) * kKeys + warp_key(), limit, s);
      out.add(x, tile, warp_key());
    }
  }

  SIMT_DEVICE static void save(Output& out, const Running& running, Partial& to) {
    const int by = warp_id() % kKeyWarps;
    out.store(to.out[by], warp_row());
#pragma unroll
    for (int h = 0; h < kOwnRows; h++) {
      float sum = running.sum[h];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      if (lane_id() % 4 != 0) continue;
      to.top[by][own_row(h)] = running.top[h];
      to.sum[by][own_row(h)] = sum;
    }
  }

  // Joins what the warps found; a thread has eight channels of a row at a time.
  SIMT_DEVICE static void store(const AttentionParams& p, const PagedTile& t, const Visibility& visible,
                                const Smem& s) {
    for (int i = thread_id(); i < t.rows * (D / 8); i += kThreads) {
      const int r = i / (D / 8), c = i % (D / 8);
      float top = -INFINITY, total = 0.f, x[8] = {};
#pragma unroll
      for (int w = 0; w < kKeyWarps; w++) top = fmaxf(top, s.partial.top[w][r]);
      const float base = top == -INFINITY ? 0.f : top;
#pragma unroll
      for (int w = 0; w < kKeyWarps; w++) {
        const float weight = exp2_approx(s.partial.top[w][r] - base);
        total += weight * s.partial.sum[w][r];
        add8(x, weight, &s.partial.out[w][r][c * 8]);
      }
      const bool none = visible.row(t.token(r), s.words[r]).blind() || total == 0.f;
      const float lse = none ? -INFINITY : (base + log2_approx(total)) * kLn2, inverse = 1.f / total;
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const float factor = p.v_channels ? inverse * p.v_channels[t.kv_head * D + c * 8 + e] : inverse;
        x[e] = none ? 0.f : x[e] * factor;
      }
      if (p.splits > 1) {
        const int64_t row = workspace_row(p, t.b, t.token(r), t.head(r));
        store8_floats(partial_out(p, t.split, row) + c * 8, x);
        if (c == 0) *partial_lse(p, t.split, row) = lse;
      } else {
        const uint4 packed = {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])};
        store16(static_cast<T*>(p.out) + t.offset_of(p.out_strides, r) + c * 8, packed);
        if (c == 0) p.lse[t.offset_of(p.lse_strides, r)] = lse;
      }
    }
  }
  SIMT_DEVICE static void add8(float (&x)[8], float weight, const float* from) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 four = load16(from + 4 * half);
      x[4 * half] += weight * bits_f32(four.x), x[4 * half + 1] += weight * bits_f32(four.y);
      x[4 * half + 2] += weight * bits_f32(four.z), x[4 * half + 3] += weight * bits_f32(four.w);
    }
  }
  SIMT_DEVICE static void store8_floats(float* to, const float (&x)[8]) {
    store16(to, uint4{f32_bits(x[0]), f32_bits(x[1]), f32_bits(x[2]), f32_bits(x[3])});
    store16(to + 4, uint4{f32_bits(x[4]), f32_bits(x[5]), f32_bits(x[6]), f32_bits(x[7])});
  }
};

}  // namespace tilewise::paged
