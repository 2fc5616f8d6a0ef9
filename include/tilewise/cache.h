// K and V of one layer in pages: what paged_attention and the speculative operators read and write.
#pragma once
#include "tilewise/tensor.h"

namespace tilewise {

struct Cache {
  const Tensor &k_pages, &v_pages;  // [P, page_size, Hkv, D], f32, f16 or bf16
  const Tensor& block_table;        // i32[B, pages], rows may be strided
};

}  // namespace tilewise
