// The family's CUDA table: compiled by nvcc for GPUs and by g++ for the emulator.
#include <initializer_list>

#include "speculative/cuda/attention.h"
#include "speculative/cuda/attention_rows.h"
#include "speculative/cuda/build.h"
#include "speculative/cuda/pages.h"
#include "speculative/cuda/tree.h"
#include "speculative/cuda/verify.h"
#include "speculative/params.h"

namespace tilewise::speculative {
namespace {

using simt::bf16;
using simt::ceil_div;
using simt::fp16;
using simt::launch;

const char* tree_finalize(const TreeFinalizeParams& p, const Runtime& rt) {
  return launch<TreeFinalize>(dim3(p.batch), {p, rt.fault}, rt.stream);
}

const char* tree_from_template(const TreeFromTemplateParams& p, const Runtime& rt) {
  return launch<TreeFromTemplate>(dim3(p.batch), {p, rt.fault}, rt.stream);
}

const char* tree_from_sequences(const TreeFromSequencesParams& p, const Runtime& rt) {
  return launch<TreeFromSequences>(dim3(p.batch), {p}, rt.stream);
}

const char* table_update(const TableUpdateParams& p, const Runtime& rt) {
  return launch<TableUpdate>(dim3(ceil_div(p.batch * p.nodes, TableUpdate::kThreads / simt::kWarp)), {p, rt.fault},
                             rt.stream);
}

// ---- tree_attention ----

bool aligned(const void* p, std::initializer_list<int64_t> strides) {
  bool ok = reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (int64_t s : strides) ok &= s % 8 == 0;  // 8 elements of 16 bits
  return ok;
}

bool tensor_cores_serve(const TreeAttentionParams& p) {
  const PageStrides &k = p.k_strides, &v = p.v_strides;
  return (p.dim == 64 || p.dim == 128) && aligned(p.q, {p.q_strides.batch, p.q_strides.token, p.q_strides.head}) &&
         aligned(p.k_pages, {k.page, k.slot, k.head}) && aligned(p.v_pages, {v.page, v.slot, v.head});
}

template <class T, int D>
const char* attend_tiles(const TreeAttentionArgs& a, const Runtime& rt) {
  const TreeAttentionParams& p = a.p;
  const int rows = p.tokens * (p.q_heads / p.kv_heads);
  const dim3 grid(ceil_div(rows, TreeAttention<T, D>::kRows), p.splits, p.batch * p.kv_heads);
  return launch<TreeAttention<T, D>>(grid, a, rt.stream);
}

template <class T>
const char* attend_rows(const TreeAttentionArgs& a, const Runtime& rt) {
  const dim3 grid(ceil_div(a.p.tokens * a.p.q_heads, TreeAttentionRows<T>::kWarps), a.p.splits, a.p.batch);
  return launch<TreeAttentionRows<T>>(grid, a, rt.stream);
}

template <class T>
const char* attend(const TreeAttentionArgs& a, const Runtime& rt) {
  const char* why;
  if constexpr (simt::is_same_v<T, float>)
    why = attend_rows<T>(a, rt);
  else if (!tensor_cores_serve(a.p))
    why = attend_rows<T>(a, rt);
  else
    why = a.p.dim == 64 ? attend_tiles<T, 64>(a, rt) : attend_tiles<T, 128>(a, rt);
  if (why || a.p.splits == 1) return why;
  const int rows = a.p.batch * a.p.tokens * a.p.q_heads;
  return launch<MergeSplits<T>>(dim3(ceil_div(rows, MergeSplits<T>::kWarps)), a, rt.stream);
}

const char* tree_attention(const TreeAttentionParams& p, const Runtime& rt) {
  const TreeAttentionArgs a = {p, rt.fault};
  if (p.type == Type::bf16) return attend<bf16>(a, rt);
#ifdef TILEWISE_FEW_INSTANCES
  return "this build serves bfloat16 only";
#else
  return p.type == Type::f16 ? attend<fp16>(a, rt) : attend<float>(a, rt);
#endif
}

// ---- paged caches ----

bool chunks_fit(const void* p, std::initializer_list<int64_t> strides, int item, int row_bytes) {
  bool ok = reinterpret_cast<uintptr_t>(p) % 16 == 0 && row_bytes % 16 == 0;
  for (int64_t s : strides) ok &= s * item % 16 == 0;
  return ok;
}

// Calls run(Chunk{}) with the widest chunk that serves.
template <class F>
const char* with_chunk(bool wide, int item, const F& run) {
  if (wide) return run(uint4{});
  return item == 4 ? run(uint32_t{}) : run(uint16_t{});
}

const char* append_kv(const AppendParams& p, const Runtime& rt) {
  const PageStrides &ks = p.k_strides, &vs = p.v_strides;
  const bool wide = chunks_fit(p.k_pages, {ks.page, ks.slot, ks.head}, p.item_bytes, p.row_bytes) &&
                    chunks_fit(p.v_pages, {vs.page, vs.slot, vs.head}, p.item_bytes, p.row_bytes) &&
                    chunks_fit(p.k, {p.k_batch, p.k_node, p.k_head}, p.item_bytes, p.row_bytes) &&
                    chunks_fit(p.v, {p.v_batch, p.v_node, p.v_head}, p.item_bytes, p.row_bytes);
  return with_chunk(wide, p.item_bytes, [&](auto chunk) {
    using K = AppendKv<decltype(chunk)>;
    const int chunks = p.row_bytes / (int)sizeof(chunk) * p.kv_heads;
    return launch<K>(dim3(ceil_div(chunks, K::kThreads), p.nodes, p.batch), {p, rt.fault}, rt.stream);
  });
}

const char* compact_kv(const CompactParams& p, const Runtime& rt) {
  bool wide = true;
  for (int i = 0; i < p.tensors; i++)
    wide &= chunks_fit(p.pages[i], {p.strides.page, p.strides.slot, p.strides.head}, p.item_bytes, p.row_bytes);
  return with_chunk(wide, p.item_bytes, [&](auto chunk) {
    using K = CompactKv<decltype(chunk)>;
    const int chunks = p.row_bytes / (int)sizeof(chunk) * p.kv_heads;
    return launch<K>(dim3(ceil_div(chunks, K::kThreads), p.tensors, p.batch), {p, rt.fault}, rt.stream);
  });
}

const char* verify_greedy(const VerifyGreedyParams& p, const Runtime& rt) {
  const auto run = [&](auto type) {
    return launch<VerifyGreedy<decltype(type)>>(dim3(p.batch), {p, rt.fault}, rt.stream);
  };
  if (p.type == Type::f32) return run(float{});
  return p.type == Type::bf16 ? run(bf16{}) : run(fp16{});
}

}  // namespace
}  // namespace tilewise::speculative

extern "C" __attribute__((visibility("default"))) const tilewise::speculative::Kernels tilewise_speculative_cuda = {
    &tilewise::speculative::tree_finalize,       &tilewise::speculative::tree_from_template,
    &tilewise::speculative::tree_from_sequences, &tilewise::speculative::table_update,
    &tilewise::speculative::tree_attention,      &tilewise::speculative::append_kv,
    &tilewise::speculative::compact_kv,          &tilewise::speculative::verify_greedy,
};
