"""Sparse weights in plain torch."""

import torch


def nm_mask(w, n=2, m=4):
    """The n entries of largest magnitude in every m along the inputs; of equals, the lower index."""
    groups = w.abs().reshape(-1, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[:, :n], True)
    return mask.reshape(w.shape)


def linear(x, w, mask, bias=None):
    """y = x W^T + bias, where W is zero outside the mask."""
    return torch.nn.functional.linear(x, torch.where(mask, w, 0), bias)
