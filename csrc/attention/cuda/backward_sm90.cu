// Instances of the Hopper backward kernels, and their tensor maps.
#include "attention/cuda/backward_sm90.h"

#include "attention/cuda/launch.h"
#include "attention/cuda/tensor_maps.h"

namespace tilewise::attention {
namespace {

// Streamed rows and stages: as many as registers and shared memory hold.
template <int D, class Mask>
struct Tiles {
  static constexpr int kKeys = Mask::kGeneral ? D == 256 ? 32 : 64 : D == 128 ? 96 : 128;
  static constexpr int kQueries = Mask::kGeneral ? D == 64 ? 64 : 32 : D == 128 ? 64 : 96;
  static constexpr int kStages = D == 256 ? 2 : 3;
};

template <class K>
const char* launch_gradient(const BackwardParams& b, int rows, int heads, const Runtime& rt) {
  const ForwardParams& p = b.forward;
  const bool packed = p.cu_seqlens_q;
  const int64_t q_rows = packed ? p.total_q : p.seq_q, k_rows = packed ? p.total_k : p.seq_k;
  const int batch = packed ? 1 : p.batch, tiles = ceil_div(rows, K::kOwned);
  BackwardSm90Args a = {{}, {}, {}, {}, b, tiles, rt.fault};
  const char* why = nullptr;
  if (q_rows > 0) why = make_map(a.q, p.q, p.q_strides, p.dim, q_rows, p.q_heads, batch, K::kQueryBox);
  if (!why && q_rows > 0)
    why = make_map(a.dout, b.dout, b.dout_strides, p.v_dim, q_rows, p.q_heads, batch, K::kQueryBox);
  if (!why && k_rows > 0) why = make_map(a.k, p.k, p.k_strides, p.dim, k_rows, p.kv_heads, batch, K::kKeyBox);
  if (!why && k_rows > 0) why = make_map(a.v, p.v, p.v_strides, p.v_dim, k_rows, p.kv_heads, batch, K::kKeyBox);
  return why ? why : launch_tiles<K>(tiles, heads, p.batch, a, rt);
}

template <class T, int D, class Mask, Part kPart>
const char* launch_keys(const BackwardParams& b, const Runtime& rt) {
  using Of = Tiles<D, Mask>;
  using Keys = BackwardKeysSm90<T, D, Of::kQueries, Of::kStages, Mask, kPart>;
  return launch_gradient<Keys>(b, b.forward.seq_k, b.forward.kv_heads, rt);
}

template <class T, int D, class Mask>
const char* launch_gradients(const BackwardParams& b, const Runtime& rt) {
  using Of = Tiles<D, Mask>;
  const ForwardParams& p = b.forward;
  using Queries = BackwardQueriesSm90<T, D, Of::kKeys, Of::kStages, Mask>;
  if (const char* why = launch_gradient<Queries>(b, p.seq_q, p.q_heads, rt)) return why;
  if constexpr (D == 256) {
    const char* why = launch_keys<T, D, Mask, Part::dk>(b, rt);
    return why ? why : launch_keys<T, D, Mask, Part::dv>(b, rt);
  } else {
    return launch_keys<T, D, Mask, Part::dk_dv>(b, rt);
  }
}

}  // namespace

bool serves_sm90(const BackwardParams& b) {
  const ForwardParams& p = b.forward;
  const bool packed = p.cu_seqlens_q;
  return serves_sm90(p) &&
         has_tensor_map(b.dout_strides, packed ? 1 : p.batch, p.q_heads, packed ? p.total_q : p.seq_q);
}

const char* backward_sm90(const BackwardParams& b, const Runtime& rt) {
  return select_type16(b.forward.type, [&](auto type) {
    return select_dim(padded_dim(b.forward), [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      return select_mask<D>(b.forward, [&](auto mask) {
        return launch_gradients<TypeOf<decltype(type)>, D, TypeOf<decltype(mask)>>(b, rt);
      });
    });
  });
}

}  // namespace tilewise::attention
