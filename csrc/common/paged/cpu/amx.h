// Paged attention on AMX tiles: a task's rows in tiles of 32, each block of keys packed once for all of them. Where key
// heads have few rows, a task takes a team of them, block by block, so that pages are read as they lie in memory.
#pragma once
#include "common/paged/cpu/ahead.h"
#include "common/paged/cpu/attention.h"
#include "common/paged/cpu/team_bytes.h"
#include "common/paged/cpu/team_vectors.h"
#include "common/paged/cpu/team_words.h"
#include "common/tile_attention.h"
#include "common/tile_overlap.h"

namespace tilewise::paged {
namespace {

constexpr int kMatrixRows = 2 * kTileRows, kMatrixTiles = kTaskRows / kMatrixRows;
// Queries and results of a team of heads stay in the L2 cache. More rows than these are bound by the products: their
// blocks are as large as can be, since results pass through the L1 cache once a block.
constexpr int kTeamRows = 64, kTeamSize = 8;
// A range of keys costs some 60 us beside its products when rows are many (docs/performance/speculative.md).
constexpr Share kTeamOfHeads = {kTeamSize}, kOneHead = {1}, kLongRanges = {1, kKeyBlock, 4096};

// Row i of a tile sees the keys of the block that its bits name.
struct SeesBits {
  KeyBits bits[kMatrixRows];
  int count;

  TILEWISE_INLINE VF hide(VF score, int row, int key) const {
    const auto mask = __mmask16(bits[row].words[key / 64] >> key % 64) & lane_mask(max_of(0, count - key));
    return (VF)_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), __mmask16(mask), (__m512)score);
  }
};

template <class T, class Attention, class Visibility>
struct MatrixTask {
  const Task<Visibility>& task;
  Attention attention;
  int tiles;
  AttentionRows rows[kTeamSize][kMatrixTiles];

  MatrixTask(const Task<Visibility>& task, const Attention& attention)
      : task(task), attention(attention), tiles(static_cast<int>(ceil_div(task.rows, kMatrixRows))) {}

  int64_t head_bytes(const PageStrides& strides) const { return strides.head * int64_t(sizeof(T)); }
  int tile_rows(int t) const { return min_of(kMatrixRows, task.rows - t * kMatrixRows); }

  bool start(const Runtime& rt) {
    const int64_t q_size = attention.query_size(kMatrixRows), state = kMatrixRows * (attention.columns() + W + 2);
    const int64_t room = attention.bytes(tiles), all = task.heads * tiles;
    char* memory = scratch<char>(rt, 2, room + all * (q_size * sizeof(Packed) + state * sizeof(float)));
    if (!memory) return false;
    attention.use(memory);
    Packed* q = reinterpret_cast<Packed*>(memory + room);
    float* at = reinterpret_cast<float*>(q + all * q_size);
    for (int64_t i = 0; i < all * state; i++) at[i] = 0;
    for (int h = 0; h < task.heads; h++) {
      const Task<Visibility> own = task.of_head(h);
      for (int t = 0; t < tiles; t++, q += q_size, at += state) {
        float *sums = at + kMatrixRows * attention.columns(), *reference = sums + kMatrixRows * W;
        float* units = reference + kMatrixRows;
        rows[h][t] = {q, at, sums, reference, false, units};
        attention.pack_queries(
            q, [&](int i) { return own.template query<T>(t * kMatrixRows + i); }, tile_rows(t), kMatrixRows, units);
      }
    }
    return true;
  }

  // What the tiles see of a block of `count` keys from `first` on.
  struct Plan {
    const MatrixTask& work;
    int64_t first;
    int count;
    Ahead& ahead;
    int lines;

