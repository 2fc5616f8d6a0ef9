// Forward: parallel over rows in head-major order, so that a filter's spectrum, made with its first row, serves the
// rest.
#pragma once
#include "fft_conv/cpu/rows.h"

namespace tilewise {
namespace {

template <class T>
inline void finish_row(const ForwardParams& p, const Plan& plan, int64_t b, int64_t h, const Buffers& buffers) {
  Sink y = sink(row_of<T>(p.y, p.y_strides, b, h), row_of<T>(p.postgate, p.postgate_strides, b, h), p.length);
  complete<T>(p, h, input_row<T>(p, b, h), y);
  last_pass(plan, buffers.transform[0], y, p.causal ? Wrap::none : Wrap::convolution, p.length, buffers.planar);
}

// Rows [begin, end) of the head-major order: row r is batch r % B of head r / B.
template <class T>
inline void forward_rows(const ForwardParams& p, const Plan& plan, int64_t begin, int64_t end, const Buffers& buffers) {
  float *x = buffers.transform[0], *k = buffers.transform[1];
  for (int64_t row = begin; row < end;) {
    const int64_t h = row / p.batch, head_end = min_of(end, (h + 1) * p.batch);
    first_pass(plan, filter_row(p, h), k);
    for (bool first = true; row < head_end; row++, first = false) {
      const int64_t b = row - h * p.batch;
      first_pass(plan, input_row<T>(p, b, h), x);
      if (first)
        walk(plan, FirstRowJob{{k}, {x, k}});
      else
        walk(plan, ConvolutionJob{x, k});
      finish_row<T>(p, plan, b, h, buffers);
    }
  }
}

template <class T>
inline const char* forward_typed(const ForwardParams& p, const Plan& plan, const Runtime& rt) {
  int failed = 0;
  parallel_for(rt, p.batch * p.heads, rows_per_task(plan), [&](int64_t begin, int64_t end) {
    Buffers buffers;
    if (buffers.allocate(rt, plan, 2, !p.causal))
      forward_rows<T>(p, plan, begin, end, buffers);
    else
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return failed ? kOutOfMemory : nullptr;
}

const char* forward(const ForwardParams& p, const Runtime& rt) {
  const Plan* plan = p.plan(p.length, W);
  if (!plan) return kOutOfMemory;
  return with_type(p.type, [&](auto t) { return forward_typed<decltype(t)>(p, *plan, rt); });
}

}  // namespace
}  // namespace tilewise
