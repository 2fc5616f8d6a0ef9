"""Golden vectors: what a real GPU answers to the probes, kept in tests/golden for CI to compare the emulator with.

On a machine with a GPU:

    python tests/simt/golden.py build --arch 90a --out build/libgolden.so
    python tests/simt/golden.py record --lib build/libgolden.so --out tests/golden
    python tests/simt/golden.py check --lib build/libgolden.so      the GPU against the numpy models

A file holds, per probe, its raw inputs and the raw words that came back.
"""

import argparse
import contextlib
import ctypes
import pathlib
import subprocess
import sys

import numpy as np

import emulated
import probes
import wgmma_cases
from emulated import message

SOURCES = ("golden_kernels.cu", "golden_kernels_sm90.cu")
WGMMA = "wgmma_"


class Host:
    """Arrays as the emulator takes them: where they are."""

    synchronize = staticmethod(lambda: None)

    def upload(self, array):
        copy = emulated.aligned(array.shape, array.dtype)
        copy[...] = array
        return copy

    def pointer(self, array):
        return emulated.pointer(array)

    def download(self, array):
        return array


class Gpu:
    """Arrays as torch tensors of bytes on the current device."""

    def __init__(self):
        import torch

        self.torch = torch

    def upload(self, array):
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        tensor = self.torch.from_numpy(raw.copy()).cuda()
        return tensor, array.dtype, array.shape

    def pointer(self, handle):
        return ctypes.c_void_p(handle[0].data_ptr())

    def download(self, handle):
        tensor, dtype, shape = handle
        return tensor.cpu().numpy().view(dtype).reshape(shape)

    def synchronize(self):
        self.torch.cuda.synchronize()

    def describe(self):
        major, minor = self.torch.cuda.get_device_capability()
        return f"sm{major}{minor}", self.torch.cuda.get_device_name()


def run_probe(library, machine, name, x):
    """The output words of one probe of probes.CASES."""
    case = probes.CASES[name]
    source, target = machine.upload(x), machine.upload(np.zeros_like(x))
    pointers = (machine.pointer(source), machine.pointer(target))
    blocks = len(x) // probes.THREADS_PER_BLOCK[case.kernel]
    if case.kernel == "stmatrix":
        error = library.simt_stmatrix_probe(case.name.encode(), *pointers, blocks, None)
    else:
        error = library.simt_probe(case.kernel.encode(), case.name.encode(), *pointers, blocks, None)
    finish(machine, name, error)
    return machine.download(target)


def run_wgmma(library, machine, name, a, b):
    """The raw accumulators, [128 threads, N / 2]."""
    wanted = wgmma_cases.inputs(name)[2]
    handles = [machine.upload(array) for array in (a, b, np.full(wanted.shape, np.nan, np.float32))]
    error = library.simt_wgmma_probe(name.encode(), *map(machine.pointer, handles), None)
    finish(machine, name, error)
    return machine.download(handles[2])


def finish(machine, name, error):
    if error:
        raise RuntimeError(f"{name}: {message(error)}")
    machine.synchronize()


def answers(library, machine, skip_unsupported=False):
    """{probe: (inputs, outputs)}; a device may lack the instructions of some probes."""
    found = {}
    for name in probes.CASES:
        with tolerated("lacks the kernel's architecture", skip_unsupported):
            x = probes.inputs(name)
            width = probes.expected(name, x)[0].shape[1]
            found[name] = (x, run_probe(library, machine, name, x)[:, :width])
    for name in wgmma_cases.CASES:
        with tolerated("lacks the kernel's architecture", skip_unsupported):
            a, b, _ = wgmma_cases.inputs(name)
            d = run_wgmma(library, machine, name, a, b)
            found[WGMMA + name] = (np.concatenate([a.ravel(), b.ravel()]), d.view(np.uint32))
    return found


@contextlib.contextmanager
def tolerated(words, enabled):
    try:
        yield
    except RuntimeError as error:
        if not enabled or words not in str(error):
            raise


def differences(name, x, actual):
    """How many words differ from the model by more than its tolerance allows."""
    if name.startswith(WGMMA):
        wanted = wgmma_cases.inputs(name[len(WGMMA) :])[2]
        return int((actual.view(np.float32) != wanted).sum())
    words, tolerance = probes.expected(name, x)
    return int(probes.mismatches(actual, words, tolerance).sum())


def save(path, found, description):
    arrays = {"device": np.array(description)}
    for name, (x, y) in found.items():
        arrays[f"{name}.in"], arrays[f"{name}.out"] = x, y
    np.savez_compressed(path, **arrays)


def load(path):
    with np.load(path) as file:
        names = [key[: -len(".in")] for key in file.files if key.endswith(".in")]
        return {name: (file[f"{name}.in"], file[f"{name}.out"]) for name in names}


# ---- commands ----


def build(args):
    target = f"-gencode=arch=compute_{args.arch},code=sm_{args.arch}"
    command = [args.nvcc, "-std=c++17", "-O3", target, "-shared", "-Xcompiler", "-fPIC"]
    command += ["-I", emulated.ROOT / "csrc", *(emulated.HERE / s for s in SOURCES), "-o", args.out]
    return subprocess.run(command).returncode


def record(args):
    if args.emulated:  # a rehearsal
        emulated.build()
        args.lib, machine, arch, device = emulated.library_path("plain"), Host(), "emulated", "the emulator"
    else:
        machine = Gpu()
        arch, device = machine.describe()
    found = answers(emulated.load(args.lib), machine, skip_unsupported=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{arch}.npz"
    save(path, found, device)
    print(f"{path}: {len(found)} probes on {device}")
    return report(found)


def check(args):
    return report(answers(emulated.load(args.lib), Gpu(), skip_unsupported=True))


def report(found):
    bad = {name: n for name, (x, y) in found.items() if (n := differences(name, x, y))}
    for name, n in bad.items():
        print(f"{name}: {n} words differ from the model")
    return bool(bad)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    building = commands.add_parser("build", help="compile the probes with nvcc")
    building.add_argument("--arch", default="90a")
    building.add_argument("--nvcc", default="nvcc")
    building.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/libgolden.so"))
    building.set_defaults(run=build)
    for name, run in (("record", record), ("check", check)):
        command = commands.add_parser(name)
        command.add_argument("--lib", type=pathlib.Path, default=pathlib.Path("build/libgolden.so"))
        command.add_argument("--out", type=pathlib.Path, default=emulated.ROOT / "tests" / "golden")
        command.set_defaults(run=run)
    commands.choices["record"].add_argument("--emulated", action="store_true", help="what the emulator answers")
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
