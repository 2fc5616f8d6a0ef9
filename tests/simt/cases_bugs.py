"""The bug kernels: how to run one, and whether its output is right. Used by test_detectors and test_schedules."""

import numpy as np

import emulated
from emulated import aligned, message, pointer
from formats import from_bf16, to_bf16

GEMM_STEPS = 5


def exchange(library, bug, watch):
    """x of each block of 128 reversed and doubled."""
    x, aux = np.arange(256, dtype=np.float32), np.zeros(64, np.uint32)
    wanted = 2 * x.reshape(2, 128)[:, ::-1].ravel()
    with watch(x=x):
        error = library.simt_bug(b"exchange", bug.encode(), pointer(x), pointer(aux), 256, 2)
    return message(error), np.array_equal(x, wanted), x.tobytes()


def pipeline(library, bug, watch):
    """Sums over 8 tiles of a rotated 256-float row."""
    x, aux = aligned((8 * 256,), np.float32), np.zeros(64, np.float32)
    x[:] = np.arange(len(x)) % 97
    index = (np.arange(64)[:, None] * 4 + np.arange(4) * 4 + 64) % 256
    wanted = sum(tile[index].sum(1) for tile in x.reshape(8, 256))
    with watch(x=x):
        error = library.simt_bug(b"pipeline", bug.encode(), pointer(x), pointer(aux), len(x), 1)
    return message(error), np.array_equal(aux, wanted), aux.tobytes()


def last_block(library, bug, watch):
    """The sum of 64 ones in each of 6 blocks: every warp sum is 32."""
    x, aux = np.ones(6 * 64, np.float32), np.zeros(64, np.uint32)
    with watch(x=x, aux=aux):
        error = library.simt_bug(b"last_block", bug.encode(), pointer(x), pointer(aux), len(x), 6)
    return message(error), x[0] == 6 * 32, x.tobytes()


def operands(library, bug, watch):
    x, aux = np.ones(32, np.float32), np.zeros(64, np.uint32)
    error = library.simt_bug(b"operands", bug.encode(), pointer(x), pointer(aux), 32, 1)
    return message(error), not x.any(), x.tobytes()


def gemm(library, bug, watch):
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-2, 3, (64, 64 * GEMM_STEPS)).astype(np.float32) for _ in range(2))
    stored = [aligned(m.shape, np.uint16) for m in (a, b)]
    stored[0][:], stored[1][:] = to_bf16(a), to_bf16(b)
    c, sink = aligned((64, 64), np.uint16), np.zeros(128, np.float32)
    with watch(a=stored[0], b=stored[1], c=c):
        error = library.simt_bug_gemm(bug.encode(), *map(pointer, (*stored, c, sink)), GEMM_STEPS)
    right = np.array_equal(from_bf16(c), from_bf16(to_bf16(a @ b.T))) and not np.isnan(sink).any()
    return message(error), right, c.tobytes()


def register_operand(library, bug, watch):
    out = np.zeros(128, np.float32)
    error = library.simt_bug_register_operand(bug.encode(), pointer(out))
    return message(error), (out == 16).all(), out.tobytes()


KERNELS = {f.__name__: f for f in (exchange, pipeline, last_block, operands, gemm, register_operand)}


def run(library, mode, kernel, bug):
    """What the mode says of it: a diagnosis, "wrong result" or "clean", and the output."""

    def watch(**arrays):
        return emulated.registered(library, **arrays if mode == "race" else {})

    error, right, output = KERNELS[kernel](library, bug, watch)
    return error or ("clean" if right else "wrong result"), output


def main(kernel, bug):
    """For the asan mode, which needs a process of its own."""
    print(run(emulated.load(emulated.library_path("asan")), "asan", kernel, bug)[0])
