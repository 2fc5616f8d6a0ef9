"""How large plain torch's own error is, when outputs have too few elements for one evaluation to tell."""

import torch


def head_dim_orders(dim: int, elements: int) -> list[torch.Tensor]:
    """Orders in which to sum a head dimension: each is another, equivalent evaluation with its own rounding errors.

    The largest error of one evaluation of a few hundred elements is a matter of luck; there are as many orders as make
    it about that of some thousands. The first is the usual one.
    """
    count = min(32, max(4, 8192 // max(1, elements)))
    return [torch.arange(dim), torch.arange(dim).flip(0), *(torch.randperm(dim) for _ in range(count - 2))]
