// Tree attention over a paged prefix, and greedy verification: the two operators of a decoding step that take time.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <random>
#include <vector>

#include "tilewise/runtime.h"
#include "tilewise/speculative.h"

namespace {

using tilewise::DType;
using tilewise::Tensor;

// A chain of `nodes` drafts behind `prefix` tokens: 8 key heads, 32 query heads, head dim 128, pages of 16.
void tree_attention(benchmark::State& state) {
  constexpr int64_t kHeads = 32, kKvHeads = 8, kDim = 128, kPage = 16;
  const int64_t nodes = state.range(0), prefix = state.range(1), pages = (prefix + nodes + kPage - 1) / kPage;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> q(nodes * kHeads * kDim), k(pages * kPage * kKvHeads * kDim), v(k.size()), out(q.size());
  std::vector<float> lse(nodes * kHeads);
  for (auto* values : {&q, &k, &v})
    for (float& x : *values) x = normal(random);
  std::vector<int32_t> table(pages);
  for (int64_t i = 0; i < pages; i++) table[i] = static_cast<int32_t>(i * 7 % pages);
  std::vector<uint64_t> bits(nodes);
  for (int64_t i = 0; i < nodes; i++) bits[i] = ~uint64_t{0} >> (63 - i);
  int32_t length = static_cast<int32_t>(prefix);
  const Tensor k_pages(k.data(), DType::f32, {pages, kPage, kKvHeads, kDim});
  const Tensor v_pages(v.data(), DType::f32, {pages, kPage, kKvHeads, kDim});
  const Tensor block_table(table.data(), DType::i32, {1, pages});
  for (auto _ : state)
    tilewise::tree_attention(Tensor(q.data(), DType::f32, {1, nodes, kHeads, kDim}), {k_pages, v_pages, block_table},
                             Tensor(&length, DType::i32, {1}), Tensor(bits.data(), DType::u64, {1, nodes, 1}), 0.088f,
                             Tensor(out.data(), DType::f32, {1, nodes, kHeads, kDim}),
                             Tensor(lse.data(), DType::f32, {1, nodes, kHeads}), nullptr);
  state.counters["GFLOP/s"] = benchmark::Counter(4e-9 * nodes * kHeads * kDim * (prefix + nodes) * state.iterations(),
                                                 benchmark::Counter::kIsRate);
  state.SetBytesProcessed(state.iterations() * 8 * prefix * kKvHeads * kDim);
}
BENCHMARK(tree_attention)->Args({1, 8192})->Args({16, 8192})->Args({64, 8192})->Unit(benchmark::kMillisecond);

void verify_greedy(benchmark::State& state) {
  constexpr int64_t kNodes = 16, kVocab = 128256;
  std::vector<float> logits(kNodes * kVocab);
  for (size_t i = 0; i < logits.size(); i++) logits[i] = static_cast<float>(i * 2654435761u % 1000003);
  std::vector<int32_t> parent(kNodes), tokens(kNodes), path(kNodes), out(kNodes);
  for (int i = 0; i < kNodes; i++) parent[i] = i - 1;
  int32_t count = kNodes, accepted;
  for (auto _ : state)
    tilewise::verify_greedy(Tensor(parent.data(), DType::i32, {1, kNodes}),
                            Tensor(tokens.data(), DType::i32, {1, kNodes}),
                            Tensor(logits.data(), DType::f32, {1, kNodes, kVocab}), Tensor(&count, DType::i32, {1}),
                            Tensor(&accepted, DType::i32, {1}), Tensor(path.data(), DType::i32, {1, kNodes}),
                            Tensor(out.data(), DType::i32, {1, kNodes}));
}
BENCHMARK(verify_greedy)->Unit(benchmark::kMicrosecond);

}  // namespace

BENCHMARK_MAIN();
