// Launches of the Hopper forward kernel: its tensor maps and its grid. Host code.
#pragma once
#include "attention/cuda/forward_sm90.h"
#include "attention/cuda/launch.h"
#include "attention/cuda/tensor_maps.h"

namespace tilewise::attention {

constexpr int64_t kCacheBytes = 32 << 20;  // of L2, for keys and values

inline int common_divisor(int a, int b) {
  return b == 0 ? a : common_divisor(b, a % b);
}

template <class K>
const char* make_key_maps(ForwardSm90Args& a) {
  const ForwardParams& p = a.p;
  const bool packed = p.cu_seqlens_q;
  const int64_t rows = a.seq_lens ? a.table.page_size : packed ? p.total_k : p.seq_k;
  const int batch = a.seq_lens ? a.table.pool : packed ? 1 : p.batch;
  if (rows == 0 || batch == 0 || !K::Source::kBoxed) return nullptr;
  a.box_rows = a.seq_lens ? common_divisor(K::kKeys, a.table.page_size) : K::kKeys;
  const char* why = make_map(a.k, p.k, p.k_strides, p.dim, rows, p.kv_heads, batch, a.box_rows);
  return why ? why : make_map(a.v, p.v, p.v_strides, p.v_dim, rows, p.kv_heads, batch, a.box_rows);
}

template <class K>
const char* make_maps(ForwardSm90Args& a) {
  const ForwardParams& p = a.p;
  const bool packed = p.cu_seqlens_q;
  const int64_t rows = packed ? p.total_q : p.seq_q;
  const int batch = packed ? 1 : p.batch;
  const char* why = make_map(a.q, p.q, p.q_strides, p.dim, rows, p.q_heads, batch, K::kGroupQueries);
  if (!why) why = make_key_maps<K>(a);
  if (!why && !packed) why = make_map(a.out, p.out, p.out_strides, p.v_dim, rows, p.q_heads, batch, K::kGroupQueries);
  return why;
}

// `of` has q, k, v, out and whose pages they are.
template <class K>
const char* launch_persistent(const ForwardSm90Args& of, const Runtime& rt) {
  ForwardSm90Args a = of;
  const ForwardParams& p = a.p;
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

// Keys and values of `a` in boxes (forward_sm90.cu), or gathered (paged_sm90.cu).
const char* launch_boxed(const ForwardSm90Args& a, const Runtime& rt);

}  // namespace tilewise::attention
