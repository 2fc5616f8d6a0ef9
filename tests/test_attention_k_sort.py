"""Caches whose keys have their channels in order of size: the order, attention, rotation, and what bfp12 gains."""

import pytest
import torch

import tilewise as tw
from harness.judge import assert_accurate, draws, yardsticks
from test_attention_cache import dequantized
from test_speculative import ints
from tilewise.reference import attention as reference
from tilewise.reference import kv_cache

pytestmark = pytest.mark.devices("cpu", "emulated")
B, HKV, D, LENGTH = 2, 2, 64, 21
ROTARY = {"none": (0, False), "halves": (64, False), "interleaved": (64, True), "some": (24, False)}


def keys(length=LENGTH, dim=D):
    """Some channels of each head are ten times as large."""
    return torch.randn(B, HKV, length, dim) * (1 + 9 * (torch.rand(HKV, 1, dim) > 0.85))


def filled(k, v, format, order=None, **rope):
    per_row = -(-k.shape[2] // 8)
    table = torch.randperm(B * per_row).view(B, per_row).int()
    cache = tw.KVCache(B * per_row, 8, HKV, k.shape[3], format=format, k_order=order)
    cache.append(k, v, table, torch.zeros(B, dtype=torch.int32), **rope)
    return cache, table


def held(cache, table, length=LENGTH):
    """float64 k and v, their channels where they were."""
    k, v = dequantized(cache, table, length)
    order = cache.k_order[None, :, None].expand(k.shape)
    return torch.empty_like(k).scatter_(3, order, k), v


@pytest.mark.parametrize("rotary_dim, interleaved", ROTARY.values(), ids=ROTARY)
def test_order_by_definition(rotary_dim, interleaved):
    k = keys()
    got = tw.KVCache.order(k, rotary_dim=rotary_dim, interleaved=interleaved)
    assert torch.equal(got, kv_cache.channel_order(k, rotary_dim, interleaved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads, tokens", [(2, 1), (6, 3)])
@pytest.mark.modes
def test_attention_sees_no_order(device, dtype, heads, tokens):
    """Any order of the channels: attention of the keys as they were, also of packed queries."""
    k, v, q = keys().to(dtype), torch.randn(B, HKV, LENGTH, D).to(dtype), torch.randn(B, heads, tokens, D).to(dtype)
    order = torch.stack([torch.randperm(D) for _ in range(HKV)])
    cache, table = filled(k, v, "fp32" if dtype == torch.float32 else "bf16", order)
    out = cache.attend(q, table, ints([LENGTH] * B))
    plain = lambda q, k, v: reference.attention(q, k, v, causal=True)[:1]  # noqa: E731
    (ruler,) = yardsticks([plain], [q, k, v], draws(8 * B * heads * tokens))
    assert_accurate("out", out, ruler, 2)
    packed = cache.attend_varlen(
        q.transpose(1, 2).flatten(0, 1), table, ints([0, tokens, 2 * tokens]), ints([LENGTH] * B)
    )
    assert_accurate("packed out", packed.unflatten(0, (B, tokens)).transpose(1, 2), ruler, 2)


@pytest.mark.parametrize("format", ["bfp12", "int4"])
def test_attention_is_that_over_what_is_held(device, format):
    k, v, q = keys(), torch.randn(B, HKV, LENGTH, D), torch.randn(B, 4, 1, D)
    cache, table = filled(k, v, format, tw.KVCache.order(k))
    exact, _ = reference.attention(q.double(), *held(cache, table), causal=True)
    out = cache.attend(q, table, ints([LENGTH] * B))
    torch.testing.assert_close(out.double(), exact, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("dim", [64, 128])
def test_bfp12_loses_less(device, dim):
    """Large channels share their exponents with each other, so that small ones keep their bits."""
    k = torch.randn(B, HKV, LENGTH, dim)
    k[..., ::8] *= 20  # four of every 32 channels
    small = torch.arange(dim) % 8 > 0
    errors = []
    for order in (torch.arange(dim).expand(HKV, dim), tw.KVCache.order(k)):
        cache, table = filled(k, k, "bfp12", order)
        errors.append(float((held(cache, table)[0] - k)[..., small].norm() / k[..., small].norm()))
    assert errors[0] > 0.8 and 0 < errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize("rotary_dim, interleaved", list(ROTARY.values())[1:], ids=list(ROTARY)[1:])
@pytest.mark.modes
def test_rotation(device, rotary_dim, interleaved):
    """On the way in and in the cache, each head's pairs turn by the angles of where they were."""
    k, v = keys(), torch.randn(B, HKV, LENGTH, D)
    order = tw.KVCache.order(k, rotary_dim=rotary_dim, interleaved=interleaved)
    rope = {"theta": 300.0, "rotary_dim": rotary_dim, "interleaved": interleaved}
    cache, table = filled(k, v, "fp32", order, **rope)
    cos, sin = tw.rope.table(torch.arange(LENGTH), rotary_dim, theta=300.0)
    expected = kv_cache.rotate(k, cos, sin, interleaved)
    torch.testing.assert_close(held(cache, table)[0].float(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(held(cache, table)[1].float(), v)
    moved = torch.arange(3, 9, dtype=torch.int32).expand(B, -1).contiguous()
    cache.update_rope(table, moved, 11, **rope)
    places = torch.arange(LENGTH)
    places[3:9] += 11
    expected = kv_cache.rotate(k, *tw.rope.table(places, rotary_dim, theta=300.0), interleaved)
    torch.testing.assert_close(held(cache, table)[0].float(), expected, atol=2e-4, rtol=1e-4)


def test_sorted_projections():
    """What the docstring says of weights: rows in order give keys in order."""
    weight, x = torch.randn(HKV * D, 48), torch.randn(B, LENGTH, 48)
    project = lambda w: (x @ w.T).unflatten(2, (HKV, D)).transpose(1, 2)  # noqa: E731
    order = tw.KVCache.order(weight.unflatten(0, (HKV, D)).mT[None])
    assert (weight.unflatten(0, (HKV, D)).norm(dim=2).gather(1, order).diff(dim=1) <= 1e-5).all()
    rows = weight.unflatten(0, (HKV, D)).gather(1, order[:, :, None].expand(-1, -1, 48)).flatten(0, 1)
    by_order = project(weight).gather(3, order[None, :, None].expand(B, HKV, LENGTH, D))
    torch.testing.assert_close(project(rows), by_order, atol=1e-5, rtol=1e-5)


ORDER = torch.arange(D).expand(HKV, D)
SPLIT = ORDER.roll(1, 1)
BAD = {
    "shape": (
        ValueError,
        "k_order has shape .64,., expected .2, 64.",
        lambda: tw.KVCache(1, 8, HKV, D, k_order=ORDER[0]),
    ),
    "dtype": (TypeError, "k_order has dtype torch.float32", lambda: tw.KVCache(1, 8, HKV, D, k_order=ORDER.float())),
    "twice": (ValueError, "not permutations", lambda: tw.KVCache(1, 8, HKV, D, k_order=ORDER // 2)),
    "list": (TypeError, "k_order is a list", lambda: tw.KVCache(1, 8, HKV, D, k_order=[1])),
    "rotary_dim": (ValueError, "rotary_dim is 3", lambda: tw.KVCache.order(keys(), rotary_dim=3)),
    "apart": (ValueError, "takes pairs .i, i . 32. .* apart", lambda: filled(keys(), keys(), "fp32", SPLIT, theta=1e4)),
    "neighbours apart": (
        ValueError,
        "takes pairs .2 i, 2 i . 1. .* apart",
        lambda: filled(keys(), keys(), "fp32", SPLIT, theta=1e4, interleaved=True),
    ),
    "other pairs": (
        ValueError,
        "apart",
        lambda: filled(keys(), keys(), "fp32", tw.KVCache.order(keys()), theta=1e4, rotary_dim=16),
    ),
    "key heads, turning": (
        ValueError,
        "k has shape",
        lambda: filled(keys().repeat(1, 2, 1, 1), keys().repeat(1, 2, 1, 1), "fp32", ORDER, theta=1e4),
    ),
    "too many angles": (
        ValueError,
        "cos has 40",
        lambda: filled(keys(), keys(), "fp32", ORDER, theta=1e4, rotary_dim=80),
    ),
    "key heads": (ValueError, "k has shape", lambda: filled(keys()[:, :1], keys()[:, :1], "fp32", ORDER)),
}


@pytest.mark.parametrize("error, message, call", BAD.values(), ids=BAD)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()
