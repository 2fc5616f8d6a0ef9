// Instances of the tensor-core forward kernel.
#include "attention/cuda/forward.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {

const char* forward_tensor_cores(const ForwardParams& p, const Runtime& rt) {
  return select_type16(p.type, [&](auto type) {
    return select_dim(padded_dim(p), [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      return select_mask<D>(p, [&](auto mask) {
        using K = Forward<TypeOf<decltype(type)>, D, TypeOf<decltype(mask)>>;
        const int tiles = ceil_div(p.seq_q, K::kQueries);
        return launch_tiles<K>(tiles, p.q_heads, p.batch, {p, tiles, rt.fault}, rt);
      });
    });
  });
}

}  // namespace tilewise::attention
