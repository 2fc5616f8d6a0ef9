// The fused step of AdamW without Python or torch.
#include "tilewise/optim.h"

#include <benchmark/benchmark.h>

#include <memory>
#include <vector>

#include "tilewise/runtime.h"

namespace {

using tilewise::DType;
using tilewise::Tensor;

// 64-byte aligned zeros.
struct Buffer {
  explicit Buffer(size_t bytes) : memory(new char[bytes + 64]()) {}
  void* data() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64); }
  std::unique_ptr<char[]> memory;
};

// One step of AdamW over 16 tensors with quantised states.
void adamw(benchmark::State& state, DType dtype, int bits) {
  tilewise::set_num_threads(1);
  const int64_t tensors = 16, n = state.range(0) / tensors;
  const int64_t block = bits == 8 ? 256 : 128, blocks = (n + block - 1) / block, code_bytes = block * bits / 8;
  const size_t bytes = n * tilewise::item_size(dtype);
  std::vector<Buffer> buffers;
  std::vector<tilewise::OptimizerSlot> slots(tensors);
  const auto make = [&](size_t size, DType type, std::initializer_list<int64_t> shape) {
    buffers.emplace_back(size);
    return Tensor(buffers.back().data(), type, shape);
  };
  for (tilewise::OptimizerSlot& s : slots) {
    s.param = make(bytes, dtype, {n});
    s.grad = make(bytes, dtype, {n});
    s.first = make(blocks * code_bytes, DType::u8, {blocks, code_bytes});
    s.second = make(blocks * code_bytes, DType::u8, {blocks, code_bytes});
    s.first_scales = make(blocks * 4, DType::f32, {blocks});
    s.second_scales = make(blocks * 4, DType::f32, {blocks});
    s.step = make(4, DType::f32, {});
    auto* grad = s.grad.ptr<uint16_t>();  // some finite pattern in either dtype
    for (size_t k = 0; k < bytes / 2; k++) grad[k] = static_cast<uint16_t>(0x3c00 + k % 512);
  }
  for (auto _ : state) tilewise::optimizer_step(slots.data(), slots.size(), {});
  state.SetItemsProcessed(state.iterations() * n * tensors);
  const auto state_bytes = static_cast<size_t>(4 * blocks * (code_bytes + 4));  // both are read and written
  state.SetBytesProcessed(state.iterations() * tensors * static_cast<int64_t>(3 * bytes + state_bytes));
}

}  // namespace

BENCHMARK_CAPTURE(adamw, float32_4bit, DType::f32, 4)->Arg(1 << 16)->Arg(1 << 24)->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(adamw, bfloat16_4bit, DType::bf16, 4)->Arg(1 << 16)->Arg(1 << 24)->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(adamw, float32_8bit, DType::f32, 8)->Arg(1 << 16)->Arg(1 << 24)->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(adamw, bfloat16_8bit, DType::bf16, 8)->Arg(1 << 16)->Arg(1 << 24)->Unit(benchmark::kMicrosecond);
BENCHMARK_MAIN();
