// Warpgroup instructions: setmaxnreg and wgmma. A product may take effect anywhere between its issue and its wait, so
// its accumulators are poisoned meanwhile.
#include <algorithm>

#include "block.h"
#include "numbers.h"
#include "race.h"

namespace simt {
namespace rt {

namespace {

constexpr int kM = 64, kK = 16, kMaxN = 256;

// All 128 threads of a warpgroup meet; the last one runs `op`.
void group_collective(void* args, GroupOp op, const char* name, Site at) {
  Fiber* f = this_fiber();
  WarpGroup& g = block->groups[f->tid / kGroupThreads];
  if (g.first_thread + kGroupThreads > block->threads) {
    fail("%s: incomplete warpgroup (%s:%d)", name, at.file, at.line);
  }
  if (g.arrived && (g.op != op || !same_site(g.site, at))) {
    fail("divergent warpgroup collective: %s at %s:%d, but %s at %s:%d", name, at.file, at.line, g.name, g.site.file,
         g.site.line);
  }
  g.op = op;
  g.name = name;
  g.site = at;
  g.args[f->tid - g.first_thread] = args;
  if (++g.arrived < kGroupThreads) return wait_here(name, at);
  g.arrived = 0;
  op(g, at);
  for (int t = kGroupThreads - 1; t >= 0; t--) {
    if (g.first_thread + t != f->tid) wake(block->fibers[g.first_thread + t]);
  }
}

// ---- operand addresses ----

uint32_t descriptor_field(uint64_t descriptor, int bit) {
  return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
}

// An operand in shared memory, as a function from (row, k) to addresses; "row" is m for A and n for B.
// K-major: row r of an atom of 8 rows holds 64 values of k; SBO leads to the next 8 rows.
// Row-major ("transposed"): line k of an atom of 8 holds 64 rows; LBO leads to the next 64 rows, SBO to the next 8 k.
struct Operand {
  uint32_t start, lbo, sbo;
  bool transposed;
  int rows;

  Operand(uint64_t descriptor, bool transposed, int rows)
      : start(descriptor_field(descriptor, 0)),
        lbo(descriptor_field(descriptor, 16)),
        sbo(descriptor_field(descriptor, 32)),
        transposed(transposed),
        rows(rows) {}

