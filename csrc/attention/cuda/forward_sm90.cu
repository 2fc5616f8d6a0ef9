// Instances of the Hopper forward kernel, and their tensor maps.
#include "attention/cuda/forward_sm90.h"

#include "attention/cuda/launch.h"
#include "attention/cuda/tensor_maps.h"

namespace tilewise::attention {
namespace {

constexpr int64_t kCacheBytes = 32 << 20;  // of L2, for keys and values

template <class K>
const char* make_maps(ForwardSm90Args& a) {
  const ForwardParams& p = a.p;
  const bool packed = p.cu_seqlens_q;
  const int64_t q_rows = packed ? p.total_q : p.seq_q, k_rows = packed ? p.total_k : p.seq_k;
  const int batch = packed ? 1 : p.batch;
  const char* why = make_map(a.q, p.q, p.q_strides, p.dim, q_rows, p.q_heads, batch, K::kGroupQueries);
  if (!why && k_rows > 0) why = make_map(a.k, p.k, p.k_strides, p.dim, k_rows, p.kv_heads, batch, K::kKeys);
  if (!why && k_rows > 0) why = make_map(a.v, p.v, p.v_strides, p.v_dim, k_rows, p.kv_heads, batch, K::kKeys);
  if (!why && !packed) why = make_map(a.out, p.out, p.out_strides, p.v_dim, q_rows, p.q_heads, batch, K::kGroupQueries);
  return why;
}

template <class K>
const char* launch_persistent(const ForwardParams& p, const Runtime& rt) {
  ForwardSm90Args a = {};
  a.p = p;
  a.fault = rt.fault;
  a.tiles = ceil_div(p.seq_q, K::kQueries);
  const int64_t heads = static_cast<int64_t>(p.batch) * p.q_heads, works = heads * a.tiles;
  if (works > 0x7fffffff) return "more than 2^31 - 1 tiles, expected fewer sequences, heads or rows";
  const int64_t group = p.q_heads / p.kv_heads, head_bytes = 2 * int64_t(p.seq_k) * (p.dim + p.v_dim);
  const int64_t fit = head_bytes > 0 ? kCacheBytes / head_bytes * group : heads;
  a.section = static_cast<int>(fit < 1 ? 1 : fit < heads ? fit : heads);
  if (const char* why = make_maps<K>(a)) return why;
  const int64_t blocks = works < sm_count() ? works : sm_count();
  return launch<K>(dim3(static_cast<unsigned>(blocks)), a, rt.stream);
}

// Keys of a tile: as many as registers and shared memory hold. General adjusts 64 at most.
template <int D, class Mask>
constexpr int keys_of() {
  if (Mask::kGeneral) return D == 256 ? 32 : 64;
  return D == 128 && !Mask::kLongestTileLast ? 176 : 128;
}

}  // namespace

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
  return select_type16(p.type, [&](auto type) {
    return select_dim(padded_dim(p), [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      return select_mask<D>(p, [&](auto tag) {
        using Mask = TypeOf<decltype(tag)>;
        return launch_persistent<ForwardSm90<TypeOf<decltype(type)>, D, keys_of<D, Mask>(), Mask>>(p, rt);
      });
    });
  });
}

}  // namespace tilewise::attention