    int rows(int t) const { return work.tile_rows(t); }
    int keys(int) const { return count; }
    TILEWISE_INLINE void meanwhile() const { ahead.go_on(lines); }
    template <class F>
    void see(int t, const F& f) const {
      const Task<Visibility>& task = work.task;
      if (task.keys.full(first)) return count % kTileDepth == 0 ? f(SeesAll()) : f(SeesUpTo{count, count});
      SeesBits sees = {};  // up to whole runs of rows
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
    for (int turn = 0; blocks[turn].count; turn ^= 1) {
      const KeyRows& now = blocks[turn];
      KeyRows& next = blocks[turn ^ 1];
      const int64_t end = now.first + now.count;
      next.find(task, end, keys.block_end(end, block), source);
      Ahead ahead(next, head_bytes(task.p.k_strides), head_bytes(task.p.v_strides), task.heads);
      const int lines = ahead.share(task.heads * (attention.calls(task.rows, now.count) + 2 * now.count));
      for (int h = 0; h < task.heads; h++) {
        const auto rows_of = [&](const char* const* at, const PageStrides& strides) {
          return [&ahead, lines, at, offset = h * head_bytes(strides)](int i) {
            ahead.go_on(lines);
            return reinterpret_cast<const T*>(at[i] + offset);
          };
        };
        attention.add_block(rows[h], tiles, rows_of(now.k, task.p.k_strides), rows_of(now.v, task.p.v_strides),
                            now.count, Plan{*this, now.first, now.count, ahead, lines});
      }
    }
  }

  bool finite(int h) const {
    for (int t = 0; t < tiles; t++)
      if (!attention.finite(rows[h][t], tile_rows(t))) return false;
    return true;
  }

