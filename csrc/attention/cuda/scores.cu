// Instances of the kernels that recompute what attention weighed.
#include "attention/cuda/scores.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {
namespace {

template <class K>
const char* launch_spans(const ScoresParams& p, int span_keys, int span_queries, const Runtime& rt) {
  const int key_spans = ceil_div(p.keys, span_keys), query_spans = p.rows ? ceil_div(p.rows, span_queries) : 1;
  const int64_t tiles = static_cast<int64_t>(key_spans) * query_spans;
  if (tiles > 0x7fffffff) return "more than 2^31 - 1 tiles, expected fewer rows or keys";
  return launch_tiles<K>(static_cast<int>(tiles), p.q_heads, p.batch,
                         {p, key_spans, query_spans, span_keys, span_queries, rows_aligned(p)}, rt);
}

// launch(type, engine)
template <class Launch>
const char* select_engine(const ScoresParams& p, Launch launch) {
  return select_dim(padded_dim(p.dim), [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    if (p.type != Type::f32 && rows_aligned(p))
      return select_type16(p.type,
                           [&](auto type) { return launch(type, TypeTag<TensorScores<TypeOf<decltype(type)>, D>>{}); });
    return select_any_type(p.type,
                           [&](auto type) { return launch(type, TypeTag<FloatScores<TypeOf<decltype(type)>, D>>{}); });
  });
}

}  // namespace

const char* column_sums(const ScoresParams& p, const Runtime& rt) {
  return select_engine(p, [&](auto type, auto engine) {
    using K = Scores<TypeOf<decltype(type)>, TypeOf<decltype(engine)>, ColumnSums>;
    return launch_spans<K>(p, K::Reduce::kSpanKeys, p.rows ? p.rows : 1, rt);
  });
}

const char* block_max(const ScoresParams& p, const Runtime& rt) {
  return select_engine(p, [&](auto type, auto engine) {
    using K = Scores<TypeOf<decltype(type)>, TypeOf<decltype(engine)>, BlockMax>;
    using Reduce = typename K::Reduce;
    return launch_spans<K>(p, Reduce::kSpanKeys / p.block_k * p.block_k, Reduce::kSpanQueries / p.block_q * p.block_q,
                           rt);
  });
}

}  // namespace tilewise::attention
