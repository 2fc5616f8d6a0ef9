// 2:4 sparse linear layers at one thread, on random weights: forward of one row and of 512, dx and dvalues.
#include "tilewise/sparse.h"

#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "tilewise/runtime.h"

namespace {

using namespace tilewise;

struct Problem {
  int64_t rows, in, out;
  std::vector<float> x, dy, values, y, dx, dvalues;
  std::vector<uint8_t> indices;

  Problem(int64_t rows, int64_t in, int64_t out)
      : rows(rows), in(in), out(out), y(rows * out), dx(rows * in), dvalues(out * in / 2) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (auto [v, n] : {std::pair{&x, rows * in}, {&dy, rows * out}, {&values, out * in / 2}}) {
      v->resize(n);
      for (float& f : *v) f = normal(random);
    }
    constexpr uint8_t kLegal[] = {0x4, 0x8, 0x9, 0xc, 0xd, 0xe};
    for (int64_t i = 0; i < out * in / 8; i++)
      indices.push_back(static_cast<uint8_t>(kLegal[random() % 6] | kLegal[random() % 6] << 4));
  }
  Tensor weight_values() { return {values.data(), DType::f32, {out, in / 2}}; }
  Tensor weight_indices() { return {indices.data(), DType::u8, {out, in / 8}}; }
  Tensor matrix(std::vector<float>& v, int64_t columns) { return {v.data(), DType::f32, {rows, columns}}; }
};

template <class Call>
void run(benchmark::State& state, const Call& call) {
  set_num_threads(1);
  Problem p(state.range(0), state.range(1), state.range(2));
  for (auto _ : state) call(p);
  state.counters["FLOP/s"] =
      benchmark::Counter(static_cast<double>(p.rows) * p.in * p.out, benchmark::Counter::kIsIterationInvariantRate);
}

void forward(benchmark::State& state) {
  run(state, [](Problem& p) {
    nm_linear(p.matrix(p.x, p.in), p.weight_values(), p.weight_indices(), nullptr, p.matrix(p.y, p.out));
  });
}
void grad_input(benchmark::State& state) {
  run(state, [](Problem& p) {
    nm_linear_dx(p.matrix(p.dy, p.out), p.weight_values(), p.weight_indices(), p.matrix(p.dx, p.in));
  });
}
void grad_values(benchmark::State& state) {
  run(state, [](Problem& p) {
    const Tensor dvalues(p.dvalues.data(), DType::f32, {p.out, p.in / 2});
    nm_linear_dvalues(p.matrix(p.dy, p.out), p.matrix(p.x, p.in), p.weight_indices(), dvalues);
  });
}

BENCHMARK(forward)->Args({1, 4096, 4096})->Args({512, 2048, 2048})->Unit(benchmark::kMillisecond);
BENCHMARK(grad_input)->Args({512, 2048, 2048})->Unit(benchmark::kMillisecond);
BENCHMARK(grad_values)->Args({512, 2048, 2048})->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
