#include "common/pages.h"

#include <sys/mman.h>

#include <cstdint>

namespace tilewise {

void advise_huge_pages(void* data, size_t bytes) {
  constexpr size_t kLarge = 8 << 20, kPage = 4096;
  if (bytes < kLarge) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice only: failure changes nothing
}

}  // namespace tilewise
