// race.cpp - happens-before checker for shared memory (and registered global buffers).
// Kernels compiled with `-fsanitize=thread` call __tsan_readN/__tsan_writeN on every access; we link our own definitions
// instead of libtsan. Vector clocks per CUDA thread; barriers, sync_warp and mbarriers are the only edges between threads.
#include "runtime.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <set>

namespace simt { namespace rt {
namespace {
enum { kInit = 1, kWPend = 2, kAtomic = 4, kGeneric = 8, kOther = 16 };
struct Rd { uint32_t clk; uint16_t tid; };
struct Cell {
  uint64_t wsite, rsite; uint32_t wclk; uint16_t wtid; uint8_t flags, nr; uint8_t rpend; uint32_t wblk, rblk; Rd r[8]; std::vector<uint32_t>* many;
};
struct Region { const unsigned char* base; size_t size; Cell* c; const char* name; bool shared; };
bool instrumented = false, active = false;
int N; Region sm; std::vector<Region> globals;
std::vector<std::vector<uint32_t>> vc, pf; std::vector<uint32_t> fence_clk; uint32_t agent; std::map<uint32_t, std::vector<uint32_t>> snap;
std::set<std::pair<uint64_t, uint64_t>> seen; std::string report; int reports;

uint64_t key(Site s) { return 1ull << 63 | (uint64_t)(s.line & 0x7fff) << 48 | ((uint64_t)s.file & 0xffffffffffffull); }
std::string where(uint64_t k) {
  char t[600];
  if (!k) return "?";
  if (k >> 63) { snprintf(t, sizeof t, "%s:%d", (const char*)(k & 0xffffffffffffull), (int)(k >> 48 & 0x7fff)); return t; }
  Dl_info i; if (!dladdr((void*)k, &i)) return "?";
  snprintf(t, sizeof t, "addr2line -e %s %#lx", i.dli_fname, (long)(k - 1 - (uint64_t)i.dli_fbase));
  if (FILE* f = popen(t, "r")) { if (fgets(t, sizeof t, f)) t[strcspn(t, "\n")] = 0; pclose(f); }
  return t;
}
std::string who(int t) { char b[48]; if (t == N) return "TMA"; snprintf(b, sizeof b, "thread %d (warp %d lane %d)", t, t / 32, t % 32); return b; }
void race(const char* what, Region& R, size_t off, int t1, uint64_t s1, int t2, uint64_t s2) {
  if (!seen.insert({s1, s2}).second || ++reports > 8) return;
  char b[1200];
  snprintf(b, sizeof b, "\n  %s at %s+%zu, block %u: %s at %s", what, R.name, off, blk->lin, who(t1).c_str(), where(s1).c_str());
  report += b;
  if (t2 >= 0) report += "\n      earlier: " + who(t2) + " at " + where(s2);
}
Region* find(const void* p, size_t n) {
  auto* q = (const unsigned char*)p;
  if (q >= sm.base && q + n <= sm.base + sm.size) return &sm;
  for (auto& g : globals) if (q >= g.base && q + n <= g.base + g.size) return &g;
  return nullptr;
}
inline bool hb(int t, int u, uint32_t clk) { return clk <= vc[t][u]; }  // (u,clk) happened before t's now
void clear_reads(Cell& c) { c.nr = 0; if (c.many) { delete c.many; c.many = nullptr; } c.flags &= ~kOther; }
void check_write_order(Region& R, Cell& c, size_t off, int t, uint64_t s, bool is_write, bool atomic) {
  if (c.flags & kWPend) race(is_write ? "write while an async copy is in flight" : "read while an async copy is in flight", R, off, t, s, c.wtid, c.wsite);
  else if (c.flags & kInit && !(atomic && c.flags & kAtomic)) {
    if (!R.shared && c.wblk != blk->lin + 1) { if (c.wblk) race(is_write ? "write-write race between blocks" : "write-read race between blocks", R, off, t, s, c.wtid, c.wsite); }
    else if (!hb(t, c.wtid, c.wclk)) race(is_write ? "write-write race" : "read of a write that is not synchronised", R, off, t, s, c.wtid, c.wsite);
  }
}
void do_read(Region& R, size_t off, int t, uint64_t s, bool async_proxy) {
  Cell& c = R.c[off];
  if (R.shared && !(c.flags & (kInit | kWPend))) race("read of uninitialised shared memory", R, off, t, s, -1, 0);
  check_write_order(R, c, off, t, s, false, false);
  if (async_proxy && c.flags & kGeneric && c.wtid < N && c.wclk > fence_clk[c.wtid] && c.wclk > pf[t][c.wtid]) race("async-proxy read of a generic write without fence.proxy.async", R, off, t, s, c.wtid, c.wsite);
}
void note_read(Region& R, Cell& c, int t, uint64_t s) {
  if (!R.shared && c.rblk != blk->lin + 1) { bool other = c.rblk != 0; clear_reads(c); c.rblk = blk->lin + 1; if (other) c.flags |= kOther; }
  c.rsite = s; uint32_t now = vc[t][t];
  if (c.many) { (*c.many)[t] = now; return; }
  int k = 0; for (int i = 0; i < c.nr; i++) if (c.r[i].tid != t && !hb(t, c.r[i].tid, c.r[i].clk)) c.r[k++] = c.r[i];
  if (k < 8) { c.r[k++] = {now, (uint16_t)t}; c.nr = k; return; }
  c.many = new std::vector<uint32_t>(N + 1, 0); for (int i = 0; i < k; i++) (*c.many)[c.r[i].tid] = c.r[i].clk; (*c.many)[t] = now; c.nr = 0;
}
void do_write(Region& R, size_t off, int t, uint64_t s, bool atomic) {
  Cell& c = R.c[off];
  check_write_order(R, c, off, t, s, true, atomic);
  if (c.rpend) race("write while an async operation may still read", R, off, t, s, c.rpend ? 0 : -1, c.rsite);
  if (!R.shared && (c.flags & kOther || (c.rblk && c.rblk != blk->lin + 1))) race("read-write race between blocks", R, off, t, s, t, c.rsite);
  if (c.many) { for (int u = 0; u < N; u++) if (!hb(t, u, (*c.many)[u])) { race("write races with an earlier read", R, off, t, s, u, c.rsite); break; } }
  else for (int i = 0; i < c.nr; i++) if (!hb(t, c.r[i].tid, c.r[i].clk)) { race("write races with an earlier read", R, off, t, s, c.r[i].tid, c.rsite); break; }
  clear_reads(c);
}
void set_write(Cell& c, int t, uint32_t clk, uint64_t s, int flags) { c.wtid = t; c.wclk = clk; c.wsite = s; c.wblk = blk->lin + 1; c.flags = flags; }
void access(int t, const void* p, size_t n, bool w, uint64_t s) {
  Region* R = find(p, n); if (!R) return;
  size_t o = (const unsigned char*)p - R->base;
  for (size_t i = o; i < o + n; i++)
    if (w) { do_write(*R, i, t, s, false); set_write(R->c[i], t, vc[t][t], s, kInit | kGeneric); }
    else { do_read(*R, i, t, s, false); note_read(*R, R->c[i], t, s); }
}
void join_into(std::vector<uint32_t>& d, const std::vector<uint32_t>& s) { if (d.empty()) d.assign(s.size(), 0); for (size_t i = 0; i < s.size(); i++) d[i] = std::max(d[i], s[i]); }
}  // namespace

bool shadow_on() { return instrumented && cfg.race; }
void shadow_begin_launch(int threads, size_t smem) {
  report.clear(); reports = 0; seen.clear(); if (!shadow_on()) return;
  N = threads; sm = {nullptr, smem, (Cell*)calloc(smem, sizeof(Cell)), "shared", true};
  for (auto& g : globals) g.c = (Cell*)calloc(g.size, sizeof(Cell));
}
std::string shadow_end_launch() {
  if (!shadow_on()) return "";
  free(sm.c); for (auto& g : globals) { free(g.c); g.c = nullptr; }
  return reports ? std::to_string(reports) + " memory errors" + report : "";
}
void shadow_begin_block(Block* b) {
  if (!shadow_on()) return;
  sm.base = b->smem; memset((void*)sm.c, 0, sm.size * sizeof(Cell));
  vc.assign(N, std::vector<uint32_t>(N + 1, 0)); pf = vc; fence_clk.assign(N + 1, 0); for (int i = 0; i < N; i++) vc[i][i] = 1; agent = 0; snap.clear(); active = true;
}
void shadow_end_block(Block*) {
  if (!active) return;
  active = false; for (size_t i = 0; i < sm.size; i++) clear_reads(sm.c[i]); sm.base = nullptr;
}
#define ON if (!active) return
void shadow_access(int t, const void* p, size_t n, bool w, Site s) { ON; access(t, p, n, w, key(s)); }
void shadow_atomic(int t, const void* p, size_t n, Site s) { ON; Region* R = find(p, n); if (!R) return; size_t o = (const unsigned char*)p - R->base; for (size_t i = o; i < o + n; i++) { do_write(*R, i, t, key(s), true); set_write(R->c[i], t, vc[t][t], key(s), kInit | kAtomic); } }
void shadow_pending_write(int t, const void* p, size_t n, Site s) { ON; Region* R = find(p, n); if (!R) return; size_t o = (const unsigned char*)p - R->base; for (size_t i = o; i < o + n; i++) { do_write(*R, i, t, key(s), false); set_write(R->c[i], t, 0xffffffffu, key(s), kWPend); } }
void shadow_complete_write(int t, const void* p, size_t n, Site s) { ON; Region* R = find(p, n); if (!R) return; size_t o = (const unsigned char*)p - R->base; for (size_t i = o; i < o + n; i++) if (R->c[i].wtid == t) set_write(R->c[i], t, vc[t][t], key(s), kInit); }
void shadow_pending_read(int t, const void* p, size_t n, Site s) { ON; Region* R = find(p, n); if (!R) return; size_t o = (const unsigned char*)p - R->base; for (size_t i = o; i < o + n; i++) { do_read(*R, i, t, key(s), true); R->c[i].rpend++; R->c[i].rsite = key(s); } }
void shadow_complete_read(int t, const void* p, size_t n, Site s) { ON; Region* R = find(p, n); if (!R) return; size_t o = (const unsigned char*)p - R->base; for (size_t i = o; i < o + n; i++) { if (R->c[i].rpend) R->c[i].rpend--; note_read(*R, R->c[i], t, key(s)); } }
uint32_t shadow_async_issue(int t, const void* p, size_t n, Site s) {
  if (!active) return 0;
  uint32_t tok = ++agent; snap[tok] = vc[t]; snap[tok][N] = std::max(snap[tok][N], tok);
  Region* R = find(p, n); if (!R) return tok; size_t o = (const unsigned char*)p - R->base;
  for (size_t i = o; i < o + n; i++) {
    Cell& c = R->c[i];
    if (c.flags & kGeneric && c.wtid < N && c.wclk > fence_clk[c.wtid] && c.wclk > pf[t][c.wtid]) race("async-proxy write over a generic write without fence.proxy.async", *R, i, t, key(s), c.wtid, c.wsite);
    do_write(*R, i, t, key(s), false); set_write(c, N, tok, key(s), kWPend);
  }
  return tok;
}
void shadow_async_complete(uint64_t* bar, const void* p, size_t n, uint32_t tok, Site) {
  ON; Region* R = find(p, n); size_t o = (const unsigned char*)p - R->base;
  for (size_t i = o; i < o + n; i++) if (R->c[i].wtid == N && R->c[i].wclk == tok) R->c[i].flags = kInit;
  join_into(blk->mbars[bar].acc, snap[tok]); snap.erase(tok);
}
void shadow_join(const std::vector<int>& arrive, const std::vector<Fiber*>& wait) {
  ON; std::vector<uint32_t> m; for (int t : arrive) join_into(m, vc[t]);
  for (Fiber* f : wait) join_into(vc[fiber_tid(f)], m);
  for (int t : arrive) vc[t][t]++;
}
void shadow_release(int t, uint64_t* bar) { ON; join_into(blk->mbars[bar].acc, vc[t]); vc[t][t]++; }
void shadow_acquire(int t, uint64_t* bar) { ON; auto& m = blk->mbars[bar].pub; if (!m.empty()) join_into(vc[t], m); }
void shadow_mbar_phase(uint64_t* bar) { ON; auto& m = blk->mbars[bar]; m.pub = m.acc; m.acc.clear(); }
void shadow_mbar_use(int t, uint64_t* bar, Site s) {  // the init of an mbarrier must be visible to whoever uses it
  ON; if (t < 0) return; Region* R = find(bar, 8); if (R) do_read(*R, (unsigned char*)bar - R->base, t, key(s), false);
}
void shadow_proxy_fence(int t) { ON; fence_clk[t] = vc[t][t]; pf[t] = vc[t]; vc[t][t]++; }
void hook(const void* p, size_t n, bool w, void* pc) {
  if (!active || !cur) return;
  auto* q = (const unsigned char*)p;
  if (q >= sm.base && q < sm.base + sm.size && cfg.preempt) preempt(cfg.preempt);
  if ((q >= sm.base + sm.size && q < sm.base + sm.size + kCanary) || (q < sm.base && q >= sm.base - kCanary)) race(w ? "out-of-bounds write" : "out-of-bounds read", sm, q - sm.base, cur->tid, (uint64_t)pc, -1, 0);
  access(cur->tid, p, n, w, (uint64_t)pc);
}
}}  // namespace simt::rt

extern "C" {
__attribute__((visibility("default"))) void simt_register(const void* p, size_t n, const char* name) { simt::rt::globals.push_back({(const unsigned char*)p, n, nullptr, name, false}); }
__attribute__((visibility("default"))) void simt_unregister_all() { simt::rt::globals.clear(); }
#define H(T, N_) \
  void __tsan_##T##N_(void* p) { simt::rt::hook(p, N_, #T[0] == 'w', __builtin_return_address(0)); } \
  void __tsan_unaligned_##T##N_(void* p) { simt::rt::hook(p, N_, #T[0] == 'w', __builtin_return_address(0)); } \
  void __tsan_volatile_##T##N_(void* p) { simt::rt::hook(p, N_, #T[0] == 'w', __builtin_return_address(0)); }
H(read, 1) H(read, 2) H(read, 4) H(read, 8) H(read, 16) H(write, 1) H(write, 2) H(write, 4) H(write, 8) H(write, 16)
void __tsan_read_range(void* p, size_t n) { simt::rt::hook(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { simt::rt::hook(p, n, true, __builtin_return_address(0)); }
void __tsan_init() { simt::rt::instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
}
