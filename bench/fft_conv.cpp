// Long convolution on CPU, one thread: bench_fft_conv [--benchmark_filter=...].
#include "tilewise/fft_conv.h"

#include <benchmark/benchmark.h>

#include <vector>

#include "tilewise/runtime.h"

namespace {

using tilewise::DType;
using tilewise::Tensor;

std::vector<float> noise(int64_t count) {
  std::vector<float> values(count);
  uint32_t state = 1;
  for (float& v : values) v = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1;
  return values;
}

// u, y and their gradients [b, h, l]; k and its gradient [h, l]
struct Rows {
  int64_t b, h, l;
  std::vector<float> u = noise(b * h * l), k = noise(h * l), y = u, du = u, dk = k;

  Tensor rows(std::vector<float>& v) { return {v.data(), DType::f32, {b, h, l}}; }
  Tensor filters(std::vector<float>& v) { return {v.data(), DType::f32, {h, l}}; }
};

Rows prepare(const benchmark::State& state) {
  tilewise::set_num_threads(1);
  return {state.range(0), state.range(1), state.range(2)};
}

void count_samples(benchmark::State& state) {
  state.SetItemsProcessed(state.iterations() * state.range(0) * state.range(1) * state.range(2));
}

void forward(benchmark::State& state) {
  Rows r = prepare(state);
  tilewise::FftConvInputs in = {r.rows(r.u), r.filters(r.k)};
  for (auto _ : state) tilewise::fft_conv_forward(in, r.rows(r.y));
  count_samples(state);
}

void backward(benchmark::State& state) {
  Rows r = prepare(state);
  tilewise::FftConvInputs in = {r.rows(r.u), r.filters(r.k)};
  const Tensor du = r.rows(r.du), dk = r.filters(r.dk);
  for (auto _ : state) tilewise::fft_conv_backward(in, r.rows(r.y), {&du, &dk});
  count_samples(state);
}

BENCHMARK(forward)->Args({8, 64, 8192})->Args({8, 64, 1000})->Args({1, 8, 1 << 20})->Unit(benchmark::kMillisecond);
BENCHMARK(backward)->Args({8, 64, 8192})->Args({1, 8, 1 << 20})->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
