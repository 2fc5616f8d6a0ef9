// Instances of the fp32-unit kernels.
#include "attention/cuda/any.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {
namespace {

template <class T, int D>
const char* launch_backward(const BackwardParams& b, bool chunks, const Runtime& rt) {
  using Row = Delta<T, D>;
  using Queries = AnyBackwardQueries<T, D>;
  using Keys = AnyBackwardKeys<T, D>;
  const ForwardParams& p = b.forward;
  const int rows = ceil_div(p.seq_q, Row::kRows), queries = ceil_div(p.seq_q, Queries::kQueries);
  const int keys = ceil_div(p.seq_k, Keys::kKeys);
  const char* why = launch_tiles<Row>(rows, p.q_heads, p.batch, {b, rows, rt.fault}, rt);
  if (!why) why = launch_tiles<Queries>(queries, p.q_heads, p.batch, {b, queries, chunks, rt.fault}, rt);
  if (!why) why = launch_tiles<Keys>(keys, p.kv_heads, p.batch, {b, keys, chunks, rt.fault}, rt);
  return why;
}

}  // namespace

const char* forward_any(const ForwardParams& p, const Runtime& rt) {
  return select_any_type(p.type, [&](auto type) {
    return select_dim(p.dim, [&](auto dim) {
      using K = AnyForward<TypeOf<decltype(type)>, decltype(dim)::value>;
      const int tiles = ceil_div(p.seq_q, K::kQueries);
      return launch_tiles<K>(tiles, p.q_heads, p.batch, {{p}, tiles, rows_aligned(p), rt.fault}, rt);
    });
  });
}

const char* backward_any(const BackwardParams& b, const Runtime& rt) {
  return select_any_type(b.forward.type, [&](auto type) {
    return select_dim(b.forward.dim, [&](auto dim) {
      return launch_backward<TypeOf<decltype(type)>, decltype(dim)::value>(b, rows_aligned(b), rt);
    });
  });
}

}  // namespace tilewise::attention
