"""Shampoo's matrices: how parameters are cut into blocks, what is kept of each, and the batched algebra on them.

A parameter of shape (d0, ...) is the matrix (d0, rest), cut into blocks; a block G of m x n has a left matrix of order
m and a right one of order n, averages of G G^T and G^T G. A parameter's state stacks its matrices by order: the tensors
``<name>.<order>`` have one entry per matrix of that order. In 4 bits:
    eigenvalues.n (b, n), eigenvectors.n uint8 (b, n, 32 C), eigenvector_scales.n (b, n, C)
    root.n uint8 (b, n, 32 C), root_scales.n (b, n, C), root_diagonal.n (b, n)
where a row of ``eigenvectors`` is one eigenvector, and C = ceil(n / 64). In 32 bits, and always where a matrix has few
elements: statistics.n (b, n, n) and root.n (b, n, n).
Matrices of one order are worked on in one batch, whichever parameters they belong to.
"""

import functools
from collections import defaultdict
from typing import NamedTuple

import torch

from tilewise import _C
from tilewise.optim.matrices import (
    ROW_BLOCK_BYTES,
    dequantize_matrix,
    orthonormalize,
    quantize_matrix,
    row_blocks,
)

BATCH_ELEMENTS = 1 << 24  # of float32 matrices that exist at one time, or one matrix
EIGENVECTORS = ("eigenvectors", "eigenvector_scales")
ROOT = ("root", "root_scales", "root_diagonal")


class Block(NamedTuple):
    """A rectangle of a parameter's matrix; its two matrices as (order, index among those of that order)."""

    rows: slice
    columns: slice
    left: tuple[int, int]
    right: tuple[int, int]


class Layout(NamedTuple):
    rows: int
    columns: int
    blocks: tuple[Block, ...]
    orders: dict[int, int]  # how many matrices of each order


