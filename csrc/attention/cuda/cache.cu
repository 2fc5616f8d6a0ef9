// Caches of codes on CUDA: writing them, and attention over them.
#include "attention/cuda/cache.h"

#include "attention/cuda/paged.h"

namespace tilewise::attention {

template <class T, class Source>
const char* launch_write(const CacheWriteParams& p, const Runtime& rt) {
  using K = CacheWrite<T, Source>;
  return launch<K>(dim3(ceil_div(p.tokens * p.kv_heads, K::kWarps), 1, p.batch), {p, rt.fault}, rt.stream);
}

const char* attend_codes(const PagedParams& p, const Runtime& rt) {
  return paged::attend_code_pages<WindowVisibility>(p, rt);
}

const char* write_cache(const CacheWriteParams& p, const Runtime& rt) {
  return paged::with_type(p.type, [&](auto type) {
    using T = decltype(type);
    if (p.format == paged::Format::native) return launch_write<T, paged::FloatSource<T>>(p, rt);
    return paged::with_codes(p.format, [&](auto source) { return launch_write<T, decltype(source)>(p, rt); });
  });
}

}  // namespace tilewise::attention
