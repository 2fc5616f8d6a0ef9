// runtime.cpp - the SIMT execution layer: fibers, scheduler, barriers, collectives, async engines, checks.
// Compile once, uninstrumented; kernels may be compiled plain, with -fsanitize=address,undefined, or with
// -fsanitize=thread (whose callbacks race.cpp implements as a shared/global-memory race checker).
#include "runtime.h"
#include <sys/mman.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <algorithm>
#include <mutex>
#include <thread>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif
#ifndef SIMT_SWITCH
#define SIMT_SWITCH 0  // 0 hand-rolled x86-64, 1 ucontext
#endif
#if SIMT_SWITCH == 1
#include <ucontext.h>
#endif

namespace simt { namespace rt {
thread_local Thread* cur = nullptr;
thread_local Block* blk = nullptr;
Config cfg;

// ---------------------------------------------------------------- context switch
#if SIMT_SWITCH == 0
extern "C" void simt_switch(void** save_sp, void* new_sp);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#endif
struct Stack { unsigned char* lo; size_t size; };
static std::mutex mu;
static std::vector<Stack> stack_pool;  // shared by all worker threads
static Stack get_stack() {
  std::lock_guard<std::mutex> g(mu);
  if (!stack_pool.empty()) { Stack s = stack_pool.back(); stack_pool.pop_back(); return s; }
  size_t size = cfg.stack_kb * 1024, guard = 4096;
  auto* p = (unsigned char*)mmap(nullptr, size + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) { perror("mmap"); abort(); }
  mprotect(p, guard, PROT_NONE);
  return {p + guard, size};
}
struct Ctx {  // one per fiber plus one for the scheduler
#if SIMT_SWITCH == 1
  ucontext_t uc;
#else
  void* sp = nullptr;
#endif
  const void* bottom = nullptr; size_t size = 0; void* fake = nullptr;
};
struct Fiber : Thread {
  Ctx ctx; Stack stack; bool alive = true, ready = true;
  const char* what = "running"; Site site{"", 0}; uint64_t *wait_bar = nullptr; uint32_t wait_parity = 0;
  std::vector<CpOp> cp; int cp_groups = 0; std::vector<StoreOp> st; int st_groups = 0;
};
static Ctx*& main_ctx() { static thread_local Ctx* c = nullptr; return c; }
static void fiber_main();
static void switch_ctx(Ctx* from, Ctx* to, bool from_dies = false) {
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(from_dies ? nullptr : &from->fake, to->bottom, to->size);
#else
  (void)from_dies;
#endif
#if SIMT_SWITCH == 1
  swapcontext(&from->uc, &to->uc);
#else
  simt_switch(&from->sp, to->sp);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}
static void prepare(Fiber* f) {
  f->stack = get_stack();
  f->ctx.bottom = f->stack.lo; f->ctx.size = f->stack.size;
#if SIMT_SWITCH == 1
  getcontext(&f->ctx.uc); f->ctx.uc.uc_stack.ss_sp = f->stack.lo; f->ctx.uc.uc_stack.ss_size = f->stack.size; f->ctx.uc.uc_link = nullptr;
  makecontext(&f->ctx.uc, fiber_main, 0);
#else
  auto* top = (void**)(f->stack.lo + f->stack.size - f->tid * 192 % 4096);  // colour the tops: page-aligned stacks would share L1 sets
  *--top = nullptr;  // fake return address; rsp % 16 == 8 at entry
  *--top = (void*)fiber_main;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f->ctx.sp = top;
#endif
}

// ---------------------------------------------------------------- errors
[[noreturn]] void fail(const char* fmt, ...) {
  char buf[8192]; va_list ap; va_start(ap, fmt); vsnprintf(buf, sizeof buf, fmt, ap); va_end(ap);
  Block* b = blk;
  if (b->error.empty()) {
    char head[160];
    if (cur) snprintf(head, sizeof head, "block (%u,%u,%u) thread %d (warp %d lane %d): ", cur->block.x, cur->block.y, cur->block.z, cur->tid, cur->warp, cur->lane);
    else snprintf(head, sizeof head, "block (%u,%u,%u): ", b->bidx.x, b->bidx.y, b->bidx.z);
    b->error = std::string(head) + buf;
  }
  if (!cur) throw Failed{};
  Fiber* f = (Fiber*)cur;
  switch_ctx(&f->ctx, main_ctx());  // abandon the block: the scheduler never resumes it
  abort();
}

// ---------------------------------------------------------------- scheduler
static uint32_t rnd(Block* b) { uint64_t x = b->rng; x ^= x << 13; x ^= x >> 7; x ^= x << 17; b->rng = x; return (uint32_t)(x >> 32); }
static void wake(Fiber* f) { f->ready = true; f->what = "running"; blk->ready.push_back(f); }
static void run_async(Block* b, size_t i) { AsyncOp op = b->async[i]; b->async.erase(b->async.begin() + i); tma_execute(op); }
static Fiber* pick(Block* b) {
  if (cfg.async == kRandom && !b->async.empty() && rnd(b) % 4 == 0) run_async(b, rnd(b) % b->async.size());
  while (b->ready.empty()) {
    if (b->async.empty()) return nullptr;
    run_async(b, cfg.async == kRandom ? rnd(b) % b->async.size() : 0);
  }
  auto& r = b->ready; Fiber* f;
  if (cfg.sched == kFifo) { f = r.front(); r.pop_front(); }
  else if (cfg.sched == kLifo) { f = r.back(); r.pop_back(); }
  else { std::swap(r[rnd(b) % r.size()], r.back()); f = r.back(); r.pop_back(); }
  return f;
}
static void resume(Ctx* from, Fiber* to, bool dies = false) { cur = to; b_switches()++; switch_ctx(from, &to->ctx, dies); }
static void block_here(const char* what, Site s) {  // current fiber gives up the CPU until wake()
  Fiber* f = (Fiber*)cur; f->ready = false; f->what = what; f->site = s;
  Fiber* n = pick(blk);
  if (n == f) { cur = f; return; }
  if (n) resume(&f->ctx, n); else { cur = nullptr; switch_ctx(&f->ctx, main_ctx()); }
  cur = f;
}
void preempt(unsigned one_in) {  // give way to a random ready fiber
  Block* b = blk; Fiber* f = (Fiber*)cur;
  if (!f || b->ready.empty() || rnd(b) % one_in) return;
  b->ready.push_back(f);
  std::swap(b->ready[rnd(b) % (b->ready.size() - 1)], b->ready.front());
  Fiber* n = b->ready.front(); b->ready.pop_front();
  if (n != f) resume(&f->ctx, n);
  cur = f;
}
static void fiber_main() {
  Fiber* f = (Fiber*)cur;
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Block* b = blk;
  b->l->entry(b->l->params, b->smem);
  cp_commit(); cp_wait(0);
  if (!f->st.empty()) fail("thread exits while a TMA store issued at %s:%d may still read shared memory", f->st[0].site.file, f->st[0].site.line);
  f->alive = false; f->ready = false; f->what = "exited"; b->alive--;
  for (int id = 0; id < 16; id++)
    if (b->bar[id].arrived && b->bar[id].full) fail("thread exits while %d threads wait at sync_block (%s:%d)", b->bar[id].arrived, b->bar[id].site.file, b->bar[id].site.line);
  Fiber* n = pick(b);
  if (n) resume(&f->ctx, n, true); else { cur = nullptr; switch_ctx(&f->ctx, main_ctx(), true); }
  abort();
}
static std::string ranges(const std::vector<int>& v) {
  std::string s; char t[32];
  for (size_t i = 0; i < v.size();) {
    size_t j = i; while (j + 1 < v.size() && v[j + 1] == v[j] + 1) j++;
    snprintf(t, sizeof t, j > i ? "%s%d-%d" : "%s%d", i ? "," : "", v[i], v[j]); s += t; i = j + 1;
  }
  return s;
}
static void deadlock(Block* b) {
  std::vector<std::pair<std::string, std::vector<int>>> g;
  for (Fiber* f : b->fibers) {
    char t[512];
    if (!f->alive) snprintf(t, sizeof t, "exited");
    else if (f->wait_bar) snprintf(t, sizeof t, "mbar_wait(%s, parity %u) at %s:%d", mbar_describe(f->wait_bar).c_str(), f->wait_parity, f->site.file, f->site.line);
    else snprintf(t, sizeof t, "%s at %s:%d", f->what, f->site.file, f->site.line);
    auto it = std::find_if(g.begin(), g.end(), [&](auto& p) { return p.first == t; });
    if (it == g.end()) { g.push_back({t, {}}); it = g.end() - 1; }
    it->second.push_back(f->tid);
  }
  std::string s = "deadlock:";
  for (auto& p : g) s += "\n    threads " + ranges(p.second) + ": " + p.first;
  fail("%s", s.c_str());
}

static void run_block(const Launch& l, unsigned lin, unsigned char* arena, uint64_t seed) {
  Block B; Block* b = blk = &B;
  b->l = &l; b->lin = lin; b->bidx = dim3(lin % l.grid.x, lin / l.grid.x % l.grid.y, lin / l.grid.x / l.grid.y);
  b->n = b->alive = l.threads; b->smem = arena; b->smem_size = l.smem; b->rng = (seed + 1) * 0x9E3779B97F4A7C15ull + lin * 0xD1B54A32D192ED03ull; rnd(b); rnd(b);
  memset(arena, 0xFF, l.smem);            // poison: NaN in bf16, fp16, fp32
  memset(arena + l.smem, 0xA5, kCanary);  // canary after the end
#if SIMT_ASAN
  ASAN_POISON_MEMORY_REGION(arena + l.smem, kCanary); ASAN_POISON_MEMORY_REGION(arena - kCanary, kCanary);
#endif
  shadow_begin_block(b);
  Ctx main; main_ctx() = &main;
#if SIMT_ASAN
  { pthread_attr_t a; void* lo; size_t sz; pthread_getattr_np(pthread_self(), &a); pthread_attr_getstack(&a, &lo, &sz); main.bottom = lo; main.size = sz; pthread_attr_destroy(&a); }
#endif
  b->warps.resize((l.threads + 31) / 32); b->groups.resize((b->warps.size() + 3) / 4);
  for (int t = 0; t < l.threads; t++) {
    auto* f = new Fiber; f->tid = t; f->lane = t & 31; f->warp = t >> 5; f->block = b->bidx; f->grid = l.grid; f->smem = arena;
    prepare(f); b->fibers.push_back(f); b->ready.push_back(f);
  }
  if (cfg.sched == kLifo) std::reverse(b->ready.begin(), b->ready.end());
  try {
    while (b->alive && b->error.empty()) {
      Fiber* n = pick(b);
      if (!n) deadlock(b);
      resume(&main, n);
      cur = nullptr;
    }
    while (b->error.empty() && !b->async.empty()) run_async(b, 0);
#if SIMT_ASAN
    ASAN_UNPOISON_MEMORY_REGION(arena - kCanary, kCanary); ASAN_UNPOISON_MEMORY_REGION(arena + l.smem, kCanary);
#endif
    if (b->error.empty())
      for (size_t i = 0; i < kCanary; i++) if (arena[l.smem + i] != 0xA5) fail("shared memory overrun: byte %zu of %zu was written", l.smem + i, l.smem);
  } catch (Failed&) {}
  shadow_end_block(b);
  for (Fiber* f : b->fibers) {
#if SIMT_ASAN
    __asan_unpoison_memory_region(f->stack.lo, f->stack.size);
#endif
    { std::lock_guard<std::mutex> g(mu); stack_pool.push_back(f->stack); } delete f;
  }
  blk = nullptr; cur = nullptr;
  if (!b->error.empty()) throw b->error;
}
uint64_t total_switches = 0;
static std::string last_error;
const char* run(const Launch& l) {
  cfg.load_env();
  unsigned total = l.grid.x * l.grid.y * l.grid.z;
  std::vector<unsigned> order(total);
  for (unsigned i = 0; i < total; i++) order[i] = i;
  uint64_t x = cfg.seed * 2654435761u + 88172645463325252ull;
  if (cfg.sched == kRandom) for (unsigned i = total; i > 1; i--) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; std::swap(order[i - 1], order[x % i]); }
  if (l.smem > 227 * 1024) { last_error = "shared memory over 227 KB"; return last_error.c_str(); }
  shadow_begin_launch(l.threads, l.smem);
  std::string err; unsigned next = 0;
  auto worker = [&] {
    size_t sz = (l.smem + 2 * kCanary + 1023) / 1024 * 1024;
    auto* mem = (unsigned char*)aligned_alloc(1024, sz + 1024);
    for (;;) {
      unsigned i; { std::lock_guard<std::mutex> g(mu); if (next == total || !err.empty()) break; i = order[next++]; }
      try { run_block(l, i, mem + kCanary, cfg.seed); } catch (std::string& e) { std::lock_guard<std::mutex> g(mu); if (err.empty()) err = e; }
    }
    std::lock_guard<std::mutex> g(mu); total_switches += b_switches(); b_switches() = 0;
    free(mem);
  };
  unsigned nt = shadow_on() ? 1 : std::min<unsigned>(cfg.threads, total);
  if (nt <= 1) worker();
  else { std::vector<std::thread> ts; for (unsigned i = 0; i < nt; i++) ts.emplace_back(worker); for (auto& t : ts) t.join(); }
  std::string sh = shadow_end_launch();
  if (err.empty()) err = sh;
  last_error = err;
  return err.empty() ? nullptr : last_error.c_str();
}

// ---------------------------------------------------------------- block barriers
static bool same(Site a, Site b) { return a.line == b.line && !strcmp(a.file, b.file); }
void barrier(int id, int n, bool wait, bool full, Site s) {
  Block* b = blk; Fiber* f = (Fiber*)cur;
  if (n < 0) n = b->n;
  if (id < 0 || id > 15) fail("barrier id %d (%s:%d)", id, s.file, s.line);
  if (n % 32) fail("barrier thread count %d is not a multiple of 32 (%s:%d)", n, s.file, s.line);
  Bar& B = b->bar[id];
  if (!B.arrived) { B.count = n; B.site = s; B.full = full; }
  else if (B.count != n) fail("barrier %d: %d threads expected here (%s:%d) but %d at %s:%d", id, n, s.file, s.line, B.count, B.site.file, B.site.line);
  else if (full && !same(B.site, s)) fail("divergent sync_block: this thread is at %s:%d, %d others wait at %s:%d", s.file, s.line, B.arrived, B.site.file, B.site.line);
  if (full && b->alive != b->n) fail("sync_block at %s:%d after %d threads exited", s.file, s.line, b->n - b->alive);
  B.arrived++;
  B.who.push_back(f->tid); if (wait) B.waiters.push_back(f);
  if (B.arrived == B.count) {
    shadow_join(B.who, B.waiters);
    auto w = std::move(B.waiters); B = Bar();
    for (Fiber* o : w) if (o != f) wake(o);
    if (cfg.sched == kRandom) preempt(1);
  } else if (wait) block_here(full ? "sync_block" : "bar_sync", s);
}

// ---------------------------------------------------------------- warp collectives
void warp_collective(uint32_t mask, Op op, void* args, const char* name, Site s) {
  Block* b = blk; Fiber* f = (Fiber*)cur; Warp& w = b->warps[f->warp];
  if (!(mask >> f->lane & 1)) fail("%s: lane not in its own mask %08x (%s:%d)", name, mask, s.file, s.line);
  Coll* c = nullptr;
  for (auto& p : w.pend) {
    if (!p.arrived) continue;
    if (p.mask == mask) { c = &p; break; }
    if (p.mask & mask) fail("%s mask %08x at %s:%d overlaps %s mask %08x at %s:%d", name, mask, s.file, s.line, p.name, p.mask, p.site.file, p.site.line);
  }
  if (!c) {
    for (auto& p : w.pend) if (!p.arrived) { c = &p; break; }
    if (!c) fail("too many concurrent collectives in a warp");
    c->mask = mask; c->op = op; c->name = name; c->site = s;
    for (Fiber* o : w.exited(b, f->warp)) if (mask >> o->lane & 1) fail("%s at %s:%d: lane %d already exited", name, s.file, s.line, o->lane);
  } else if (c->op != op || !same(c->site, s))
    fail("divergent warp collective: this lane is in %s at %s:%d, lanes %08x in %s at %s:%d", name, s.file, s.line, c->arrived, c->name, c->site.file, c->site.line);
  c->args[f->lane] = args; c->arrived |= 1u << f->lane;
  if (c->arrived == mask) {
    c->arrived = 0;
    void* a[32]; memcpy(a, c->args, sizeof a);
    if (op) op(a, mask, s);
    for (int l = 31; l >= 0; l--) if ((mask >> l & 1) && l != f->lane) wake(b->fibers[f->warp * 32 + l]);
  } else block_here(name, s);
}
static void sync_op(void**, uint32_t mask, Site) { std::vector<int> who; std::vector<Fiber*> fs; for (int l = 0; l < 32; l++) if (mask >> l & 1) { who.push_back(cur->warp * 32 + l); fs.push_back(blk->fibers[cur->warp * 32 + l]); } shadow_join(who, fs); }
void warp_sync(uint32_t mask, Site s) { warp_collective(mask, sync_op, nullptr, "sync_warp", s); }
int fiber_tid(Fiber* f) { return f->tid; }
std::vector<Fiber*> Warp::exited(Block* b, int warp) { std::vector<Fiber*> v; for (int l = 0; l < 32 && warp * 32 + l < b->n; l++) if (!b->fibers[warp * 32 + l]->alive) v.push_back(b->fibers[warp * 32 + l]); return v; }

// ---------------------------------------------------------------- numbers
float to_float(bf16 x) { uint32_t u = (uint32_t)x.bits << 16; float f; memcpy(&f, &u, 4); return f; }
float to_float(fp16 x) { _Float16 h; memcpy(&h, &x.bits, 2); return (float)h; }
uint16_t to_bf16(float f) { uint32_t u; memcpy(&u, &f, 4); if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff; return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16); }
uint16_t to_fp16(float f) { _Float16 h = (_Float16)f; uint16_t u; memcpy(&u, &h, 2); return u; }
static inline float cvt(uint16_t v, bool is_bf16) { return is_bf16 ? to_float(bf16{v}) : to_float(fp16{v}); }

