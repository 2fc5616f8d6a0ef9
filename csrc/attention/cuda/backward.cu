// Instances of the tensor-core backward kernels.
#include "attention/cuda/backward.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {
namespace {

template <class T>
const char* launch_delta(const BackwardParams& b, const Runtime& rt) {
  using K = Delta<T>;
  const int tiles = ceil_div(b.forward.seq_q, K::kRows);
  return launch_tiles<K>(tiles, b.forward.q_heads, b.forward.batch, {b, tiles, rt.fault}, rt);
}

template <class K>
const char* launch_keys(const BackwardParams& b, const Runtime& rt) {
  const int tiles = ceil_div(b.forward.seq_k, K::kKeys);
  return launch_tiles<K>(tiles, b.forward.kv_heads, b.forward.batch, {b, tiles, rt.fault}, rt);
}

template <class T, int D, class Mask>
const char* launch_gradients(const BackwardParams& b, const Runtime& rt) {
  using Queries = BackwardQueries<T, D, Mask>;
  const ForwardParams& p = b.forward;
  const int tiles = ceil_div(p.seq_q, Queries::kQueries);
  if (const char* why = launch_tiles<Queries>(tiles, p.q_heads, p.batch, {b, tiles, rt.fault}, rt)) return why;
  if constexpr (D == 256) {
    const char* why = launch_keys<BackwardKeys<T, D, Mask, Part::dk>>(b, rt);
    return why ? why : launch_keys<BackwardKeys<T, D, Mask, Part::dv>>(b, rt);
  } else {
    return launch_keys<BackwardKeys<T, D, Mask>>(b, rt);
  }
}

}  // namespace

const char* backward_tensor_cores(const BackwardParams& b, const Runtime& rt) {
  return select_type16(b.forward.type, [&](auto type) {
    using T = TypeOf<decltype(type)>;
    if (const char* why = launch_delta<T>(b, rt)) return why;
    if (serves_sm90(b)) return backward_sm90(b, rt);
    return select_dim(padded_dim(b.forward), [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      return select_mask<D>(b.forward,
                            [&](auto mask) { return launch_gradients<T, D, TypeOf<decltype(mask)>>(b, rt); });
    });
  });
}

}  // namespace tilewise::attention
