"""What Shampoo keeps beside its moments: layout, creation and checks.

Of every parameter, in host memory:
    statistics_step, root_step  float32 scalars: at which step statistics and roots were last computed, 0 for never
    blocks  int64 (4,): rows and columns of its matrix, and into how many blocks they are cut; zeros if it has none
and the tensors of tilewise.optim.preconditioners.
"""

import torch

from tilewise.optim.checkpoint import check_tensor
from tilewise.optim.preconditioners import blocks_of, layout, tensors_of

COUNTERS = ("statistics_step", "root_step")
HOST_TENSORS = {"statistics_step": (torch.float32, ()), "root_step": (torch.float32, ()), "blocks": (torch.int64, (4,))}
KINDS = ("statistics", "root", "root_scales", "root_diagonal", "eigenvectors", "eigenvector_scales", "eigenvalues")


def new_tensors(part, options) -> dict:
    """The tensors of a parameter before its first step; ``part`` is what this process holds of it."""
    zeros = {
        name: torch.zeros(shape, dtype=dtype, device="cpu" if name in HOST_TENSORS else part.device)
        for name, (dtype, shape) in planned(part, options).items()
    }
    return zeros | {"blocks": torch.tensor(blocks_of(part.shape, options["max_order"]))}


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
