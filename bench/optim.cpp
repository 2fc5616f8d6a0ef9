// The fused AdamW step without Python or torch.
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

void adamw_4bit(benchmark::State& state, DType dtype) {
  tilewise::set_num_threads(1);
  const int64_t tensors = 16, n = state.range(0) / tensors, blocks = (n + 127) / 128;
  const size_t bytes = n * tilewise::item_size(dtype);
  std::vector<Buffer> buffers;
  std::vector<tilewise::AdamWSlot> slots;
  const auto make = [&](size_t size, DType type, std::initializer_list<int64_t> shape) {
    buffers.emplace_back(size);
    return Tensor(buffers.back().data(), type, shape);
  };
  for (int64_t i = 0; i < tensors; i++) {
    slots.push_back({make(bytes, dtype, {n}), make(bytes, dtype, {n}), make(blocks * 64, DType::u8, {blocks, 64}),
                     make(blocks * 64, DType::u8, {blocks, 64}), make(blocks * 8, DType::f32, {blocks, 2}),
                     make(4, DType::f32, {})});
    auto* grad = slots.back().grad.ptr<uint16_t>();  // some finite pattern in either dtype
    for (size_t k = 0; k < bytes / 2; k++) grad[k] = static_cast<uint16_t>(0x3c00 + k % 512);
  }
  for (auto _ : state) tilewise::adamw_step(slots.data(), slots.size(), {});
  state.SetItemsProcessed(state.iterations() * n * tensors);
  state.SetBytesProcessed(state.iterations() * tensors * static_cast<int64_t>(3 * bytes + 2 * 136 * blocks));
}

}  // namespace

BENCHMARK_CAPTURE(adamw_4bit, float32, DType::f32)->Arg(1 << 16)->Arg(1 << 24)->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(adamw_4bit, bfloat16, DType::bf16)->Arg(1 << 16)->Arg(1 << 24)->Unit(benchmark::kMicrosecond);
BENCHMARK_MAIN();
