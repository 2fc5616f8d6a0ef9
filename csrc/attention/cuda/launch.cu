// The family's CUDA table: compiled by nvcc for GPUs and by g++ for the emulator.
#include "attention/cuda/launch.h"

namespace tilewise::attention {
namespace {

// Whether every row of [batch, heads, rows, dim] 16-bit values starts on 16 bytes. Strides of single steps are unused.
bool aligned16(const void* base, const Strides& s, int batch, int heads, int64_t rows) {
  const auto multiple = [](int64_t stride, int64_t count) { return count <= 1 || stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && multiple(s.batch, batch) && multiple(s.head, heads) &&
         multiple(s.row, rows);
}

bool fits_tensor_cores(const ForwardParams& p) {
  const bool packed = p.cu_seqlens_q;
  const int batch = packed ? 1 : p.batch;
  const int64_t rows_q = packed ? p.total_q : p.seq_q, rows_k = packed ? p.total_k : p.seq_k;
  return p.type != Type::f32 && p.scale > 0.f && aligned16(p.q, p.q_strides, batch, p.q_heads, rows_q) &&
         aligned16(p.out, p.out_strides, batch, p.q_heads, rows_q) &&
         aligned16(p.k, p.k_strides, batch, p.kv_heads, rows_k) &&
         aligned16(p.v, p.v_strides, batch, p.kv_heads, rows_k);
}

const char* forward(const ForwardParams& p, const Runtime& rt) {
  if (p.dim != p.v_dim) return no_such_instance();
  return fits_tensor_cores(p) ? forward_tensor_cores(p, rt) : "todo";
}

const char* backward(const BackwardParams& b, const Runtime& rt) {
  const ForwardParams& p = b.forward;
  if (p.dim != p.v_dim) return no_such_instance();
  return backward_tensor_cores(b, rt);
}

}  // namespace
}  // namespace tilewise::attention

extern "C" __attribute__((visibility("default"))) const tilewise::attention::Kernels tilewise_attention_cuda = {
    &tilewise::attention::forward,
    &tilewise::attention::backward,
};
