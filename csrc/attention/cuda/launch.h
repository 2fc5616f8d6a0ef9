// How a launch picks its kernel instance. launch.cu decides between the two kernel families, forward.cu, backward.cu
// and any.cu hold their instances.
#pragma once
#include "attention/cuda/general.h"
#include "attention/cuda/mask.h"

namespace tilewise::attention {

// fp16 and bf16 on tensor cores: 16-byte rows, head dims that are multiples of 8.
const char* forward_tensor_cores(const ForwardParams&, const Runtime&);
const char* backward_tensor_cores(const BackwardParams&, const Runtime&);
// The same on sm_90a, for what tensor maps can describe. The backward wants delta.
bool serves_sm90(const ForwardParams&);
bool serves_sm90(const BackwardParams&);
bool serves_sm90(const PagedParams&);  // many tokens of every sequence
const char* forward_sm90(const ForwardParams&, const Runtime&);
const char* paged_sm90(const PagedParams&, const Runtime&);
const char* backward_sm90(const BackwardParams&, const Runtime&);
// The same for few queries of grouped heads: a tile holds all heads that read one key head (paged.cu).
bool packs_heads(const ForwardParams&);
const char* forward_packed(const ForwardParams&, const Runtime&);
// Every type, alignment and head dim, on the fp32 units.
const char* forward_any(const ForwardParams&, const Runtime&);
const char* backward_any(const BackwardParams&, const Runtime&);

// What options ask for besides: dbias and dsink, once delta is known, and masks as bits.
const char* bias_gradient(const BackwardParams&, bool tensor_cores, const Runtime&);
const char* sink_gradient(const BackwardParams&, const Runtime&);
const char* pack_mask(const PackMaskParams&, const Runtime&);

// Over paged caches, by either kind of kernel (paged.cu), and over those of codes on the fp32 units (cache.cu).
const char* attend_paged(const PagedParams&, const Runtime&);
const char* attend_codes(const PagedParams&, const Runtime&);
const char* write_cache(const CacheWriteParams&, const Runtime&);

const char* merge(const MergeParams&, const Runtime&);
const char* merge_backward(const MergeBackwardParams&, const Runtime&);
const char* rope(const RopeParams&, const Runtime&);
const char* column_sums(const ScoresParams&, const Runtime&);
const char* block_max(const ScoresParams&, const Runtime&);

// Whether every row of every tensor consists of aligned 16 bytes.
bool rows_aligned(const ForwardParams&);
bool rows_aligned(const BackwardParams&);
bool rows_aligned(const ScoresParams&);

template <class T>
struct TypeTag {
  using type = T;
};
template <class Tag>
using TypeOf = typename Tag::type;
template <int N>
struct Number {
  static constexpr int value = N;
};

inline const char* no_such_instance() {
  return "no CUDA kernel for this type and head dim";
}

// select(..., fn) calls fn with the tags of the instance. TILEWISE_FEW_INSTANCES keeps one type and head dim: seeded
// bugs are compiled often.
// The head dim of the instance that serves these.
inline int padded_dim(int dim) {
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}
inline int padded_dim(const ForwardParams& p) {
  return padded_dim(p.dim > p.v_dim ? p.dim : p.v_dim);
}
template <class Fn>
const char* select_dim(int dim, Fn fn) {
  if (dim == 64) return fn(Number<64>{});
#ifndef TILEWISE_FEW_INSTANCES
  if (dim == 128) return fn(Number<128>{});
  if (dim == 256) return fn(Number<256>{});
#endif
  return no_such_instance();
}
template <class Fn>
const char* select_type16(Type type, Fn fn) {
  if (type == Type::bf16) return fn(TypeTag<bf16>{});
#ifndef TILEWISE_FEW_INSTANCES
  if (type == Type::f16) return fn(TypeTag<fp16>{});
#endif
  return no_such_instance();
}
template <class Fn>
const char* select_any_type(Type type, Fn fn) {
  return type == Type::f32 ? fn(TypeTag<float>{}) : select_type16(type, fn);
}
// Dense and Causal want positive scales, and head dims of exactly 64 or 128; General serves all the rest.
template <int D, class Fn>
const char* select_mask(const ForwardParams& p, Fn fn) {
  if constexpr (D <= 128)
    if (p.dim == D && p.v_dim == D && p.scale > 0.f && p.scale < INFINITY && causal_or_dense(p.rules))
      return p.causal ? fn(TypeTag<Causal>{}) : fn(TypeTag<Dense>{});
  return fn(TypeTag<General>{});
}

// One block per tile, head and sequence.
template <class K>
const char* launch_tiles(int tiles, int heads, int batch, const typename K::Params& params, const Runtime& rt) {
  const int64_t blocks = static_cast<int64_t>(tiles) * heads * batch;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 tiles, expected fewer sequences, heads or rows";
  return launch<K>(dim3(static_cast<unsigned>(blocks)), params, rt.stream);
}

}  // namespace tilewise::attention
