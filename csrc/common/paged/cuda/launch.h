// Which kernel attends to which pages, and its launch: on tensor cores for 16-bit queries of head dim 64 or 128, a warp
// per row for the rest.
#pragma once
#include <initializer_list>

#include "common/paged/cuda/codes.h"
#include "common/paged/cuda/numbers.h"
#include "common/paged/cuda/rows.h"
#include "common/paged/cuda/widened.h"
#include "common/paged/splits.h"

namespace tilewise::paged {

inline bool aligned(const void* p, std::initializer_list<int64_t> strides) {
  bool ok = reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (int64_t s : strides) ok &= s % 8 == 0;  // 8 elements of 16 bits
  return ok;
}

inline bool queries_aligned(const AttentionParams& p) {
  const TokenStrides &q = p.q_strides, &out = p.out_strides;
  return aligned(p.q, {q.batch, q.token, q.head}) && aligned(p.out, {out.batch, out.token, out.head});
}
inline bool rows_aligned(const AttentionParams& p) {
  const PageStrides &k = p.k_strides, &v = p.v_strides;
  return queries_aligned(p) && aligned(p.k_pages, {k.page, k.slot, k.head}) &&
         aligned(p.v_pages, {v.page, v.slot, v.head});
}

inline int tile_rows(const AttentionParams& p) {
  return p.tokens * (p.q_heads / p.kv_heads);
}

template <class T, int D, class Visibility, class Pages, int Rows>
const char* launch_tiles(const Args<typename Visibility::Params>& a, const Runtime& rt) {
  using K = PagedAttention<T, D, Visibility, Pages>;
  static_assert(K::kRows == Rows, "what cuda_splits counts with");
  return launch<K>(dim3(ceil_div(tile_rows(a.p), K::kRows), a.p.splits, a.p.batch * a.p.kv_heads), a, rt.stream);
}

template <class T, class Visibility, class Source = FloatSource<T>>
const char* launch_rows(const Args<typename Visibility::Params>& a, const Runtime& rt) {
  using K = PagedAttentionRows<T, Visibility, Source>;
  static_assert(K::kWarps == kSingleRows, "what cuda_splits counts with");
  return launch<K>(dim3(ceil_div(a.p.tokens * a.p.q_heads, K::kWarps), a.p.splits, a.p.batch), a, rt.stream);
}

// Few rows: the warps share out the keys instead.
template <class T, int D, class Visibility>
const char* launch_numbers(const Args<typename Visibility::Params>& a, const Runtime& rt) {
  return tile_rows(a.p) <= kFewRows ? launch_tiles<T, D, Visibility, NumberPages<T, D, kTileWarps>, kFewRows>(a, rt)
                                    : launch_tiles<T, D, Visibility, NumberPages<T, D, 1>, kManyRows>(a, rt);
}

// Pages of float32 or other head dims, and rows that are not aligned, are left to the kernel of rows.
template <class T, class Visibility>
const char* attend_numbers(const Args<typename Visibility::Params>& a, const Runtime& rt) {
  if constexpr (!is_same_v<T, float>)
    if ((a.p.dim == 64 || a.p.dim == 128) && rows_aligned(a.p))
      return a.p.dim == 64 ? launch_numbers<T, 64, Visibility>(a, rt) : launch_numbers<T, 128, Visibility>(a, rt);
  return launch_rows<T, Visibility>(a, rt);
}

// Few rows: codes become operands in registers. More: they are widened once for all of them.
template <class T, int D, class Visibility, class Source>
const char* launch_codes(const Args<typename Visibility::Params>& a, const Runtime& rt) {
  const int rows = tile_rows(a.p);
  if (rows <= kCodeRows) return launch_tiles<T, D, Visibility, CodePages<T, D, Source>, kCodeRows>(a, rt);
  return rows <= kFewRows ? launch_tiles<T, D, Visibility, WidenedPages<T, D, Source, kTileWarps>, kFewRows>(a, rt)
                          : launch_tiles<T, D, Visibility, WidenedPages<T, D, Source, 1>, kManyRows>(a, rt);
}

template <class T, class Visibility, class Source>
const char* attend_codes(const Args<typename Visibility::Params>& a, const Runtime& rt) {
  if constexpr (!is_same_v<T, float>) {
    if (queries_aligned(a.p) && a.p.dim == 64 && CodeRows<64, Source>::aligned(a.p))
      return launch_codes<T, 64, Visibility, Source>(a, rt);
    if (queries_aligned(a.p) && a.p.dim == 128 && CodeRows<128, Source>::aligned(a.p))
      return launch_codes<T, 128, Visibility, Source>(a, rt);
  }
  return launch_rows<T, Visibility, Source>(a, rt);
}

template <class T, class Visibility>
const char* merge(const Args<typename Visibility::Params>& a, const Runtime& rt) {
  using K = MergeSplits<T, Visibility>;
  if (a.p.splits == 1) return nullptr;
  return launch<K>(dim3(ceil_div(a.p.batch * a.p.tokens * a.p.q_heads, K::kWarps)), a, rt.stream);
}

// f(T{}) for the type of the queries. TILEWISE_FEW_INSTANCES keeps one: seeded bugs are compiled often.
template <class F>
const char* with_type(Type type, const F& f) {
  if (type == Type::bf16) return f(bf16{});
#ifdef TILEWISE_FEW_INSTANCES
  return "this build serves bfloat16 only";
#else
  return type == Type::f16 ? f(fp16{}) : f(float{});
#endif
}
// f(Source{}) for the codes of a format.
template <class F>
const char* with_codes(Format format, const F& f) {
  if (format == Format::int4) return f(CodeSource<4>{});
#ifndef TILEWISE_FEW_INSTANCES
  if (format == Format::int8) return f(CodeSource<8>{});
  if (format == Format::int2) return f(CodeSource<2>{});
#endif
  return f(Bfp12Source{});
}

template <class Visibility>
const char* attend_float_pages(const typename Visibility::Params& p, const Runtime& rt) {
  const Args<typename Visibility::Params> a = {p, rt.fault};
  return with_type(p.type, [&](auto type) {
    using T = decltype(type);
    const char* why = attend_numbers<T, Visibility>(a, rt);
    return why ? why : merge<T, Visibility>(a, rt);
  });
}

template <class Visibility>
const char* attend_code_pages(const typename Visibility::Params& p, const Runtime& rt) {
  const Args<typename Visibility::Params> a = {p, rt.fault};
  return with_type(p.type, [&](auto type) {
    using T = decltype(type);
    const auto attend = [&](auto source) { return attend_codes<T, Visibility, decltype(source)>(a, rt); };
    const char* why = with_codes(p.format, attend);
    return why ? why : merge<T, Visibility>(a, rt);
  });
}

}  // namespace tilewise::paged
