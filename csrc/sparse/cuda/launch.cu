// The family's CUDA table: compiled by nvcc for GPUs and by g++ for the emulator.
#include <type_traits>

#include "sparse/cuda/nm_backward.h"
#include "sparse/cuda/nm_float.h"
#include "sparse/cuda/nm_forward.h"
#include "sparse/params.h"

namespace tilewise::sparse {
namespace {

dim3 blocks(int64_t n, int64_t per_x, int64_t m, int64_t per_y) {
  return dim3(unsigned(ceil_div(n, per_x)), unsigned(ceil_div(m, per_y)));
}

// Whether rows of 16-bit elements that start at p, `stride` apart, can be read 16 bytes at a time.
bool aligned(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 8 == 0;
}

// Calls launch.template operator()<T, kAligned>; tests that compile the kernels anew keep one of the four.
template <class Launch>
const char* with_instance(Type type, bool is_aligned, const Launch& launch) {
#ifdef TILEWISE_FEW_INSTANCES
  if (type == Type::bf16 && is_aligned) return launch(bf16{}, std::true_type{});
  return "this build has aligned bf16 only";
#else
  if (type == Type::bf16) return is_aligned ? launch(bf16{}, std::true_type{}) : launch(bf16{}, std::false_type{});
  return is_aligned ? launch(fp16{}, std::true_type{}) : launch(fp16{}, std::false_type{});
#endif
}

constexpr int64_t kNarrowRows = 16;

template <class K>
const char* launch_forward(const NmForwardParams& p, const Runtime& rt) {
  return launch<K>(blocks(p.out, K::kOut, p.rows, K::kRows), {p, rt.fault}, rt.stream);
}

const char* nm_forward(const NmForwardParams& p, const Runtime& rt) {
  if (p.type == Type::f32)
    return launch<FloatProduct<FloatForward>>(blocks(p.out, 64, p.rows, 64), {p, rt.fault}, rt.stream);
  const bool is_aligned = p.in % 64 == 0 && aligned(p.x, p.x_stride) && aligned(p.values, p.in / 2) &&
                          reinterpret_cast<uintptr_t>(p.indices) % 8 == 0;
  return with_instance(p.type, is_aligned, [&](auto t, auto a) {
    using T = decltype(t);
    if (p.rows <= kNarrowRows) return launch_forward<NmForwardNarrow<T, a.value>>(p, rt);
    return launch_forward<NmForwardWide<T, a.value>>(p, rt);
  });
}

const char* nm_grad_input(const NmGradInputParams& p, const Runtime& rt) {
  if (p.type == Type::f32)
    return launch<FloatProduct<FloatGradInput>>(blocks(p.in, 64, p.rows, 64), {p, rt.fault}, rt.stream);
  const bool is_aligned = p.in % 16 == 0 && p.out % 8 == 0 && aligned(p.dy, p.dy_stride) && aligned(p.values, 8) &&
                          reinterpret_cast<uintptr_t>(p.indices) % 2 == 0;
  return with_instance(p.type, is_aligned, [&](auto t, auto a) {
    using K = NmGradInput<decltype(t), a.value>;
    return launch<K>(blocks(p.in, K::kSide, p.rows, K::kSide), {p, rt.fault}, rt.stream);
  });
}

const char* nm_grad_values(const NmGradValuesParams& p, const Runtime& rt) {
  if (p.type == Type::f32)
    return launch<FloatProduct<FloatGradValues>>(blocks(p.in, 64, p.out, 64), {p, rt.fault}, rt.stream);
  const bool is_aligned = p.in % 8 == 0 && p.out % 8 == 0 && aligned(p.dy, p.dy_stride) && aligned(p.x, p.x_stride);
  return with_instance(p.type, is_aligned, [&](auto t, auto a) {
    using K = NmGradValues<decltype(t), a.value>;
    return launch<K>(blocks(p.in, K::kSide, p.out, K::kSide), {p, rt.fault}, rt.stream);
  });
}

const char* column_sum(const ColumnSumParams& p, const Runtime& rt) {
  const dim3 grid(unsigned(ceil_div(p.out, int64_t{32})));
  if (p.type == Type::f32) return launch<ColumnSum<float>>(grid, p, rt.stream);
  if (p.type == Type::bf16) return launch<ColumnSum<bf16>>(grid, p, rt.stream);
  return launch<ColumnSum<fp16>>(grid, p, rt.stream);
}

}  // namespace
}  // namespace tilewise::sparse

extern "C" __attribute__((visibility("default"))) const tilewise::sparse::Kernels tilewise_sparse_cuda = {
    &tilewise::sparse::nm_forward,
    &tilewise::sparse::nm_grad_input,
    &tilewise::sparse::nm_grad_values,
    &tilewise::sparse::column_sum,
    nullptr,
    nullptr,
};