  // The 16-byte chunk that holds (row, k).
  uint32_t chunk(int row, int k) const {
    const uint32_t address = transposed ? start + row / 64 * lbo + k / 8 * sbo + k % 8 * 128 + row % 64 / 8 * 16
                                        : start + row / 8 * sbo + row % 8 * 128 + k / 8 * 16;
    return swizzle128(address);
  }
  const uint16_t* locate(int row, int k, Site at) const {
    const unsigned char* p = from_smem_addr(chunk(row, k), 16, "wgmma descriptor", at);
    return reinterpret_cast<const uint16_t*>(p) + (transposed ? row : k) % 8;
  }
  template <class F>
  void for_each_chunk(Site at, F f) const {
    const int row_step = transposed ? 8 : 1, k_step = transposed ? 1 : 8;
    for (int row = 0; row < rows; row += row_step) {
      for (int k = 0; k < kK; k += k_step) f(from_smem_addr(chunk(row, k), 16, "wgmma descriptor", at));
    }
  }
};

// Each of the four warps reads the operands on its own account.
template <class F>
void for_each_operand_chunk(const WgmmaOp& op, const WarpGroup& g, F f) {
  const auto visit = [&](const unsigned char* p) {
    for (int warp = 0; warp < 4; warp++) f(g.first_thread + warp * kWarp, p);
  };
  if (!op.shape.a_in_registers) Operand(op.desc_a, op.shape.trans_a, kM).for_each_chunk(op.site, visit);
  Operand(op.desc_b, op.shape.trans_b, op.shape.n).for_each_chunk(op.site, visit);
}

// ---- the product ----

struct Matrices {
  float a[kM][kK], b[kK][kMaxN], c[kM][kMaxN];
};

// Fragment row of register pair i of thread t: warps own 16 rows each.
int fragment_row(int t, int i) {
  return t / kWarp * 16 + t % kWarp / 4 + i % 2 * 8;
}

void gather_register_a(const WgmmaOp& op, const WarpGroup& g, Matrices& m) {
  for (int t = 0; t < kGroupThreads; t++) {
    if (memcmp(op.a[t], op.a_at_issue[t], sizeof op.a_at_issue[t])) {
      fail("wgmma: thread %d changed (or let go of) the A fragment while the operation issued at %s:%d was in flight",
           g.first_thread + t, op.site.file, op.site.line);
    }
    for (int i = 0; i < 4; i++) {
      const int k = t % 4 * 2 + i / 2 * 8;
      m.a[fragment_row(t, i)][k] = low_half(op.a_at_issue[t][i], op.shape.is_bf16);
      m.a[fragment_row(t, i)][k + 1] = high_half(op.a_at_issue[t][i], op.shape.is_bf16);
    }
  }
}

void gather_operands(const WgmmaOp& op, const WarpGroup& g, Matrices& m) {
  const bool is_bf16 = op.shape.is_bf16;
  const Operand a(op.desc_a, op.shape.trans_a, kM), b(op.desc_b, op.shape.trans_b, op.shape.n);
  if (op.shape.a_in_registers) gather_register_a(op, g, m);
  for (int k = 0; k < kK; k++) {
    for (int row = 0; row < kM && !op.shape.a_in_registers; row++) {
      m.a[row][k] = half_to_f32(*a.locate(row, k, op.site), is_bf16);
    }
    for (int n = 0; n < op.shape.n; n++) m.b[k][n] = half_to_f32(*b.locate(n, k, op.site), is_bf16);
  }
}

void multiply(int n_columns, Matrices& m) {
  for (int row = 0; row < kM; row++) {
    std::fill_n(m.c[row], n_columns, 0.f);
    for (int k = 0; k < kK; k++) {
      for (int n = 0; n < n_columns; n++) m.c[row][n] += m.a[row][k] * m.b[k][n];
    }
  }
}

void remove_poison(WgmmaOp& op) {
  const int per_thread = op.shape.n / 2;
  for (int t = 0; t < kGroupThreads && !op.saved.empty(); t++) {
    memcpy(op.d[t], &op.saved[t * per_thread], per_thread * sizeof(float));
  }
}

void poison_accumulators(WgmmaOp& op) {
  const int per_thread = op.shape.n / 2;
  op.saved.resize(kGroupThreads * per_thread);
  for (int t = 0; t < kGroupThreads; t++) {
    memcpy(&op.saved[t * per_thread], op.d[t], per_thread * sizeof(float));
    memset(op.d[t], 0xff, per_thread * sizeof(float));
  }
}

// Whoever wrote to an accumulator in flight has broken the poison.
void check_poison(const WgmmaOp& op, const WarpGroup& g) {
  if (op.saved.empty()) return;
  for (int t = 0; t < kGroupThreads; t++) {
    for (int i = 0; i < op.shape.n / 2; i++) {
      if (f32_bits(op.d[t][i]) == 0xffffffffu) continue;
      fail("wgmma: thread %d wrote accumulator %d while the operation issued at %s:%d was in flight",
           g.first_thread + t, i, op.site.file, op.site.line);
    }
  }
}

void execute(WgmmaOp& op, const WarpGroup& g) {
  static thread_local Matrices m;
  gather_operands(op, g, m);
  multiply(op.shape.n, m);
  check_poison(op, g);
  remove_poison(op);
  for (int t = 0; t < kGroupThreads; t++) {
    for (int i = 0; i < op.shape.n / 2; i++) {
      const float product = m.c[fragment_row(t, i / 2)][i / 4 * 8 + t % 4 * 2 + i % 2];
      op.d[t][i] = product + (op.accumulate ? op.d[t][i] : 0.f);
    }
  }
  op.executed = true;
}

// ---- issue ----

struct WgmmaArgs {
  WgmmaShape shape;
  float* d;
  const uint32_t* a;
  uint64_t desc_a, desc_b;
  bool accumulate;
};

void check_issue(const WarpGroup& g, const WgmmaArgs& first, Site at) {
  if (!g.fenced) {
    fail("wgmma.mma_async without wgmma.fence after the accumulators were last touched (%s:%d)", at.file, at.line);
  }
  const bool a_ok = first.shape.a_in_registers || first.desc_a >> 62 == 1;
  if (!a_ok || first.desc_b >> 62 != 1) {
    fail("wgmma: the emulator models the 128-byte swizzle only (%s:%d)", at.file, at.line);
  }
}

WgmmaOp make_op(const WarpGroup& g, Site at) {
  const auto& first = *static_cast<WgmmaArgs*>(g.args[0]);
  WgmmaOp op;
  op.shape = first.shape;
  op.desc_a = first.desc_a;
  op.desc_b = first.desc_b;
  op.accumulate = first.accumulate;
  op.group = g.commit_groups;
  op.site = at;
  for (int t = 0; t < kGroupThreads; t++) {
    const auto& x = *static_cast<WgmmaArgs*>(g.args[t]);
    if (x.desc_a != op.desc_a || x.desc_b != op.desc_b || x.accumulate != op.accumulate) {
      fail("wgmma: descriptors differ between threads %d and %d of the warpgroup (%s:%d)", g.first_thread,
           g.first_thread + t, at.file, at.line);
    }
    op.d[t] = x.d;
    op.a[t] = x.a;
    if (x.a) memcpy(op.a_at_issue[t], x.a, sizeof op.a_at_issue[t]);
  }
  return op;
}

void issue_op(WarpGroup& g, Site at) {
  check_issue(g, *static_cast<WgmmaArgs*>(g.args[0]), at);
  g.ops.push_back(make_op(g, at));
  WgmmaOp& op = g.ops.back();
  bool pending = false, same_accumulators_pending = false;
  for (const WgmmaOp& other : g.ops) {
    if (&other == &op || other.executed) continue;
    pending = true;
    if (other.d[0] == op.d[0]) same_accumulators_pending = true;
  }
  for_each_operand_chunk(op, g, [&](int tid, const unsigned char* p) { race::begin_async_read(tid, p, 16, at); });
  const bool now = block->config->async == AsyncOrder::kEager ||
                   (block->random_async() && !pending && block->random.one_in(2));  // products finish in order
  if (now) {
    execute(op, g);
  } else if (!same_accumulators_pending) {
    poison_accumulators(op);
  }
}

// Products still in flight go on guarding their accumulators, though an older product has just been added to them.
void poison_again(WarpGroup& g) {
  for (size_t i = 0; i < g.ops.size(); i++) {
    WgmmaOp& op = g.ops[i];
    const auto uses_same = [&](const WgmmaOp& other) { return !other.executed && other.d[0] == op.d[0]; };
    const bool first = std::none_of(g.ops.begin(), g.ops.begin() + static_cast<std::ptrdiff_t>(i), uses_same);
    if (!op.executed && op.saved.empty() && first) poison_accumulators(op);
  }
}

void wait_op(WarpGroup& g, Site) {
  const int complete = g.commit_groups - *static_cast<int*>(g.args[0]);
  size_t kept = 0;
  for (size_t i = 0; i < g.ops.size(); i++) {
    WgmmaOp& op = g.ops[i];
    if (op.group >= complete) {
      if (kept != i) g.ops[kept] = std::move(op);
      kept++;
      continue;
    }
    if (!op.executed) execute(op, g);
    for_each_operand_chunk(op, g, [&](int tid, const unsigned char* p) { race::end_async_read(tid, p, 16, op.site); });
  }
  g.ops.erase(g.ops.begin() + static_cast<std::ptrdiff_t>(kept), g.ops.end());
  g.fenced = false;
  poison_again(g);
}

// ---- setmaxnreg ----

struct RegisterArgs {
  int wanted;
  bool grow;
};

// The warpgroups' final counts must fit what the launch gave the block, or a GPU would hang in the .inc.
void set_max_reg_op(WarpGroup& g, Site at) {
  const auto& args = *static_cast<RegisterArgs*>(g.args[0]);
  const int at_launch = std::min(255, 65536 / block->threads) / 8 * 8;
  if (!g.registers) g.registers = at_launch;
  if (args.grow ? args.wanted < g.registers : args.wanted > g.registers) {
    fail("setmaxnreg.%s to %d from %d registers (%s:%d)", args.grow ? "inc" : "dec", args.wanted, g.registers, at.file,
         at.line);
  }
  g.registers = args.wanted;
  int total = 0;
  for (const WarpGroup& other : block->groups) {
    if (!other.registers) return;  // not yet all have spoken
    total += other.registers * kGroupThreads;
  }
  if (total <= at_launch * block->threads) return;
  fail("setmaxnreg: the warpgroups ask for %d registers, the block has %d (%s:%d)", total, at_launch * block->threads,
       at.file, at.line);
}

}  // namespace

void wgmma_fence(Site at) {
  group_collective(nullptr, [](WarpGroup& g, Site) { g.fenced = true; }, "wgmma.fence", at);
}

void wgmma(WgmmaShape shape, float* d, const uint32_t* a, uint64_t desc_a, uint64_t desc_b, bool accumulate, Site at) {
  WgmmaArgs args{shape, d, a, desc_a, desc_b, accumulate};
  group_collective(&args, issue_op, shape.a_in_registers ? "wgmma (A in registers)" : "wgmma", at);
}

void wgmma_commit(Site at) {
  group_collective(nullptr, [](WarpGroup& g, Site) { g.commit_groups++; }, "wgmma.commit_group", at);
}

void wgmma_wait(int newest_pending, Site at) {
  group_collective(&newest_pending, wait_op, "wgmma.wait_group", at);
}

void set_max_reg(int registers, bool grow, Site at) {
  RegisterArgs args{registers, grow};
  group_collective(&args, set_max_reg_op, "setmaxnreg", at);
}

}  // namespace rt
}  // namespace simt
