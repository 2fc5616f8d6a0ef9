"""tw.block_sparsity against definitions that walk over every query, key and block."""

import math

import pytest
import torch

import tilewise as tw
from tilewise import block_sparsity as sparsity
from tilewise.reference import attention as reference

# queries, keys, block size
SIZES = [(80, 80, 16), (100, 130, (32, 16)), (75, 90, (16, 48)), (130, 100, (64, 32)), (1, 50, 16), (40, 40, 64)]
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
SIZED = pytest.mark.parametrize("queries, keys, block_size", SIZES, ids=str)


def inputs(queries, keys, batch=2, heads=4, kv_heads=2, dim=24):
    return torch.randn(batch, heads, queries, dim), torch.randn(batch, kv_heads, keys, dim)


def per_query_head(k, q):
    return k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def blocks_of(seen, block_size):
    """Which blocks hold a True of (..., S, Sk)."""
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    rows = [part.any(-2) for part in seen.split(block_q, -2)]
    columns = [part.any(-1) for part in torch.stack(rows, -2).split(block_k, -1)]
    return torch.stack(columns, -1)


def visible(queries, keys, causal):
    return reference.visible(queries, keys, causal=causal)


def diagonal(queries, keys, causal):
    """bool (S, Sk): the diagonal itself."""
    return (
        visible(queries, keys, causal=True) & reference.visible(queries, keys, window=(0, None)) & torch.tensor(causal)
    )


def assert_keeps_diagonal_and_hides_the_future(mask, queries, keys, causal):
    dense = mask.dense(queries, keys)
    assert not (diagonal(queries, keys, causal) & ~dense).any()
    assert not (mask.blocks & ~blocks_of(visible(queries, keys, causal), mask.block_size)).any()


@SIZED
@CAUSAL
@pytest.mark.parametrize("window, global_tokens", [(0, 0), (20, 3), (33, 20), (500, 0)])
def test_lambda_mask(queries, keys, block_size, causal, window, global_tokens):
    mask = tw.block_sparsity.lambda_mask(
        queries, keys, window=window, global_tokens=global_tokens, block_size=block_size, causal=causal
    )
    exact = reference.visible(queries, keys, causal=causal, window=(window, None), global_tokens=global_tokens)
    assert torch.equal(mask.blocks[0, 0], blocks_of(exact, block_size)) and mask.block_size == block_size


def pooled(t, block):
    parts = t.split(block, 2)
    return torch.stack([torch.cat([p.amax(2), p.amin(2), p.mean(2)], -1) for p in parts], 2)


def gate_inputs(queries, keys, gate_dim=10, weight_heads=True):
    q, k = inputs(queries, keys)
    wq, wk = torch.randn(4, 72, gate_dim) / 8, torch.randn(2, 72, gate_dim) / 8
    return (q, k, wq, wk) if weight_heads else (q, k, wq[0], wk[0])


@SIZED
@CAUSAL
@pytest.mark.parametrize("weight_heads", [False, True], ids=["shared", "per-head"])
def test_seer_scores(queries, keys, block_size, causal, weight_heads):
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    q, k, wq, wk = gate_inputs(queries, keys, weight_heads=weight_heads)

    def rope(x, positions):
        assert positions.shape == (x.shape[2],)
        return x * torch.cos(positions / 7)[:, None]

    scores = sparsity.seer_scores(q, k, wq, wk, block_size=block_size, causal=causal, rope=rope)
    starts_q = torch.arange(0, queries, block_q) + keys - queries
    starts_k = torch.arange(0, keys, block_k)
    gate_q, gate_k = rope(pooled(q, block_q) @ wq, starts_q), rope(pooled(k, block_k) @ wk, starts_k)
    logits = gate_q @ per_query_head(gate_k, gate_q).transpose(-1, -2) / math.sqrt(10)
    seen = blocks_of(visible(queries, keys, causal), block_size)
    expected = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)
    torch.testing.assert_close(scores, expected)


