"""Every option of attention, alone and together with others, against the reference on every device."""

import math

import pytest
import torch

import tilewise as tw
from attention_cases import DTYPES, GRADIENTS, Shape, inputs, judge
from tilewise.reference import attention as reference
from tilewise.reference import philox

SHAPES = [Shape(2, 4, 2, 70, 90, 64, 64), Shape(1, 2, 1, 150, 130, 64, 64)]


def seeded(device, seed):
    """A generator, and the seed that dropout draws from it."""
    generator = torch.Generator(device.torch).manual_seed(seed)
    draw = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device.torch, generator=generator)
    return torch.Generator(device.torch).manual_seed(seed), int(draw)


def boolean(*shape):
    return torch.rand(shape) < 0.7


def slopes(shape):
    return torch.rand(shape.heads) / 4


def block_mask(shape, block_q, block_k):
    blocks = boolean(shape.batch, shape.heads, -(-shape.queries // block_q), -(-shape.keys // block_k))
    return {"blocks": blocks, "block_size": (block_q, block_k)}


# name -> f(shape) -> (options as both sides take them, options that are tensors with gradients)
OPTIONS = {
    "window": lambda s: {"window": (17, 9)},
    "left": lambda s: {"window": (5, None)},
    "right": lambda s: {"window": (None, 0)},
    "causal-window": lambda s: {"causal": True, "window": (20, None)},
    "lambda": lambda s: {"causal": True, "window": (20, 0), "global_tokens": 4},
    "softcap": lambda s: {"softcap": 1.5, "causal": True},
    "alibi": lambda s: {"alibi_slopes": slopes(s)},
    "alibi-batched": lambda s: {"alibi_slopes": torch.rand(s.batch, s.heads) / 4, "causal": True},
    "bias": lambda s: {"bias": torch.randn(s.batch, s.heads, s.queries, s.keys)},
    "bias-of-heads": lambda s: {"bias": torch.randn(s.heads, s.queries, s.keys), "causal": True},
    "bias-of-keys": lambda s: {"bias": torch.randn(s.batch, 1, 1, s.keys)},
    # beside sinks as heavy as all keys: without them, the softmax cancels the bias and its gradient is zero
    "bias-of-rows": lambda s: {
        "bias": torch.randn(1, s.heads, s.queries, 1),
        "softcap": 2.0,
        "sink_logits": torch.randn(s.heads) + math.log(max(s.keys, 1)) + 1,
    },
    "mask": lambda s: {"mask": boolean(s.batch, s.heads, s.queries, s.keys)},
    "mask-of-keys": lambda s: {"mask": boolean(s.batch, 1, 1, s.keys), "causal": True},
    "mask-of-rows": lambda s: {"mask": boolean(s.queries, 1)},
    "blocks-16": lambda s: {"block_mask": block_mask(s, 16, 16)},
    "blocks-64": lambda s: {"block_mask": block_mask(s, 64, 32), "causal": True},
    "blocks-128": lambda s: {"block_mask": block_mask(s, 48, 128), "window": (40, None)},
    "sinks": lambda s: {"sink_logits": torch.randn(s.heads), "causal": True},
    "dropout": lambda s: {"dropout_p": 0.3},
    "everything": lambda s: {
        "causal": True,
        "window": (60, None),
        "global_tokens": 3,
        "softcap": 3.0,
        "alibi_slopes": slopes(s),
        "bias": torch.randn(1, s.heads, 1, s.keys),
        "mask": boolean(s.batch, 1, s.queries, s.keys),
        "block_mask": block_mask(s, 32, 64),
        "sink_logits": torch.randn(s.heads),
        "dropout_p": 0.1,
    },
}
LEAVES = {"bias": "dbias", "sink_logits": "dsink_logits"}  # options with gradients


def check(shape, name, dtype, device, attention=tw.attention, plain=reference.attention, tensors=None):
    options = OPTIONS[name](shape)
    blocks = options.get("block_mask")
    if blocks:
        options["block_mask"] = tw.BlockMask(blocks["blocks"].to(device.torch), blocks["block_size"])
    options = {n: t.to(device.torch) if torch.is_tensor(t) else t for n, t in options.items()}
    if "bias" in options and name != "bias-of-keys":  # that one stays float32 beside any dtype
        options["bias"] = options["bias"].to(dtype)
    leaves = [n for n in LEAVES if n in options]
    random = seeded(device, 7) if "dropout_p" in options else None
    fixed = {n: t for n, t in options.items() if n not in leaves}

    def ours(q, k, v, *rest):
        extra = {"generator": seeded(device, 7)[0]} if random else {}
        return attention(q, k, v, **fixed, **dict(zip(leaves, rest, strict=True)), **extra, return_lse=True)

    def theirs(q, k, v, *rest):
        extra = {"dropout_seed": random[1]} if random else {}
        return plain(q, k, v, **fixed, **dict(zip(leaves, rest, strict=True)), **extra)

    tensors = tensors or inputs(shape, dtype, device)
    dout = torch.randn(*tensors[0].shape[:-1], tensors[2].shape[-1]).to(device.torch, dtype)
    if "sink_logits" in options:  # whose gradient, a sum over all rows, would cancel
        dout, tensors = dout + 0.5, (*tensors[:2], tensors[2] + 0.5)
    gradients = (*GRADIENTS, *(LEAVES[n] for n in leaves))
    judge(ours, theirs, (*tensors, *(options[n] for n in leaves)), dout, dtype, gradients)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(device, shape, name, dtype):
    check(shape.on(device), name, dtype, device)


@pytest.mark.modes
@pytest.mark.parametrize("name", ["lambda", "blocks-16", "everything"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_small(device, name, dtype):
    check(Shape(1, 2, 1, 25, 37, 64, 64), name, dtype, device)


@pytest.mark.parametrize("name", ["lambda", "everything"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim,v_dim", [(40, 24), (7, 3), (96, 128), (256, 200)])
def test_head_dims(device, dim, v_dim, name, dtype):
    check(Shape(1, 2, 1, 36, 40, dim, v_dim), name, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_packed_equals_dense(device, dtype):
    """Two sequences of equal length, packed and not: options count sequences, rows and keys alike."""
    shape = Shape(2, 2, 1, 24, 40, 64, 64)
    options = OPTIONS["everything"](shape)
    blocks = options.pop("block_mask")
    options["block_mask"] = tw.BlockMask(blocks["blocks"].to(device.torch), blocks["block_size"])
    options = {n: t.to(device.torch) if torch.is_tensor(t) else t for n, t in options.items()}
    dense = [t.requires_grad_() for t in inputs(shape, dtype, device)]
    packed = [t.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for t in dense]
    leaves = [options.pop(n).requires_grad_() for n in LEAVES]
    offsets = [torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device.torch) for n in (24, 40)]
    named = dict(zip(LEAVES, leaves, strict=True))
    one = tw.attention(*dense, **options, **named, generator=seeded(device, 7)[0])
    lengths = {"max_seqlen_q": 24, "max_seqlen_k": 40}
    two = tw.attention_varlen(*packed, *offsets, **lengths, **options, **named, generator=seeded(device, 7)[0])
    pack = lambda t: t.transpose(1, 2).flatten(0, 1)  # noqa: E731
    torch.testing.assert_close(two, pack(one))
    expected = torch.autograd.grad(one.sum(), (*dense, *leaves))
    got = torch.autograd.grad(two.sum(), (*packed, *leaves))
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, pack(b) if i < 3 else b)


@pytest.mark.devices("cpu")
def test_long_rows(device):
    """Several blocks of keys, windows that skip some of them, on CPU several tasks."""
    for name in ("lambda", "blocks-64", "bias-of-heads", "everything"):
        check(Shape(1, 2, 2, 700, 700, 64, 64), name, torch.float32, device)


def test_philox_vectors():
    """The published known-answer vectors of Philox4x32-10 (Random123)."""
    known = {
        (0, 0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0xFFFFFFFF,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
            0xD16CFE09,
            0x94FDCCEB,
            0x5001E420,
            0x24126EA1,
        ),
    }
    for (*counter, k0, k1), expected in known.items():
        words = philox.words([torch.tensor(c) for c in counter], (k0, k1))
        assert tuple(int(w) for w in words) == expected


def test_dropout_frequency(device):
    """The share of weights that are kept, seen through values of one."""
    q, k, v = inputs(Shape(1, 2, 2, 64, 64, 64, 64).on(device), torch.float32, device)
    generator = torch.Generator(device.torch).manual_seed(3)
    out = tw.attention(torch.zeros_like(q), k, torch.ones_like(v), dropout_p=0.25, generator=generator)
    kept = out[..., 0] * 0.75 * k.shape[2]  # how many of the row's equal weights are left
    assert torch.allclose(kept, kept.round(), atol=1e-2) and (kept != kept[0, 0, 0]).any()
    count = kept.numel() * k.shape[2]
    assert abs(float(kept.sum()) / count - 0.75) < 5 * math.sqrt(0.75 * 0.25 / count)


def test_sink_without_keys(device):
    """A row that sees nothing gives zeros, its lse is the sink logit, and the sink has no gradient from it."""
    q, k, v = inputs(Shape(1, 2, 2, 6, 4, 64, 64), torch.float32, device)
    sinks = torch.randn(2, device=device.torch, requires_grad=True)
    mask = torch.zeros(6, 4, dtype=torch.bool, device=device.torch)
    out, lse = tw.attention(q, k, v, mask=mask, sink_logits=sinks, return_lse=True)
    assert (out == 0).all()
    torch.testing.assert_close(lse, sinks.detach()[None, :, None].expand_as(lse))
    assert (torch.autograd.grad(out.sum(), sinks)[0] == 0).all()
