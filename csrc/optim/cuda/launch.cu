// The family's CUDA table: compiled by nvcc for GPUs and by g++ for the emulator.
#include "optim/cuda/launch.h"

#include "optim/cuda/quantize.h"
#include "optim/cuda/shampoo.h"
#include "optim/params.h"

namespace tilewise::optim {
namespace {

bool aligned16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// ---- one step ----

// Which launches a tensor takes part in.
bool is_rank1(const StepTensor& t) {
  return t.second.format == Format::rank1;
}
bool is_factored(const StepTensor& t) {
  return t.second.format == Format::factored;
}
bool is_structured(const StepTensor& t) {
  return t.n && (is_rank1(t) || is_factored(t));
}
bool has_bits4(const StepTensor& t) {
  return t.first.format == Format::bits4 || t.second.format == Format::bits4 || is_rank1(t);
}
bool has_bits8(const StepTensor& t) {
  return t.first.format == Format::bits8 || t.second.format == Format::bits8;
}

int64_t chunks_of(const StepTensor& t) {
  return simt::ceil_div<int64_t>(t.n, kChunk);
}
int64_t tiles_of(const StepTensor& t) {
  return simt::ceil_div<int64_t>(t.rows, kTileRows) * simt::ceil_div<int64_t>(t.columns, kTileColumns);
}
int64_t one(const StepTensor&) {
  return 1;
}

Entry entry_of(const StepTensor& t, int first_unit, bool device_counts) {
  const bool aligned = aligned16(t.param) && aligned16(t.grad) && aligned16(t.residual) && aligned16(t.first.values) &&
                       aligned16(t.second.values);
  Entry e = {t.param,         t.grad,        t.residual, t.first.values, t.first.scales,  t.second.values,
             t.second.scales, t.workspace,   t.n,        t.rows,         t.columns,       {t.k},
             t.stream,        t.step_number, first_unit, t.first.format, t.second.format, t.param_type,
             t.grad_type,     aligned};
  if (device_counts) e.step = t.step;
  return e;
}

CallConstants call_constants(const StepParams& p) {
  return {p.rule,          p.nesterov, p.stochastic_rounding, p.beta1, p.beta2, p.grad_weight,
          p.square_weight, p.l2,       p.grad_factor,         p.eps,   p.seed,  p.device};
}

// The launches of one call; the table of tensors is filled anew for each.
class Step {
 public:
  Step(const StepParams& p, void* stream) : p_(p), stream_(stream) { table_.c = call_constants(p); }

  const char* run() {
    if (p_.structured && !short_sides()) return "a row or column of 2^31 elements in a rank-1 or factored moment";
    if (p_.structured) {
      each(&tile_statistics, tiles_of, is_structured);
      each(&combine_statistics, combine_units, is_structured);
      each(&invert_mean, one, [](const StepTensor& t) { return t.n && is_factored(t); });
    }
    for (const Float param : kFloats) step(param);
    if (p_.structured) each(&publish_scales, publish_units, [](const StepTensor& t) { return t.n && is_rank1(t); });
    if (p_.device.steps) count_steps();
    return why_;
  }

 private:
  bool short_sides() const {
    for (int64_t i = 0; i < p_.count; i++)
      if (p_.tensors[i].rows > INT32_MAX || p_.tensors[i].columns > INT32_MAX) return false;
    return true;
  }

  void step(Float param) {
    const auto typed = [=](const StepTensor& t) { return t.n && t.param_type == param; };
    for (int structured = 0; structured < 2; structured++) {
      const auto belongs = [=](const StepTensor& t) { return typed(t) && is_structured(t) == structured; };
      each(bits4_step_of(param, structured), chunks_of,
           [=](const StepTensor& t) { return belongs(t) && has_bits4(t); });
      each(bits8_step_of(param, structured), chunks_of,
           [=](const StepTensor& t) { return belongs(t) && has_bits8(t); });
    }
    each(full_step_of(param), chunks_of,
         [=](const StepTensor& t) { return typed(t) && !has_bits4(t) && !has_bits8(t); });
  }

