// Backward. With x = pregate * u, z = x conv k + skip * x and y = postgate * z, for every row
//   g = postgate * dy,  dx = g corr k + skip * g,  du = pregate * dx,  dpregate = u * dx,  dpostgate = dy * z,
// and for every head, summed over the batch: dk = g corr x, dskip = sum g x.
// Parallel over heads: a head's batch is summed in order, as spectra, so the result does not depend on
// threads.
#pragma once
#include "fft_conv/cpu/rows.h"

namespace tilewise {
namespace {

template <class T>
inline Signal gradient_row(const BackwardParams& p, int64_t b, int64_t h) {
  return signal(row_of<T>(p.dy, p.dy_strides, b, h), row_of<T>(p.forward.postgate, p.forward.postgate_strides, b, h),
                p.forward.length);
}

// du and dpregate from g corr k, which stands in g.
template <class T>
inline void finish_dx(const BackwardParams& p, const Plan& plan, int64_t b, int64_t h, float* g, float* planar) {
  const ForwardParams& f = p.forward;
  const T *u = row_of<T>(f.u, f.u_strides, b, h), *pregate = row_of<T>(f.pregate, f.pregate_strides, b, h);
  Sink dx = sink(row_of<T>(p.du, p.du_strides, b, h), pregate, f.length);
  dx.second_out = row_of<T>(p.dpregate, p.dpregate_strides, b, h);
  dx.second_gate = u;
  complete<T>(f, h, gradient_row<T>(p, b, h), dx);
  last_pass(plan, g, dx, f.causal ? Wrap::none : Wrap::correlation, f.length, planar);
}

// dpostgate from x conv k, which stands in x.
template <class T>
inline void finish_dpostgate(const BackwardParams& p, const Plan& plan, int64_t b, int64_t h, float* x, float* planar) {
  const ForwardParams& f = p.forward;
  Sink d = sink<T>(row_of<T>(p.dpostgate, p.dpostgate_strides, b, h), row_of<T>(p.dy, p.dy_strides, b, h), f.length);
  complete<T>(f, h, input_row<T>(f, b, h), d);
  last_pass(plan, x, d, f.causal ? Wrap::none : Wrap::convolution, f.length, planar);
}

// dk from its sum over the batch.
inline void finish_dk(const BackwardParams& p, const Plan& plan, int64_t h, const float* sum, float* planar) {
  const ForwardParams& f = p.forward;
  Sink dk = sink<float>(p.dk + h * f.filter_length, nullptr, f.filter_length);
  dk.plain = true;
  last_pass(plan, sum, dk, f.causal ? Wrap::none : Wrap::correlation, f.length, planar);
}

template <class T>
inline void backward_head(const BackwardParams& p, const Plan& plan, int64_t h, const Buffers& buffers) {
  const ForwardParams& f = p.forward;
  float *g = buffers.transform[0], *x = buffers.transform[1], *k = buffers.transform[2], *sum = buffers.transform[3];
  const bool wants_dx = p.du || p.dpregate;
  float* total = f.batch > kBatchChain ? buffers.transform[4] : sum;
  GradientJob job = {g, x, k, sum, total, wants_dx, p.dk != nullptr, p.dpostgate != nullptr, 0, f.batch};
  double dskip = 0;
  if (job.needs_k()) first_pass(plan, filter_row(f, h), k);
  for (int64_t b = 0; b < f.batch; b++) {
    const Signal gradient = gradient_row<T>(p, b, h), input = input_row<T>(f, b, h);
    if (p.dskip) dskip += dot<T>(gradient, input);
    if (job.needs_g()) first_pass(plan, gradient, g);
    if (job.needs_x()) first_pass(plan, input, x);
    job.row = b;
    walk(plan, job);
    if (job.wants_dx) finish_dx<T>(p, plan, b, h, g, buffers.planar);
    if (job.wants_product) finish_dpostgate<T>(p, plan, b, h, x, buffers.planar);
  }
  if (p.dskip) p.dskip[h] = float(dskip);
  if (p.dk) finish_dk(p, plan, h, total, buffers.planar);
}

template <class T>
inline const char* backward_typed(const BackwardParams& p, const Plan& plan, const Runtime& rt) {
  int failed = 0;
  const int64_t heads_per_task = max_of<int64_t>(1, rows_per_task(plan) / max_of<int64_t>(1, p.forward.batch));
  parallel_for(rt, p.forward.heads, heads_per_task, [&](int64_t begin, int64_t end) {
    Buffers buffers;
    if (!buffers.allocate(rt, plan, p.forward.batch > kBatchChain ? 5 : 4, !p.forward.causal)) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t h = begin; h < end; h++) backward_head<T>(p, plan, h, buffers);
  });
  return failed ? kOutOfMemory : nullptr;
}

const char* backward(const BackwardParams& p, const Runtime& rt) {
  const Plan* plan = p.forward.plan(p.forward.length, W);
  if (!plan) return kOutOfMemory;
  return with_type(p.forward.type, [&](auto t) { return backward_typed<decltype(t)>(p, *plan, rt); });
}

}  // namespace
}  // namespace tilewise
