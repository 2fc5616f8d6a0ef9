"""What an optimizer's states take, parameter by parameter."""

import math
from typing import NamedTuple

from tilewise.optim import forms
from tilewise.optim.tensors import local


class ParameterMemory(NamedTuple):
    """One row of a report; of a sharded parameter, this process's part."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: int  # of the first moment kept
    form: str  # of the second moment, or of the only one
    state_bytes: int
    bytes_per_parameter: float


class MemoryReport(tuple):
    """Rows of :class:`ParameterMemory`; ``str`` and ``print`` give a table, rich's ``print`` a coloured one."""

    @property
    def state_bytes(self) -> int:
        """Bytes of all states."""
        return sum(row.state_bytes for row in self)

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of all states per element of all parameters."""
        return self.state_bytes / max(sum(_numel(row) for row in self), 1)

    def _lines(self):
        for row in self:
            shape = "x".join(map(str, row.shape)) or "scalar"
            size = f"{row.state_bytes:,}", f"{row.bytes_per_parameter:.3f}"
            yield row.name, shape, row.dtype, str(row.bits), row.form, *size
        yield "total", "", "", "", "", f"{self.state_bytes:,}", f"{self.bytes_per_parameter:.3f}"

    def __str__(self):
        lines = [HEADER, *self._lines()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                f"{cell:{'<>'[i >= 5]}{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def __rich__(self):
        from rich.table import Table

        table = Table(title="optimizer states")
        for i, title in enumerate(HEADER):
            table.add_column(title, justify="right" if i >= 5 else "left")
        *rows, total = self._lines()
        for row in rows:
            table.add_row(*row)
        table.add_section()
        table.add_row(*total)
        return table


HEADER = ("parameter", "shape", "dtype", "bits", "form", "bytes", "bytes per element")


def memory_report(optimizer, named_parameters=None) -> MemoryReport:
    """A row per parameter of the optimizer; for those without states, what they will get."""
    names = {id(p): name for name, p in named_parameters or ()}
    rows = []
    for i, group in enumerate(optimizer.param_groups):
        own = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
        rows += [
            _row(optimizer, group, p, names.get(id(p), name)) for p, name in zip(group["params"], own, strict=True)
        ]
    return MemoryReport(rows)


def _row(optimizer, group, p, name):
    shape, state = tuple(local(p).shape), optimizer.state.get(p) or {}
    held = {moment: forms.find(state, moment) or form for moment, form in optimizer.planned_forms(p, group).items()}
    size = sum(forms.nbytes(form, moment, shape) for moment, form in held.items()) + 4  # and the step counter
    if group["master_weights"] and str(p.dtype) == "torch.bfloat16":
        size += 2 * local(p).numel()
    others = optimizer.other_tensors("memory_report", p, group, state)
    size += sum(dtype.itemsize * math.prod(shape) for dtype, shape in others.values())
    kinds = list(held.values())
    bits, form = (kinds[0].bits, kinds[-1].label) if kinds else (0, "none")
    return ParameterMemory(
        name, shape, str(p.dtype).removeprefix("torch."), bits, form, size, size / max(local(p).numel(), 1)
    )


def _numel(row):
    count = 1
    for size in row.shape:
        count *= size
    return count
