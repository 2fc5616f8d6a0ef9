// Attention over paged caches on CUDA.
#include "attention/cuda/paged.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {

const char* attend_paged(const PagedParams& p, const Runtime& rt) {
  return paged::attend_float_pages<WindowVisibility>(p, rt);
}

}  // namespace tilewise::attention
