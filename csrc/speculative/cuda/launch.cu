// The family's CUDA table: compiled by nvcc for GPUs and by g++ for the emulator.
#include <initializer_list>

#include "speculative/cuda/attention.h"
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

const char* tree_attention(const TreeAttentionParams& p, const Runtime& rt) {
  return paged::attend_float_pages<TreeVisibility>(p, rt);
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
  if (item == 1) return run(uint8_t{});
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
