// The one header of the per-ISA sources (csrc/*/cpu/kernels.cpp), each compiled once per instruction set.
//
// Their rules, enforced by cmake/check_isa.cmake, keep code compiled for AVX-512 out of everything else:
//  - no C++ standard header (built with -nostdinc++), because an inline std:: function compiled here could be the copy
//    that the linker keeps for the whole program; only <stdint.h>, <stddef.h>, <immintrin.h>, params.h and this header;
//  - everything in an anonymous namespace; the family's table is the only external symbol;
//  - no dynamic initialisers (they would run on any machine), no exceptions.
#pragma once
#include "common/runtime.h"
#include "common/simd.h"

// Name of the family's table in this build: TILEWISE_ISA_TABLE(attention) -> tilewise_attention_avx2.
#define TILEWISE_CONCAT_(a, b) tilewise_##a##_##b
#define TILEWISE_CONCAT(a, b) TILEWISE_CONCAT_(a, b)
#define TILEWISE_ISA_TABLE(family) TILEWISE_CONCAT(family, TILEWISE_ISA)

namespace tilewise {
namespace {

// parallel_for with a callable: body(begin, end).
template <class F>
inline void parallel_for(const Runtime& rt, int64_t n, int64_t grain, const F& body) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  rt.parallel_for(n, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

template <class T>
inline T* scratch(const Runtime& rt, int slot, int64_t count) {
  return static_cast<T*>(rt.scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace
}  // namespace tilewise
