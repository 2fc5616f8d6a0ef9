"""What a step passes for its parameters beside the parameters and gradients themselves; kept from step to step."""

from functools import cached_property
from itertools import chain, repeat
from operator import is_
from typing import NamedTuple

import torch

from tilewise.optim.tensors import is_plain


class Row(NamedTuple):
    """Of one parameter."""

    p: torch.Tensor
    kind: tuple  # of the group's options that decide what a state holds
    state: dict
    held: tuple  # the tensors of `state` when the row was made
    index: int  # of the parameter among all
    stream: int
    step: torch.Tensor
    first: torch.Tensor | None
    first_scales: torch.Tensor | None
    second: torch.Tensor | None
    second_scales: torch.Tensor | None
    residual: torch.Tensor | None
    rows: int

    def fits(self, p, kind, state) -> bool:
        """Whether nothing was replaced since."""
        same = self.p is p and self.kind == kind and len(self.held) == len(state)
        return same and all(map(is_, self.held, state.values()))


def _without_none(tensors, instead):
    return [instead if t is None else t for t in tensors]


class Rows(list):
    """Of the parameters of one call of the operator."""

    @cached_property
    def columns(self) -> Row:
        """A Row of columns; those of tensors or numbers that no parameter has are empty."""
        p, kind, state, held, index, stream, step, *tensors, rows = map(list, zip(*self, strict=True))
        none = torch.empty(0, device=p[0].device)
        tensors = [[] if all(map(is_, column, repeat(None))) else _without_none(column, none) for column in tensors]
        return Row(p, kind, state, held, index, stream, step, *tensors, rows if any(rows) else [])


class WholeGroup:
    """The rows of a group whose parameters are all plain tensors on one device, and all have gradients.

    Asking whether it still fits costs a tenth of looking at row after row.
    """

    def __init__(self, rows: Rows):
        columns = rows.columns
        self.rows, self.params, self.states = rows, columns.p, columns.state
        self.kind, self.device = rows[0].kind, rows[0].p.device
        self.held = list(chain.from_iterable(columns.held))

    def fits(self, params, grads, kind, states) -> bool:
        """As Row.fits, of all of them; ``states`` is the optimizer's."""
        if len(params) != len(self.params) or kind != self.kind or not all(map(is_, params, self.params)):
            return False
        now = list(map(states.get, params))
        return (
            all(map(is_, now, self.states))
            and sum(map(len, now)) == len(self.held)
            and all(map(is_, chain.from_iterable(map(dict.values, now)), self.held))
            and {p.device for p in params} == {self.device}
            and all(map(is_plain, grads))
        )
