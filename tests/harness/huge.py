"""Tensors of more than 2^31 elements that take little memory: most of their addresses are one chunk, mapped again and
again; only the end is memory of its own."""

import ctypes
import mmap
import os

import torch

CHUNK = 64 << 20  # bytes
_GUARD = 16 << 30  # addresses on both sides that nothing may touch: where indices of 32 bits would go
_FIXED, _NORESERVE = 0x10, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE


def _map(address, length, protection, flags, file=-1):
    got = _libc.mmap(address, length, protection, flags, file, 0)
    if got in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    return got


class HugeTensors:
    """Makes them, all over the same chunk of zeros; their memory is given back when the ``with`` block is left."""

    def __enter__(self):
        self._chunk = os.memfd_create("chunk")
        os.ftruncate(self._chunk, CHUNK)
        self._mapped = []
        return self

    def __exit__(self, *_):
        for address, length in self._mapped:
            _libc.munmap(address, length)
        os.close(self._chunk)

    def ending_with(self, tail: torch.Tensor, skipped: int) -> torch.Tensor:
        """One-dimensional: ``skipped`` elements that share the chunk, then a copy of ``tail``."""
        shared, own = skipped * tail.itemsize, tail.numel() * tail.itemsize
        if shared % mmap.PAGESIZE:
            raise ValueError("the tail must begin on a page")
        total = 2 * _GUARD + shared + own
        reserved = _map(None, total, 0, _ANONYMOUS)
        self._mapped.append((reserved, total))
        first = reserved + _GUARD
        for at in range(0, shared, CHUNK):
            _map(first + at, min(CHUNK, shared - at), _READ_WRITE, mmap.MAP_SHARED | _FIXED, self._chunk)
        _map(first + shared, own, _READ_WRITE, _ANONYMOUS | _FIXED)
        whole = torch.frombuffer((ctypes.c_char * (shared + own)).from_address(first), dtype=tail.dtype)
        whole[skipped:] = tail.reshape(-1)
        return whole
