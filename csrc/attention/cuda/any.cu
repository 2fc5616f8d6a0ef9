// Instances of the fp32-unit kernels.
#include "attention/cuda/any.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {
namespace {

template <class K>
const char* launch_rows(int rows, int heads, const BackwardParams& b, bool chunks, const Runtime& rt, int tile) {
  const int tiles = ceil_div(rows, tile);
  return launch_tiles<K>(tiles, heads, b.forward.batch, {b, tiles, chunks, rt.fault}, rt);
}

template <class T, int D>
const char* launch_backward(const BackwardParams& b, bool chunks, const Runtime& rt) {
  const ForwardParams& p = b.forward;
  const auto keys = [&](auto part) {
    using K = AnyBackwardKeys<T, D, static_cast<Part>(decltype(part)::value)>;
    return launch_rows<K>(p.seq_k, p.kv_heads, b, chunks, rt, K::kKeys);
  };
  using Row = Delta<T>;
  using Queries = AnyBackwardQueries<T, D>;
  const int rows = ceil_div(p.seq_q, Row::kRows);
  const char* why = launch_tiles<Row>(rows, p.q_heads, p.batch, {b, rows, rt.fault}, rt);
  if (!why) why = launch_rows<Queries>(p.seq_q, p.q_heads, b, chunks, rt, Queries::kQueries);
  if constexpr (D > 64) {
    if (!why) why = keys(Number<static_cast<int>(Part::dk)>{});
    return why ? why : keys(Number<static_cast<int>(Part::dv)>{});
  } else {
    return why ? why : keys(Number<static_cast<int>(Part::dk_dv)>{});
  }
}

}  // namespace

const char* forward_any(const ForwardParams& p, const Runtime& rt) {
  return select_any_type(p.type, [&](auto type) {
    return select_dim(padded_dim(p), [&](auto dim) {
      using K = AnyForward<TypeOf<decltype(type)>, decltype(dim)::value>;
      const int tiles = ceil_div(p.seq_q, K::kQueries);
      return launch_tiles<K>(tiles, p.q_heads, p.batch, {{p}, tiles, rows_aligned(p), rt.fault}, rt);
    });
  });
}

const char* backward_any(const BackwardParams& b, const Runtime& rt) {
  return select_any_type(b.forward.type, [&](auto type) {
    return select_dim(padded_dim(b.forward), [&](auto dim) {
      return launch_backward<TypeOf<decltype(type)>, decltype(dim)::value>(b, rows_aligned(b), rt);
    });
  });
}

}  // namespace tilewise::attention