@SIZED
@CAUSAL
def test_seer_gate(queries, keys, block_size, causal):
    tensors = gate_inputs(queries, keys)
    options = {"block_size": block_size, "causal": causal}
    scores = sparsity.seer_scores(*tensors, **options)
    on_diagonal = blocks_of(diagonal(queries, keys, causal), block_size)
    seen = blocks_of(visible(queries, keys, causal), block_size)

    mask = sparsity.seer_gate(*tensors, threshold=0.3, **options)
    assert torch.equal(mask.blocks, (scores >= 0.3) & seen | on_diagonal)
    assert_keeps_diagonal_and_hides_the_future(mask, queries, keys, causal)

    for top_k in (1, 3, 100):
        mask = sparsity.seer_gate(*tensors, top_k=top_k, **options)
        assert_keeps_diagonal_and_hides_the_future(mask, queries, keys, causal)
        count = torch.minimum(seen.sum(-1), on_diagonal.sum(-1).clamp(min=top_k))
        assert torch.equal(mask.blocks.sum(-1), count.expand_as(mask.blocks[..., 0]))
        chosen = mask.blocks & ~on_diagonal
        least = scores.masked_fill(~chosen, math.inf).amin(-1)
        left = scores.masked_fill(mask.blocks | ~seen, -math.inf).amax(-1)
        assert (least >= left).all()


def test_seer_scores_are_differentiable():
    tensors = torch.randn(1, 2, 40, 3), torch.randn(1, 1, 50, 3), torch.randn(2, 9, 2), torch.randn(9, 2)
    q, k, wq, wk = (t.double().requires_grad_() for t in tensors)
    run = lambda *t: sparsity.seer_scores(*t, block_size=16)  # noqa: E731
    gradients = torch.autograd.grad(run(q, k, wq, wk).square().sum(), (q, k, wq, wk))
    assert all(g.abs().sum() > 0 for g in gradients)
    assert torch.autograd.gradcheck(lambda a, b: run(q.detach(), k.detach(), a, b), (wq, wk))


def vertical_slash_by_definition(q, k, vertical, slash, last, causal):
    """bool (B, Hq, S, Sk): every element of a chosen column or diagonal."""
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    last = min(last, queries)
    logits = q[:, :, queries - last :] @ per_query_head(k, q).transpose(-1, -2) / math.sqrt(dim)
    seen = visible(queries, keys, causal)
    weights = logits.masked_fill(~seen[queries - last :], -math.inf).softmax(-1).nan_to_num(0)
    lines = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            lines[b, h][:, weights[b, h].sum(0).topk(min(vertical, keys)).indices] = True
            # torch's offset of a diagonal is key - row
            least = 0 if causal else 1 - last
            distances = list(range(least, keys))
            sums = torch.stack([weights[b, h].diagonal(keys - last - o).sum() for o in distances])
            for i in sums.topk(min(slash, len(distances))).indices.tolist():
                lines[b, h].diagonal(keys - queries - distances[i]).fill_(True)
    return lines & seen


@SIZED
@CAUSAL
@pytest.mark.parametrize("vertical, slash, last", [(3, 2, 16), (0, 4, 64), (5, 0, 1), (2, 1, 33)])
def test_vertical_slash(queries, keys, block_size, causal, vertical, slash, last):
    q, k = inputs(queries, keys)
    options = {"vertical": vertical, "slash": slash, "last": last}
    mask = sparsity.vertical_slash(q, k, **options, block_size=block_size, causal=causal)
    lines = vertical_slash_by_definition(q, k, **options, causal=causal)
    assert torch.equal(mask.blocks, blocks_of(lines | diagonal(queries, keys, causal), block_size))
    assert_keeps_diagonal_and_hides_the_future(mask, queries, keys, causal)