  // Launches a kernel over all tensors that belong to it, kMaxTensors at a time.
  template <class Belongs>
  void each(StepLaunch launch, int64_t (*units_of)(const StepTensor&), const Belongs& belongs) {
    int64_t units = 0;
    const auto flush = [&] {
      if (table_.count && !why_) why_ = launch(table_, static_cast<unsigned>(units), stream_);
      table_.count = 0;
      units = 0;
    };
    table_.count = 0;
    for (int64_t i = 0; i < p_.count; i++) {
      const StepTensor& t = p_.tensors[i];
      if (!belongs(t)) continue;
      if (table_.count == kMaxTensors || units + units_of(t) > INT32_MAX) flush();
      table_.tensors[table_.count++] = entry_of(t, static_cast<int>(units), p_.device.steps);
      units += units_of(t);
    }
    flush();
  }

  void count_steps() {
    CountSteps::Params q = {};
    q.device = p_.device;
    for (int64_t i = 0; i < p_.count && !why_; i++) {
      q.steps[q.count++] = p_.tensors[i].step;
      if (q.count < CountSteps::kMaxSteps && i + 1 < p_.count) continue;
      why_ = simt::launch<CountSteps>(dim3(simt::ceil_div(q.count, CountSteps::kThreads)), q, stream_);
      q.count = 0;
    }
  }

  static constexpr Float kFloats[] = {Float::f32, Float::bf16, Float::f16};
  const StepParams& p_;
  void* stream_;
  TensorTable table_ = {};
  const char* why_ = nullptr;
};

const char* step(const StepParams& p, const Runtime& rt) {
  return Step(p, rt.stream).run();
}

// ---- quantisation by itself ----

template <template <class> class Kernel, class Codec>
const char* launch_codec(const CodecParams& p, const Runtime& rt) {
  const int64_t blocks = simt::ceil_div<int64_t>(p.n, Codec::kElements);
  const auto grid = static_cast<unsigned>(simt::ceil_div<int64_t>(blocks * Codec::kLanes, kCodecThreads));
  return simt::launch<Kernel<Codec>>(dim3(grid), {p, aligned16(p.values)}, rt.stream);
}
template <template <class> class Kernel>
const char* run_codec(const CodecParams& p, const Runtime& rt) {
  return p.bits == 4 ? launch_codec<Kernel, Codec4>(p, rt) : launch_codec<Kernel, Codec8>(p, rt);
}

template <class Kernel>
const char* run_matrix_codec(const MatrixCodecParams& p, const Runtime& rt) {
  const int64_t blocks = p.batch * p.order * simt::ceil_div<int64_t>(p.order, kRowBlock);
  const auto grid = static_cast<unsigned>(simt::ceil_div<int64_t>(blocks * kLanesPerRowBlock, kCodecThreads));
  return simt::launch<Kernel>(dim3(grid), {p, p.order % 4 == 0 && aligned16(p.values)}, rt.stream);
}

const char* orthonormalize(const OrthonormalizeParams& p, const Runtime& rt) {
  const bool aligned = p.order % 4 == 0 && aligned16(p.rows) && aligned16(p.defect) && aligned16(p.out);
  const int64_t side = simt::ceil_div<int64_t>(p.order, kTile);
  const SquareLaunch launch = {p, aligned, static_cast<int>(side)};
  const dim3 grid(static_cast<unsigned>(p.batch * side * side));
  const char* why = simt::launch<SquareProduct<true>>(grid, launch, rt.stream);
  return why ? why : simt::launch<SquareProduct<false>>(grid, launch, rt.stream);
}

}  // namespace
}  // namespace tilewise::optim

extern "C" __attribute__((visibility("default"))) const tilewise::optim::Kernels tilewise_optim_cuda = {
    &tilewise::optim::step,
    &tilewise::optim::run_codec<tilewise::optim::Quantize>,
    &tilewise::optim::run_codec<tilewise::optim::Dequantize>,
    &tilewise::optim::run_matrix_codec<tilewise::optim::EncodeMatrix>,
    &tilewise::optim::run_matrix_codec<tilewise::optim::DecodeMatrix>,
    &tilewise::optim::orthonormalize,
};
