"""tilewise: CUDA kernels with native CPU twins, registered as PyTorch operators."""

import torch as _torch  # noqa: F401  (first: the core looks for torch's thread team when it is loaded)

from tilewise import _C, block_sparsity, compat, distributed, nn, optim, packing, reference, rope, speculative
from tilewise.attention import (
    BlockMask,
    KVCache,
    ZipCache,
    attention,
    attention_block_max,
    attention_column_sums,
    attention_varlen,
    lm_infinite_attention,
    merge_attention,
    paged_attention,
    paged_attention_varlen,
    shared_prefix_attention,
    tensor_attention,
)
from tilewise.fft_conv import fft_conv
from tilewise.sparse import CSR, CompressedWeight, NMSparse, linear, matmul

__all__ = [
    "BlockMask",
    "CSR",
    "CompressedWeight",
    "KVCache",
    "NMSparse",
    "ZipCache",
    "attention",
    "attention_block_max",
    "attention_column_sums",
    "attention_varlen",
    "block_sparsity",
    "compat",
    "distributed",
    "fft_conv",
    "info",
    "linear",
    "lm_infinite_attention",
    "matmul",
    "merge_attention",
    "nn",
    "optim",
    "packing",
    "paged_attention",
    "paged_attention_varlen",
    "reference",
    "rope",
    "shared_prefix_attention",
    "speculative",
    "tensor_attention",
]

_C.attach_torch_threads()
__version__ = _C.version()


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
