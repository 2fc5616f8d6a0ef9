// Instances of the Hopper forward kernel whose keys and values arrive in boxes.
#include "attention/cuda/forward_sm90_launch.h"

namespace tilewise::attention {
namespace {

// Keys of a tile: as many as registers and shared memory hold. General adjusts 64 at most.
template <int D, class Mask>
constexpr int keys_of() {
  if (Mask::kGeneral) return D == 256 ? 32 : 64;
  return D == 128 && !Mask::kLongestTileLast ? 176 : 128;
}

}  // namespace

const char* launch_boxed(const ForwardSm90Args& a, const Runtime& rt) {
  return select_type16(a.p.type, [&](auto type) {
    return select_dim(padded_dim(a.p), [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      return select_mask<D>(a.p, [&](auto tag) {
        using Mask = TypeOf<decltype(tag)>;
        return launch_persistent<ForwardSm90<TypeOf<decltype(type)>, D, keys_of<D, Mask>(), Mask>>(a, rt);
      });
    });
  });
}

bool serves_sm90(const ForwardParams& p) {
  if (!arch_runs(device_arch(), kSm90a)) return false;
  const bool packed = p.cu_seqlens_q;
  const int64_t batch = packed ? 1 : p.batch, q_rows = packed ? p.total_q : p.seq_q;
  const int64_t k_rows = packed ? p.total_k : p.seq_k;
  return has_tensor_map(p.q_strides, batch, p.q_heads, q_rows) &&
         has_tensor_map(p.k_strides, batch, p.kv_heads, k_rows) &&
         has_tensor_map(p.v_strides, batch, p.kv_heads, k_rows);
}

const char* forward_sm90(const ForwardParams& p, const Runtime& rt) {
  ForwardSm90Args a = {};
  a.p = p;
  return launch_boxed(a, rt);
}

}  // namespace tilewise::attention
