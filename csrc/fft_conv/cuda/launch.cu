// The family's CUDA table: compiled by nvcc for GPUs and by g++ for the emulator.
#include "fft_conv/cuda/instances.h"
#include "fft_conv/cuda/reduce.h"

namespace tilewise::fft_conv {
namespace {

constexpr int kMaxGridY = 65535;

int divide_up(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

int fft_size(int64_t length) {
  int n = kSmallestFft;
  while (n < length) n *= 2;
  return n;
}

// The split of the batch depends on the sizes alone, so that sums over it have the same order on every device.
int rows_per_block(const ForwardParams& p) {
  const int64_t wanted = p.batch * p.heads / 1024, least = divide_up(p.batch, kMaxGridY);
  const int64_t rows = wanted < 4 ? 4 : wanted > 16 ? 16 : wanted;
  return static_cast<int>(rows < least ? least : rows);
}
// The filter gradient writes a partial result per block: just enough blocks to fill a GPU.
int grad_rows_per_block(const ForwardParams& p) {
  const int64_t blocks = divide_up(1024, p.heads);
  const int64_t rows = divide_up(p.batch, blocks < kMaxGridY ? blocks : kMaxGridY);
  return static_cast<int>(rows < 1 ? 1 : rows);
}

// What one call needs besides its tensors, as offsets into the workspace.
struct Workspace {
  int n, row_groups, grad_groups, partials, planes;
  size_t tables, spectrum, conj_spectrum, spectrum_scale, dots, partial_sums, bytes;

  Workspace(const ForwardParams& p, bool backward) {
    n = fft_size(p.length);
    row_groups = divide_up(p.batch, rows_per_block(p));
    grad_groups = divide_up(p.batch, grad_rows_per_block(p));
    partials = grad_groups * (p.type == Type::f32 ? 1 : partials_per_group(n));
    planes = p.type == Type::f32 || !p.causal ? 2 : 1;
    bytes = 0;
    const size_t points = static_cast<size_t>(p.heads) * n;
    tables = take(p.type == Type::f32 ? 0 : size_t{16} * factors_of(n).table_words());
    spectrum = take(points * (p.type == Type::f32 ? sizeof(float2) : 4));
    conj_spectrum = take(backward && p.type != Type::f32 ? points * 4 : 0);
    spectrum_scale = take(p.heads * sizeof(float));
    dots = take(backward ? row_groups * p.heads * sizeof(float) : 0);
    partial_sums = take(backward ? points * planes * partials * sizeof(float) : 0);
  }

 private:
  size_t take(size_t size) {
    const size_t at = bytes;
    bytes += (size + 255) / 256 * 256;
    return at;
  }
};

template <class T>
T* at(const ForwardParams& p, size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(p.workspace) + offset);
}

template <class T>
Rows<const T> rows(const void* data, Strides strides) {
  return {static_cast<const T*>(data), strides};
}
template <class T>
Rows<T> rows(void* data, Strides strides) {
  return {static_cast<T*>(data), strides};
}

// Whether every row of the tensors may be read 16 bytes at a time; null tensors may.
template <class T, class... More>
bool vectorizable(int64_t length, const Rows<T>& first, const More&... more) {
  constexpr int kVector = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(first.data) % 16 == 0 && first.strides.batch % kVector == 0 &&
                       first.strides.head % kVector == 0;
  if (length % kVector || (first.data && !aligned)) return false;
  if constexpr (sizeof...(more) > 0) return vectorizable(length, more...);
  return true;
}

template <class T>
class Call {
 public:
  Call(const ForwardParams& p, const Runtime& rt, bool backward)
      : p_(p), stream_(rt.stream), w_(p, backward), grid_(p.heads, w_.row_groups) {}

  const char* prepare(bool plain, bool conjugate) const {
    PrepareParams q = {p_.k, p_.k_stride, p_.filter_length, length(), w_.n, static_cast<int>(p_.heads), p_.causal};
    if constexpr (is_same_v<T, float>) {
      q.spectrum32 = at<float2>(p_, w_.spectrum);
    } else {
      q.factors = factors_of(w_.n);
      q.tables = at<uint4>(p_, w_.tables);
      q.spectrum_scale = at<float>(p_, w_.spectrum_scale);
      if (plain) q.spectrum = at<uint4>(p_, w_.spectrum);
      if (conjugate) q.conj_spectrum = at<uint4>(p_, w_.conj_spectrum);
    }
    return launch_prepare(q, stream_);
  }

  // out[0] = postgate * z
  const char* forward(const void* postgate, Strides postgate_strides, void* y, Strides y_strides) const {
    ConvParams<T> c = conv(rows<T>(p_.u, p_.u_strides), rows<T>(p_.pregate, p_.pregate_strides));
    c.gate[0] = rows<T>(postgate, postgate_strides);
    c.out[0] = rows<T>(y, y_strides);
    return run(c, false);
  }

  const char* input_grad(const BackwardParams& b) const {
    ConvParams<T> c = conv(rows<T>(b.dy, b.dy_strides), rows<T>(p_.postgate, p_.postgate_strides));
    c.gate[0] = rows<T>(p_.pregate, p_.pregate_strides);
    c.out[0] = rows<T>(b.du, b.du_strides);
    if (b.dpregate || b.dskip) c.gate[1] = rows<T>(p_.u, p_.u_strides);
    c.out[1] = rows<T>(b.dpregate, b.dpregate_strides);
    if (b.dskip) c.dots = at<float>(p_, w_.dots);
    return run(c, true);
  }

