// The core without Python or torch: link libtilewise, include the public headers.
#include <cstdint>
#include <cstdio>

#include "tilewise/runtime.h"
#include "tilewise/speculative.h"

int main() {
  using tilewise::DType;
  using tilewise::Tensor;
  int32_t parent[] = {-1, 0, 0, 2}, n_nodes = 4, seq_len = 7;
  int32_t positions[4], first_child[4], next_sibling[4];
  uint64_t ancestors[4];
  tilewise::tree_finalize(Tensor(parent, DType::i32, {1, 4}), Tensor(&n_nodes, DType::i32, {1}),
                          Tensor(&seq_len, DType::i32, {1}), Tensor(positions, DType::i32, {1, 4}),
                          Tensor(first_child, DType::i32, {1, 4}), Tensor(next_sibling, DType::i32, {1, 4}),
                          Tensor(ancestors, DType::u64, {1, 4, 1}));
  std::printf("tilewise %s on %s\npositions:", tilewise::version(), tilewise::isa());
  for (int32_t p : positions) std::printf(" %d", p);
  std::printf("\n");
}
