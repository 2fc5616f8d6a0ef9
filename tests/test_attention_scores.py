"""Column sums and block maxima of the attention map, against the map itself."""

import math

import pytest
import torch

import tilewise as tw
from attention_cases import DTYPES, Shape, inputs
from harness.emulation import assert_schedules_agree
from harness.judge import assert_accurate, draws, yardsticks

SHAPES = [Shape(2, 4, 2, 70, 130, 64, 64), Shape(1, 2, 1, 33, 300, 40, 8), Shape(1, 1, 1, 1, 3, 64, 64)]


def weights_of(q, k, causal=False, again=False):
    """``again``: the scores of the weights are summed in another order than those of the lse, as where an lse is given;
    then their errors do not cancel."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    queries, keys = scores.shape[-2:]
    if causal:
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    if again:
        scores = (q.flip(-1) @ k.flip(-1).transpose(-1, -2) / math.sqrt(q.shape[-1])).where(scores > -math.inf, scores)
    return (scores - lse).exp().nan_to_num(0)


def prepared(shape, dtype, device, causal, layout="bhsd"):
    q, k, v = inputs(shape, dtype, device, layout)
    return q, k, tw.attention(q, k, v, causal=causal, return_lse=True)[1]


def judge(run, of, q, k, causal):
    """``of`` makes the result of the weights."""
    plains = [lambda q, k, again=again: (of(weights_of(q, k, causal, again)),) for again in (False, True)]
    assert_accurate("result", run, *yardsticks(plains, [q, k], draws(q.shape[1] * k.shape[2])), 2)


def column_sums(weights):
    return weights.sum(2)


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_sums(device, shape, dtype, causal):
    q, k, lse = prepared(shape.on(device), dtype, device, causal)
    got = tw.attention_column_sums(q, k, lse, causal=causal, normalize=False)
    assert got.dtype == torch.float32
    judge(got, column_sums, q, k, causal)


def test_one_key(device):
    """Its weight is 1, as far as a float32 lse tells: exact cancellation is no yardstick."""
    q, k, lse = prepared(Shape(1, 2, 1, 1, 1, 64, 64), torch.float32, device, False)
    bound = 2.0**-22 * (1 + lse.abs()[..., None])
    for got in (tw.attention_column_sums(q, k, lse), tw.attention_block_max(q, k, lse, 16)[..., 0]):
        assert ((got - 1).abs() <= bound[..., 0]).all()


def pooled_by(block_q, block_k):
    def pooled(weights):
        pad = (0, -weights.shape[3] % block_k, 0, -weights.shape[2] % block_q)
        return torch.nn.functional.max_pool2d(torch.nn.functional.pad(weights, pad), (block_q, block_k))

    return pooled


# Head dims below and at those of a GPU's instances, of which some make rows of whole 16 bytes and some do not.
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dim", [1, 64, 72, 100, 256])
@pytest.mark.devices("emulated", "cuda")
def test_head_dims(device, dtype, dim):
    q, k, lse = prepared(Shape(1, 2, 1, 37, 53, dim, dim), dtype, device, True)
    sums = tw.attention_column_sums(q, k, lse, causal=True, normalize=False)
    judge(sums, column_sums, q, k, True)
    judge(tw.attention_block_max(q, k, lse, 16, causal=True), pooled_by(16, 16), q, k, True)


@pytest.mark.modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_several_tiles(device, dtype):
    """Of queries and of keys, also within one block of the result; rows far apart in memory."""
    q, k, lse = prepared(Shape(1, 2, 1, 75, 150, 64, 64), dtype, device, True, "bshd")
    sums = tw.attention_column_sums(q, k, lse, causal=True, normalize=False)
    judge(sums, column_sums, q, k, True)
    judge(tw.attention_block_max(q, k, lse, (48, 80), causal=True), pooled_by(48, 80), q, k, True)


@pytest.mark.modes
@pytest.mark.devices("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_schedules(device, dtype):
    """Every buffer is reused: the same bits in every schedule."""
    q, k, lse = prepared(Shape(1, 1, 1, 75, 150, 64, 64), dtype, device, True)

    def run():
        sums = tw.attention_column_sums(q, k, lse, causal=True)
        return sums, tw.attention_block_max(q, k, lse, (32, 112), causal=True)

    assert_schedules_agree(run, 4)


def test_spans_of_queries(device):
    """More queries than the maxima of one block of threads, and blocks that do not divide their number."""
    q, k, lse = prepared(Shape(1, 1, 1, 530, 20, 8, 8), torch.float16, device, False)
    judge(tw.attention_block_max(q, k, lse, (96, 16)), pooled_by(96, 16), q, k, False)


def test_queries_without_weight(device):
    """lse of -inf, which a call over no keys returns, weighs nothing."""
    q, k, lse = prepared(Shape(1, 1, 1, 20, 30, 64, 64), torch.bfloat16, device, False)
    lse[..., 3:9] = -math.inf
    q[..., 3, :] = math.nan
    kept = [i for i in range(20) if not 3 <= i < 9]
    sums = tw.attention_column_sums(q, k, lse, normalize=False).double().cpu()
    weights = weights_of(q.double(), k.double()).cpu()[:, :, kept]
    torch.testing.assert_close(sums, weights.sum(2), rtol=1e-4, atol=1e-5)
    tops = tw.attention_block_max(q, k, lse, 16).double().cpu()
    torch.testing.assert_close(
        tops[0, 0, :, 0],
        torch.stack([w[..., :16].max() for w in (weights[:, :, :10], weights[:, :, 10:])]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_probe_rows(device):
    """ZipCache's saliency: the mean over those probe rows that see the key."""
    q, k, lse = prepared(SHAPES[0].on(device), torch.float32, device, True)
    queries, keys = q.shape[2], k.shape[2]
    rows = torch.tensor([3, queries - 10, queries - 1, 14], device=device.torch)
    got = tw.attention_column_sums(q, k, lse, rows=rows, causal=True)
    weights = weights_of(q.double(), k.double(), causal=True)[:, :, rows]
    seen = rows[:, None] + keys - queries >= torch.arange(keys, device=device.torch)
    torch.testing.assert_close(got.double(), weights.sum(2) / seen.sum(0).clamp_min(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [16, (48, 16), (16, 128), 64], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_max(device, shape, block, causal):
    q, k, lse = prepared(shape.on(device), torch.float32, device, causal)
    got = tw.attention_block_max(q, k, lse, block, causal=causal)
    block_q, block_k = (block, block) if isinstance(block, int) else block
    judge(got, pooled_by(block_q, block_k), q, k, causal)


def test_rows_without_keys(device):
    q, k, lse = prepared(Shape(1, 2, 2, 9, 4, 64, 64), torch.float32, device, True)
    sums = tw.attention_column_sums(q, k, lse, causal=True, normalize=False)
    torch.testing.assert_close(sums.sum(-1).cpu(), torch.full((1, 2), 4.0))  # five of nine rows see nothing
    empty = tw.attention_column_sums(q[:, :, :0], k, lse[:, :, :0])
    assert empty.shape == (1, 2, 4) and (empty == 0).all()
    assert tw.attention_block_max(q, k[:, :, :0], lse, 16).shape == (1, 2, 1, 0)


def test_errors():
    q, k, lse = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 4, 5)
    for run, kind, message in (
        (lambda: tw.attention_column_sums(q, k[..., :4], lse), ValueError, "column_sums: k has head dim 4"),
        (lambda: tw.attention_column_sums(q[:, :3], k, lse[:, :3]), ValueError, "column_sums: q has 3 heads"),
        (lambda: tw.attention_column_sums(q, k.half(), lse), TypeError, "column_sums: k has dtype float16"),
        (lambda: tw.attention_column_sums(q, k, lse.double()), TypeError, "column_sums: lse has dtype float64"),
        (lambda: tw.attention_column_sums(q, k, lse[..., :3]), ValueError, "column_sums: lse has shape"),
        (lambda: tw.attention_column_sums(q, k, lse, rows=torch.tensor([9])), IndexError, "out of range"),
        (lambda: tw.attention_block_max(q, k, lse, 24), ValueError, "block_max: block_size .* has blocks of 24"),
        (lambda: tw.attention_block_max(q[0], k, lse, 16), ValueError, "block_max: q has shape"),
        (lambda: tw.attention_block_max(1, k, lse, 16), TypeError, "block_max: q is a int"),
    ):
        with pytest.raises(kind, match=message):
            run()


def test_opcheck():
    q, k, lse = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 4, 5)
    last_key = torch.arange(5, dtype=torch.int32)
    torch.library.opcheck(torch.ops.tilewise.attention_column_sums.default, (q, k, lse, last_key, None))
    torch.library.opcheck(torch.ops.tilewise.attention_block_max.default, (q, k, lse, 16, 32, None, 0.5))
