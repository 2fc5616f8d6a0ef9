// Attention over paged caches on CUDA, and over few queries of grouped heads: one sequence is one page.
#include "attention/cuda/paged.h"

#include "attention/cuda/launch.h"
#include "attention/packing.h"

namespace tilewise::attention {
const char* attend_paged(const PagedParams& p, const Runtime& rt) {
  return serves_sm90(p) ? paged_sm90(p, rt) : paged::attend_float_pages<WindowVisibility>(p, rt);
}

bool packs_heads(const ForwardParams& p) {
  return is_decoding(p) && p.q_heads > p.kv_heads && (p.dim == 64 || p.dim == 128);
}

const char* forward_packed(const ForwardParams& p, const Runtime& rt) {
  const paged::Args<PagedParams> a = {as_pages(p), rt.fault};
  return select_type16(p.type, [&](auto type) {
    using T = TypeOf<decltype(type)>;
    return p.dim == 64 ? paged::launch_numbers<T, 64, WindowVisibility>(a, rt)
                       : paged::launch_numbers<T, 128, WindowVisibility>(a, rt);
  });
}

}  // namespace tilewise::attention
