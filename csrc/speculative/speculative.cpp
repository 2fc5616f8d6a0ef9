// The family's only argument checks, and the choice of its kernels.
#include "tilewise/speculative.h"

#include "common/check.h"
#include "common/dispatch.h"
#include "speculative/params.h"

extern "C" {
extern const tilewise::speculative::Kernels tilewise_speculative_generic;
#ifdef TILEWISE_HAS_AVX2
extern const tilewise::speculative::Kernels tilewise_speculative_avx2;
extern const tilewise::speculative::Kernels tilewise_speculative_avx512;
#endif
#ifdef TILEWISE_HAS_CUDA
extern const tilewise::speculative::Kernels tilewise_speculative_cuda;
#endif
}

namespace tilewise {
namespace {

using speculative::Kernels;

constexpr KernelSet<Kernels> kKernels = {
#ifdef TILEWISE_HAS_AVX2
    {&tilewise_speculative_generic, &tilewise_speculative_avx2, &tilewise_speculative_avx512},
#else
    {&tilewise_speculative_generic, nullptr, nullptr},
#endif
#ifdef TILEWISE_HAS_CUDA
    &tilewise_speculative_cuda,
#else
    nullptr,
#endif
    "tilewise_speculative_cuda"};

// Index tensors are small and dense: i32, contiguous, on `like`'s device.
void check_indices(const Check& check, const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
                   const Tensor& like) {
  check.dtype(t, name, {DType::i32});
  check.shape(t, name, shape);
  check.same_device(t, name, like, "parent");
  check.contiguous(t, name);
}

void check_tree(const Check& check, const Tensor& parent, const Tensor& n_nodes) {
  const int64_t nodes = parent.shape[1];
  for (int64_t b = 0; b < parent.shape[0]; b++) {
    const int32_t count = n_nodes.ptr<int32_t>()[b];
    check.that(count >= 1 && count <= nodes, "n_nodes", "[%ld] is %d, expected 1 <= n_nodes <= %ld", b, count, nodes);
    const int32_t* row = parent.ptr<int32_t>() + b * nodes;
    check.that(row[0] == -1, "parent", "[%ld, 0] is %d, expected -1 (the root)", b, row[0]);
    for (int32_t i = 1; i < count; i++)
      check.that(row[i] >= 0 && row[i] < i, "parent", "[%ld, %d] is %d, expected 0 <= parent < %d", b, i, row[i], i);
  }
}

}  // namespace

void tree_finalize(const Tensor& parent, const Tensor& n_nodes, const Tensor& seq_lens, const Tensor& positions,
                   const Tensor& first_child, const Tensor& next_sibling, const Tensor& ancestor_bits, void* stream) {
  const Check check("tree_finalize");
  check.dims(parent, "parent", 2);
  const int64_t batch = parent.shape[0], nodes = parent.shape[1], words = (nodes + 63) / 64;
  check.that(nodes <= kMaxTreeNodes, "parent", "has %ld nodes, expected at most %d", nodes, kMaxTreeNodes);
  check_indices(check, parent, "parent", {batch, nodes}, parent);
  check_indices(check, n_nodes, "n_nodes", {batch}, parent);
  check_indices(check, seq_lens, "seq_lens", {batch}, parent);
  check_indices(check, positions, "positions", {batch, nodes}, parent);
  check_indices(check, first_child, "first_child", {batch, nodes}, parent);
  check_indices(check, next_sibling, "next_sibling", {batch, nodes}, parent);
  check.dtype(ancestor_bits, "ancestor_bits", {DType::u64, DType::i64});
  check.shape(ancestor_bits, "ancestor_bits", {batch, nodes, words});
  check.same_device(ancestor_bits, "ancestor_bits", parent, "parent");
  check.contiguous(ancestor_bits, "ancestor_bits");
  if (batch == 0 || nodes == 0) return;
  if (host_checks_indices(parent.device)) check_tree(check, parent, n_nodes);

  const speculative::TreeFinalizeParams params = {
      parent.ptr<int32_t>(),      n_nodes.ptr<int32_t>(),      seq_lens.ptr<int32_t>(),       positions.ptr<int32_t>(),
      first_child.ptr<int32_t>(), next_sibling.ptr<int32_t>(), ancestor_bits.ptr<uint64_t>(), static_cast<int>(batch),
      static_cast<int>(nodes),    static_cast<int>(words)};
  run_kernel("tree_finalize", kKernels, parent.device, &Kernels::tree_finalize, params, stream);
}

}  // namespace tilewise