// ---------------------------------------------------------------- shared memory, ldmatrix, mma
static bool in_smem(const void* p, size_t n) { auto* q = (const unsigned char*)p; return q >= blk->smem && q + n <= blk->smem + blk->smem_size; }
uint32_t smem_addr(const void* p, Site s) {
  if (!in_smem(p, 1)) fail("address %p is not in shared memory (%s:%d)", p, s.file, s.line);
  return kSmemBase + (uint32_t)((const unsigned char*)p - blk->smem);
}
static unsigned char* from_smem_addr(uint32_t a, size_t n, const char* what, Site s) {
  if (a < kSmemBase || a + n > kSmemBase + blk->smem_size) fail("%s reads shared memory at offset %lld, outside [0,%zu) (%s:%d)", what, (long long)a - kSmemBase, blk->smem_size, s.file, s.line);
  return blk->smem + (a - kSmemBase);
}
static void check16(const void* p, const char* what, Site s) {
  if ((uintptr_t)p % 16) fail("%s: shared address not 16-byte aligned (%s:%d)", what, s.file, s.line);
  if (!in_smem(p, 16)) fail("%s: shared address out of bounds, offset %lld of %zu (%s:%d)", what, (long long)((const unsigned char*)p - blk->smem), blk->smem_size, s.file, s.line);
}
struct LdArgs { uint32_t* r; const void* row; bool trans; };
static void ldmatrix_op(void** a, uint32_t, Site s) {
  const uint16_t* rows[32];
  for (int l = 0; l < 32; l++) { auto* x = (LdArgs*)a[l]; check16(x->row, "ldmatrix", s); rows[l] = (const uint16_t*)x->row; shadow_access(cur->warp * 32 + l, x->row, 16, false, s); }
  for (int l = 0; l < 32; l++) {
    auto* x = (LdArgs*)a[l]; int g = l >> 2, t = (l & 3) * 2;
    for (int m = 0; m < 4; m++) {
      uint16_t lo = x->trans ? rows[m * 8 + t][g] : rows[m * 8 + g][t], hi = x->trans ? rows[m * 8 + t + 1][g] : rows[m * 8 + g][t + 1];
      x->r[m] = lo | (uint32_t)hi << 16;
    }
  }
}
void ldmatrix(uint32_t* r, const void* row, bool trans, Site s) { LdArgs a{r, row, trans}; warp_collective(kFullMask, ldmatrix_op, &a, "ldmatrix", s); }

