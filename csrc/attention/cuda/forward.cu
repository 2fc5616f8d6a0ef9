// Instances of the tensor-core forward kernel.
#include "attention/cuda/forward.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {

const char* forward_tensor_cores(const ForwardParams& p, const Runtime& rt) {
  return select_type16(p.type, [&](auto type) {
    return select_dim(p.dim, [&](auto dim) {
      return select_mask(p.causal, [&](auto mask) {
        using K = Forward<TypeOf<decltype(type)>, decltype(dim)::value, TypeOf<decltype(mask)>>;
        const int tiles = ceil_div(p.seq_q, K::kQueries);
        return launch_tiles<K>(tiles, p.q_heads, p.batch, {p, tiles, rt.fault}, rt);
      });
    });
  });
}

}  // namespace tilewise::attention
