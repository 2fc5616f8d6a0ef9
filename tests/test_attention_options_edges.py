"""Options of attention at their edges: packed sequences, nothing to see, bad numbers, bad arguments."""

import math

import pytest
import torch

import tilewise as tw
from attention_cases import Shape, inputs
from test_attention_options import LEAVES, OPTIONS, check
from tilewise.attention.masks import pack_mask
from tilewise.attention.options import pack as pack_options
from tilewise.reference import attention as reference

pytestmark = pytest.mark.devices("cpu")

LENGTHS = [30, 0, 70, 17, 16, 1], [45, 20, 33, 0, 130, 9]  # queries and keys of each sequence


def prepared(name, shape, device):
    """The options of a case as tensors of the device."""
    options = OPTIONS[name](shape)
    if blocks := options.get("block_mask"):
        options["block_mask"] = tw.BlockMask(blocks["blocks"].to(device.torch), blocks["block_size"])
    return {n: t.to(device.torch) if torch.is_tensor(t) else t for n, t in options.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed(device, name, dtype):
    queries, keys = LENGTHS
    shape = Shape(len(queries), 4, 2, max(queries), max(keys), 64, 64)
    cu = [torch.tensor([0, *n], device=device.torch).cumsum(0).int() for n in LENGTHS]
    tensors = [torch.randn(sum(n), h, 64) for n, h in ((queries, 4), (keys, 2), (keys, 2))]
    lengths = {"max_seqlen_q": max(queries), "max_seqlen_k": max(keys)}
    check(
        shape,
        name,
        dtype,
        device,
        attention=lambda q, k, v, **options: tw.attention_varlen(q, k, v, *cu, **lengths, **options),
        plain=lambda q, k, v, **options: reference.attention_varlen(q, k, v, *cu, **options),
        tensors=[t.to(device.torch, dtype) for t in tensors],
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("hide", ["mask", "window", "block_mask", "bias"])
def test_not_finite_beside_hidden(device, hide, bad):
    """A key that is not finite shows in the rows that see it, and in no other."""
    q, k, v = inputs(Shape(1, 1, 1, 70, 150, 64, 64), torch.float32, device)
    k[0, 0, 40, 3] = bad
    mask = torch.rand(70, 150, device=device.torch) < 0.7
    blocks = tw.BlockMask(torch.rand(1, 1, 5, 5, device=device.torch) < 0.6, (16, 32))
    hidden = torch.zeros(70, 150, device=device.torch).masked_fill(~mask, -math.inf)
    option = {"mask": mask, "window": (30, 5), "block_mask": blocks, "bias": hidden}[hide]
    got, lse = tw.attention(q, k, v, **{hide: option}, return_lse=True)
    # a bias of -inf hides as a mask does, where plain torch would add it to NaN
    expected, expected_lse = reference.attention(q, k, v, **({"mask": mask} if hide == "bias" else {hide: option}))
    torch.testing.assert_close(got, expected, equal_nan=True, atol=1e-5, rtol=1e-4)
    expected_lse = expected_lse.where(expected_lse != math.inf, math.nan)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_lowest_bias(device, dtype):
    """The lowest finite number as a bias hides keys beside others, and nothing where all have it."""
    q, k, v = (t.requires_grad_() for t in inputs(Shape(1, 2, 2, 40, 50, 64, 64), dtype, device))
    bias = torch.zeros(40, 50, device=device.torch, dtype=dtype)
    bias[:, 30:] = bias[7] = torch.finfo(dtype).min
    out = tw.attention(q, k, v, bias=bias)
    hidden = tw.attention(q, k[:, :, :30], v[:, :, :30])
    rest = [i for i in range(40) if i != 7]
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(out[:, :, rest], hidden[:, :, rest], **close)
    torch.testing.assert_close(out[:, :, 7], v.mean(2), **close)
    dout = torch.ones_like(out)
    dout[:, :, 7] = 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, (q, k, v), dout))