  const char* filter_grad(const BackwardParams& b) const {
    FilterGradParams<T> g = {rows<T>(p_.u, p_.u_strides),    rows<T>(p_.pregate, p_.pregate_strides),
                             rows<T>(b.dy, b.dy_strides),    rows<T>(p_.postgate, p_.postgate_strides),
                             at<float>(p_, w_.partial_sums), at<uint4>(p_, w_.tables),
                             static_cast<int>(p_.batch),     length(),
                             grad_rows_per_block(p_),        !p_.causal};
    g.vector = vectorizable(p_.length, g.u, g.u_gate, g.dy, g.dy_gate);
    const dim3 grid(p_.heads, w_.grad_groups);
    if constexpr (is_same_v<T, float>) {
      return launch_filter_grad32(w_.n, grid, g, stream_);
    } else {
      return launch_filter_grad<T>(w_.n, grid, g, stream_);
    }
  }

  const char* reduce(const BackwardParams& b) const {
    const ReduceParams r = {at<float>(p_, w_.partial_sums),
                            at<float>(p_, w_.dots),
                            b.dk,
                            b.dskip,
                            p_.filter_length,
                            w_.partials,
                            w_.row_groups,
                            w_.planes,
                            w_.n,
                            length(),
                            !p_.causal};
    const int chunks = b.dk ? divide_up(p_.filter_length, ReduceGradients::kThreads) : 1;
    return launch<ReduceGradients>(dim3(p_.heads, chunks < 1 ? 1 : chunks), r, stream_);
  }

 private:
  const ForwardParams& p_;
  void* stream_;
  Workspace w_;
  dim3 grid_;

  int length() const { return static_cast<int>(p_.length); }

  ConvParams<T> conv(Rows<const T> in, Rows<const T> in_gate) const {
    ConvParams<T> c = {};
    c.in = in;
    c.in_gate = in_gate;
    c.skip = p_.skip;
    c.tables = at<uint4>(p_, w_.tables);
    c.spectrum_scale = at<float>(p_, w_.spectrum_scale);
    c.batch = static_cast<int>(p_.batch);
    c.length = length();
    c.rows_per_block = rows_per_block(p_);
    return c;
  }

  const char* run(ConvParams<T>& c, bool conjugate) const {
    c.vector = vectorizable(p_.length, c.in, c.in_gate, c.gate[0], c.gate[1], c.out[0], c.out[1]);
    if constexpr (is_same_v<T, float>) {
      c.spectrum = at<void>(p_, w_.spectrum);
      return launch_conv32(w_.n, conjugate, grid_, c, stream_);
    } else {
      c.spectrum = at<void>(p_, conjugate ? w_.conj_spectrum : w_.spectrum);
      return launch_conv<T>(w_.n, grid_, c, stream_);
    }
  }
};

bool empty(const ForwardParams& p) {
  return p.batch == 0 || p.heads == 0 || p.length == 0;
}

template <class T>
const char* forward_as(const ForwardParams& p, const Runtime& rt) {
  if (empty(p)) return nullptr;
  const Call<T> call(p, rt, false);
  if (const char* why = call.prepare(true, false)) return why;
  return call.forward(p.postgate, p.postgate_strides, p.y, p.y_strides);
}

template <class T>
const char* backward_as(const BackwardParams& b, const Runtime& rt) {
  const ForwardParams& p = b.forward;
  if (p.heads == 0) return nullptr;
  const Call<T> call(p, rt, true);
  const bool input = b.du || b.dpregate || b.dskip, any = !empty(p);
  const char* why = nullptr;
  if (any) why = call.prepare(b.dpostgate != nullptr, input);
  if (!why && any && b.dpostgate) why = call.forward(b.dy, b.dy_strides, b.dpostgate, b.dpostgate_strides);
  if (!why && any && input) why = call.input_grad(b);
  if (!why && any && b.dk) why = call.filter_grad(b);
  if (!why && (b.dk || b.dskip)) why = call.reduce(b);  // zeros where there is nothing to sum
  return why;
}

const char* forward(const ForwardParams& p, const Runtime& rt) {
  switch (p.type) {
    case Type::f16: return forward_as<fp16>(p, rt);
    case Type::bf16: return forward_as<bf16>(p, rt);
    case Type::f32: return forward_as<float>(p, rt);
  }
  return "unknown element type";
}
const char* backward(const BackwardParams& b, const Runtime& rt) {
  switch (b.forward.type) {
    case Type::f16: return backward_as<fp16>(b, rt);
    case Type::bf16: return backward_as<bf16>(b, rt);
    case Type::f32: return backward_as<float>(b, rt);
  }
  return "unknown element type";
}

int64_t forward_workspace(const ForwardParams& p) {
  return empty(p) ? 0 : static_cast<int64_t>(Workspace(p, false).bytes);
}
int64_t backward_workspace(const BackwardParams& b) {
  return empty(b.forward) ? 0 : static_cast<int64_t>(Workspace(b.forward, true).bytes);
}

static_assert(kLargestFft == 16384, "the text of unsupported()");
const char* unsupported(const ForwardParams& p) {
  return p.length > kLargestFft ? "length above 16384 on CUDA" : nullptr;
}

}  // namespace
}  // namespace tilewise::fft_conv

extern "C" __attribute__((visibility("default"))) const tilewise::fft_conv::Kernels tilewise_fft_conv_cuda = {
    &tilewise::fft_conv::forward,           &tilewise::fft_conv::backward,
    &tilewise::fft_conv::forward_workspace, &tilewise::fft_conv::backward_workspace,
    &tilewise::fft_conv::unsupported,
};
