// One AdamW step of up to kMaxTensors tensors in one launch. Their addresses travel in the kernel's parameters: nothing
// is allocated, copied or waited for. (The bias corrections travel there too, so a captured graph would repeat its
// step's.)
#pragma once
#include "optim/cuda/codec.h"

namespace tilewise::optim {

constexpr int kMaxTensors = 256;

// param P [n], grad G [n]; the states are as in AdamWTensor.
struct TensorEntry {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* scales;
  int64_t n;
  float step_size, inv_correction2;
  int first_chunk;  // the first thread block that works on this tensor
  bool aligned;     // all of it to 16 bytes
};

struct StepConstants {
  float beta1, beta2, grad_weight, square_weight, decay, eps;
};

template <class P, class G>
struct AdamWStep {
  static constexpr int kThreads = 256, kMinBlocks = 2, kMinArch = 800;
  static constexpr int kChunkBlocks = kThreads / kQuad;         // state blocks per thread block
  static constexpr int kChunkElements = kChunkBlocks * kBlock;  // 8192
  static constexpr int kRun = sizeof(P) == 2 && sizeof(G) == 2 ? 8 : 4;

  struct Params {
    TensorEntry tensors[kMaxTensors];
    int count;
    StepConstants k;
  };
  static_assert(sizeof(Params) <= 32764, "the limit of kernel parameters");
  struct Smem {
    float signed_values[16];
  };

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    if (thread_id() < 16) s.signed_values[thread_id()] = signed_value(thread_id());
    sync_block();
    const int chunk = static_cast<int>(block_idx().x);
    const TensorEntry& t = q.tensors[tensor_of(q, chunk)];
    const int64_t first = static_cast<int64_t>(chunk - t.first_chunk) * kChunkElements;
    if (t.scales)
      step_quantized(t, q.k, s, first);
    else
      step_full(t, q.k, first);
  }

