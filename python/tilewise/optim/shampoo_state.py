"""What Shampoo keeps beside its moments: layout, creation, checks, and the way into other bits and blocks.

Of every parameter, in host memory:
    statistics_step, root_step  float32 scalars: at which step statistics and roots were last computed, 0 for never
    blocks  int64 (4,): rows and columns of its matrix, and into how many blocks they are cut; zeros if it has none
and the tensors of tilewise.optim.preconditioners.
"""

import torch

from tilewise.optim.checkpoint import check_tensor
from tilewise.optim.preconditioners import (
    Slot,
    blocks_of,
    compute_roots,
    keep_roots,
    keep_statistics,
    layout,
    roots_of,
    statistics_of,
    tensors_of,
)

COUNTERS = ("statistics_step", "root_step")
HOST_TENSORS = {"statistics_step": (torch.float32, ()), "root_step": (torch.float32, ()), "blocks": (torch.int64, (4,))}
KINDS = ("statistics", "root", "root_scales", "root_diagonal", "eigenvectors", "eigenvector_scales", "eigenvalues")


def new_tensors(part, options) -> dict:
    """The tensors of a parameter before its first step; ``part`` is what this process holds of it."""
    zeros = {
        name: torch.zeros(shape, dtype=dtype, device="cpu" if name in HOST_TENSORS else part.device)
        for name, (dtype, shape) in planned(part, options).items()
    }
    return zeros | {"blocks": torch.tensor(blocks_of(part.shape, options["max_order"]), device="cpu")}


def planned(part, options) -> dict:
    """{name: (dtype, shape)} of a new state's."""
    where, least = layout(*blocks_of(part.shape, options["max_order"])), max(options["min_quantized_size"], 1)
    quantized = lambda order: options["state_bits"] != 32 and order * order >= least  # noqa: E731
    return HOST_TENSORS | (tensors_of(where, quantized) if where else {})


def layout_of(state):
    return layout(*state["blocks"].tolist())


def found(where: str, part, state: dict) -> dict:
    """{name: (dtype, shape)} of the tensors that a state must have, by its blocks and names."""
    if "blocks" not in state:
        raise ValueError(f"{where} has no 'blocks', expected a state of Shampoo")
    check_tensor(f"{where}['blocks']", state["blocks"], *HOST_TENSORS["blocks"])
    rows, columns, row_count, column_count = blocks = state["blocks"].tolist()
    whole = blocks_of(part.shape, 1)
    cut = min(1, rows) <= row_count <= rows and min(1, columns) <= column_count <= columns
    if (rows, columns) != whole[:2] or not cut:
        raise ValueError(f"{where}['blocks'] is {blocks}, expected blocks of a {whole[0]} x {whole[1]} matrix")
    matrices = layout(*blocks)
    return HOST_TENSORS | (tensors_of(matrices, lambda order: f"eigenvalues.{order}" in state) if matrices else {})


def check_values(where: str, state: dict) -> None:
    """Raises ValueError for counters ahead of the step, and for matrices that no step leaves."""
    step = float(state["step"])
    for name in COUNTERS:
        value = float(state[name])
        if not (0 <= value <= step and value == int(value)):
            raise ValueError(f"{where}['{name}'] is {value}, expected an integer, 0 <= {name} <= step")
    for name, value in state.items():
        kind = name.split(".")[0]
        if kind not in KINDS or not value.is_floating_point():
            continue
        if not bool(value.isfinite().all()):
            raise ValueError(f"{where}['{name}'] has values that are not finite")
        if (kind.endswith("scales") or kind == "eigenvalues") and not bool((value >= 0).all()):
            raise ValueError(f"{where}['{name}'] has negative values")


# ---- the way into other bits and blocks ----


def converted_tensors(part, options, state: dict) -> dict:
    """New tensors with what those of ``state``, which were checked, hold."""
    new = new_tensors(part, options)
    for name in COUNTERS:
        new[name].copy_(state[name])
    where, old = layout_of(new), {name: t.to(part.device) for name, t in state.items() if name.split(".")[0] in KINDS}
    if where is None or not state["statistics_step"] > 0:
        return new
    if torch.equal(new["blocks"], state["blocks"].cpu()):
        for order, count in where.orders.items():
            _copy_matrices(new, old, order, count)
        return new
    before = layout_of(state).blocks
    averages = [[statistics_of([Slot(old, *slot)])[0] for slot in (block.left, block.right)] for block in before]
    for block in where.blocks:
        for side in (0, 1):
            slots = [Slot(new, *(block.left, block.right)[side])]
            keep_statistics(slots, _recut(block, side, before, averages)[None])
            if state["root_step"] > 0:
                compute_roots(slots, options["matrix_eps"])
    return new


def _copy_matrices(new, old, order, count):
    """Bit by bit in the same form; else one by one, through float32."""
    ours, theirs = ({name for name in s if name.endswith(f".{order}")} for s in (new, old))
    if ours == theirs:
        new |= {name: old[name].clone() for name in ours}
        return
    for i in range(count):
        source, target = [Slot(old, order, i)], [Slot(new, order, i)]
        keep_statistics(target, statistics_of(source))
        keep_roots(target, roots_of(source))


def _recut(block, side, before, averages):
    """Statistics of one side (0: left, 1: right) of a block, from those of the blocks as they were before.

    Of an old block with statistics L and R, the part in rows r and columns c has L[r, r] tr(R[c, c]) / tr(R) on its
    left, and likewise on its right: exact where the gradient's covariance is a Kronecker product. What old blocks
    beside each other say of the same rows adds up; between rows of different ones nothing is known.
    """
    own, other = block[side], block[1 - side]
    total = averages[0][side].new_zeros(own.stop - own.start, own.stop - own.start)
    for source, matrices in zip(before, averages, strict=True):
        (here, inside), (_, across) = _common(own, source[side]), _common(other, source[1 - side])
        squares = matrices[1 - side].diagonal().clamp(min=0)
        share = squares[across].sum() / squares.sum().clamp(min=torch.finfo(torch.float32).tiny)
        total[here, here] += matrices[side][inside, inside] * share
    return total


def _common(a, b):
    """What two slices share, counted from the start of each; empty slices where it is nothing."""
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    stop = max(start, stop)
    return slice(start - a.start, stop - a.start), slice(start - b.start, stop - b.start)