  void write(int h, const Task<Visibility>& own) const {
    float row[kMaxHeadDim + W];
    for (int r = 0; r < task.rows; r++) {
      const AttentionRows& tile = rows[h][r / kMatrixRows];
      const int i = r % kMatrixRows;
      attention.read_row(tile, i, [&](int d, VF value) { store(row + d, value); });
      own.write(r, row, tile.reference[i], reduce_add(load(tile.sums + i * W)));
    }
  }
};

// All heads of a task; `done`: the bits of those whose results are there. Parts of infinite inputs may have become NaN:
// such a head is left. False: no memory.
template <class T, class Attention, class Visibility>
bool attend_matrix(const Task<Visibility>& task, const Runtime& rt, const Attention& attention, uint32_t& done) {
  MatrixTask<T, Attention, Visibility> work(task, attention);
  if (!work.start(rt)) return false;
  work.run();
  for (int h = 0; h < task.heads; h++) {
    if (!work.finite(h)) continue;
    work.write(h, task.of_head(h));
    done |= 1u << h;
  }
  return true;
}
// In the order of work that pays: up to 32 rows have too little to put beside each other.
template <class T, class Operands, class Visibility>
bool attend_matrix(const Task<Visibility>& task, const Runtime& rt, uint32_t& done) {
  const int dim = task.p.dim;
  const float scale = task.p.scale * kLog2e;
  // A reference that has to be the peak of a whole block is not there when its first weights are made.
  if constexpr ((Operands::kParts == 1 || Operands::kScaled) && !Operands::kPeakFirst) {
    using Overlapped = OverlappedAttention<T, Operands>;
    if (task.rows > kMatrixRows && Overlapped::serves(dim, dim))
      return attend_matrix<T>(task, rt, Overlapped(dim, dim, scale), done);
  }
  const int keys = task.rows > kTeamRows ? kMaxBlockKeys : 0;
  return attend_matrix<T>(task, rt, TileAttention<T, Operands>(dim, dim, scale, task.rows, kTileDepth, keys), done);
}

// Scores of so few terms round so little that what products of parts leave out would show.
constexpr int kFewTerms = 16;

// By head: on vectors what is too small for tiles, what they do not serve, and what they left.
template <class T, class Operands, class Visibility>
bool attend_on_tiles(const Task<Visibility>& task, const Runtime& rt) {
  const bool few = (task.rows <= kFewRows && FloatRows<T>(task.p.dim).serves_few()) ||
                   (Operands::kParts > 1 && task.p.dim <= kFewTerms);
  uint32_t done = 0;
  if (!few && task.p.softcap == 0 && !attend_matrix<T, Operands>(task, rt, done)) return false;
  for (int h = 0; h < task.heads; h++)
    if (!(done >> h & 1) && !attend_rows<FloatRows<T>>(task.of_head(h), rt)) return false;
  return true;
}

template <class Work, class Visibility>
const char* attend_teams(const typename Visibility::Params& p, const Runtime& rt, const Share& share = kTeamShare) {
  return run_tasks<Visibility>(
      p, rt, share, [](const Task<Visibility>& task, const Runtime& rt) { return attend_team<Work>(task, rt); });
}
template <class Source, class Visibility>
const char* attend_one_row(const typename Visibility::Params& p, const Runtime& rt) {
  constexpr int kOften = ByteRows<Source>::kBits == 8 ? 2 : 1;  // units of 128 channels
  const ByteRows<Source> bytes(p.dim);
  const int units = bytes.units();
  if (units == kOften && bytes.whole())
    return attend_teams<VectorTeam<Source, Visibility, kOften, true>, Visibility>(p, rt, kVectorShare);
  if (units == 1) return attend_teams<VectorTeam<Source, Visibility, 1, false>, Visibility>(p, rt, kVectorShare);
  if (units <= kOften)
    return attend_teams<VectorTeam<Source, Visibility, kOften, false>, Visibility>(p, rt, kVectorShare);
  return attend_teams<VectorTeam<Source, Visibility, 2 * kOften, false>, Visibility>(p, rt, kVectorShare);
}
// Few rows, on tiles of bytes if they serve.
template <class Source, class Visibility>
const char* attend_few_on_tiles(const typename Visibility::Params& p, const Runtime& rt) {
  if constexpr (ByteRows<Source>::kServed)
    if (fits_bytes(p)) {
      const int rows = team_rows(p);
      if (rows == 1) return attend_one_row<Source, Visibility>(p, rt);
      if (rows == 2) return attend_teams<ByteTeam<Source, Visibility, 2>, Visibility>(p, rt);
      return attend_teams<ByteTeam<Source, Visibility, 4>, Visibility>(p, rt);
    }
  return attend_teams<WordTeam<Source, Visibility>, Visibility>(p, rt);
}

template <class T, class Operands, class Visibility>
const char* run_on_tiles(const typename Visibility::Params& p, const Runtime& rt) {
  const int rows = team_rows(p);
  const bool tiles = rows > kFewRows && p.softcap == 0;
  const Share& share = !tiles ? kOneHead : rows <= kTeamRows ? kTeamOfHeads : kLongRanges;
  return run_tasks<Visibility>(p, rt, share, [](const Task<Visibility>& task, const Runtime& rt) {
    return attend_on_tiles<T, Operands>(task, rt);
  });
}

template <class Visibility>
const char* attend_float_pages_on_tiles(const typename Visibility::Params& p, const Runtime& rt) {
  if (p.type == Type::bf16 && fits_team(p)) return attend_few_on_tiles<FloatRows<Bf16>, Visibility>(p, rt);
  if (p.type == Type::f16 && rt.fp16_tiles) return run_on_tiles<Fp16, NativeFp16Operands, Visibility>(p, rt);
  if (p.type == Type::f32 && rt.fp16_tiles) return run_on_tiles<float, Fp16Operands, Visibility>(p, rt);
  return with_type(p.type, [&](auto type) {
    using T = decltype(type);
    return run_on_tiles<T, Bf16Operands<T>, Visibility>(p, rt);
  });
}

template <class Visibility>
const char* attend_code_pages_on_tiles(const typename Visibility::Params& p, const Runtime& rt) {
  if (!fits_team(p)) return attend_code_pages<Visibility>(p, rt);
  return with_codes(p.format, p.dim,
                    [&](auto source) { return attend_few_on_tiles<decltype(source), Visibility>(p, rt); });
}

}  // namespace
}  // namespace tilewise::paged
