// The Hopper forward kernel over pages: in boxes where they have many rows, gathered where not.
#include "attention/cuda/forward_sm90_launch.h"
#include "common/paged/cuda/launch.h"

namespace tilewise::attention {
namespace {

constexpr int64_t kMostKeys = 1 << 30;  // of a sequence in pages
constexpr int kManyTokens = 64;         // fewer leave most of a block's queries idle
constexpr int kBoxRows = 32;            // fewer keep the one warp that issues boxes longer than wgmma takes for a tile

// As attention without pages sees it: the longest sequence that the table has room for.
ForwardParams forward_params(const PagedParams& p) {
  const auto of_tokens = [](const paged::TokenStrides& s) { return Strides{s.batch, s.head, s.token}; };
  const auto of_pages = [](const paged::PageStrides& s) { return Strides{s.page, s.head, s.slot}; };
  const int64_t capacity = int64_t(p.table.pages_per_row) * p.table.page_size;
  ForwardParams f = {};
  f.q = p.q, f.k = p.k_pages, f.v = p.v_pages, f.out = p.out, f.lse = p.lse;
  f.q_strides = of_tokens(p.q_strides), f.out_strides = of_tokens(p.out_strides);
  f.k_strides = of_pages(p.k_strides), f.v_strides = of_pages(p.v_strides);
  f.batch = p.batch, f.q_heads = p.q_heads, f.kv_heads = p.kv_heads;
  f.seq_q = p.tokens, f.seq_k = static_cast<int>(capacity < kMostKeys ? capacity : kMostKeys);
  f.dim = f.v_dim = p.dim;
  f.scale = p.scale;
  f.type = p.type == paged::Type::bf16 ? Type::bf16 : Type::f16;
  f.causal = p.window_left == kUnlimited && p.window_right == 0;
  f.rules.window_left = p.window_left, f.rules.window_right = f.causal ? kUnlimited : p.window_right;
  f.rules.softcap = p.softcap;
  return f;
}

template <class T, int D>
const char* launch_gathered(const ForwardSm90Args& a, const Runtime& rt) {
  return select_mask<D>(a.p, [&](auto tag) {
    using Mask = TypeOf<decltype(tag)>;
    return launch_persistent<ForwardSm90<T, D, Mask::kGeneral ? 64 : 128, Mask, GatheredKeys>>(a, rt);
  });
}
const char* launch_gathered(const ForwardSm90Args& a, const Runtime& rt) {
  return select_type16(a.p.type, [&](auto type) {
    using T = TypeOf<decltype(type)>;
#ifndef TILEWISE_FEW_INSTANCES
    if (a.p.dim > 64) return launch_gathered<T, 128>(a, rt);
#endif
    return launch_gathered<T, 64>(a, rt);
  });
}

// Whether 32 bits count the 16-byte units of a pool.
bool gathers(const paged::PageStrides& s, int pool) {
  return pool * s.page / 8 < int64_t(0xffffffff);
}

// Dense tiles of 176 keys do not consist of such boxes.
bool boxes_serve(const ForwardSm90Args& a) {
  const bool dense = !a.p.causal && causal_or_dense(a.p.rules);
  return a.table.page_size % kBoxRows == 0 && !(dense && a.p.dim == 128);
}

}  // namespace

bool serves_sm90(const PagedParams& p) {
  const ForwardParams f = forward_params(p);
  const int64_t rows = p.tokens;
  if (f.seq_k == kMostKeys) return false;
  return arch_runs(device_arch(), kSm90a) && p.type != paged::Type::f32 && p.tokens >= kManyTokens && p.splits == 1 &&
         p.dim <= 128 && p.dim % 8 == 0 && p.table.pool > 0 && paged::rows_aligned(p) &&
         gathers(p.k_strides, p.table.pool) && gathers(p.v_strides, p.table.pool) &&
         has_tensor_map(f.q_strides, p.batch, p.q_heads, rows) &&
         has_tensor_map(f.out_strides, p.batch, p.q_heads, rows) &&
         has_tensor_map(f.k_strides, p.table.pool, p.kv_heads, p.table.page_size) &&
         has_tensor_map(f.v_strides, p.table.pool, p.kv_heads, p.table.page_size) && p.lse_strides.token == 1 &&
         p.lse_strides.head == rows && p.lse_strides.batch == rows * p.q_heads;
}

const char* paged_sm90(const PagedParams& p, const Runtime& rt) {
  ForwardSm90Args a = {};
  a.p = forward_params(p);
  a.table = p.table;
  a.seq_lens = p.seq_lens;
  return boxes_serve(a) ? launch_boxed(a, rt) : launch_gathered(a, rt);
}

}  // namespace tilewise::attention
