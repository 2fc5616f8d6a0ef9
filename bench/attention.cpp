// The main path of attention without Python: bench_attention [--benchmark_filter=...]. The rate is in FLOP/s.
#include "tilewise/attention.h"

#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "tilewise/runtime.h"

namespace {

using tilewise::DType;
using tilewise::Tensor;

constexpr int64_t kHeads = 8;

struct Array : Tensor {
  std::vector<float> memory;
  Array(std::initializer_list<int64_t> shape, bool random) : Tensor(nullptr, DType::f32, shape), memory(numel()) {
    std::mt19937 bits(1);
    std::normal_distribution<float> normal;
    if (random)
      for (float& x : memory) x = normal(bits);
    data = memory.data();
  }
};

struct Inputs {
  Array q, k, v, out, lse;
  Inputs(int64_t length, int64_t dim)
      : q({1, kHeads, length, dim}, true),
        k({1, kHeads, length, dim}, true),
        v({1, kHeads, length, dim}, true),
        out({1, kHeads, length, dim}, false),
        lse({1, kHeads, length}, false) {}
};

void report(benchmark::State& state, double products) {
  const double length = state.range(0), dim = state.range(1);
  state.counters["flops"] =
      benchmark::Counter(products * kHeads * length * length * dim,  // causal: half of 2 a product
                         benchmark::Counter::kIsIterationInvariantRate);
}

void causal_forward(benchmark::State& state) {
  tilewise::set_num_threads(1);
  Inputs in(state.range(0), state.range(1));
  for (auto _ : state) tilewise::attention_forward(in.q, in.k, in.v, in.out, in.lse, {true});
  report(state, 2);
}

void causal_backward(benchmark::State& state) {
  tilewise::set_num_threads(1);
  Inputs in(state.range(0), state.range(1)), grads(state.range(0), state.range(1));
  tilewise::attention_forward(in.q, in.k, in.v, in.out, in.lse, {true});
  for (auto _ : state)
    tilewise::attention_backward(grads.out, in.q, in.k, in.v, in.out, in.lse, grads.q, grads.k, grads.v, grads.lse,
                                 {true});
  report(state, 5);
}

BENCHMARK(causal_forward)->ArgNames({"length", "dim"})->Args({1024, 64})->Args({2048, 128});
BENCHMARK(causal_backward)->ArgNames({"length", "dim"})->Args({1024, 64})->Args({2048, 128});

}  // namespace

BENCHMARK_MAIN();
