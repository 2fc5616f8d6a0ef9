"""Sparse linear layers beside torch's dense matrix product with the zeros (its fastest way on these shapes)."""

import torch
import torch.nn.functional as F

import tilewise as tw
from tilewise.bench.case import Case
from tilewise.sparse.operators import csr_linear_dvalues_op, csr_linear_op, nm_linear_dvalues_op, nm_linear_dx_op

CSR_SHAPE = (512, 2048, 2048)  # rows, inputs, outputs
CSR_TARGETS = {0.8: 1.8, 0.9: None, 0.95: None}
NM_SHAPES = [(1, 4096, 4096), (16, 4096, 4096), (512, 2048, 2048), (2048, 512, 2048)]
FEW_ROWS_OF_16_BITS = [(rows, 4096, 4096) for rows in (4, 8, 32)]  # on tiles, whose kernels change between them
CUDA_NM_SHAPES = [(1, 8192, 8192), (16, 8192, 8192), (4096, 4096, 4096), (8192, 8192, 8192)]


def _tensors(device, dtype, rows, columns, out):
    shapes = (out, columns), (rows, columns), (rows, out)
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def _nm_runs(device, dtype, rows, columns, out):
    """Both sides of every operation, on the same tensors."""
    w, x, dy = _tensors(device, dtype, rows, columns, out)
    weight = tw.NMSparse.from_dense(w)
    values, indices, mask = weight.values, weight.indices, weight.mask()
    dense = weight.to_dense()
    dx, dvalues = lambda: nm_linear_dx_op(dy, values, indices), lambda: nm_linear_dvalues_op(dy, x, indices)
    return {
        "forward": (lambda: tw.linear(x, weight), lambda: F.linear(x, dense)),
        "dx": (dx, lambda: dy @ dense),
        "dvalues": (dvalues, lambda: (dy.t() @ x).mul_(mask)),
        "training step": (
            lambda: (tw.linear(x, weight), dx(), dvalues()),
            lambda: (F.linear(x, w * mask), dy @ (w * mask), (dy.t() @ x).mul_(mask)),
        ),
    }


def _nm_cases(device, dtype, rows, columns, out):
    size, name = dtype.itemsize, f"2:4 {str(dtype)[6:]} {rows}x{columns}x{out}"
    flops = rows * columns * out  # half of the dense product's
    least = out * columns * (4 * size + 1) / 8 + size * rows * (columns + out)  # half the values, 2 bits for each
    operations = {"forward": 1, "dx": 1, "dvalues": 1, "training step": 3} if rows >= 64 else {"forward": 1}
    for operation, times in operations.items():  # decoding has no backward
        yield Case(
            f"{name} {operation}",
            flops=times * flops,
            bytes=times * least,
            dtype=dtype,
            prepare=lambda operation=operation: _nm_runs(device, dtype, rows, columns, out)[operation],
        )


def _csr_cases(device, sparsity, target, rows, columns, out):
    w, x, dy = _tensors(device, torch.float32, rows, columns, out)
    w = torch.where(torch.rand_like(w) >= sparsity, w, 0)
    weight = tw.CSR.from_dense(w)
    matrix, transposed, tile = weight._matrix(), weight._transposed(), weight._tile
    nnz, name = weight.values.numel(), f"CSR {sparsity:.0%} {rows}x{columns}x{out}"
    work = {"flops": 2 * rows * nnz, "bytes": 8 * nnz + 4 * (x.numel() + dy.numel())}
    yield Case(f"{name} forward", lambda: tw.linear(x, weight), lambda: F.linear(x, w), target=target, **work)
    if rows < 64:
        return
    dx = lambda: csr_linear_op(dy, weight.values, None, transposed, [], out, tile)  # noqa: E731
    yield Case(f"{name} dx", dx, lambda: dy @ w, **work)
    yield Case(f"{name} dvalues", lambda: csr_linear_dvalues_op(dy, x, matrix, tile), lambda: dy.t() @ x, **work)


def _nm_shapes(device, dtype):
    if device.type != "cpu":
        return CUDA_NM_SHAPES
    return NM_SHAPES if dtype == torch.float32 else sorted(NM_SHAPES + FEW_ROWS_OF_16_BITS)


def cases(device: torch.device) -> list[Case]:
    found = []
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cpu" else [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        for shape in _nm_shapes(device, dtype):
            found += _nm_cases(device, dtype, *shape)
    if device.type == "cpu":
        for sparsity, target in CSR_TARGETS.items():
            found += _csr_cases(device, sparsity, target, *CSR_SHAPE)
        found += _csr_cases(device, 0.8, None, 16, *CSR_SHAPE[1:])
        found += _csr_cases(device, 0.9, None, 1, 4096, 4096)
    return found
