// Advice to the kernel about memory that callers own.
#pragma once
#include <cstddef>

namespace tilewise {

// Asks for 2 MB pages behind a large output that is about to be written. Where it is fresh memory, faults of 4 KB each
// cost more than many kernels; memory that has its pages already stays as it is.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace tilewise
