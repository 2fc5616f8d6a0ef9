// One step of tensors whose moments are held in 32 bits, or not at all, or whose second moment is factored beside
// such a first one.
#pragma once
#include "optim/cuda/master.h"
#include "optim/cuda/rule.h"
#include "optim/cuda/step.h"

namespace tilewise::optim {

template <class P>
struct FullStep {
  static constexpr int kThreads = kStepThreads, kMinBlocks = 4, kMinArch = 800;
  static constexpr int kRun = kRunOf<P>;
  using Params = TensorTable;
  struct Smem {
    StepNumbers numbers;
  };

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    if (skipped(q.c.device)) return;
    const int chunk = static_cast<int>(block_idx().x);
    const Entry& t = q.tensor_of(chunk);
    if (thread_id() == 0) s.numbers = numbers_of(t, q.c);
    sync_block();
    const int64_t first = static_cast<int64_t>(chunk - t.first_unit) * kChunk;
    const int64_t end = first + kChunk < t.n ? first + kChunk : t.n;
    for (int64_t at = first + kRun * thread_id(); at < end; at += kRun * kThreads) step(q.c, t, s.numbers, at);
  }

  SIMT_DEVICE static void step(const CallConstants& c, const Entry& t, const StepNumbers& numbers, int64_t at) {
    const bool has_first = t.first_format == Format::f32, has_second = t.second_format == Format::f32;
    const ParamRun<P, kRun> params = {t, c, numbers.step_number};
    float p[1][kRun], g[1][kRun], m[1][kRun] = {}, v[1][kRun] = {};
    params.load(p[0], at);
    if (has_first) load_run(m[0], static_cast<const float*>(t.first), at, t.n, t.aligned);
    if (has_second) load_run(v[0], static_cast<const float*>(t.second), at, t.n, t.aligned);
    load_grad(g[0], t, at, t.n, t.aligned);
    if (t.structured()) read_factors(v[0], t, at);
    Update{c, numbers, has_first, t.structured()}(p, g, m, v);
    if (has_first) store_run(m[0], static_cast<float*>(t.first), at, t.n, t.aligned);
    if (has_second) store_run(v[0], static_cast<float*>(t.second), at, t.n, t.aligned);
    params.store(p[0], at);
  }

  SIMT_DEVICE static void read_factors(float (&v)[kRun], const Entry& t, int64_t at) {
    const float inverse_mean = *Workspace(t).inverse_mean(t);
    for_each_place<kRun>(t.second_scales, Place(at, t), t,
                         [&](int i, float row, float column) { v[i] = row * inverse_mean * column; });
  }
};

}  // namespace tilewise::optim
