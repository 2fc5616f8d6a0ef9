// Probes of the instructions that run everywhere: 16 raw words per thread in, 16 out. golden.py lists them with their
// inputs and models; a GPU's answers are recorded in tests/golden.
#include "probe.h"
#include "simt/philox.h"

namespace probes {
namespace {

// ---- instructions of a single thread ----

struct ScalarProbe {
  static constexpr int kThreads = 128, kMinArch = 800;
  using Params = probes::Params;
  struct Smem {};

  static SIMT_DEVICE uint32_t approximate(uint32_t op, float x) {
    switch (op) {
      case id("exp2_approx"): return f32_bits(exp2_approx(x));
      case id("log2_approx"): return f32_bits(log2_approx(x));
      case id("rcp_approx"): return f32_bits(rcp_approx(x));
      case id("rsqrt_approx"): return f32_bits(rsqrt_approx(x));
      case id("sqrt_approx"): return f32_bits(sqrt_approx(x));
      case id("tanh_approx"): return f32_bits(tanh_approx(x));
    }
    return kUnknown;
  }

  static SIMT_DEVICE uint32_t convert(uint32_t op, uint32_t a, uint32_t b) {
    const float x = bits_f32(a), y = bits_f32(b);
    const uint16_t half = static_cast<uint16_t>(a);
    switch (op) {
      case id("from_f32_bf16"): return from_f32<bf16>(x).bits;
      case id("from_f32_fp16"): return from_f32<fp16>(x).bits;
      case id("to_f32_bf16"): return f32_bits(to_f32(bf16{half}));
      case id("to_f32_fp16"): return f32_bits(to_f32(fp16{half}));
      case id("pack2_bf16"): return pack2<bf16>(x, y);
      case id("pack2_fp16"): return pack2<fp16>(x, y);
      case id("unpack2_bf16"): return f32_bits(unpack2<bf16>(a).x) ^ f32_bits(unpack2<bf16>(a).y);
      case id("unpack2_fp16"): return f32_bits(unpack2<fp16>(a).x) ^ f32_bits(unpack2<fp16>(a).y);
      case id("to_tf32"): return to_tf32(x);
      case id("max_nan"): return f32_bits(max_nan(x, y));
    }
    return kUnknown;
  }

  static SIMT_DEVICE uint32_t packed(uint32_t op, uint32_t a, uint32_t b, uint32_t c) {
    switch (op) {
      case id("hfma2_fp16"): return hfma2(a, b, c);
      case id("hfma2_bf16"): return hfma2<bf16>(a, b, c);
      case id("hmul2_fp16"): return hmul2(a, b);
      case id("hmul2_bf16"): return hmul2<bf16>(a, b);
      case id("hadd2_fp16"): return hadd2(a, b);
      case id("hadd2_bf16"): return hadd2<bf16>(a, b);
      case id("hneg2"): return hneg2(a);
    }
    return kUnknown;
  }

  static SIMT_DEVICE uint32_t bits(uint32_t op, uint32_t a, uint32_t b, uint32_t c) {
    switch (op) {
      case id("popc"): return popc(a);
      case id("clz"): return clz(a);
      case id("find_first_set"): return find_first_set(a);
      case id("bit_reverse"): return bit_reverse(a);
      case id("funnel_shift_left"): return funnel_shift_left(a, b, c);
      case id("funnel_shift_right"): return funnel_shift_right(a, b, c);
      case id("prmt"): return prmt(a, b, c);
      case id("lop3_xor"): return lop3<0x96>(a, b, c);
      case id("lop3_majority"): return lop3<0xe8>(a, b, c);
    }
    return kUnknown;
  }

  static SIMT_DEVICE void run(const Params& p, Smem&) {
    const size_t i = static_cast<size_t>(block_idx().x * kThreads + thread_id()) * kWords;
    const uint32_t a = p.in[i], b = p.in[i + 1], c = p.in[i + 2];
    uint32_t result = approximate(p.op, bits_f32(a));
    if (result == kUnknown) result = convert(p.op, a, b);
    if (result == kUnknown) result = packed(p.op, a, b, c);
    if (result == kUnknown) result = bits(p.op, a, b, c);
    p.out[i] = result;
  }
};

// Words 0-1 are the key, 2-4 the counter.
struct RandomProbe {
  static constexpr int kThreads = 128, kMinArch = 800;
  using Params = probes::Params;
  struct Smem {};

