// Second moments that rows and columns share (tilewise/optim.h): rank-1 and factored. A step takes two passes: the
// first gathers statistics of rows and columns tile by tile, the second is the step itself, with a complete second
// moment. Small tensors take both before the next ones, so that memory gives up their gradients once.
#pragma once
#include "optim/cpu/block.h"
#include "optim/cpu/stage.h"

namespace tilewise {
namespace {

// What StepTensor::workspace holds (params.h).
struct Shared {
  float* column_parts;  // [row_tiles, columns]
  float* row_parts;     // [column_tiles, rows]
  float* scales;        // [rows + columns], new
  float* inverse_mean;  // 1 / mean(row)
  int64_t row_tiles, column_tiles;

  explicit Shared(const StepTensor& t)
      : column_parts(t.workspace),
        row_tiles(ceil_div(t.rows, kTileRows)),
        column_tiles(ceil_div(t.columns, kTileColumns)) {
    row_parts = column_parts + row_tiles * t.columns;
    scales = row_parts + column_tiles * t.rows;
    inverse_mean = scales + t.rows + t.columns;
  }
};

constexpr float kSmallestMean = 0x1p-126f;

// body(row, column, offset from the first, length) for the parts of `count` elements that lie in one row.
template <class Body>
TILEWISE_INLINE void for_each_run(const StepTensor& t, int64_t element, int count, const Body& body) {
  int64_t row = element / t.columns, column = element % t.columns;
  for (int at = 0; at < count; row++, column = 0) {
    const int length = int(min_of<int64_t>(count - at, t.columns - column));
    body(row, column, at, length);
    at += length;
  }
}

// ---- the second moment of some elements ----

// The scales of rank-1 elements, from those of rows and columns.
inline void element_scales(const StepTensor& t, const float* scales, int64_t element, int count, float* to) {
  for_each_run(t, element, count, [&](int64_t row, int64_t column, int at, int length) {
    const VF of_row = set1(scales[row]);
    const float* of_columns = scales + t.rows + column;
    for_each_vector(length, [&](int i, int lanes) {
      store(to + at + i, max(min(of_row, load(of_columns + i, lanes)), set1(kMinUnsignedScale)), lanes);
    });
  });
}

// Elements that are staged together: by the time that a piece is read, in other vectors than it was written in, its
// stores have left the store buffer, which could not forward them.
constexpr int kSegment = 8 * kBlock;

// body(block of codes, offset of its first element here, offset from `element`, elements here)
template <class Body>
TILEWISE_INLINE void for_each_block(int64_t element, int count, const Body& body) {
  for (int at = 0, length; at < count; at += length) {
    const int inside = int((element + at) % kBlock);
    length = min_of(kBlock - inside, count - at);
    body((element + at) / kBlock, inside, at, length);
  }
}

// New, from the old codes and scales; of at most kSegment elements.
inline void average_rank1(const StepParams& p, const StepTensor& t, int64_t element, int count, const float* g,
                          float* v) {
  float scales[kSegment];
  element_scales(t, t.second.scales, element, count, scales);
  const VF square_weight = set1(p.square_weight);
  for_each_block(element, count, [&](int64_t block, int inside, int at, int length) {
    BlockValues x;
    decode_unsigned(static_cast<const uint8_t*>(t.second.values) + block * kCodeBytes, p.beta2, x);
    if (length == kBlock) {
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) {
        prefetch_with_vector(g + at, i * W);
        const VF grad = load(g + at + i * W);
        store(v + at + i * W, grad * square_weight * grad + x[i] * load(scales + at + i * W));
      }
      return;
    }
    float units[kBlock];
    for (int i = 0; i < kVectors; i++) store(units + i * W, x[i]);
    for_each_vector(length, [&](int i, int lanes) {
      const VF grad = load(g + at + i, lanes), old = load(units + inside + i, lanes) * load(scales + at + i, lanes);
      store(v + at + i, grad * square_weight * grad + old, lanes);
    });
  });
}

// Of numbers that are >= 0 or NaN.
TILEWISE_INLINE VF finite_or_zero(VF x) {
  return select((VI)(x < set1(kInfinity)), x, set1(0));
}

// Of at most kSegment elements from the first of a block on.
inline void write_rank1(const StepTensor& t, int64_t element, int count, const float* v) {
  float scales[kSegment];
  element_scales(t, Shared(t).scales, element, count, scales);
  for_each_block(element, count, [&](int64_t block, int, int at, int length) {
    float rest[2][kBlock];  // of the tensor, and its scales
    const bool whole = length == kBlock;
    if (!whole) {
      for (int i = length; i < kBlock; i++) rest[0][i] = 0, rest[1][i] = 1;
      __builtin_memcpy(rest[0], v + at, length * sizeof(float));
      __builtin_memcpy(rest[1], scales + at, length * sizeof(float));
    }
    const float *values = whole ? v + at : rest[0], *their_scales = whole ? scales + at : rest[1];
    BlockValues x, s;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) x[i] = finite_or_zero(load(values + i * W)), s[i] = load(their_scales + i * W);
    encode_unsigned(x, s, static_cast<uint8_t*>(t.second.values) + block * kCodeBytes);
  });
}