def test_vertical_slash_finds_them():
    """A planted column and a planted diagonal, in blocks that the diagonal is far from."""
    queries, block = 320, 16
    q, k = torch.zeros(1, 1, queries, 64), torch.zeros(1, 1, queries, 64)
    position = torch.arange(queries)
    angles = position[:, None] * torch.arange(1, 17) * 0.3
    q[0, 0, :, :32] = torch.cat([angles.cos(), angles.sin()], -1)
    k[0, 0, :, :32] = torch.cat([(angles + 96 * 0.3 * torch.arange(1, 17)).cos(), torch.zeros(queries, 16)], -1)
    k[0, 0, :, 16:32] = (angles + 96 * 0.3 * torch.arange(1, 17)).sin()  # q_i . k_j = 16 where i - j = 96
    q[0, 0, :, 40], k[0, 0, 50, 40] = 4, 4
    mask = sparsity.vertical_slash(q, k, vertical=1, slash=1, block_size=block, scale=1.0).blocks[0, 0]
    rows = torch.arange(queries // block)
    expected = torch.eye(queries // block, dtype=torch.bool)
    expected[rows[6:], rows[6:] - 6] = True
    expected[rows >= 3, 50 // block] = True
    assert torch.equal(mask, expected)


def criticality_by_definition(q, k, segment, block_k, causal):
    (batch, heads, queries, dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    scores = torch.full((batch, heads, -(-queries // segment), -(-keys // block_k)), -math.inf)
    for s, qs in enumerate(q.split(segment, 2)):
        for j, ks in enumerate(per_query_head(k, q).split(block_k, 2)):
            if causal and (j + 1) * block_k > s * segment + keys - queries:
                continue
            q_max, q_min, k_max, k_min = qs.amax(2), qs.amin(2), ks.amax(2), ks.amin(2)
            dot = lambda a, b: (a * b).sum(-1)  # noqa: E731
            of_max, of_min = ((dot(q_max, of_k) + dot(q_min, of_k)) / 2 for of_k in (k_max, k_min))
            scores[:, :, s, j] = torch.maximum(of_max, of_min)
    scores = scores.unflatten(1, (kv_heads, heads // kv_heads)).mean(2) / math.sqrt(dim)
    return scores.softmax(-1).nan_to_num(0)


@pytest.mark.parametrize(
    "queries, keys, segment, block_size, budget",
    [(160, 160, 32, 16, 48), (150, 170, 64, (32, 16), 32), (70, 200, 48, (48, 32), 64), (130, 100, 32, 16, 33)],
)
@CAUSAL
def test_segment_criticality(queries, keys, segment, block_size, budget, causal):
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    q, k = inputs(queries, keys)
    options = {"segment": segment, "block_size": block_size, "budget": budget, "causal": causal, "return_scores": True}
    mask, scores = sparsity.segment_criticality(q, k, **options)
    exact = criticality_by_definition(q, k, segment, block_k, causal)
    torch.testing.assert_close(scores, exact, rtol=1e-4, atol=1e-6)
    before = torch.rand_like(scores)
    mask, scores = sparsity.segment_criticality(q, k, **options, previous=before)
    torch.testing.assert_close(scores, 0.25 * before + 0.75 * exact, rtol=1e-4, atol=1e-6)

    assert_keeps_diagonal_and_hides_the_future(mask, queries, keys, causal)
    own = blocks_of(diagonal(queries, keys, causal), (segment, block_k))
    first = torch.arange(0, queries, segment)[:, None] + keys - queries
    earlier = (torch.arange(0, keys, block_k) + block_k <= first) if causal else torch.ones_like(own)
    seen = blocks_of(visible(queries, keys, causal), block_size)
    for s in range(-(-queries // segment)):
        rows = mask.blocks[:, :, s * segment // block_q : (s + 1) * segment // block_q]
        chosen = rows & earlier[s]
        assert torch.equal(chosen, chosen[:, :, :1].expand_as(chosen)), "a segment's rows agree"
        assert (chosen[:, :, 0].sum(-1) == min(budget // block_k, int(earlier[s].sum()))).all()
        assert torch.equal(
            rows & ~earlier[s], (own[s] & seen[s * segment // block_q :][: rows.shape[2]]).expand_as(rows)
        )
        left = per_query_head(scores[:, :, s], q).masked_fill(chosen[:, :, 0] | ~earlier[s], -math.inf).amax(-1)
        least = per_query_head(scores[:, :, s], q).masked_fill(~chosen[:, :, 0], math.inf).amin(-1)
        assert (least >= left).all()


def test_strided_and_half_inputs():
    """(B, S, H, D) in memory, in bfloat16: the same choice as of contiguous tensors."""
    q, k = (torch.randn(1, 100, heads, 24).bfloat16().transpose(1, 2) for heads in (4, 2))
    for build in (
        lambda q, k: sparsity.vertical_slash(q, k, vertical=3, slash=3, block_size=16),
        lambda q, k: sparsity.segment_criticality(q, k, segment=32, block_size=16, budget=32),
        lambda q, k: sparsity.seer_gate(q, k, torch.eye(72), torch.eye(72), block_size=16, top_k=2),
    ):
        assert torch.equal(build(q, k).blocks, build(q.contiguous(), k.contiguous()).blocks)


@pytest.mark.parametrize("queries, keys", [(0, 0), (0, 40), (40, 0)])
@CAUSAL
def test_empty(queries, keys, causal):
    q, k = inputs(queries, keys)
    masks = [
        sparsity.lambda_mask(queries, keys, window=3, block_size=16, causal=causal),
        sparsity.vertical_slash(q, k, vertical=3, slash=3, block_size=16, causal=causal),
        sparsity.segment_criticality(q, k, segment=32, block_size=16, budget=32, causal=causal),
        sparsity.seer_gate(q, k, torch.eye(72), torch.eye(72), block_size=16, top_k=2, causal=causal),
    ]
    for mask in masks:
        assert mask.blocks.shape[2:] == (-(-queries // 16), -(-keys // 16))


Q, K = torch.zeros(1, 4, 40, 8), torch.zeros(1, 2, 40, 8)
W = torch.zeros(24, 5)
BAD = {
    "block": (ValueError, "lambda_mask: block_size is 24", lambda: sparsity.lambda_mask(9, 9, window=1, block_size=24)),
    "pair": (
        ValueError,
        "vertical_slash: block_size is",
        lambda: sparsity.vertical_slash(Q, K, vertical=1, slash=1, block_size=(16, 256)),
    ),
    "window": (ValueError, "lambda_mask: window is -1", lambda: sparsity.lambda_mask(9, 9, window=-1)),
    "list": (TypeError, "vertical_slash: q is a list", lambda: sparsity.vertical_slash([1], K, vertical=1, slash=1)),
    "dims": (ValueError, "vertical_slash: k has 3", lambda: sparsity.vertical_slash(Q, K[0], vertical=1, slash=1)),
    "heads": (ValueError, "vertical_slash: k's shape", lambda: sparsity.vertical_slash(K, Q, vertical=1, slash=1)),
    "vertical": (ValueError, "vertical is -1", lambda: sparsity.vertical_slash(Q, K, vertical=-1, slash=1)),
    "last": (ValueError, "last is 0", lambda: sparsity.vertical_slash(Q, K, vertical=1, slash=1, last=0)),
    "segment": (
        ValueError,
        "segment is 100, expected a multiple of 128",
        lambda: sparsity.segment_criticality(Q, K, segment=100),
    ),
    "budget": (ValueError, "budget is 31, expected at least 32", lambda: sparsity.segment_criticality(Q, K, budget=31)),
    "previous": (
        ValueError,
        "previous' shape is .3,., expected .1, 2, 1, 2.",
        lambda: sparsity.segment_criticality(Q, K, previous=torch.zeros(3)),
    ),
    "neither": (ValueError, "threshold is None and top_k", lambda: sparsity.seer_gate(Q, K, W, W, block_size=16)),
    "top_k": (ValueError, "top_k is 0", lambda: sparsity.seer_gate(Q, K, W, W, block_size=16, top_k=0)),
    "weight": (
        ValueError,
        "seer_scores: wq's shape is .23, 5.",
        lambda: sparsity.seer_gate(Q, K, W[1:], W, block_size=16, top_k=1),
    ),
    "gate": (
        ValueError,
        "wk's last dimension is 4, expected 5",
        lambda: sparsity.seer_gate(Q, K, W, W[:, 1:], block_size=16, top_k=1),
    ),
}


@pytest.mark.parametrize("error, message, call", BAD.values(), ids=BAD)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_no_square_matrix():
    """32K x 32K: a boolean for every pair would take 1 GB; the builders stay within O(S D)."""
    q, k = torch.zeros(1, 1, 32768, 16), torch.zeros(1, 1, 32768, 16)
    peak = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal peak
            out = function(*args, **kwargs or {})
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if torch.is_tensor(t):
                    peak = max(peak, t.numel())
            return out

    with Sizes():
        sparsity.vertical_slash(q, k, vertical=1000, slash=4000)
        sparsity.segment_criticality(q, k)
        sparsity.lambda_mask(32768, 32768, window=4096, global_tokens=64)
        sparsity.seer_gate(q, k, torch.zeros(48, 8), torch.zeros(48, 8), block_size=64, top_k=8)
    assert 64 * 32768 <= peak <= 65 * 32768


@pytest.mark.devices("cpu")
def test_attention_reads_them(device):
    """The kernels take every builder's mask, whatever its shape."""
    q, k = (t.to(device.torch) for t in inputs(100, 130, dim=64))
    w = torch.randn(192, 8)
    for mask in (
        sparsity.lambda_mask(100, 130, window=20, global_tokens=4, block_size=(32, 16), device=device.torch),
        sparsity.vertical_slash(q, k, vertical=3, slash=3, block_size=16),
        sparsity.segment_criticality(q, k, segment=64, block_size=(64, 32), budget=32),
        sparsity.seer_gate(q, k, w, w, block_size=48, top_k=2),
    ):
        got = tw.attention(q, k, k, causal=True, block_mask=mask)
        torch.testing.assert_close(got, reference.attention(q, k, k, causal=True, block_mask=mask)[0])
