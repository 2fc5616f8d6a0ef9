"""tilewise: CUDA kernels with native CPU twins, registered as PyTorch operators."""

import torch as _torch  # noqa: F401  (first: the core looks for torch's thread team when it is loaded)

from tilewise import _C

_C.attach_torch_threads()
__version__ = _C.version()

from tilewise.fft_conv import fft_conv  # noqa: E402, F401


def info():
    """What this build holds and what it found: version, CUDA architectures, CPU instruction set, threads, devices."""
    return {
        "version": _C.version(),
        "cuda_architectures": _C.cuda_architectures(),
        "isa": _C.isa(),
        "isa_levels": _C.isa_levels(),
        "threads": f"{_C.num_threads()} ({_C.thread_backend()})",
        "cuda_devices": _C.cuda_devices(),
    }
