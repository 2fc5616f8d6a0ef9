// Instances of the Hopper forward kernel, and their tensor maps.
#include "attention/cuda/forward_sm90.h"

#include "attention/cuda/launch.h"
#include "attention/cuda/tensor_maps.h"
#include "common/paged/cuda/launch.h"

namespace tilewise::attention {
namespace {

constexpr int64_t kCacheBytes = 32 << 20;  // of L2, for keys and values
constexpr int64_t kMostKeys = 1 << 30;     // of a sequence in pages
constexpr int kManyTokens = 64;            // fewer leave most of a block's queries idle

int common_divisor(int a, int b) {
  return b == 0 ? a : common_divisor(b, a % b);
}

template <class K>
const char* make_key_maps(ForwardSm90Args& a) {
  const ForwardParams& p = a.p;
  const bool packed = p.cu_seqlens_q;
  const int64_t rows = a.seq_lens ? a.table.page_size : packed ? p.total_k : p.seq_k;
  const int batch = a.seq_lens ? a.table.pool : packed ? 1 : p.batch;
  if (rows == 0 || batch == 0) return nullptr;
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

// Keys of a tile: as many as registers and shared memory hold. General adjusts 64 at most.
template <int D, class Mask>
constexpr int keys_of() {
  if (Mask::kGeneral) return D == 256 ? 32 : 64;
  return D == 128 && !Mask::kLongestTileLast ? 176 : 128;
}

const char* launch_forward(const ForwardSm90Args& a, const Runtime& rt) {
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
  ForwardSm90Args a = {};
  a.p = p;
  return launch_forward(a, rt);
}

bool serves_sm90(const PagedParams& p) {
  const ForwardParams f = forward_params(p);
  const int64_t rows = p.tokens;
  if (f.seq_k == kMostKeys) return false;
  return arch_runs(device_arch(), kSm90a) && p.type != paged::Type::f32 && p.tokens >= kManyTokens && p.splits == 1 &&
         p.table.page_size % 8 == 0 && p.table.pool > 0 && paged::tensor_cores_serve(p) &&
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
  return launch_forward(a, rt);
}

}  // namespace tilewise::attention