def test_nothing_to_see(device):
    """Rows hidden by any option give 0, -inf and no gradient, also beside values that are not finite."""
    q, k, v = inputs(Shape(1, 2, 1, 80, 64, 64, 64), torch.float32, device)
    v[0, 0, 63] = math.inf
    rows = torch.ones(80, 64, dtype=torch.bool, device=device.torch)
    rows[3] = rows[64:] = False
    rows[:, 63] = False
    nothing = tw.BlockMask(torch.zeros(1, 1, 5, 4, dtype=torch.bool, device=device.torch), 16)
    for option, blind in (
        ({"mask": rows}, ~rows.any(1)),
        ({"block_mask": nothing}, torch.ones(80, dtype=torch.bool)),
        ({"window": (0, 0)}, torch.arange(80) < 16),
        ({"bias": torch.zeros(80, 64, device=device.torch).masked_fill(~rows, -math.inf)}, ~rows.any(1)),
    ):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = tw.attention(*leaves, **option, return_lse=True)
        blind = blind.to(device.torch)
        assert (out[:, :, blind] == 0).all() and (lse[:, :, blind] == -math.inf).all()
        assert lse[:, :, ~blind].isfinite().all()
    leaves = [t.clone().requires_grad_() for t in (q, k, torch.ones_like(v))]
    out = tw.attention(*leaves, mask=rows)
    assert all((g[:, :, 64:] == 0).all() for g in torch.autograd.grad(out.sum(), leaves[:1]))
    out = tw.attention(*leaves, block_mask=nothing)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_everything_seen(device):
    """Masks that hide nothing change nothing."""
    q, k, v = inputs(Shape(1, 2, 1, 90, 150, 64, 64), torch.float32, device)
    expected = tw.attention(q, k, v)
    all_blocks = tw.BlockMask(torch.ones(1, 1, 3, 5, dtype=torch.bool, device=device.torch), 32)
    everything = torch.ones(1, 1, dtype=torch.bool, device=device.torch)
    for option in ({"block_mask": all_blocks}, {"mask": everything}, {"window": (500, 500)}, {"softcap": 0.0}):
        torch.testing.assert_close(tw.attention(q, k, v, **option), expected, atol=1e-6, rtol=1e-5)


def test_dropout_extremes(device):
    q, k, v = (t.requires_grad_() for t in inputs(Shape(1, 2, 1, 40, 60, 64, 64), torch.float32, device))
    assert torch.equal(tw.attention(q, k, v, dropout_p=0.0), tw.attention(q, k, v))
    out, lse = tw.attention(q, k, v, dropout_p=1 - 2.0**-20, return_lse=True)  # rounds to 1: nothing is kept
    assert (out == 0).all() and lse.isfinite().all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    generator = torch.Generator(device.torch).manual_seed(1)
    once = tw.attention(q, k, v, dropout_p=0.999, generator=generator)
    again = tw.attention(q, k, v, dropout_p=0.999, generator=generator.manual_seed(1))
    assert torch.equal(once, again) and (once != 0).any() and once.isfinite().all()


def everything_on(device, shape):
    q, k, v = (t.requires_grad_() for t in inputs(shape, torch.float32, device))
    options = prepared("everything", shape, device)
    leaves = [options[n].requires_grad_() for n in LEAVES]
    return (q, k, v, *leaves), lambda: tw.attention(
        q, k, v, **options, generator=torch.Generator(device.torch).manual_seed(5)
    )


def test_any_number_of_threads(device):
    leaves, run = everything_on(device, Shape(1, 2, 1, 600, 700, 64, 64))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = run()
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_some_gradients(device):
    """A gradient alone, twice and later has the bits that it has beside the others."""
    leaves, run = everything_on(device, Shape(1, 2, 1, 60, 70, 64, 64))
    out = run()
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    run()  # other dropout seeds, other scratch memory
    assert all(torch.equal(a, b) for a, b in zip(expected, torch.autograd.grad(out, leaves, dout), strict=True))
    for leaf, gradient in zip(leaves, expected, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        assert torch.equal(torch.autograd.grad(run(), leaf, dout)[0], gradient)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("queries,keys", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_empty(device, name, queries, keys):
    shape = Shape(1, 2, 1, queries, keys, 64, 64)
    options = prepared(name, shape, device)
    leaves = [options[n].requires_grad_() for n in LEAVES if n in options]
    q, k, v = (t.requires_grad_() for t in inputs(shape, torch.float32, device))
    out, lse = tw.attention(q, k, v, **options, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    if not keys:
        sinks = options.get("sink_logits", torch.full((2,), -math.inf, device=device.torch))
        assert (out == 0).all() and torch.equal(lse, sinks.detach()[None, :, None].expand_as(lse))
    for gradient, of in zip(torch.autograd.grad(out.sum(), (q, k, v, *leaves)), (q, k, v, *leaves), strict=True):
        assert gradient.shape == of.shape and gradient.isfinite().all()
        if not (queries and keys):
            assert (gradient == 0).all()


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 150])
def test_pack_mask(device, keys):
    mask = torch.rand(2, 1, 5, keys, device=device.torch) < 0.5
    for given in (mask, mask.transpose(1, 2), mask.flip(3), mask[..., :1]):
        words = pack_mask(given, keys)
        bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=device.torch) & 1
        assert torch.equal(bits.flatten(-2)[..., :keys].bool(), given.expand(-1, -1, -1, keys))
        assert (bits.flatten(-2)[..., keys:] == 0).all()


