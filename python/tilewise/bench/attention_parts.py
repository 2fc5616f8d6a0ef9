"""What stands around attention, beside the same formula in torch: scores, partial results, prefixes, third order."""

import torch
import torch.nn.functional as F

import tilewise as tw
from tilewise.bench.case import Case


def _scores(device, heads=8, length=1024, dim=64):
    """Sums and block maxima of probabilities; torch has the probabilities in memory, from the same lse."""
    shape, products = (1, heads, length, dim), 2 * heads * length * length * dim

    def tensors():
        q, k, v = (torch.randn(shape, device=device) for _ in range(3))
        return q, k, tw.attention(q, k, v, return_lse=True)[1]

    def probabilities(q, k, lse):
        return (q @ k.transpose(-1, -2)).mul_(dim**-0.5).sub_(lse[..., None]).exp_()

    def sums():
        q, k, lse = tensors()
        ours = lambda: tw.attention_column_sums(q, k, lse, normalize=False)  # noqa: E731
        return ours, lambda: probabilities(q, k, lse).sum(-2)

    def probes():
        q, k, lse = tensors()
        rows = torch.randperm(length, device=device)[: length // 10]
        ours = lambda: tw.attention_column_sums(q, k, lse, rows=rows, normalize=False)  # noqa: E731
        return ours, lambda: probabilities(q[:, :, rows], k, lse[:, :, rows]).sum(-2)

    def block_max():
        q, k, lse = tensors()
        return lambda: tw.attention_block_max(q, k, lse, 64), lambda: F.max_pool2d(probabilities(q, k, lse), 64)

    least = 2 * heads * length * dim * 4
    return [
        Case(f"fp32 column sums {length} d{dim}", flops=products, bytes=least, prepare=sums),
        Case(f"fp32 column sums {length} d{dim}, a tenth of rows", flops=products // 10, bytes=least, prepare=probes),
        Case(f"fp32 block max {length} d{dim}", flops=products, bytes=least, prepare=block_max),
    ]


def _merge(device, parts=4, heads=8, length=1024, dim=128):
    def prepare():
        outs = list(torch.randn(parts, 1, heads, length, dim, device=device))
        lses = list(torch.randn(parts, 1, heads, length, device=device))

        def theirs():
            lse = torch.stack(lses)
            return (lse.softmax(0)[..., None] * torch.stack(outs)).sum(0), lse.logsumexp(0)

        return lambda: tw.merge_attention(outs, lses), theirs

    size = heads * length * dim
    return Case(f"fp32 merge of {parts} parts d{dim}", flops=0, bytes=(parts + 1) * size * 4, prepare=prepare)


def _shared_prefix(device, batch=16, heads=8, prefix=2048, own=64, dim=64):
    """One new token for each sequence; torch's keys and values lie ready, the prefix once per sequence."""

    def prepare():
        make = lambda b, n: torch.randn(b, heads, n, dim, device=device)  # noqa: E731
        q, k, v, first_k, first_v = make(batch, 1), make(batch, own), make(batch, own), make(1, prefix), make(1, prefix)
        whole = [torch.cat([p.expand(batch, -1, -1, -1), t], 2) for p, t in ((first_k, k), (first_v, v))]
        ours = lambda: tw.shared_prefix_attention(q, first_k, first_v, k, v)  # noqa: E731
        return ours, lambda: F.scaled_dot_product_attention(q, *whole)

    keys = prefix + batch * own
    return Case(
        f"fp32 shared prefix of {prefix}, {batch} sequences d{dim}",
        flops=4 * batch * heads * dim * (prefix + own),
        bytes=2 * heads * keys * dim * 4,
        prepare=prepare,
    )


def _third_order(device, heads=4, length=96, dim=64):
    """torch multiplies the pairs of keys, and of values, in memory: its scores are S N^2."""

    def prepare():
        q, k1, k2, v1, v2 = (torch.randn(1, heads, length, dim, device=device) for _ in range(5))
        pairs = lambda a, b: (a[:, :, :, None] * b[:, :, None]).flatten(2, 3)  # noqa: E731
        theirs = lambda: F.scaled_dot_product_attention(q, pairs(k1, k2), pairs(v1, v2))  # noqa: E731
        return lambda: tw.tensor_attention(q, k1, k2, v1, v2), theirs

    return Case(
        f"fp32 third order {length} d{dim}",
        flops=4 * heads * length**3 * dim,
        bytes=6 * heads * length * dim * 4,
        prepare=prepare,
    )


def cases(device: torch.device) -> list[Case]:
    return [*_scores(device), _merge(device), _shared_prefix(device), _third_order(device)]
