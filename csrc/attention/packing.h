// Few queries of dense attention are decoding without pages: a sequence is one page, and the queries of all heads that
// read one key head are the rows of a tile. Host code.
#pragma once
#include "attention/params.h"
#include "common/paged/splits.h"

namespace tilewise::attention {

constexpr int kFewQueries = 32;
constexpr int64_t kMostUnits = 65535;  // of a grid's third dimension

inline bool only_windowed(const Rules& r) {
  Rules plain = r;
  plain.window_left = plain.window_right = kUnlimited;
  plain.softcap = 0;
  return causal_or_dense(plain) && r.global_tokens == 0;
}

// Whether the kernels over pages know all that this asks for.
inline bool is_decoding(const ForwardParams& p) {
  return p.seq_q > 0 && p.seq_q <= kFewQueries && p.seq_k > 0 && !p.cu_seqlens_q && p.v_dim == p.dim &&
         int64_t(p.batch) * p.kv_heads <= kMostUnits && only_windowed(p.rules);
}

inline PagedParams as_pages(const ForwardParams& p) {
  const auto of_rows = [](const Strides& s) { return paged::TokenStrides{s.batch, s.row, s.head}; };
  const auto of_pages = [](const Strides& s) { return paged::PageStrides{s.batch, s.row, s.head}; };
  PagedParams a = {};
  a.q = p.q, a.k_pages = p.k, a.v_pages = p.v, a.out = p.out, a.lse = p.lse;
  a.table = {nullptr, 0, 1, p.seq_k, p.batch};
  a.q_strides = of_rows(p.q_strides), a.out_strides = of_rows(p.out_strides);
  a.lse_strides = {int64_t(p.q_heads) * p.seq_q, 1, p.seq_q};
  a.k_strides = of_pages(p.k_strides), a.v_strides = of_pages(p.v_strides);
  a.batch = p.batch, a.tokens = p.seq_q, a.q_heads = p.q_heads, a.kv_heads = p.kv_heads, a.dim = p.dim;
  a.splits = 1;
  a.scale = p.scale, a.softcap = p.rules.softcap;
  a.type = p.type == Type::f32 ? paged::Type::f32 : p.type == Type::bf16 ? paged::Type::bf16 : paged::Type::f16;
  a.window_left = p.rules.window_left, a.window_right = p.causal ? 0 : p.rules.window_right;
  return a;
}

}  // namespace tilewise::attention
