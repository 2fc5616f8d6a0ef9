// How findings of the race checker read.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "../simt.h"
#include "race_state.h"

namespace simt {
namespace race {

namespace {

constexpr int kMaxFindings = 8;

// The innermost inlined frame outside this library's own headers.
std::string source_line(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return "?";
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase);
  char command[1024];
  snprintf(command, sizeof command, "addr2line -i -e '%s' %#tx 2>/dev/null", info.dli_fname, offset - 1);
  FILE* output = popen(command, "r");
  if (!output) return "?";
  std::string innermost, chosen;
  char line[1024];
  while (fgets(line, sizeof line, output)) {
    line[strcspn(line, " \n")] = 0;
    if (innermost.empty()) innermost = line;
    if (chosen.empty() && !strstr(line, "simt/host/")) chosen = line;
  }
  pclose(output);
  if (!chosen.empty()) return chosen;
  return innermost.empty() ? "?" : innermost;
}

std::string text(Where w) {
  if (!w.at) return "?";
  if (w.line) return std::string(static_cast<const char*>(w.at)) + ":" + std::to_string(w.line);
  return source_line(w.at);
}

std::string thread_name(int tid) {
  if (tid == checker.threads) return "a bulk load";
  char name[64];
  snprintf(name, sizeof name, "thread %d (warp %d lane %d)", tid, tid / kWarp, tid % kWarp);
  return name;
}

}  // namespace

void report(const Finding& f, const Region& region, size_t offset, int earlier_tid, Where earlier) {
  Checker& c = checker;
  if (!c.reported.insert({f.where, earlier}).second) return;
  if (++c.findings > kMaxFindings) return;
  c.report += std::string("\n  ") + f.what + " at " + region.name + "+" + std::to_string(offset) + ", block " +
              std::to_string(c.block) + ": " + thread_name(f.tid) + " at " + text(f.where);
  if (earlier_tid >= 0) c.report += "\n      earlier: " + thread_name(earlier_tid) + " at " + text(earlier);
}

}  // namespace race
}  // namespace simt
