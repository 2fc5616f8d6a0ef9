// Instances of the tensor-core backward kernels.
#include "attention/cuda/backward.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {
namespace {

template <class T, int D>
const char* launch_delta(const BackwardParams& b, const Runtime& rt) {
  using K = Delta<T, D>;
  const int tiles = ceil_div(b.forward.seq_q, K::kRows);
  return launch_tiles<K>(tiles, b.forward.q_heads, b.forward.batch, {b, tiles, rt.fault}, rt);
}

template <class T, int D, class Mask>
const char* launch_gradients(const BackwardParams& b, const Runtime& rt) {
  using Queries = BackwardQueries<T, D, Mask>;
  using Keys = BackwardKeys<T, D, Mask>;
  const ForwardParams& p = b.forward;
  const int query_tiles = ceil_div(p.seq_q, Queries::kQueries), key_tiles = ceil_div(p.seq_k, Keys::kKeys);
  const char* why = launch_tiles<Queries>(query_tiles, p.q_heads, p.batch, {b, query_tiles, rt.fault}, rt);
  return why ? why : launch_tiles<Keys>(key_tiles, p.kv_heads, p.batch, {b, key_tiles, rt.fault}, rt);
}

}  // namespace

const char* backward_tensor_cores(const BackwardParams& b, const Runtime& rt) {
  return select_type16(b.forward.type, [&](auto type) {
    return select_dim(b.forward.dim, [&](auto dim) {
      using T = TypeOf<decltype(type)>;
      constexpr int D = decltype(dim)::value;
      if (const char* why = launch_delta<T, D>(b, rt)) return why;
      return select_mask(b.forward.causal,
                         [&](auto mask) { return launch_gradients<T, D, TypeOf<decltype(mask)>>(b, rt); });
    });
  });
}

}  // namespace tilewise::attention