inline void read_factored(const StepTensor& t, int64_t element, int count, float* v) {
  const float inverse_mean = *Shared(t).inverse_mean;
  for_each_run(t, element, count, [&](int64_t row, int64_t column, int at, int length) {
    const VF factor = set1(t.second.scales[row] * inverse_mean);
    const float* of_columns = t.second.scales + t.rows + column;
    for_each_vector(length, [&](int i, int lanes) { store(v + at + i, factor * load(of_columns + i, lanes), lanes); });
  });
}

inline void read_given(const StepParams& p, const StepTensor& t, int64_t element, int count, const float* g, float* v) {
  if (t.second.format == Format::factored) return read_factored(t, element, count, v);
  average_rank1(p, t, element, count, g, v);
}

// ---- statistics ----
struct Sum {
  TILEWISE_INLINE static VF both(VF a, VF b) { return a + b; }
  static float all(VF a) { return reduce_add(a); }
};
struct Largest {  // of numbers >= 0
  TILEWISE_INLINE static VF both(VF a, VF b) { return max(a, b); }
  static float all(VF a) { return reduce_max(a); }
};

// Takes `count` numbers into the maxima of their rows and columns.
inline void gather(const StepTensor& t, int64_t element, int count, const float* x, float* rows, float* columns) {
  for_each_run(t, element, count, [&](int64_t row, int64_t column, int at, int length) {
    VF of_row = set1(0);
    float* of_columns = columns + column;
    for_each_vector(length, [&](int i, int lanes) {
      const VF here = finite_or_zero(load(x + at + i, lanes));
      of_row = max(of_row, here);
      store(of_columns + i, max(load(of_columns + i, lanes), here), lanes);
    });
    rows[row] = max_of(rows[row], reduce_max(of_row));
  });
}

// The gradients of some elements: where they lie if that will do, else in `spare`.
inline const float* gradients(const StepParams& p, const StepTensor& t, int64_t element, int count, float* spare) {
  if (t.grad_type == Float::f32 && p.grad_factor == 1 && p.l2 == 0) return static_cast<const float*>(t.grad) + element;
  float param[kSegment];
  if (p.l2 != 0) load_param(t, element, count, param);
  load_grad(p, t, element, count, param, spare);
  return spare;
}

// Adds the squares of some gradients of one row.
inline void gather_squares(const StepParams& p, const StepTensor& t, int64_t begin, int64_t end, float* row,
                           float* columns) {
  VF of_row = set1(0);
  for (int64_t e = begin; e < end; e += kBlock) {
    float spare[kBlock];
    const int count = int(min_of<int64_t>(kBlock, end - e));
    const float* g = gradients(p, t, e, count, spare);
    for_each_vector(count, [&](int i, int lanes) {
      prefetch_with_vector(g, i);
      const VF grad = load(g + i, lanes), square = grad * grad;
      const VF here = finite_or_zero(square);
      of_row = of_row + here;
      store(columns + i, load(columns + i, lanes) + here, lanes);
    });
    columns += count;
  }
  *row = Sum::all(of_row);
}

inline void gather_maxima(const StepParams& p, const StepTensor& t, int64_t begin, int64_t end, float* rows,
                          float* columns) {
  for (int64_t e = begin; e < end; e += kSegment) {
    const int count = int(min_of<int64_t>(kSegment, end - e));
    float spare[kSegment], x[kSegment];
    average_rank1(p, t, e, count, gradients(p, t, e, count, spare), x);
    gather(t, e, count, x, rows, columns);
  }
}

