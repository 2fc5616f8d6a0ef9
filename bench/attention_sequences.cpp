// Attention beyond one dense problem: packed sequences, block-sparse masks, and decoding over a paged cache.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "tilewise/attention.h"
#include "tilewise/runtime.h"

namespace {

using tilewise::DType;
using tilewise::Tensor;

template <class T>
struct Array : Tensor {
  std::vector<T> memory;
  Array(DType dtype, std::initializer_list<int64_t> shape) : Tensor(nullptr, dtype, shape), memory(numel()) {
    data = memory.data();
  }
};

struct Floats : Array<float> {
  explicit Floats(std::initializer_list<int64_t> shape) : Array(DType::f32, shape) {
    std::mt19937 bits(1);
    std::normal_distribution<float> normal;
    for (float& x : memory) x = normal(bits);
  }
};

void report(benchmark::State& state, double flops) {
  state.counters["flops"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
}

// Causal sequences of mixed lengths, one after the other: 8 heads of 64.
void varlen_forward(benchmark::State& state) {
  tilewise::set_num_threads(1);
  constexpr int64_t kHeads = 8, kDim = 64, kSequences = 6, kTokens = 2550;
  Array<int32_t> cu(DType::i32, {kSequences + 1});
  cu.memory = {0, 1000, 1040, 1340, 2040, 2050, kTokens};
  cu.data = cu.memory.data();
  Floats q({kTokens, kHeads, kDim}), k({kTokens, kHeads, kDim}), v({kTokens, kHeads, kDim}),
      out({kTokens, kHeads, kDim});
  Floats lse({kHeads, kTokens});
  tilewise::AttentionOptions options;
  options.causal = true;
  for (auto _ : state) tilewise::attention_varlen_forward(q, k, v, {cu, cu, {}, {}}, out, lse, options);
  double pairs = 0;
  for (int64_t b = 0; b < kSequences; b++)
    pairs += 0.5 * (cu.memory[b + 1] - cu.memory[b]) * (cu.memory[b + 1] - cu.memory[b]);
  report(state, 4 * pairs * kHeads * kDim);
}
BENCHMARK(varlen_forward)->Unit(benchmark::kMillisecond);

// The share of blocks of 64 that is kept, in percent: 4 heads of 64 at 4096.
void block_sparse_forward(benchmark::State& state) {
  tilewise::set_num_threads(1);
  constexpr int64_t kHeads = 4, kLength = 4096, kDim = 64, kBlocks = kLength / 64;
  Floats q({1, kHeads, kLength, kDim}), k({1, kHeads, kLength, kDim}), v({1, kHeads, kLength, kDim});
  Floats out({1, kHeads, kLength, kDim}), lse({1, kHeads, kLength});
  Array<uint8_t> blocks(DType::boolean, {1, kHeads, kBlocks, kBlocks});
  std::mt19937 bits(1);
  for (uint8_t& kept : blocks.memory) kept = static_cast<int64_t>(bits() % 100) < state.range(0);
  tilewise::AttentionOptions options;
  options.blocks = &blocks;
  options.block_q = options.block_k = 64;
  for (auto _ : state) tilewise::attention_forward(q, k, v, out, lse, options);
  const double kept = std::accumulate(blocks.memory.begin(), blocks.memory.end(), 0.0);
  report(state, 4 * kept * 64 * 64 * kDim);
}
BENCHMARK(block_sparse_forward)->ArgName("percent")->Arg(10)->Arg(25)->Arg(50)->Arg(100)->Unit(benchmark::kMillisecond);

// One token behind 8192 keys in pages of 16, out of order: 32 query heads on 8, head dim 128, float32.
void paged_decode(benchmark::State& state) {
  tilewise::set_num_threads(1);
  constexpr int64_t kHeads = 32, kKvHeads = 8, kDim = 128, kPage = 16;
  const int64_t keys = state.range(0), pages = keys / kPage;
  Floats q({1, kHeads, 1, kDim}), out({1, kHeads, 1, kDim}), lse({1, kHeads, 1});
  Floats k_pages({pages, kPage, kKvHeads, kDim}), v_pages({pages, kPage, kKvHeads, kDim});
  Array<int32_t> table(DType::i32, {1, pages}), lengths(DType::i32, {1});
  for (int64_t i = 0; i < pages; i++) table.memory[i] = static_cast<int32_t>(i * 7 % pages);
  lengths.memory[0] = static_cast<int32_t>(keys);
  for (auto _ : state) tilewise::paged_attention(q, {k_pages, v_pages, table}, lengths, out, lse);
  report(state, 4.0 * kHeads * kDim * keys);
  state.SetBytesProcessed(state.iterations() * (k_pages.memory.size() + v_pages.memory.size()) * sizeof(float));
}
BENCHMARK(paged_decode)->ArgName("keys")->Arg(8192)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
