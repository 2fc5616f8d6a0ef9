// Checks that the family's entry points share.
#pragma once
#include "common/check.h"
#include "optim/params.h"
#include "tilewise/optim.h"

namespace tilewise {

inline int64_t blocks_of(int64_t n, int bits) {
  const int block = bits == 8 ? optim::kBlock8 : optim::kBlock;
  return (n + block - 1) / block;
}

// The kernels use 16-byte accesses on codes; torch's allocators align far better, an odd view does not.
inline void check_codes(const Check& check, const Tensor& t, const char* name, int64_t n, int bits) {
  check.dtype(t, name, {DType::u8});
  check.shape(t, name, {blocks_of(n, bits), bits == 8 ? optim::kCodeBytes8 : optim::kCodeBytes});
  check.contiguous(t, name);
  check.that(reinterpret_cast<uintptr_t>(t.data) % 16 == 0, name, "is not aligned, expected a multiple of 16 bytes");
}

}  // namespace tilewise
