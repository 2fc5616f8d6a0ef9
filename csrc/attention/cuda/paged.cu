// Attention over paged caches on CUDA.
#include "attention/cuda/paged.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {

const char* attend_paged(const PagedParams& p, const Runtime& rt) {
  return serves_sm90(p) ? paged_sm90(p, rt) : paged::attend_float_pages<WindowVisibility>(p, rt);
}

}  // namespace tilewise::attention
