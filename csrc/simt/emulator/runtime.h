// runtime.h - internals shared by runtime.cpp and race.cpp
#pragma once
#include "../simt.h"
#include <deque>
#include <map>
#include <string>
#include <vector>
namespace simt { namespace rt {
enum { kFifo = 0, kLazy = 0, kLifo = 1, kEager = 1, kRandom = 2 };
struct Config { int sched = kLifo, async = kLazy; uint64_t seed = 0; int race = 1; unsigned preempt = 0, threads = 1; size_t stack_kb = 128; void load_env(); };
extern Config cfg;
constexpr size_t kCanary = 1024; constexpr uint32_t kSmemBase = 1024;
struct Failed {};
struct Fiber; struct Block;
struct CpOp { unsigned char* dst; const unsigned char* src; int bytes, group; bool pred, done; Site site; };
struct StoreOp { const TensorMap* map; const unsigned char* src; Coord c; int group; bool done; Site site; };
struct Mbar { int pending, expected; int64_t tx; unsigned phase; };
struct MbarSide { std::vector<uint32_t> acc, pub; };  // clocks of the phase in progress / last completed
struct AsyncOp { unsigned char* dst; const TensorMap* map; uint64_t* bar; Coord c; int tid; Site site; uint32_t token; };
struct Bar { int arrived = 0, count = 0; bool full = false; Site site{"", 0}; std::vector<Fiber*> waiters; std::vector<int> who; };
struct Coll { uint32_t mask = 0, arrived = 0; Op op = nullptr; const char* name = ""; Site site{"", 0}; void* args[32]; };
struct Warp { Coll pend[4]; std::vector<Fiber*> exited(Block*, int warp); };
struct WgOp { int n; uint64_t da, db; bool tb, acc, bf, rs, executed = false; int group; Site site; float* d[128]; const uint32_t* a[128]; uint32_t asnap[128][4]; std::vector<float> saved; };
struct Group { int regs = 0, want_regs = 0, arrived = 0, groups = 0, first = 0; bool fenced = false; void (*op)(Group&, Site) = nullptr; const char* name = ""; Site site{"", 0}; void* args[128]; std::vector<WgOp> ops; };
struct Block {
  const Launch* l; unsigned lin; dim3 bidx; int n, alive; unsigned char* smem; size_t smem_size; uint64_t rng; std::string error;
  std::vector<Fiber*> fibers; std::deque<Fiber*> ready; Bar bar[16]; std::vector<Warp> warps; std::vector<Group> groups;
  std::map<uint64_t*, MbarSide> mbars; std::vector<AsyncOp> async;
};
extern thread_local Block* blk;
inline uint64_t& b_switches() { static thread_local uint64_t n = 0; return n; }
[[noreturn]] void fail(const char*, ...);
void tma_execute(const AsyncOp&);
std::string mbar_describe(uint64_t*);
void preempt(unsigned one_in);
int fiber_tid(Fiber*);
// ---- happens-before checker (race.cpp; no-ops unless the kernels were compiled with -fsanitize=thread) ----
bool shadow_on();
void shadow_begin_launch(int threads, size_t smem);
std::string shadow_end_launch();
void shadow_begin_block(Block*);
void shadow_end_block(Block*);
void shadow_access(int tid, const void*, size_t, bool write, Site);
void shadow_atomic(int tid, const void*, size_t, Site);
void shadow_pending_write(int tid, const void*, size_t, Site);
void shadow_complete_write(int tid, const void*, size_t, Site);
void shadow_pending_read(int tid, const void*, size_t, Site);
void shadow_complete_read(int tid, const void*, size_t, Site);
uint32_t shadow_async_issue(int tid, const void*, size_t, Site);
void shadow_async_complete(uint64_t* bar, const void*, size_t, uint32_t token, Site);
void shadow_join(const std::vector<int>& arrive, const std::vector<Fiber*>& wait);
void shadow_release(int tid, uint64_t* bar);
void shadow_acquire(int tid, uint64_t* bar);
void shadow_mbar_phase(uint64_t* bar);
void shadow_mbar_use(int tid, uint64_t* bar, Site);
void shadow_proxy_fence(int tid);
}}