def blocks_of(shape, max_order) -> tuple[int, int, int, int]:
    """Rows and columns of a parameter's matrix, and into how many blocks they are cut; zeros if it has no matrix."""
    if len(shape) < 2 or 0 in shape:
        return 0, 0, 0, 0
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    return rows, columns, -(-rows // max_order), -(-columns // max_order)


def _cut(size, count):
    """Slices that differ by at most one, longer ones first."""
    ends = [i * (size // count) + min(i, size % count) for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


@functools.lru_cache(maxsize=4096)
def layout(rows, columns, row_count, column_count) -> Layout | None:
    if not rows:
        return None
    orders, blocks = defaultdict(int), []

    def next_of(order):
        orders[order] += 1
        return order, orders[order] - 1

    for r in _cut(rows, row_count):
        for c in _cut(columns, column_count):
            blocks.append(Block(r, c, next_of(r.stop - r.start), next_of(c.stop - c.start)))
    return Layout(rows, columns, tuple(blocks), dict(orders))


def tensors_of(where: Layout, quantized) -> dict[str, tuple[torch.dtype, tuple]]:
    """{name: (dtype, shape)} of a parameter's matrices; ``quantized(order)`` says which are in 4 bits."""
    tensors = {}
    for n, b in where.orders.items():
        if not quantized(n):
            tensors |= dict.fromkeys((f"statistics.{n}", f"root.{n}"), (torch.float32, (b, n, n)))
            continue
        blocks = row_blocks(n)
        codes, scales = (torch.uint8, (b, n, blocks * ROW_BLOCK_BYTES)), (torch.float32, (b, n, blocks))
        tensors |= dict(zip((f"{name}.{n}" for name in EIGENVECTORS), (codes, scales), strict=True))
        tensors |= dict(zip((f"{name}.{n}" for name in ROOT), (codes, scales, (torch.float32, (b, n))), strict=True))
        tensors[f"eigenvalues.{n}"] = torch.float32, (b, n)
    return tensors


class Slot(NamedTuple):
    """One matrix: where it stands in the state of its parameter."""

    state: dict
    order: int
    index: int

    @property
    def quantized(self):
        return f"eigenvalues.{self.order}" in self.state

    def part(self, name):
        return self.state[f"{name}.{self.order}"][self.index : self.index + 1]


def _gather(slots, name):
    parts = [slot.part(name) for slot in slots]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scatter(slots, name, values):
    for slot, value in zip(slots, values.split(1), strict=True):
        slot.part(name).copy_(value)


def _stack(matrices):
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)


def _batches(items, key, elements):
    """Lists of the items that agree in ``key``, of at most BATCH_ELEMENTS together."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    for group in groups.values():
        size = max(1, BATCH_ELEMENTS // max(1, elements(group[0])))
        yield from (group[i : i + size] for i in range(0, len(group), size))


# ---- statistics ----
class Statistic(NamedTuple):
    slot: Slot
    x: torch.Tensor  # (order, any): the matrix averages x x^T
    first: bool


def update_statistics(jobs, beta) -> None:
    """Moves each average towards its x x^T. One that is not finite is left out: its matrix does not change."""
    for batch in _batches(jobs, lambda j: (*j.x.shape, j.slot.quantized, j.first), lambda j: 4 * j.slot.order**2):
        slots = [job.slot for job in batch]
        x = _stack([job.x for job in batch])
        usable = x.square().sum((1, 2)).isfinite()  # then so is every product
        if x.is_cpu and usable.all():
            usable = None  # all of them; on CUDA asking would wait for the device
        else:
            x = x.masked_fill(~usable[:, None, None], 0)
        if not slots[0].quantized:
            weight = 1 - beta if usable is None else torch.where(usable, 1 - beta, 0.0)[:, None, None]
            _scatter(slots, "statistics", torch.lerp(_gather(slots, "statistics"), x @ x.mT, weight))
        elif batch[0].first:
            keep_statistics(slots, (1 - beta) * (x @ x.mT))
        else:
            _keep_eigenvectors(slots, *_iterate(slots, x, beta), usable)


RIDGE = 2.0**-20  # of the largest element


def _decompose(matrices):
    """Eigenvalues, ascending, and eigenvectors in columns, of symmetric matrices.

    Where rows hardly ever see a gradient, elements lie tens of decades below the largest, and LAPACK's float32 solver
    may fail, or return NaN. Those far below its rounding are dropped, and a ridge keeps the rest from being singular.
    """
    top = matrices.abs().amax((1, 2), keepdim=True)
    scaled = matrices / torch.where(top > 0, top, 1)
    scaled = scaled.where(scaled.abs() > 2.0**-40, 0)
    scaled.diagonal(dim1=1, dim2=2).add_(RIDGE)
    values, columns = torch.linalg.eigh(scaled)
    return (values - RIDGE) * top[..., 0], columns


def _iterate(slots, x, beta):
    """Eigenvalues and eigenvectors of A = beta V L V^T + (1 - beta) x x^T: one step of orthogonal iteration from V.

    With V^T V = I the product A V is beta V L + (1 - beta) x (x^T V), so A itself is not needed. In A V = Q R the
    diagonal of R is q_i^T A v_i: Rayleigh quotients between the new and the old vectors.
    """
    rows = orthonormalize(_dequantize(slots, EIGENVECTORS))
    moved = rows * (beta * _gather(slots, "eigenvalues"))[..., None]
    moved = torch.baddbmm(moved, rows @ x, x.mT, alpha=1 - beta)
    packed, reflections = torch.geqrf(moved.mT)  # torch.linalg.qr would copy both factors once more
    return packed.diagonal(dim1=1, dim2=2).abs(), torch.linalg.householder_product(packed, reflections).mT


def _dequantize(slots, names):
    return dequantize_matrix(*(_gather(slots, name) for name in names))


def _keep_eigenvectors(slots, values, rows, usable=None):
    """In descending order, because the iteration converges from the largest; where not ``usable`` as they were."""
    codes, scales, _ = quantize_matrix(rows)
    values, order = values.clamp(min=0).sort(descending=True)
    where = torch.arange(len(order), device=order.device)[:, None], order
    named = {"eigenvalues": values, "eigenvectors": codes[where], "eigenvector_scales": scales[where]}
    for name, new in named.items():
        if usable is not None:
            new = torch.where(usable.view(-1, *[1] * (new.ndim - 1)), new, _gather(slots, name))
        _scatter(slots, name, new)


def statistics_of(slots) -> torch.Tensor:
    """The averages (b, n, n) as they stand."""
    if not slots[0].quantized:
        return _gather(slots, "statistics")
    values, rows = _eigenvectors(slots)
    return (rows * values[..., None]).mT @ rows


def keep_statistics(slots, averages) -> None:
    if slots[0].quantized:
        values, columns = _decompose(averages)
        _keep_eigenvectors(slots, values, columns.mT)
    else:
        _scatter(slots, "statistics", averages)


RECTIFICATIONS = 4  # Bjorck steps after which quantised eigenvectors are orthonormal to float32's rounding


def _eigenvectors(slots):
    """Eigenvalues, and eigenvectors in rows."""
    rows = orthonormalize(_dequantize(slots, EIGENVECTORS), steps=RECTIFICATIONS)
    return _gather(slots, "eigenvalues"), rows


# ---- inverse fourth roots ----


def compute_roots(slots, eps) -> None:
    """(A + eps max(eigenvalues of A) I)^(-1/4) of each average A; of zero the identity."""
    for batch in _batches(slots, lambda s: (s.order, s.quantized), lambda s: 4 * s.order**2):
        if batch[0].quantized:
            values, rows = _eigenvectors(batch)
        else:
            values, columns = _decompose(_gather(batch, "statistics"))
            rows = columns.mT
        keep_roots(batch, (rows * _inverse_fourth_roots(values, eps)[..., None]).mT @ rows)


def keep_roots(slots, roots) -> None:
    kept = quantize_matrix(roots, keep_diagonal=True) if slots[0].quantized else (roots,)
    for name, value in zip(ROOT, kept, strict=False):
        _scatter(slots, name, value)


def _inverse_fourth_roots(values, eps):
    top = values.amax(-1, keepdim=True)
    return torch.where(top > 0, values.clamp(min=0) + eps * top, 1).pow(-0.25)


# ---- what a step does ----
class Product(NamedTuple):
    left: Slot
    right: Slot
    gradient: torch.Tensor  # (m, n)
    direction: torch.Tensor  # (m, n), overwritten


def precondition(jobs, or_gradient=False) -> None:
    """direction = left gradient right, at the gradient's norm; of roots that are zero the gradient, if asked for."""
    key = lambda j: (*j.gradient.shape, j.left.quantized, j.right.quantized)  # noqa: E731
    for batch in _batches(jobs, key, lambda j: j.left.order**2 + j.right.order**2):
        g = _stack([job.gradient for job in batch])
        dtype = _product_dtype(batch[0])
        out = roots_of([job.left for job in batch]).to(dtype) @ g.to(dtype)
        out = out @ roots_of([job.right for job in batch]).to(dtype)
        size, new_size = _norms(g), _norms(out)
        scale = torch.where(new_size > 0, size / new_size, 0)
        for i, job in enumerate(batch):
            torch.mul(out[i], scale[i], out=job.direction)
            if or_gradient:
                job.direction.copy_(torch.where(new_size[i] == 0, g[i], job.direction))


def _norms(matrices):
    """float32 (b, 1, 1); those of the rows first, because torch adds up many squares less exactly than few."""
    by_row = torch.linalg.vector_norm(matrices, dim=2, dtype=torch.float32)
    return torch.linalg.vector_norm(by_row, dim=1)[:, None, None]


NARROW_ORDER = 128  # below it bfloat16 gains nothing


def _product_dtype(job):
    """bfloat16 for roots in 4 bits where its products are several times faster: it rounds far less than the codes."""
    g, quantized = job.gradient, job.left.quantized and job.right.quantized
    fast = min(g.shape) >= NARROW_ORDER and (g.is_cuda or _C.isa().startswith("amx"))
    return torch.bfloat16 if quantized and fast else torch.float32


def roots_of(slots) -> torch.Tensor:
    """The inverse roots (b, n, n) as they stand."""
    return _dequantize(slots, ROOT) if slots[0].quantized else _gather(slots, "root")
