"""Column sums and block maxima of the attention map, against the map itself."""

import math

import pytest
import torch

import tilewise as tw
from attention_cases import DTYPES, Shape, inputs
from harness.judge import assert_accurate, draws, yardsticks

pytestmark = pytest.mark.devices("cpu")
SHAPES = [Shape(2, 4, 2, 70, 130, 64, 64), Shape(1, 2, 1, 33, 300, 40, 8), Shape(1, 1, 1, 1, 1, 64, 64)]


def weights_of(q, k, causal=False):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    queries, keys = scores.shape[-2:]
    if causal:
        scores = scores.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1), -math.inf)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp().nan_to_num(0)


def prepared(shape, dtype, device, causal):
    q, k, v = inputs(shape, dtype, device)
    return q, k, tw.attention(q, k, v, causal=causal, return_lse=True)[1]


def judge(run, plain, q, k):
    ruler = yardsticks([lambda q, k: (plain(q, k),)], [q, k], draws(q.shape[1] * k.shape[2]))[0]
    assert_accurate("result", run, ruler, 2)


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_sums(device, shape, dtype, causal):
    q, k, lse = prepared(shape, dtype, device, causal)
    got = tw.attention_column_sums(q, k, lse, causal=causal, normalize=False)
    assert got.dtype == torch.float32
    judge(got, lambda q, k: weights_of(q, k, causal).sum(2), q, k)


def test_probe_rows(device):
    """ZipCache's saliency: the mean over those probe rows that see the key."""
    q, k, lse = prepared(SHAPES[0], torch.float32, device, True)
    rows = torch.tensor([3, 60, 69, 14])
    got = tw.attention_column_sums(q, k, lse, rows=rows, causal=True)
    weights = weights_of(q.double(), k.double(), causal=True)[:, :, rows]
    seen = rows[:, None] + 60 >= torch.arange(130)
    torch.testing.assert_close(got.double(), weights.sum(2) / seen.sum(0).clamp_min(1), rtol=1e-5, atol=1e-6)
    assert (got[..., 130 - 60 + 69 :] == 0).all()


@pytest.mark.parametrize("block", [16, (48, 16), (16, 128), 64], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_max(device, shape, block, causal):
    q, k, lse = prepared(shape, torch.float32, device, causal)
    got = tw.attention_block_max(q, k, lse, block, causal=causal)
    block_q, block_k = (block, block) if isinstance(block, int) else block

    def pooled(q, k):
        weights = weights_of(q, k, causal)
        pad = (0, -weights.shape[3] % block_k, 0, -weights.shape[2] % block_q)
        return torch.nn.functional.max_pool2d(torch.nn.functional.pad(weights, pad), (block_q, block_k))

    judge(got, pooled, q, k)


def test_rows_without_keys(device):
    q, k, lse = prepared(Shape(1, 2, 2, 9, 4, 64, 64), torch.float32, device, True)
    sums = tw.attention_column_sums(q, k, lse, causal=True, normalize=False)
    torch.testing.assert_close(sums.sum(-1), torch.full((1, 2), 4.0))  # five of nine rows see nothing
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
