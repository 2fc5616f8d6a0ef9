// Parameters in 16 bits: stochastic rounding, or the float32 master that a bf16 parameter and its residual make.
#pragma once
#include "optim/cuda/runs.h"
#include "optim/cuda/tensors.h"
#include "simt/philox.h"

namespace tilewise::optim {

// Gradients as floats, of any type: a switch that all threads of a block take alike, for a third of the kernels.
template <int Run>
SIMT_DEVICE void load_grad(float (&g)[Run], const Entry& t, int64_t at, int64_t end, bool aligned) {
  switch (t.grad_type) {
    case Float::f32: return load_run(g, static_cast<const float*>(t.grad), at, end, aligned);
    case Float::bf16: return load_run(g, static_cast<const bf16*>(t.grad), at, end, aligned);
    case Float::f16: return load_run(g, static_cast<const fp16*>(t.grad), at, end, aligned);
  }
}

// Parameters as floats: with the residual, where there is one, those of the master.
template <class P, int Run>
SIMT_DEVICE void load_master(float (&p)[Run], const Entry& t, int64_t at, int64_t end, bool aligned) {
  load_run(p, static_cast<const P*>(t.param), at, end, aligned);
  if constexpr (is_same_v<P, bf16>) {
    if (!t.residual) return;
    RunWords<int16_t, Run> residuals;
    load_words(residuals, t.residual, at, end, aligned);
#pragma unroll
    for (int i = 0; i < Run; i++) {
      const int32_t residual = static_cast<int16_t>(residuals.element(i));
      p[i] = bits_f32(f32_bits(p[i]) + static_cast<uint32_t>(residual));
    }
  }
}

// Parameters of type P in registers, and back; `start` is a multiple of Run.
template <class P, int Run>
struct ParamRun {
  const Entry& t;
  const CallConstants& c;
  uint32_t step_number;

  SIMT_DEVICE void load(float (&p)[Run], int64_t start) const { load_master<P>(p, t, start, t.n, t.aligned); }

  SIMT_DEVICE void store(const float (&p)[Run], int64_t start) const {
    if constexpr (!is_same_v<P, float>) {
      if (c.stochastic_rounding) return store_drawn(p, start);
    }
    if constexpr (is_same_v<P, bf16>) {
      if (t.residual) return store_with_residual(p, start);
    }
    store_run(p, static_cast<P*>(t.param), start, t.n, t.aligned);
  }

 private:
  SIMT_DEVICE void store_with_residual(const float (&p)[Run], int64_t start) const {
    RunWords<P, Run> rounded = {};
    RunWords<int16_t, Run> rest = {};
#pragma unroll
    for (int i = 0; i < Run; i++) {
      const bool is_nan = !(fabsf(p[i]) <= INFINITY);
      const uint32_t master = is_nan ? 0x7fc00000u : f32_bits(p[i]), top = (master + 0x8000) >> 16;
      rounded.word[i / 2] |= top << 16 * (i & 1);
      rest.word[i / 2] |= ((master - (top << 16)) & 0xffff) << 16 * (i & 1);
    }
    store_words(rounded, static_cast<P*>(t.param), start, t.n, t.aligned);
    store_words(rest, t.residual, start, t.n, t.aligned);
  }

  // Eight consecutive elements share an evaluation of Philox, 16 bits each.
  SIMT_DEVICE void store_drawn(const float (&p)[Run], int64_t start) const {
    static_assert(Run == 8, "one evaluation");
    const uint64_t group = static_cast<uint64_t>(start) / 8, key = c.seed | static_cast<uint64_t>(t.stream) << 32;
    const uint4 drawn = philox(key, static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), step_number);
    const uint32_t draws[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
    RunWords<P, Run> rounded;
#pragma unroll
    for (int i = 0; i < Run; i += 2) {
      const uint32_t r = draws[i / 2];
      rounded.word[i / 2] = round_up_by(p[i], r & 0xffff) | round_up_by(p[i + 1], r >> 16) << 16;
    }
    store_words(rounded, static_cast<P*>(t.param), start, t.n, t.aligned);
  }

  // x rounded up in magnitude with the probability of its place between its neighbours; r has 16 random bits.
  SIMT_DEVICE static uint32_t round_up_by(float x, uint32_t r) {
    const float a = fabsf(x);
    if constexpr (is_same_v<P, bf16>) {
      return a < INFINITY ? (f32_bits(x) + r) >> 16 : from_f32<bf16>(x).bits;
    } else {
      const float normal = bits_f32((f32_bits(a) + (r >> 3)) & ~0x1fffu);
      const float subnormal = floorf(fmaf(static_cast<float>(r), 0x1p-16f, a * 0x1p24f)) * 0x1p-24f;
      const float moved = a < 0x1p-14f ? subnormal : normal;
      return from_f32<fp16>(a < 65504.f ? copysignf(moved, x) : x).bits;
    }
  }
};

}  // namespace tilewise::optim
