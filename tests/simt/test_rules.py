"""Kernels obey the rules of csrc/simt/README.md, and the checker notices when one does not."""

import pytest

import rules

GOOD = """
// asm, threadIdx and __syncthreads() may be named in comments
#include "simt/simt.h"
template <class T>
struct Scale {
  static constexpr int kThreads = 128, kMinArch = 800;
  struct Params { const T* __restrict__ x; };
  struct Smem { float partial[4]; };
  static SIMT_DEVICE float total(const Smem& s) { return s.partial[0]; }
  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    static_assert(sizeof(T) == 2, "asm volatile is only a word here");
    s.partial[simt::warp_id()] = static_cast<float>(simt::block_idx().x);
    simt::atomic_add(&s.partial[0], 1.f);
  }
};
static const char* launch_scale(const Args& a, void* stream);
"""

BAD = {
    'asm volatile("bar.sync 0;");': "inline assembly",
    "__syncthreads();": "CUDA builtin",
    "v = __shfl_xor_sync(~0u, v, 1);": "CUDA builtin",
    "__shared__ float tile[64];": "CUDA builtin",
    "const int t = threadIdx.x;": "index variable",
    "cudaMemcpyAsync(a, b, n, kind, s);": "runtime or driver",
    "cuTensorMapEncodeTiled(&map);": "runtime or driver",
    "atomicAdd(&x, 1.f);": "CUDA atomic",
    "kernel<<<grid, 128>>>(p);": "CUDA launch",
    "#include <cuda_fp16.h>": "CUDA header",
    "volatile int* flag = p.flag;": "volatile",
    "static int counter = 0;": "mutable static",
    "static float table[64];": "mutable static",
    "static std::vector<int> cache;": "mutable static",
    "thread_local int depth;": "thread-local",
    "#if SIMT_EMULATED": "one of the two machines",
    'printf("%d", t);': "printing",
    "memcpy(s.tile, p.x, 64);": "race checker does not see",
}


def test_kernels_obey_the_rules():
    assert rules.check_files(rules.kernel_files()) == []


def test_good_code_passes():
    assert rules.check_text(GOOD) == []


@pytest.mark.parametrize("line", BAD)
def test_bad_code_is_found(line):
    found = rules.check_text(GOOD + line + "\n")
    assert [number for number, _, _ in found if number != GOOD.count("\n") + 1] == []
    assert any(BAD[line] in what for _, what, _ in found), found


def test_files_are_found_and_reported(tmp_path):
    folder = tmp_path / "csrc" / "attention" / "cuda"
    folder.mkdir(parents=True)
    (folder / "forward.h").write_text("int x;\n__syncthreads();\n")
    (tmp_path / "csrc" / "simt" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "simt" / "cuda" / "own.h").write_text("asm;\n")
    files = rules.kernel_files(tmp_path)
    assert [f.name for f in files] == ["forward.h"]
    assert rules.check_files(files)[0].endswith(
        "forward.h:2: CUDA builtin or attribute; simt has a name for it: __syncthreads();"
    )