struct MmaArgs { float* d; const uint32_t* a; uint32_t b0, b1; };
template <bool BF> static void mma_op(void** v, uint32_t, Site) {
  float A[16][16], B[16][8], C[16][8];
  auto lo = [](uint32_t u) { return cvt((uint16_t)u, BF); };
  auto hi = [](uint32_t u) { return cvt((uint16_t)(u >> 16), BF); };
  for (int l = 0; l < 32; l++) {
    auto* x = (MmaArgs*)v[l]; int g = l >> 2, t = (l & 3) * 2;
    for (int i = 0; i < 4; i++) { int r = g + (i & 1) * 8, c = t + (i >> 1) * 8; A[r][c] = lo(x->a[i]); A[r][c + 1] = hi(x->a[i]); }
    B[t][g] = lo(x->b0); B[t + 1][g] = hi(x->b0); B[t + 8][g] = lo(x->b1); B[t + 9][g] = hi(x->b1);
    C[g][t] = x->d[0]; C[g][t + 1] = x->d[1]; C[g + 8][t] = x->d[2]; C[g + 8][t + 1] = x->d[3];
  }
  for (int r = 0; r < 16; r++) {
    float acc[8] = {};
    for (int k = 0; k < 16; k++) for (int n = 0; n < 8; n++) acc[n] += A[r][k] * B[k][n];
    for (int n = 0; n < 8; n++) C[r][n] += acc[n];
  }
  for (int l = 0; l < 32; l++) {
    auto* x = (MmaArgs*)v[l]; int g = l >> 2, t = (l & 3) * 2;
    x->d[0] = C[g][t]; x->d[1] = C[g][t + 1]; x->d[2] = C[g + 8][t]; x->d[3] = C[g + 8][t + 1];
  }
}
void mma16816(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf, Site s) { MmaArgs x{d, a, b0, b1}; warp_collective(kFullMask, bf ? mma_op<true> : mma_op<false>, &x, "mma", s); }
void atomic_add_f32(float* p, float v, Site s) {
  shadow_atomic(cur->tid, p, 4, s);
  auto* u = (uint32_t*)p; uint32_t old = __atomic_load_n(u, __ATOMIC_RELAXED), want; float f;
  do { memcpy(&f, &old, 4); f += v; memcpy(&want, &f, 4); } while (!__atomic_compare_exchange_n(u, &old, want, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

// ---------------------------------------------------------------- cp.async
static void cp_exec(CpOp& o) { if (o.done) return; o.done = true; if (o.pred) memcpy(o.dst, o.src, o.bytes); else memset(o.dst, 0, o.bytes); }
void cp_async(void* dst, const void* src, int bytes, bool pred, Site s) {
  check16(dst, "cp.async", s);
  if ((uintptr_t)src % 16) fail("cp.async: global address not 16-byte aligned (%s:%d)", s.file, s.line);
  Fiber* f = (Fiber*)cur;
#if SIMT_ASAN
  if (pred && __asan_region_is_poisoned((void*)src, bytes)) { if (cfg.async != kEager) { volatile char c = *(const char*)src; (void)c; } }
#endif
  if (pred) shadow_access(f->tid, src, bytes, false, s);
  shadow_pending_write(f->tid, dst, bytes, s);
  CpOp o{(unsigned char*)dst, (const unsigned char*)src, bytes, f->cp_groups, pred, false, s};
  if (cfg.async == kEager || (cfg.async == kRandom && (rnd(blk) & 1))) cp_exec(o);
  f->cp.push_back(o);
}
void cp_commit() { ((Fiber*)cur)->cp_groups++; }
void cp_wait(int n) {
  Fiber* f = (Fiber*)cur; int upto = f->cp_groups - n; size_t k = 0;
  for (auto& o : f->cp) if (o.group < upto) { cp_exec(o); shadow_complete_write(f->tid, o.dst, o.bytes, o.site); } else f->cp[k++] = o;
  f->cp.resize(k);
}

// ---------------------------------------------------------------- mbarrier: [0,20) pending, [20,40) expected, [40,63) tx + 2^22, 63 phase
static Mbar unpack(uint64_t w) { return {(int)(w & 0xfffff), (int)(w >> 20 & 0xfffff), (int64_t)(w >> 40 & 0x7fffff) - (1 << 22), (unsigned)(w >> 63)}; }
static uint64_t packm(Mbar m) { return (uint64_t)m.pending | (uint64_t)m.expected << 20 | ((uint64_t)(m.tx + (1 << 22)) & 0x7fffff) << 40 | (uint64_t)m.phase << 63; }
std::string mbar_describe(uint64_t* p) { Mbar m = unpack(*p); char t[128]; snprintf(t, sizeof t, "smem+%ld: phase %u, %d of %d arrivals pending, tx-count %lld", (long)((unsigned char*)p - blk->smem), m.phase, m.pending, m.expected, (long long)m.tx); return t; }
void mbar_init(uint64_t* p, uint32_t count, Site s) {
  if (!in_smem(p, 8) || (uintptr_t)p % 8) fail("mbarrier not an aligned shared address (%s:%d)", s.file, s.line);
  blk->mbars[p] = MbarSide(); *p = packm({(int)count, (int)count, 0, 0});
  shadow_access(cur->tid, p, 8, true, s);
}
static Mbar get(uint64_t* p, const char* what, Site s) { if (!blk->mbars.count(p)) fail("%s on an mbarrier that was never initialised (%s:%d)", what, s.file, s.line); shadow_mbar_use(cur ? cur->tid : -1, p, s); return unpack(*p); }
static void settle(uint64_t* p, Mbar m) {
  bool flip = m.pending == 0 && m.tx == 0;
  if (flip) { m.phase ^= 1; m.pending = m.expected; }
  *p = packm(m);
  if (flip) { shadow_mbar_phase(p); for (Fiber* f : blk->fibers) if (f->alive && f->wait_bar == p && f->wait_parity != m.phase) { f->wait_bar = nullptr; wake(f); } }
}
void mbar_arrive(uint64_t* p, int64_t tx, Site s) {
  Mbar m = get(p, "mbar_arrive", s);
  if (m.pending == 0) fail("mbar_arrive: more arrivals than the mbarrier expects (%s) at %s:%d", mbar_describe(p).c_str(), s.file, s.line);
  shadow_release(cur->tid, p);
  m.tx += tx; m.pending--; settle(p, m);
  if (cfg.sched == kRandom) { preempt(2); if (!blk->async.empty() && cfg.async == kRandom && rnd(blk) % 2) run_async(blk, rnd(blk) % blk->async.size()); }
}
void mbar_wait(uint64_t* p, uint32_t parity, Site s) {
  Mbar m = get(p, "mbar_wait", s); Fiber* f = (Fiber*)cur;
  if (m.phase == parity) { f->wait_bar = p; f->wait_parity = parity; block_here("mbar_wait", s); }
  shadow_acquire(f->tid, p);
}
void proxy_fence() { shadow_proxy_fence(cur->tid); }

// ---------------------------------------------------------------- TMA
static uint32_t swizzle128(uint32_t a) { return a ^ ((a >> 7 & 7) << 4); }
static size_t box_bytes(const TensorMap* m) { size_t n = m->elem; for (int i = 0; i < m->rank; i++) n *= m->box[i]; return n; }
// Visits a box's elements: it lies packed in shared memory, innermost dimension first, then swizzled. f(shared, global or nullptr if outside, bytes).
template <class F> static void walk_box(const TensorMap* m, const Coord& at, unsigned char* smem, F f) {
  uint32_t row = m->box[0] * m->elem, base = kSmemBase + (uint32_t)(smem - blk->smem); size_t rows = box_bytes(m) / row;
  for (size_t r = 0; r < rows; r++) {
    size_t q = r; bool in = true; const unsigned char* g = m->base;
    for (int i = 1; i < m->rank; i++) {
      int64_t x = at.c[i] + (int64_t)(q % m->box[i]); q /= m->box[i];
      if (x < 0 || x >= (int64_t)m->dim[i]) in = false; else g += (size_t)x * m->stride[i];
    }
    for (uint32_t c = 0; c < row; c += 16) {
      unsigned char* d = blk->smem + (swizzle128(base + (uint32_t)r * row + c) - kSmemBase);
      int64_t x = at.c[0] + (int64_t)(c / m->elem);
      if (in && x >= 0 && x + 16 / m->elem <= (int64_t)m->dim[0]) { f(d, g + x * m->elem, 16); continue; }
      for (uint32_t e = 0; e < 16; e += m->elem, x++) f(d + e, in && x >= 0 && x < (int64_t)m->dim[0] ? g + x * m->elem : nullptr, m->elem);
    }
  }
}
static void check_box(const char* what, const TensorMap* m, const void* smem, int rank, Site s) {
  if (m->magic != 0x7e45u) fail("%s: not a tensor map (%s:%d)", what, s.file, s.line);
  if (m->rank != rank) fail("%s: %d coordinates for a tensor map of rank %d (%s:%d)", what, rank, m->rank, s.file, s.line);
  if (smem_addr(smem, s) % 1024 && m->box[0] * m->elem == 128) fail("%s: 128-byte-swizzled tile not 1024-byte aligned (%s:%d)", what, s.file, s.line);
  if (!in_smem(smem, box_bytes(m))) fail("%s: tile ends outside shared memory (%s:%d)", what, s.file, s.line);
}
void tma_load(void* dst, const TensorMap* m, uint64_t* bar, int rank, Coord c, Site s) {
  check_box("tma_load", m, dst, rank, s);
  get(bar, "tma_load", s);
  AsyncOp op{(unsigned char*)dst, m, bar, c, cur->tid, s, shadow_async_issue(cur->tid, dst, box_bytes(m), s)};
  if (cfg.async == kEager) tma_execute(op); else blk->async.push_back(op);
}
void tma_execute(const AsyncOp& o) {  // elements outside the tensor arrive as zero and count as bytes
  walk_box(o.map, o.c, o.dst, [](unsigned char* d, const unsigned char* g, size_t n) { if (g) memcpy(d, g, n); else memset(d, 0, n); });
  size_t bytes = box_bytes(o.map);
  shadow_async_complete(o.bar, o.dst, bytes, o.token, o.site);
  Mbar b = unpack(*o.bar); b.tx -= (int64_t)bytes; settle(o.bar, b);
}
static void store_execute(StoreOp& o) {
  if (o.done) return;
  o.done = true;
  walk_box(o.map, o.c, (unsigned char*)o.src, [&](unsigned char* d, const unsigned char* g, size_t n) { if (g) { shadow_access(cur->tid, g, n, true, o.site); memcpy((void*)g, d, n); } });
}
void tma_store(const TensorMap* m, const void* src, int rank, Coord c, Site s) {
  check_box("tma_store", m, src, rank, s);
  Fiber* f = (Fiber*)cur;
  shadow_pending_read(f->tid, src, box_bytes(m), s);
  StoreOp o{m, (const unsigned char*)src, c, f->st_groups, false, s};
  if (cfg.async == kEager || (cfg.async == kRandom && (rnd(blk) & 1))) store_execute(o);
  f->st.push_back(o);
}
void bulk_commit() { ((Fiber*)cur)->st_groups++; }
void bulk_wait_read(int n) {
  Fiber* f = (Fiber*)cur; int upto = f->st_groups - n; size_t k = 0;
  for (auto& o : f->st) if (o.group < upto) { store_execute(o); shadow_complete_read(f->tid, o.src, box_bytes(o.map), o.site); } else f->st[k++] = o;
  f->st.resize(k);
}

// ---------------------------------------------------------------- wgmma
static void group_rendezvous(void* args, void (*op)(Group&, Site), const char* name, Site s) {
  Block* b = blk; Fiber* f = (Fiber*)cur; Group& g = b->groups[f->warp / 4];
  if ((f->warp / 4 + 1) * 128 > b->n) fail("%s: incomplete warpgroup (%s:%d)", name, s.file, s.line);
  if (g.arrived && (g.op != op || !same(g.site, s))) fail("divergent warpgroup collective: %s at %s:%d vs %s at %s:%d", name, s.file, s.line, g.name, g.site.file, g.site.line);
  g.op = op; g.name = name; g.site = s; g.args[f->tid & 127] = args; g.first = f->warp / 4 * 128;
  if (++g.arrived == 128) { g.arrived = 0; op(g, s); for (int i = 127; i >= 0; i--) if (g.first + i != f->tid) wake(b->fibers[g.first + i]); }
  else block_here(name, s);
}
void wgmma_fence(Site s) { group_rendezvous(nullptr, [](Group& g, Site) { g.fenced = true; }, "wgmma.fence", s); }
struct WgArgs { float* d; int n; const uint32_t* a; uint64_t da, db; bool tb, acc, bf; };
static void element_rows(const WgOp& o, std::vector<uint32_t>& A, std::vector<uint32_t>& B) {
  // 16-byte units each operand touches. K-major SW128: (mn, k) -> start + (mn/8)*SBO + (mn%8)*128 + k*2.
  // MN-major SW128 (64 elements per atom row): (mn, k) -> start + (mn/64)*LBO + (k/8)*SBO + (k%8)*128 + (mn%64)*2.   Then address bits [4:6] ^= bits [7:9].
  auto f = [](uint64_t d) { return (uint32_t)(d & 0x3fff) << 4; };
  uint32_t a0 = f(o.da), asbo = f(o.da >> 32), b0 = f(o.db), blbo = f(o.db >> 16), bsbo = f(o.db >> 32);
  A.resize(o.rs ? 0 : 64 * 2); for (int r = 0; r < (o.rs ? 0 : 64); r++) for (int h = 0; h < 2; h++) A[r * 2 + h] = swizzle128(a0 + r / 8 * asbo + r % 8 * 128 + h * 16);
  if (!o.tb) { B.resize(o.n * 2); for (int r = 0; r < o.n; r++) for (int h = 0; h < 2; h++) B[r * 2 + h] = swizzle128(b0 + r / 8 * bsbo + r % 8 * 128 + h * 16); }
  else { B.resize(16 * o.n / 8); for (int k = 0; k < 16; k++) for (int c = 0; c < o.n / 8; c++) B[k * (o.n / 8) + c] = swizzle128(b0 + c / 8 * blbo + k / 8 * bsbo + k % 8 * 128 + c % 8 * 16); }
}
static void wgmma_execute(WgOp& o, int first) {
  std::vector<uint32_t> ar, br; element_rows(o, ar, br);
  static thread_local float A[64][16], B[16][256], C[64][256];
  auto unit = [&](uint32_t addr) { return (const uint16_t*)from_smem_addr(addr, 16, "wgmma descriptor", o.site); };
  if (o.rs) {
    for (int t = 0; t < 128; t++) {
      if (memcmp(o.a[t], o.asnap[t], 16)) fail("wgmma: thread %d changed (or let go of) the A fragment while the operation issued at %s:%d was in flight", first + t, o.site.file, o.site.line);
      for (int i = 0; i < 4; i++) {  // register i: rows +8 for odd i, columns +8 for i >= 2
        int r = t / 32 * 16 + (t % 32) / 4 + (i & 1) * 8, k = (t % 4) * 2 + (i >> 1) * 8;
        A[r][k] = cvt((uint16_t)o.asnap[t][i], o.bf); A[r][k + 1] = cvt((uint16_t)(o.asnap[t][i] >> 16), o.bf);
      }
    }
  } else for (int r = 0; r < 64; r++) for (int k = 0; k < 16; k++) A[r][k] = cvt(unit(ar[r * 2 + k / 8])[k % 8], o.bf);
  for (int n = 0; n < o.n; n++) for (int k = 0; k < 16; k++) B[k][n] = cvt(o.tb ? unit(br[k * (o.n / 8) + n / 8])[n % 8] : unit(br[n * 2 + k / 8])[k % 8], o.bf);
  if (!o.saved.empty()) for (int t = 0; t < 128; t++) memcpy(o.d[t], &o.saved[t * o.n / 2], o.n / 2 * 4);  // un-poison
  for (int r = 0; r < 64; r++) { for (int n = 0; n < o.n; n++) C[r][n] = 0; for (int k = 0; k < 16; k++) for (int n = 0; n < o.n; n++) C[r][n] += A[r][k] * B[k][n]; }
  for (int t = 0; t < 128; t++) for (int i = 0; i < o.n / 2; i++) {
    int r = t / 32 * 16 + (t % 32) / 4 + (i / 2 % 2) * 8, c = i / 4 * 8 + (t % 4) * 2 + i % 2;
    o.d[t][i] = C[r][c] + (o.acc ? o.d[t][i] : 0.f);
  }
  o.executed = true;
}
void wgmma_mma(float* d, int n, const uint32_t* areg, uint64_t da, uint64_t db, bool tb, bool acc, bool bf, Site s) {
  WgArgs a{d, n, areg, da, db, tb, acc, bf};
  group_rendezvous(&a, [](Group& g, Site s) {
    auto* x = (WgArgs*)g.args[0];
    if (!g.fenced) fail("wgmma.mma_async without wgmma.fence after the accumulators were last touched (%s:%d)", s.file, s.line);
    if ((!x->a && (x->da >> 62) != 1) || (x->db >> 62) != 1) fail("wgmma: this layer models 128-byte swizzle only (%s:%d)", s.file, s.line);
    g.ops.emplace_back(); WgOp& o = g.ops.back();
    o.n = x->n; o.da = x->da; o.db = x->db; o.tb = x->tb; o.acc = x->acc; o.bf = x->bf; o.rs = x->a != nullptr; o.group = g.groups; o.site = s;
    bool chained = false, pending = false;
    for (int t = 0; t < 128; t++) {
      auto* y = (WgArgs*)g.args[t]; o.d[t] = y->d; o.a[t] = y->a;
      if (y->a) memcpy(o.asnap[t], y->a, 16);
      if (y->da != o.da || y->db != o.db || y->acc != o.acc) fail("wgmma: descriptors differ between threads %d and %d of the warpgroup (%s:%d)", g.first, g.first + t, s.file, s.line);
    }
    for (auto& p : g.ops) if (&p != &o && !p.executed) { pending = true; if (p.d[0] == o.d[0]) chained = true; }
    std::vector<uint32_t> A, B; element_rows(o, A, B);
    for (auto* v : {&A, &B}) for (uint32_t u : *v) { auto* p = from_smem_addr(u, 16, "wgmma descriptor", s); for (int w = 0; w < 4; w++) shadow_pending_read(g.first + w * 32, p, 16, s); }
    if (cfg.async == kEager || (cfg.async == kRandom && !pending && (rnd(blk) & 1))) wgmma_execute(o, g.first);
    else if (!chained) {
      o.saved.resize(128 * o.n / 2);
      for (int t = 0; t < 128; t++) { memcpy(&o.saved[t * o.n / 2], o.d[t], o.n / 2 * 4); memset(o.d[t], 0xFF, o.n / 2 * 4); }  // poison the accumulators until waited for
    }
  }, areg ? "wgmma.mma_async (A in registers)" : "wgmma.mma_async", s);
}
// setmaxnreg: the warpgroups' final counts must fit what the launch gave the block, or a GPU would hang in the .inc
void set_max_reg(int n, bool grow, Site s) {
  static thread_local int want; static thread_local bool up; want = n; up = grow;
  group_rendezvous(nullptr, [](Group& g, Site s) {
    Block* b = blk; int at_launch = std::min(255, 65536 / b->n) / 8 * 8, sum = 0;
    if (!g.regs) g.regs = at_launch;
    if (up ? want < g.regs : want > g.regs) fail("setmaxnreg.%s to %d from %d registers (%s:%d)", up ? "inc" : "dec", want, g.regs, s.file, s.line);
    g.regs = want;
    for (auto& o : b->groups) { if (!o.regs) return; sum += o.regs; }
    if (sum * 128 > at_launch * b->n) fail("setmaxnreg: the warpgroups ask for %d registers, the block has %d (%s:%d)", sum * 128, at_launch * b->n, s.file, s.line);
  }, "setmaxnreg", s);
}
void wgmma_commit(Site s) { group_rendezvous(nullptr, [](Group& g, Site) { g.groups++; }, "wgmma.commit_group", s); }
void wgmma_wait(int n, Site s) {
  static thread_local int want; want = n;
  group_rendezvous(nullptr, [](Group& g, Site s) {
    size_t k = 0;
    for (size_t i = 0; i < g.ops.size(); i++) {
      WgOp& o = g.ops[i];
      if (o.group < g.groups - want) {
        if (!o.executed) wgmma_execute(o, g.first);
        std::vector<uint32_t> A, B; element_rows(o, A, B);
        for (auto* v : {&A, &B}) for (uint32_t u : *v) { auto* p = from_smem_addr(u, 16, "wgmma descriptor", s); for (int w = 0; w < 4; w++) shadow_complete_read(g.first + w * 32, p, 16, o.site); }
      } else { if (k != i) g.ops[k] = o; k++; }
    }
    g.ops.resize(k); g.fenced = false;
  }, "wgmma.wait_group", s);
}
void Config::load_env() {
  auto num = [](const char* k, long d) { const char* v = getenv(k); return v ? atol(v) : d; };
  auto pol = [](const char* k, int d) { const char* v = getenv(k); return !v ? d : !strcmp(v, "random") ? kRandom : !strcmp(v, "lifo") || !strcmp(v, "eager") ? kLifo : kFifo; };
  sched = pol("SIMT_SCHED", kLifo); async = pol("SIMT_ASYNC", kLazy); seed = num("SIMT_SEED", 0); race = num("SIMT_RACE", 1); preempt = num("SIMT_PREEMPT", 0);
  threads = num("SIMT_THREADS", std::thread::hardware_concurrency()); stack_kb = num("SIMT_STACK_KB", SIMT_ASAN ? 512 : 128);
}
}}  // namespace simt::rt
