// The family's CUDA table: compiled by nvcc for GPUs and by g++ for the emulator.
#include "attention/cuda/launch.h"

namespace tilewise::attention {
namespace {

struct Extent {
  int batch, heads;
  int64_t rows;
};

Extent queries(const ForwardParams& p) {
  return p.cu_seqlens_q ? Extent{1, p.q_heads, p.total_q} : Extent{p.batch, p.q_heads, p.seq_q};
}
Extent keys(const ForwardParams& p) {
  return p.cu_seqlens_q ? Extent{1, p.kv_heads, p.total_k} : Extent{p.batch, p.kv_heads, p.seq_k};
}

// A dimension of extent one is never stepped along: its stride may be anything.
bool aligned(const void* base, const Strides& s, const Extent& extent, int dim, Type type) {
  const int64_t values = type == Type::f32 ? 4 : 8;
  const auto multiple = [=](int64_t stride, int64_t count) { return count <= 1 || stride % values == 0; };
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && multiple(s.batch, extent.batch) &&
         multiple(s.head, extent.heads) && multiple(s.row, extent.rows) && dim % values == 0;
}

const char* forward(const ForwardParams& p, const Runtime& rt) {
  const bool tensor_cores = p.type != Type::f32 && rows_aligned(p);
  if (!tensor_cores) return forward_any(p, rt);
  if (packs_heads(p)) return forward_packed(p, rt);
  return serves_sm90(p) ? forward_sm90(p, rt) : forward_tensor_cores(p, rt);
}

const char* backward(const BackwardParams& b, const Runtime& rt) {
  const ForwardParams& p = b.forward;
  const bool tensor_cores = p.type != Type::f32 && rows_aligned(b);
  const char* why = tensor_cores ? backward_tensor_cores(b, rt) : backward_any(b, rt);
  if (!why && b.dbias) why = bias_gradient(b, tensor_cores, rt);
  return why || !b.dsink ? why : sink_gradient(b, rt);
}

}  // namespace

bool rows_aligned(const ForwardParams& p) {
  return aligned(p.q, p.q_strides, queries(p), p.dim, p.type) &&
         aligned(p.out, p.out_strides, queries(p), p.v_dim, p.type) &&
         aligned(p.k, p.k_strides, keys(p), p.dim, p.type) && aligned(p.v, p.v_strides, keys(p), p.v_dim, p.type);
}

bool rows_aligned(const BackwardParams& b) {
  const ForwardParams& p = b.forward;
  return rows_aligned(p) && aligned(b.dout, b.dout_strides, queries(p), p.v_dim, p.type) &&
         aligned(b.dq, b.dq_strides, queries(p), p.dim, p.type) &&
         aligned(b.dk, b.dk_strides, keys(p), p.dim, p.type) && aligned(b.dv, b.dv_strides, keys(p), p.v_dim, p.type);
}

bool rows_aligned(const ScoresParams& p) {
  return aligned(p.q, p.q_strides, {p.batch, p.q_heads, p.rows}, p.dim, p.type) &&
         aligned(p.k, p.k_strides, {p.batch, p.kv_heads, p.keys}, p.dim, p.type);
}

}  // namespace tilewise::attention

extern "C" __attribute__((visibility("default"))) const tilewise::attention::Kernels tilewise_attention_cuda = {
    &tilewise::attention::forward,      &tilewise::attention::backward,       &tilewise::attention::pack_mask,
    &tilewise::attention::attend_paged, &tilewise::attention::attend_codes,   &tilewise::attention::write_cache,
    &tilewise::attention::merge,        &tilewise::attention::merge_backward, &tilewise::attention::rope,
    &tilewise::attention::column_sums,  &tilewise::attention::block_max,
};
