// The family's CUDA table: compiled by nvcc for GPUs and by g++ for the emulator.
#include "attention/cuda/forward.h"

namespace tilewise::attention {
namespace {

// Blocks of a launch: -1 if there are more than a grid holds.
int64_t grid_size(int64_t tiles, int64_t heads, int64_t batch) {
  const int64_t blocks = tiles * heads * batch;
  return blocks <= 0x7fffffff ? blocks : -1;
}

template <class T, int D, class Mask>
const char* launch_forward(const ForwardParams& p, const Runtime& rt) {
  using K = Forward<T, D, Mask>;
  const int tiles = ceil_div(p.seq_q, K::kQueries);
  const int64_t blocks = grid_size(tiles, p.q_heads, p.batch);
  if (blocks < 0) return "more than 2^31 - 1 tiles of queries";
  return blocks ? launch<K>(dim3(static_cast<unsigned>(blocks)), {p, tiles, rt.fault}, rt.stream) : nullptr;
}

const char* forward(const ForwardParams& p, const Runtime& rt) {
  if (p.type == Type::bf16) return p.dim == 64 ? p.causal ? launch_forward<bf16, 64, Causal>(p, rt) : launch_forward<bf16, 64, Dense>(p, rt) : p.causal ? launch_forward<bf16, 128, Causal>(p, rt) : launch_forward<bf16, 128, Dense>(p, rt);
  return "todo";
}

}  // namespace
}  // namespace tilewise::attention

extern "C" __attribute__((visibility("default"))) const tilewise::attention::Kernels tilewise_attention_cuda = {
    &tilewise::attention::forward,
    nullptr,
};