def block_mask(*shape, size=16):
    return tw.BlockMask(torch.ones(shape, dtype=torch.bool), size)


# a call of q (1, 2, 20, 64) and k (1, 1, 30, 64)
ERRORS = {
    "window": (ValueError, r"window \(left\) is -1", {"window": (-1, 0)}),
    "window-right": (ValueError, r"window \(right\) is -2", {"window": (None, -2)}),
    "global": (ValueError, "global_tokens is -1", {"global_tokens": -1}),
    "softcap": (ValueError, "softcap is -1", {"softcap": -1.0}),
    "softcap-inf": (ValueError, "softcap is inf", {"softcap": math.inf}),
    "dropout": (ValueError, "dropout_p is 1", {"dropout_p": 1.0}),
    "dropout-negative": (ValueError, "dropout_p is -0.1", {"dropout_p": -0.1}),
    "slopes": (ValueError, "alibi_slopes has size 3 in dimension 1", {"alibi_slopes": torch.ones(3)}),
    "slopes-batch": (ValueError, "alibi_slopes has size 2 in dimension 0", {"alibi_slopes": torch.ones(2, 2)}),
    "bias": (ValueError, "bias has size 29 in dimension 3", {"bias": torch.ones(20, 29)}),
    "bias-dtype": (TypeError, "bias has dtype float16", {"bias": torch.ones(20, 30).half()}),
    "mask": (ValueError, "mask has 31 keys", {"mask": torch.ones(20, 31, dtype=torch.bool)}),
    "mask-rows": (ValueError, "mask has size 19 in dimension 2", {"mask": torch.ones(19, 30, dtype=torch.bool)}),
    "mask-dtype": (TypeError, "mask has dtype", {"mask": torch.ones(20, 30)}),
    "blocks": (ValueError, "block_mask has size 3 in dimension 3", {"block_mask": block_mask(1, 2, 2, 3)}),
    "block-size": (ValueError, "block_mask .* blocks of 24", {"block_mask": block_mask(1, 2, 1, 2, size=24)}),
    "block-type": (TypeError, "block_mask is a Tensor", {"block_mask": torch.ones(1)}),
    "sinks": (ValueError, "sink_logits has shape", {"sink_logits": torch.ones(3)}),
}


@pytest.mark.parametrize("error,message,options", ERRORS.values(), ids=ERRORS)
def test_errors(device, error, message, options):
    q, k, v = inputs(Shape(1, 2, 1, 20, 30, 64, 64), torch.float32, device)
    with pytest.raises(error, match=message):
        tw.attention(q, k, v, **options)


def test_opcheck():
    shape = Shape(1, 2, 1, 9, 12, 64, 64)
    q, k, v = (torch.randn(1, h, n, 64) for h, n in ((2, 9), (1, 12), (1, 12)))
    mask = torch.rand(1, 1, 9, 12) < 0.8
    torch.library.opcheck(torch.ops.tilewise.attention_pack_mask.default, (mask, 12))
    given = {**OPTIONS["everything"](shape), "mask": mask, "block_mask": None}
    options = pack_options("attention", q, 12, **given)
    differentiable = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.tilewise.attention.default, (*differentiable, *options))
    out, lse = torch.ops.tilewise.attention(q, k, v, *options)
    backward = torch.ops.tilewise.attention_backward.default
    torch.library.opcheck(backward, (out, lse, q, k, v, out, lse, True, *options))
