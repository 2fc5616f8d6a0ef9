// Instances of the kernels that join partial results and rotate.
#include "attention/cuda/merge.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {
namespace {

constexpr int kWarps = 4;  // rows a block takes

template <class K>
const char* launch_rows(const typename K::Params& params, int64_t batch, int64_t heads, int64_t rows,
                        const Runtime& rt) {
  static_assert(K::kWarps == kWarps);
  const int64_t blocks = (batch * heads * rows + kWarps - 1) / kWarps;
  if (blocks > 0x7fffffff) return "more than 2^33 rows, expected fewer";
  return launch<K>(dim3(static_cast<unsigned>(blocks)), params, rt.stream);
}

bool chunks_fit(const void* base, const Strides& s, int dim, int values) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && s.batch % values == 0 && s.head % values == 0 &&
         s.row % values == 0 && dim % values == 0;
}

bool chunks_fit(const MergeParams& p) {
  const int values = p.type == Type::f32 ? 4 : 8;
  bool fit = chunks_fit(p.out, p.out_strides, p.dim, values);
  for (int i = 0; i < p.parts; i++) fit &= chunks_fit(p.outs[i], p.outs_strides[i], p.dim, values);
  return fit;
}
bool chunks_fit(const MergeBackwardParams& b) {
  const MergeParams& p = b.forward;
  const int values = p.type == Type::f32 ? 4 : 8;
  bool fit = chunks_fit(p) && chunks_fit(b.dout, b.dout_strides, p.dim, values);
  for (int i = 0; i < p.parts; i++) fit &= chunks_fit(b.douts[i], b.douts_strides[i], p.dim, values);
  return fit;
}

// fn(type, Number<values a lane takes>)
template <class P, class Fn>
const char* select_values(const P& params, Type type, Fn fn) {
  const bool fit = chunks_fit(params);
  return select_any_type(type, [&](auto tag) {
    constexpr int kValues = 16 / static_cast<int>(sizeof(TypeOf<decltype(tag)>));
    return fit ? fn(tag, Number<kValues>{}) : fn(tag, Number<1>{});
  });
}

}  // namespace

const char* merge(const MergeParams& p, const Runtime& rt) {
  return select_values(p, p.type, [&](auto type, auto values) {
    using K = Merge<TypeOf<decltype(type)>, decltype(values)::value>;
    return launch_rows<K>(p, p.batch, p.heads, p.rows, rt);
  });
}

const char* merge_backward(const MergeBackwardParams& b, const Runtime& rt) {
  const MergeParams& p = b.forward;
  return select_values(b, p.type, [&](auto type, auto values) {
    using K = MergeBackward<TypeOf<decltype(type)>, decltype(values)::value>;
    return launch_rows<K>(b, p.batch, p.heads, p.rows, rt);
  });
}

const char* rope(const RopeParams& p, const Runtime& rt) {
  return select_any_type(
      p.type, [&](auto type) { return launch_rows<Rope<TypeOf<decltype(type)>>>(p, p.batch, p.heads, p.rows, rt); });
}

}  // namespace tilewise::attention