inline void gather_tile(const StepParams& p, const StepTensor& t, int64_t tile) {
  const Shared shared(t);
  const int64_t row_tile = tile / shared.column_tiles, column_tile = tile % shared.column_tiles;
  const int64_t row = row_tile * kTileRows, row_end = min_of(row + kTileRows, t.rows);
  const int64_t column = column_tile * kTileColumns, column_end = min_of(column + kTileColumns, t.columns);
  float* rows = shared.row_parts + column_tile * t.rows;
  float* columns = shared.column_parts + row_tile * t.columns;
  for (int64_t r = row; r < row_end; r++) rows[r] = 0;
  for (int64_t c = column; c < column_end; c++) columns[c] = 0;
  const bool rank1 = t.second.format == Format::rank1;
  if (rank1 && shared.column_tiles == 1)  // blocks of codes go on from row to row
    return gather_maxima(p, t, row * t.columns, row_end * t.columns, rows, columns);
  for (int64_t r = row; r < row_end; r++) {
    const int64_t begin = r * t.columns + column, end = r * t.columns + column_end;
    if (rank1)
      gather_maxima(p, t, begin, end, rows, columns);
    else
      gather_squares(p, t, begin, end, rows + r, columns + column);
  }
}

inline int64_t tiles_of(const StepTensor& t) {
  return t.rows ? ceil_div(t.rows, kTileRows) * ceil_div(t.columns, kTileColumns) : 0;
}

// The tiles of the tensors from `tensor` on are numbered through.
inline void gather_tiles(const StepParams& p, int64_t tensor, int64_t begin, int64_t end) {
  for (int64_t first = 0; first < end; tensor++) {
    const StepTensor& t = p.tensors[tensor];
    const int64_t tiles = tiles_of(t);
    for (int64_t tile = max_of<int64_t>(begin - first, 0); tile < min_of(end - first, tiles); tile++)
      gather_tile(p, t, tile);
    first += tiles;
  }
}

// ---- from the statistics of tiles to those of rows and columns ----
template <class Statistic>
void combine_parts(const float* parts, int64_t tiles, int64_t length, float* to) {
  for (int64_t i = 0; i < length; i += W) {
    VF all = load(parts + i, length - i);
    for (int64_t tile = 1; tile < tiles; tile++)
      all = Statistic::both(all, load(parts + tile * length + i, length - i));
    store(to + i, all, length - i);
  }
}

// scales = beta2 scales + square_weight / count sums
inline void average_means(const StepParams& p, const float* sums, int64_t length, int64_t count, float* scales) {
  for (int64_t i = 0; i < length; i += W) {
    const VF mean = finite_or_zero(load(sums + i, length - i) / set1(float(count)));
    store(scales + i, mean * set1(p.square_weight) + load(scales + i, length - i) * set1(p.beta2), length - i);
  }
}

inline void combine(const StepParams& p, const StepTensor& t) {
  const Shared shared(t);
  const bool rank1 = t.second.format == Format::rank1;
  const auto run = rank1 ? &combine_parts<Largest> : &combine_parts<Sum>;
  run(shared.row_parts, shared.column_tiles, t.rows, shared.scales);
  run(shared.column_parts, shared.row_tiles, t.columns, shared.scales + t.rows);
  if (rank1) return;
  average_means(p, shared.scales, t.rows, t.columns, t.second.scales);
  average_means(p, shared.scales + t.rows, t.columns, t.rows, t.second.scales + t.rows);
  double sum = 0;
  for (int64_t r = 0; r < t.rows; r++) sum += double(t.second.scales[r]);
  *shared.inverse_mean = 1 / max_of(float(sum / double(t.rows)), kSmallestMean);
}

// Before the step of some tensors: factored moments are complete then, rank-1 ones have their new scales in the
// workspace.
inline void prepare_structured(const StepParams& p, int64_t first, int64_t last, const Runtime& rt) {
  int64_t tiles = 0;
  for (int64_t i = first; i < last; i++) tiles += tiles_of(p.tensors[i]);
  parallel_for(rt, tiles, 1, [&](int64_t begin, int64_t end) { gather_tiles(p, first, begin, end); });
  parallel_for(rt, last - first, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = first + begin; i < first + end; i++)
      if (p.tensors[i].rows) combine(p, p.tensors[i]);
  });
}

// After it: nothing needs the old scales any more.
inline void publish_scales(const StepParams& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const StepTensor& t = p.tensors[i];
    if (t.second.format != Format::rank1) continue;
    __builtin_memcpy(t.second.scales, Shared(t).scales, size_t(t.rows + t.columns) * sizeof(float));
  }
}

}  // namespace
}  // namespace tilewise
