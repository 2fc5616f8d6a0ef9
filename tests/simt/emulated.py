"""Builds the emulated libraries of this directory and calls them with numpy arrays."""

import contextlib
import ctypes
import os
import pathlib
import subprocess
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "simt-tests"
MODES = ("plain", "race", "asan")
SIMT_VARIABLES = (
    "SIMT_ARCH",
    "SIMT_SCHED",
    "SIMT_ASYNC",
    "SIMT_SEED",
    "SIMT_PREEMPT",
    "SIMT_THREADS",
    "SIMT_RACE",
    "SIMT_WATCHDOG",
)


def build():
    """Configures and builds all modes; what is up to date stays."""
    generator = ["-G", "Ninja"] if subprocess.run(["which", "ninja"], capture_output=True).returncode == 0 else []
    configure = ["cmake", *generator, "-S", HERE, "-B", BUILD, f"-DTILEWISE_EMULATOR_DIR={BUILD}"]
    compile_all = ["cmake", "--build", BUILD, "--parallel", "2"]
    commands = [compile_all] if (BUILD / "CMakeCache.txt").exists() else [configure, compile_all]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


def library_path(mode):
    return BUILD / f"libtilewise_emulated_{mode}.so"


def load(path):
    library = ctypes.CDLL(str(path))
    for name in (
        "simt_probe",
        "simt_stmatrix_probe",
        "simt_bulk_probe",
        "simt_tma_probe",
        "simt_wgmma_probe",
        "simt_bug",
        "simt_bug_gemm",
        "simt_bug_register_operand",
    ):
        if hasattr(library, name):
            getattr(library, name).restype = ctypes.c_char_p
    return library


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def message(error):
    return "" if error is None else error.decode()


@contextlib.contextmanager
def settings(**values):
    """Sets SIMT_* for the launches inside; all others are unset, so that a caller's environment cannot interfere."""
    before = {name: os.environ.pop(name, None) for name in SIMT_VARIABLES}
    os.environ.update({f"SIMT_{name.upper()}": str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def registered(library, **arrays):
    """Lets the race checker watch these global buffers."""
    for name, array in arrays.items():
        library.simt_register(pointer(array), ctypes.c_size_t(array.nbytes), name.encode())
    try:
        yield
    finally:
        library.simt_unregister_all()


def aligned(shape, dtype, alignment=128):
    """A zeroed array whose data starts where a GPU allocation might."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def sanitizer_environment():
    """The environment in which Python can load the asan library."""
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    clean = {name: value for name, value in os.environ.items() if name not in SIMT_VARIABLES}
    return {
        **clean,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": str(HERE),
    }


def run_sanitized(code):
    """Runs Python code with the sanitizers loaded; returns what it printed, a sanitizer's report included."""
    done = subprocess.run([sys.executable, "-c", code], env=sanitizer_environment(), capture_output=True, text=True)
    return done.stdout + done.stderr