  static SIMT_DEVICE void run(const Params& p, Smem&) {
    const size_t i = static_cast<size_t>(block_idx().x * kThreads + thread_id()) * kWords;
    const uint32_t* in = p.in + i;
    const uint64_t key = static_cast<uint64_t>(in[1]) << 32 | in[0];
    store16(p.out + i, p.op == id("philox") ? philox(key, in[2], in[3], in[4]) : make_uint4(kUnknown, 0, 0, 0));
  }
};

// ---- collectives and matrix instructions of a warp ----

struct WarpProbe {
  static constexpr int kThreads = 32, kMinArch = 800;
  using Params = probes::Params;
  struct Smem {
    alignas(16) uint32_t rows[kWarp][4];
  };

  static SIMT_DEVICE void shuffle(uint32_t op, const uint32_t (&x)[kWords], uint32_t (&y)[kWords]) {
    const int n = static_cast<int>(x[1]);
    switch (op) {
      case id("shfl"): y[0] = shfl(x[0], n); break;
      case id("shfl_xor"): y[0] = shfl_xor(x[0], n); break;
      case id("shfl_up"): y[0] = shfl_up(x[0], n); break;
      case id("shfl_down"): y[0] = shfl_down(x[0], n); break;
      case id("shfl_64"): {
        const uint64_t v = shfl(static_cast<uint64_t>(x[2]) << 32 | x[0], n);
        y[0] = static_cast<uint32_t>(v);
        y[1] = static_cast<uint32_t>(v >> 32);
        break;
      }
    }
  }

  static SIMT_DEVICE void vote(uint32_t op, const uint32_t (&x)[kWords], uint32_t (&y)[kWords]) {
    const int32_t s = static_cast<int32_t>(x[0]);
    switch (op) {
      case id("warp_ballot"): y[0] = warp_ballot(x[0] & 1); break;
      case id("warp_any"): y[0] = warp_any(x[0] & 1); break;
      case id("warp_all"): y[0] = warp_all(x[0] & 1); break;
      case id("match_any"): y[0] = match_any(x[0]); break;
      case id("redux_add"): y[0] = redux_add(x[0]); break;
      case id("redux_min_s32"): y[0] = static_cast<uint32_t>(redux_min(s)); break;
      case id("redux_min_u32"): y[0] = redux_min(x[0]); break;
      case id("redux_max_s32"): y[0] = static_cast<uint32_t>(redux_max(s)); break;
      case id("redux_max_u32"): y[0] = redux_max(x[0]); break;
      case id("elect_one"): y[0] = redux_add(static_cast<uint32_t>(elect_one())); break;
      case id("warp_sum"): y[0] = f32_bits(warp_sum(bits_f32(x[0]))); break;
      case id("warp_max"): y[0] = f32_bits(warp_max(bits_f32(x[0]), 8)); break;
    }
  }

  // Words 0-3 are this lane's row in shared memory, word 4 the row whose address it gives.
  static SIMT_DEVICE void load_matrix(uint32_t op, const uint32_t (&x)[kWords], uint32_t (&y)[kWords], Smem& s) {
    store16(s.rows[lane_id()], make_uint4(x[0], x[1], x[2], x[3]));
    sync_warp();
    const uint32_t* row = s.rows[x[4] % kWarp];
    uint32_t r1[1] = {}, r2[2] = {}, r4[4] = {};
    switch (op) {
      case id("ldmatrix_x1"): ldmatrix_x1(r1, row); break;
      case id("ldmatrix_x1_trans"): ldmatrix_x1_trans(r1, row); break;
      case id("ldmatrix_x2"): ldmatrix_x2(r2, row); break;
      case id("ldmatrix_x2_trans"): ldmatrix_x2_trans(r2, row); break;
      case id("ldmatrix_x4"): ldmatrix_x4(r4, row); break;
      case id("ldmatrix_x4_trans"): ldmatrix_x4_trans(r4, row); break;
    }
    y[0] = r1[0] | r2[0] | r4[0];
    y[1] = r2[1] | r4[1];
    y[2] = r4[2];
    y[3] = r4[3];
  }