  // The last tensor that starts at or before `chunk`.
  SIMT_DEVICE static int tensor_of(const Params& q, int chunk) {
    int low = 0, high = q.count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (q.tensors[middle].first_chunk <= chunk ? low : high) = middle;
    }
    return low;
  }

  SIMT_DEVICE static float updated(float p, float m, float v, const TensorEntry& t, const StepConstants& k) {
    const float denominator = fmaf(sqrt_approx(v), t.inv_correction2, k.eps);
    return p * k.decay - m * t.step_size * rcp_approx(denominator);
  }

  // ---- 4-bit states: a quad of lanes per block ----
  using Lane = Quad<kRun>;
  static constexpr int kChunks = Lane::kChunks;
  using Values = float[kChunks][kRun];

  SIMT_DEVICE static void step_quantized(const TensorEntry& t, const StepConstants& k, const Smem& s, int64_t first) {
    const Lane lane{thread_id() % kQuad};
    const int64_t block = first / kBlock + thread_id() / kQuad, start = block * kBlock;
    const bool valid = start < t.n;  // the whole quad; the others go along for the collectives
    uint8_t* m_codes = static_cast<uint8_t*>(t.exp_avg) + block * kCodeBytes;
    uint8_t* v_codes = static_cast<uint8_t*>(t.exp_avg_sq) + block * kCodeBytes;
    float* scales = t.scales + 2 * block;
    Values m = {}, v = {};
    if (valid) {
      decode(m, v, lane, m_codes, v_codes, scales, k, s);
      average(m, v, lane, t, k, start);
      update(m, v, lane, t, k, start);
    }
    sync_warp();  // a quad's lanes have all read the old codes and scales
    write(m, v, lane, m_codes, v_codes, scales, valid);
  }

  SIMT_DEVICE static void decode(Values& m, Values& v, const Lane& lane, const uint8_t* m_codes, const uint8_t* v_codes,
                                 const float* scales, const StepConstants& k, const Smem& s) {
    const float m_factor = scales[0] * k.beta1, v_factor = scales[1] * k.beta2 * kFourthPowerUnit;
    uint32_t m_words[kRun], v_words[kRun];
    lane.load_codes(m_words, m_codes);
    lane.load_codes(v_words, v_codes);
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
#pragma unroll
      for (int i = 0; i < kRun; i++) {
        m[c][i] = s.signed_values[m_words[i] >> lane.shift(c) & 15] * m_factor;
        v[c][i] = unsigned_value(v_words[i] >> lane.shift(c) & 15) * v_factor;
      }
    }
  }

  SIMT_DEVICE static void average(Values& m, Values& v, const Lane& lane, const TensorEntry& t, const StepConstants& k,
                                  int64_t start) {
    Values g;
#pragma unroll
    for (int c = 0; c < kChunks; c++)
      load_run(g[c], static_cast<const G*>(t.grad), start + lane.element(c), t.n, t.aligned);
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
#pragma unroll
      for (int i = 0; i < kRun; i++) {
        m[c][i] = fmaf(g[c][i], k.grad_weight, m[c][i]);
        v[c][i] = fmaf(g[c][i] * k.square_weight, g[c][i], v[c][i]);
      }
    }
  }

  // Two halves, each of which has its loads in flight together. Moments that are not finite restart from zero, so that
  // one bad gradient does not reach the other elements of the block through its scale.
  SIMT_DEVICE static void update(Values& m, Values& v, const Lane& lane, const TensorEntry& t, const StepConstants& k,
                                 int64_t start) {
    constexpr int kHalf = kChunks / 2;
#pragma unroll
    for (int half = 0; half < kChunks; half += kHalf) {
      float p[kHalf][kRun];
#pragma unroll
      for (int c = 0; c < kHalf; c++)
        load_run(p[c], static_cast<const P*>(t.param), start + lane.element(half + c), t.n, t.aligned);
#pragma unroll
      for (int c = 0; c < kHalf; c++) {
#pragma unroll
        for (int i = 0; i < kRun; i++) {
          float &mean = m[half + c][i], &square = v[half + c][i];
          p[c][i] = updated(p[c][i], mean, square, t, k);
          const bool finite = square < INFINITY;
          mean = finite ? mean : 0;
          square = finite ? square : 0;
        }
        store_run(p[c], static_cast<P*>(t.param), start + lane.element(half + c), t.n, t.aligned);
      }
    }
  }

  SIMT_DEVICE static void write(const Values& m, const Values& v, const Lane& lane, uint8_t* m_codes, uint8_t* v_codes,
                                float* scales, bool valid) {
    float m_top = 0, v_top = 0;
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
#pragma unroll
      for (int i = 0; i < kRun; i++) {
        m_top = fmaxf(m_top, fabsf(m[c][i]));
        v_top = fmaxf(v_top, v[c][i]);
      }
    }
    const float m_scale = signed_scale(m_top), v_scale = unsigned_scale(v_top);
    write_codes(m, lane, SignedCodec(m_scale), m_codes, valid);
    write_codes(v, lane, UnsignedCodec(v_scale), v_codes, valid);
    if (valid && lane.part == 0) {
      scales[0] = m_scale;
      scales[1] = v_scale;
    }
  }

  template <class Codec>
  SIMT_DEVICE static void write_codes(const Values& x, const Lane& lane, const Codec& codec, uint8_t* codes,
                                      bool valid) {
    uint32_t words[kRun] = {};
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
#pragma unroll
      for (int i = 0; i < kRun; i++) words[i] |= codec.encode(x[c][i]) << lane.shift(c);
    }
    lane.store_codes(words, codes, valid);
  }

  // ---- 32-bit states: four elements per thread at a time ----
  SIMT_DEVICE static void step_full(const TensorEntry& t, const StepConstants& k, int64_t first) {
    const int64_t end = first + kChunkElements < t.n ? first + kChunkElements : t.n;
    float* exp_avg = static_cast<float*>(t.exp_avg);
    float* exp_avg_sq = static_cast<float*>(t.exp_avg_sq);
    for (int64_t at = first + 4 * thread_id(); at < end; at += 4 * kThreads) {
      float p[4], g[4], m[4], v[4];
      load_run(p, static_cast<const P*>(t.param), at, t.n, t.aligned);
      load_run(g, static_cast<const G*>(t.grad), at, t.n, t.aligned);
      load_run(m, exp_avg, at, t.n, t.aligned);
      load_run(v, exp_avg_sq, at, t.n, t.aligned);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        m[i] = fmaf(g[i], k.grad_weight, m[i] * k.beta1);
        v[i] = fmaf(g[i] * k.square_weight, g[i], v[i] * k.beta2);
        p[i] = updated(p[i], m[i], v[i], t, k);
      }
      store_run(m, exp_avg, at, t.n, t.aligned);
      store_run(v, exp_avg_sq, at, t.n, t.aligned);
      store_run(p, static_cast<P*>(t.param), at, t.n, t.aligned);
    }
  }
};

}  // namespace tilewise::optim
