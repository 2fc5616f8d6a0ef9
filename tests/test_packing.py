"""tw.packing: bins, padding and back, and attention over what they pack."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from attention_cases import DTYPES, assert_same, judge
from tilewise.reference import attention as reference

LENGTHS = st.lists(st.integers(0, 40), max_size=20)


def first_fit_decreasing(lengths, capacity):
    """The definition, bin by bin."""
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in bins if sum(lengths[j] for j in b) + lengths[i] <= capacity]
        if not fitting:
            bins.append([])
        (fitting or bins[-1:])[0].append(i)
    return bins


@given(LENGTHS, st.none() | st.integers(40, 100))
@settings(max_examples=300, deadline=None)
def test_bins(lengths, capacity):
    packing = tw.packing.pack(lengths, capacity)
    room = max(lengths, default=0) if capacity is None else capacity
    assert packing.bins == first_fit_decreasing(lengths, room) and packing.capacity == room
    assert all(n <= room for n in packing.bin_lengths)
    assert packing.order.tolist() == sum(packing.bins, [])
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    expected = [0, *torch.tensor([lengths[i] for i in packing.order.tolist()]).cumsum(0).tolist()]
    assert packing.cu_seqlens.dtype == packing.positions.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == expected
    assert packing.positions.tolist() == [p for i in packing.order.tolist() for p in range(lengths[i])]
    assert packing.max_seqlen == max(lengths, default=0)


def test_worst_case():
    """Lengths for which first-fit-decreasing takes 11 bins where 9 are enough (Johnson's example)."""
    lengths = [51] * 6 + [27] * 6 + [26] * 6 + [23] * 12
    best = [[51, 26, 23]] * 6 + [[27, 27, 23, 23]] * 3
    assert sorted(sum(best, [])) == sorted(lengths) and all(sum(b) == 100 for b in best)
    packing = tw.packing.pack(lengths, 100)
    assert [sorted((lengths[i] for i in b), reverse=True) for b in packing.bins] == (
        [[51, 27]] * 6 + [[26, 26, 26]] * 2 + [[23] * 4] * 3
    )


def test_perfect_fit():
    assert tw.packing.pack([3, 7, 2, 8, 5, 5], 10).bins == [[3, 2], [1, 0], [4, 5]]
    assert tw.packing.pack([4, 4, 4]).bins == [[0], [1], [2]]


@given(LENGTHS, st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
@settings(max_examples=100, deadline=None)
def test_pad_and_unpad_are_inverses(lengths, spare, dtype):
    length = max(lengths, default=0) + spare
    tokens = torch.arange(1, 1 + 2 * sum(lengths)).view(-1, 2).to(dtype)
    mask = torch.arange(length) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    for where in (lengths, torch.tensor(lengths, dtype=torch.int32), mask, tw.packing.pack(lengths)):
        padded = tw.packing.pad(tokens, where, length=length, value=-1)
        assert padded.shape == (len(lengths), length, 2) and padded.dtype == dtype
        assert (padded[~mask] == -1).all()
        assert torch.equal(tw.packing.unpad(padded, where), tokens)
        assert torch.equal(tw.packing.pad(tw.packing.unpad(padded, where), where, length=length, value=-1), padded)


def test_order_of_a_packing():
    """Rows come out bin after bin, and go back to the caller's order."""
    packing = tw.packing.pack([1, 3, 2], 4)
    padded = torch.tensor([[10, 0, 0], [20, 21, 22], [30, 31, 0]])
    tokens = tw.packing.unpad(padded, packing)
    assert tokens.tolist() == [20, 21, 22, 10, 30, 31]
    assert torch.equal(tw.packing.pad(tokens, packing), padded)
    rows = tw.packing.pad(tokens, packing.bin_lengths, length=packing.capacity)
    assert rows.tolist() == [[20, 21, 22, 10], [30, 31, 0, 0]]


def test_mask_with_holes():
    mask = torch.tensor([[False, True, True, False, True], [False] * 5, [True] * 5])
    padded = torch.randn(3, 5, 4)
    tokens = tw.packing.unpad(padded, mask)
    assert torch.equal(tokens, padded[mask])
    wider = tw.packing.pad(tokens, mask, length=7)
    assert torch.equal(wider[:, :5], padded * mask[..., None]) and (wider[:, 5:] == 0).all()


@pytest.mark.parametrize("kind", ["lengths", "mask", "packing"])
def test_gradients(kind):
    lengths = [3, 0, 5, 1]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    where = {"lengths": lengths, "mask": mask, "packing": tw.packing.pack(lengths)}[kind]
    padded = torch.randn(6, 4, 2, dtype=torch.float64).transpose(0, 1).requires_grad_()
    tokens = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: tw.packing.unpad(t, where), padded)
    assert torch.autograd.gradcheck(lambda t: tw.packing.pad(t, where, length=6, value=3.0), tokens)


BAD = {
    "negative": (ValueError, "pack: lengths has -1", lambda: tw.packing.pack([3, -1])),
    "capacity": (ValueError, "pack: lengths has 9, expected at most 8", lambda: tw.packing.pack([9], 8)),
    "float": (TypeError, "pack: lengths has a float", lambda: tw.packing.pack([1.5])),
    "bool": (TypeError, "pack: lengths has a bool", lambda: tw.packing.pack([True])),
    "float-tensor": (TypeError, "pack: lengths is torch.float32", lambda: tw.packing.pack(torch.ones(2))),
    "matrix": (TypeError, "offsets: lengths is", lambda: tw.packing.offsets(torch.ones(2, 2, dtype=torch.int32))),
    "list": (TypeError, "unpad: padded is a list", lambda: tw.packing.unpad([1], [1])),
    "vector": (ValueError, "unpad: padded has 1 dim", lambda: tw.packing.unpad(torch.ones(3), [1])),
    "rows": (ValueError, "unpad: padded has shape", lambda: tw.packing.unpad(torch.ones(3, 4), [1, 1])),
    "long": (ValueError, "unpad: where has a length of 5", lambda: tw.packing.unpad(torch.ones(1, 4), [5])),
    "mask": (ValueError, "unpad: padded has", lambda: tw.packing.unpad(torch.ones(1, 4), torch.ones(1, 3) > 0)),
    "mask-dims": (ValueError, "unpad: where has 1", lambda: tw.packing.unpad(torch.ones(1, 4), torch.ones(4) > 0)),
    "scalar": (ValueError, "pad: packed has 0 dim", lambda: tw.packing.pad(torch.tensor(1.0), [1])),
    "tokens": (ValueError, "pad: packed has 3 tokens, expected 4", lambda: tw.packing.pad(torch.ones(3), [4])),
    "short": (ValueError, "pad: where has a length of 3", lambda: tw.packing.pad(torch.ones(3), [3], length=2)),
    "mask-short": (
        ValueError,
        "pad: length is 2, expected at least 3",
        lambda: tw.packing.pad(torch.ones(3), torch.ones(1, 3) > 0, length=2),
    ),
}


@pytest.mark.parametrize("error, message, call", BAD.values(), ids=BAD)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def heads_first(t):
    return t.transpose(0, 1)[None]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_packed_attention_is_that_of_separate_sequences(device, dtype):
    """The same forward; gradients to rounding, judged against the sequences one by one in float64."""
    lengths = [9, 30, 1, 17, 0, 22]
    packing = tw.packing.pack(lengths, 40, device=device.torch)
    assert len(packing.bins) < len(lengths)
    padded = [torch.randn(6, 30, heads, 64).to(device.torch, dtype) for heads in (4, 2, 2)]
    cu, longest = packing.cu_seqlens, packing.max_seqlen

    def packed(q, k, v):
        q, k, v = (tw.packing.unpad(t, packing) for t in (q, k, v))
        sequences = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        out, lse = tw.attention_varlen(q, k, v, cu, cu, **sequences, causal=True, return_lse=True)
        return tw.packing.pad(out, packing), lse

    def separate(q, k, v):
        outs, lses = [], {}
        for i, n in enumerate(lengths):
            out, lses[i] = reference.attention(*(heads_first(t[i, :n]) for t in (q, k, v)), causal=True)
            outs.append(torch.nn.functional.pad(out[0].transpose(0, 1), (0, 0, 0, 0, 0, 30 - n)))
        return torch.stack(outs), torch.cat([lses[i][0] for i in packing.order.tolist()], 1)

    out, _ = packed(*padded)
    for i, n in enumerate(lengths):
        alone = tw.attention(*(heads_first(t[i, :n]) for t in padded), causal=True)
        assert_same(device, out[i, :n], alone[0].transpose(0, 1), 2, n)
    judge(packed, separate, padded, torch.randn(out.shape).to(out), dtype)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_chunked_prefill(device, dtype, kv_heads):
    """A prefill chunk and three decodes in one call, and each alone."""
    chunk, past = 24, (37, 50, 3, 0)
    queries, keys = [chunk, 1, 1, 1], [past[0] + chunk, *(n + 1 for n in past[1:])]
    cu_q, cu_k = (tw.packing.offsets(n, device.torch) for n in (queries, keys))
    q = torch.randn(sum(queries), 4, 64).to(device.torch, dtype)
    k, v = (torch.randn(sum(keys), kv_heads, 64).to(device.torch, dtype) for _ in range(2))
    lengths = {"max_seqlen_q": chunk, "max_seqlen_k": max(keys)}
    together = tw.attention_varlen(q, k, v, cu_q, cu_k, **lengths, causal=True).split(queries)
    for i, parts in enumerate(zip(q.split(queries), k.split(keys), v.split(keys), strict=True)):
        alone = tw.attention(*map(heads_first, parts), causal=True)
        assert_same(device, together[i], alone[0].transpose(0, 1), 4 // kv_heads, queries[i])


def test_chunks_are_the_whole_prompt(device):
    """Prefilling in chunks, each over the keys so far, gives what one causal call over the prompt gives."""
    q, k, v = (torch.randn(50, 2, 64).to(device.torch) for _ in range(3))
    whole = tw.attention(*map(heads_first, (q, k, v)), causal=True)[0].transpose(0, 1)
    for begin, end in ((0, 20), (20, 40), (40, 50)):
        cu_q, cu_k = (tw.packing.offsets([n], device.torch) for n in (end - begin, end))
        chunk = tw.attention_varlen(q[begin:end], k[:end], v[:end], cu_q, cu_k, causal=True)
        torch.testing.assert_close(chunk, whole[begin:end], rtol=1e-5, atol=1e-5)