  // Words: A 0-3, B 4-7, C 8-11, metadata 12.
  static SIMT_DEVICE void multiply(uint32_t op, const uint32_t (&x)[kWords], uint32_t (&y)[kWords]) {
    const uint32_t a[4] = {x[0], x[1], x[2], x[3]}, b[4] = {x[4], x[5], x[6], x[7]};
    float d[4] = {bits_f32(x[8]), bits_f32(x[9]), bits_f32(x[10]), bits_f32(x[11])};
    switch (op) {
      case id("mma_m16n8k16_bf16"): mma_m16n8k16<bf16>(d, a, b[0], b[1]); break;
      case id("mma_m16n8k16_fp16"): mma_m16n8k16<fp16>(d, a, b[0], b[1]); break;
      case id("mma_m16n8k16_zero_bf16"): mma_m16n8k16_zero<bf16>(d, a, b[0], b[1]); break;
      case id("mma_m16n8k16_zero_fp16"): mma_m16n8k16_zero<fp16>(d, a, b[0], b[1]); break;
      case id("mma_m16n8k8_tf32"): mma_m16n8k8_tf32(d, a, b[0], b[1]); break;
      case id("mma_sp_m16n8k32_bf16_0"): mma_sp_m16n8k32<bf16, 0>(d, a, b, x[12]); break;
      case id("mma_sp_m16n8k32_bf16_1"): mma_sp_m16n8k32<bf16, 1>(d, a, b, x[12]); break;
      case id("mma_sp_m16n8k32_fp16_0"): mma_sp_m16n8k32<fp16, 0>(d, a, b, x[12]); break;
      case id("mma_sp_m16n8k32_fp16_1"): mma_sp_m16n8k32<fp16, 1>(d, a, b, x[12]); break;
    }
    for (int i = 0; i < 4; i++) y[i] = f32_bits(d[i]);
  }

  static SIMT_DEVICE void multiply_other(uint32_t op, const uint32_t (&x)[kWords], uint32_t (&y)[kWords]) {
    const uint32_t a[4] = {x[0], x[1], x[2], x[3]}, a2[2] = {x[0], x[1]};
    uint32_t h[2] = {x[8], x[9]};
    int32_t d[4];
    for (int i = 0; i < 4; i++) d[i] = static_cast<int32_t>(x[8 + i]);
    switch (op) {
      case id("mma_m16n8k16_acc16"): mma_m16n8k16_acc16(h, a, x[4], x[5]); break;
      case id("mma_m16n8k16_s8"): mma_m16n8k16_s8(d, a2, x[4]); break;
      case id("mma_m16n8k32_s8"): mma_m16n8k32_s8(d, a, x[4], x[5]); break;
    }
    for (int i = 0; i < 4; i++) y[i] = op == id("mma_m16n8k16_acc16") ? h[i & 1] : static_cast<uint32_t>(d[i]);
  }

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    const size_t i = static_cast<size_t>(block_idx().x * kThreads + thread_id()) * kWords;
    uint32_t x[kWords], y[kWords];
    for (int w = 0; w < kWords; w++) x[w] = p.in[i + w];
    for (int w = 0; w < kWords; w++) y[w] = kUnknown;
    const uint32_t kind = p.in[i + kWords - 1];  // which of the functions knows the name
    if (kind == 0) shuffle(p.op, x, y);
    if (kind == 1) vote(p.op, x, y);
    if (kind == 2) load_matrix(p.op, x, y, s);
    if (kind == 3) multiply(p.op, x, y);
    if (kind == 4) multiply_other(p.op, x, y);
    for (int w = 0; w < kWords; w++) p.out[i + w] = y[w];
  }
};

// ---- memory ----

struct MemoryProbe {
  static constexpr int kThreads = 128, kMinArch = 800;
  using Params = probes::Params;
  struct Smem {
    alignas(16) uint32_t words[kThreads][4];
  };

