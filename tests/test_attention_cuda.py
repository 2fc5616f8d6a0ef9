"""What the tiles of the CUDA kernels could get wrong: tile borders, rescaling, unaligned rows, odd scales, bad offsets.

The tests run on every device; the shapes are chosen around the kernels' tiles of 32, 64 and 128 rows.
"""

import functools

import pytest
import torch

import tilewise as tw
from attention_cases import DTYPES, Shape, another_kernel, assert_same, inputs, judge
from harness.emulation import assert_schedules_agree
from tilewise.reference import attention as reference

HALVES = [torch.float16, torch.bfloat16]


def check(tensors, dtype, **options):
    """Output, lse and gradients against float64, beside plain torch in the same dtype."""
    dout = torch.randn(*tensors[0].shape[:3], tensors[2].shape[-1]).to(tensors[0])
    kernel = lambda q, k, v: tw.attention(q, k, v, return_lse=True, **options)  # noqa: E731
    plain = lambda q, k, v: reference.attention(q, k, v, **options)  # noqa: E731
    judge(kernel, plain, tensors, dout, dtype)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("queries,keys", [(1, 64), (64, 65), (128, 128), (129, 63), (33, 193)])
def test_tile_borders(device, queries, keys, dim):
    for causal in (False, True):
        check(inputs(Shape(1, 1, 1, queries, keys, dim, dim), torch.bfloat16, device), torch.bfloat16, causal=causal)


@pytest.mark.modes
@pytest.mark.parametrize("dim", [64, 128])
def test_heads_share_keys(device, dim):
    """Two groups of three heads, two key tiles."""
    check(inputs(Shape(1, 6, 2, 20, 131, dim, dim), torch.float16, device), torch.float16, causal=True)


@pytest.mark.modes
@pytest.mark.parametrize("dim,keys", [(64, 420), (128, 330)])
def test_rings_wrap(device, dim, keys):
    """More tiles than there are stages for them, each way: four heads share the keys."""
    check(inputs(Shape(1, 4, 1, 60, keys, dim, dim), torch.bfloat16, device), torch.bfloat16, causal=True)


@pytest.mark.parametrize("dtype", HALVES, ids=["f16", "bf16"])
@pytest.mark.parametrize("first,last", [(8.0, 0.1), (0.1, 8.0)], ids=["falling", "rising"])
def test_maximum_moves_late(device, dtype, first, last):
    """Scores of very different size, in either order: accumulators are rescaled, or rightly not."""
    q, k, v = inputs(Shape(1, 1, 1, 20, 200, 64, 64), torch.float32, device)
    k *= torch.linspace(first, last, 200, device=device.torch)[:, None]
    check([t.to(dtype) for t in (q, k, v)], dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_off_16_bytes(device, dtype):
    """Rows at odd addresses, one element apart from those of a wider tensor."""

    def shifted(t):
        frame = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype, device=t.device)
        frame[..., 1:-2] = t
        return frame[..., 1:-2]

    check([shifted(t) for t in inputs(Shape(1, 2, 1, 40, 70, 64, 64), dtype, device)], dtype, causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.2])
@pytest.mark.parametrize("dtype", HALVES, ids=["f16", "bf16"])
def test_scale_is_not_positive(device, dtype, scale):
    check(inputs(Shape(1, 2, 1, 40, 50, 64, 64), dtype, device), dtype, causal=True, scale=scale)


def packed(dtype, device, kv_heads=2):
    offsets_q = torch.tensor([0, 5, 5, 38, 50], dtype=torch.int32, device=device.torch)
    offsets_k = torch.tensor([0, 9, 13, 13, 83], dtype=torch.int32, device=device.torch)
    sizes = (50, 4), (83, kv_heads), (83, kv_heads)
    return [torch.randn(*size, 64).to(device.torch, dtype) for size in sizes], (offsets_q, offsets_k)


@pytest.mark.modes
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_packed_equals_separate(device, dtype, kv_heads):
    """Bit for bit: a sequence among others, one without queries and one without keys, gives what it gives alone."""
    tensors, (offsets_q, offsets_k) = packed(dtype, device, kv_heads)
    leaves = [t.requires_grad_() for t in tensors]
    out, lse = tw.attention_varlen(*leaves, offsets_q, offsets_k, causal=True, return_lse=True)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, dout)
    for b in range(4):
        rows = slice(offsets_q[b], offsets_q[b + 1]), *[slice(offsets_k[b], offsets_k[b + 1])] * 2
        alone = [t[r].detach().transpose(0, 1)[None].requires_grad_() for t, r in zip(leaves, rows, strict=True)]
        one, one_lse = tw.attention(*alone, causal=True, return_lse=True)
        few = {"group": 4 // kv_heads, "queries": one.shape[2]}
        same = functools.partial(assert_same, device, **few)
        same(out[rows[0]].transpose(0, 1)[None], one)
        torch.testing.assert_close(
            lse[:, rows[0]][None], one_lse, rtol=0, atol=1e-5 if another_kernel(device, dtype, **few) else 0
        )
        expected = torch.autograd.grad(one, alone, dout[rows[0]].transpose(0, 1)[None])
        for got, r, e in zip(gradients, rows, expected, strict=True):
            same(got[r].transpose(0, 1)[None], e)


@pytest.mark.modes
@pytest.mark.parametrize("which", [0, 1], ids=["queries", "keys"])
@pytest.mark.parametrize("at,value", [(2, 1000), (1, -7), (4, 10)], ids=["overrun", "negative", "falling"])
def test_bad_offsets(device, which, at, value):
    """Never followed. A host that may not look learns of them with its next call, and then works again."""
    (q, k, v), offsets = packed(torch.bfloat16, device)
    good = offsets[which].clone()
    offsets[which][at] = value
    run = lambda: tw.attention_varlen(q, k, v, *offsets, max_seqlen_q=50, max_seqlen_k=83)  # noqa: E731
    if device.kind != "cpu":
        run()
    if device.kind == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match="cu_seqlens"):
        run()
    offsets[which].copy_(good)
    assert run().isfinite().all()


@pytest.mark.modes
@pytest.mark.parametrize("dtype,dim", [(torch.float16, 128), (torch.bfloat16, 64), (torch.float32, 64)], ids=str)
def test_schedules_over_tiles(device, dtype, dim):
    """Several tiles each way, so that every buffer is reused: the same bits in every schedule, or in every run."""
    tensors = [t.requires_grad_() for t in inputs(Shape(1, 2, 1, 70, 140, dim, dim), dtype, device)]

    def run():
        out, lse = tw.attention(*tensors, causal=True, return_lse=True)
        return out, lse, *torch.autograd.grad(out, tensors, torch.ones_like(out))

    if device.kind == "emulated":
        assert_schedules_agree(run, count=4)
    else:
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