  // Word 4 says whether to copy; otherwise the destination becomes zero.
  static SIMT_DEVICE void copy(uint32_t op, const uint32_t* in, uint32_t (&shared)[4]) {
    const bool predicate = in[4] & 1;
    for (int w = 0; w < 4; w++) shared[w] = ~in[w];
    switch (op) {
      case id("cp_async4"): cp_async4(shared, in, predicate); break;
      case id("cp_async8"): cp_async8(shared, in, predicate); break;
      case id("cp_async16"): cp_async16(shared, in, predicate); break;
    }
    cp_async_commit();
    cp_async_wait<0>();
  }

  static SIMT_DEVICE void move(uint32_t op, const uint32_t* in, uint32_t* out) {
    switch (op) {
      case id("load_store_2"): store2(out, load2(in)); break;
      case id("load_store_4"): store4(out, load4(in)); break;
      case id("load_store_8"): store8(out, load8(in)); break;
      case id("load_store_16"): store16(out, load16(in)); break;
      case id("stream_16"): store16_stream(out, load16_stream(in)); break;
      case id("const_16"): store16(out, load16_const(in)); break;
    }
  }

  // Word 0 is the old value, word 1 the operand, word 2 what cas expects. The result: old, new.
  static SIMT_DEVICE uint32_t modify(uint32_t op, uint32_t* word, uint32_t v, uint32_t expected) {
    auto* s = reinterpret_cast<int32_t*>(word);
    const int32_t sv = static_cast<int32_t>(v);
    switch (op) {
      case id("atomic_add_f32"): return f32_bits(atomic_add(reinterpret_cast<float*>(word), bits_f32(v)));
      case id("atomic_add_s32"): return static_cast<uint32_t>(atomic_add(s, sv));
      case id("atomic_add_u32"): return atomic_add(word, v);
      case id("atomic_max_s32"): return static_cast<uint32_t>(atomic_max(s, sv));
      case id("atomic_max_u32"): return atomic_max(word, v);
      case id("atomic_min_s32"): return static_cast<uint32_t>(atomic_min(s, sv));
      case id("atomic_min_u32"): return atomic_min(word, v);
      case id("atomic_or"): return atomic_or(word, v);
      case id("atomic_and"): return atomic_and(word, v);
      case id("atomic_exch"): return atomic_exch(word, v);
      case id("atomic_cas"): return atomic_cas(word, expected, v);
    }
    return kUnknown;
  }

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    const size_t i = static_cast<size_t>(block_idx().x * kThreads + thread_id()) * kWords;
    const uint32_t* in = p.in + i;
    uint32_t* out = p.out + i;
    const uint32_t kind = in[kWords - 1];
    uint32_t (&shared)[4] = s.words[thread_id()];
    if (kind == 0) {
      copy(p.op, in, shared);
      store16(out, load16(shared));
    }
    if (kind == 1) move(p.op, in, out);
    if (kind == 2) {
      out[1] = in[0];
      out[0] = modify(p.op, out + 1, in[1], in[2]);
    }
    if (kind == 3) {
      shared[1] = in[0];
      out[0] = modify(p.op, shared + 1, in[1], in[2]);
      out[1] = shared[1];
    }
  }
};

}  // namespace

SIMT_EXPORT const char* simt_probe(const char* kernel, const char* name, const uint32_t* in, uint32_t* out, int blocks,
                                   void* stream) {
  const Params p{in, out, id(name)};
  const dim3 grid(static_cast<unsigned>(blocks));
  switch (id(kernel)) {
    case id("scalar"): return launch<ScalarProbe>(grid, p, stream);
    case id("random"): return launch<RandomProbe>(grid, p, stream);
    case id("warp"): return launch<WarpProbe>(grid, p, stream);
    case id("memory"): return launch<MemoryProbe>(grid, p, stream);
  }
  return "no such probe kernel";
}

}  // namespace probes
