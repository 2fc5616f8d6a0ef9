"""Attention over packed sequences, against the reference sequence by sequence."""

import math

import pytest
import torch

import tilewise as tw
from attention_cases import DTYPES, judge
from harness.emulation import assert_schedules_agree
from tilewise.attention.options import pack as pack_options
from tilewise.reference import attention as reference

# lengths of queries and keys of each sequence
PACKS = {
    "one": ([37], [37]),
    "several": ([17, 1, 40], [17, 30, 12]),
    "empty-between": ([20, 0, 5, 0], [20, 7, 0, 0]),
}
LONG_PACKS = {"long": ([600, 3, 250], [600, 400, 250]), "many": ([5, 9, 1] * 4, [5, 9, 1] * 4)}


def offsets(lengths, device):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device.torch)


def pack(lengths, device, dtype=torch.float32, heads=2, kv_heads=1, dim=64, spare=0):
    """q, k, v and the offsets; ``spare`` rows at the end belong to no sequence."""
    rows_q, rows_k = (sum(n) + spare for n in lengths)
    shapes = (rows_q, heads, dim), (rows_k, kv_heads, dim), (rows_k, kv_heads, dim)
    return [torch.randn(s).to(device.torch, dtype) for s in shapes], [offsets(n, device) for n in lengths]


def check(lengths, device, dtype, causal, **shape):
    tensors, cu = pack(lengths, device, dtype, **shape)
    dout = torch.randn(tensors[0].shape).to(device.torch, dtype)
    kernel = lambda q, k, v: tw.attention_varlen(q, k, v, *cu, causal=causal, return_lse=True)  # noqa: E731
    plain = lambda q, k, v: reference.attention_varlen(q, k, v, *cu, causal=causal)  # noqa: E731
    judge(kernel, plain, tensors, dout, dtype)


@pytest.mark.modes
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_against_reference(device, lengths, dtype, causal):
    check(lengths, device, dtype, causal)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("lengths", LONG_PACKS.values(), ids=LONG_PACKS)
def test_longer(device, lengths, dtype):
    if device.small:
        lengths = [[n // 8 for n in side[:3]] for side in lengths]
    check(lengths, device, dtype, causal=True, heads=3, kv_heads=3)


def test_no_sequences(device):
    (q, k, v), cu = pack(([], []), device, spare=3)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = tw.attention_varlen(*leaves, *cu, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_equals_dense(device):
    """One packed batch and the same batch padded to equal lengths give the same bits."""
    (q, k, v), cu = pack(([24, 24], [24, 24]), device)
    packed = tw.attention_varlen(q, k, v, *cu, causal=True)
    dense = tw.attention(*(t.view(2, 24, -1, 64).transpose(1, 2) for t in (q, k, v)), causal=True)
    assert torch.equal(packed.view(2, 24, 2, 64).transpose(1, 2), dense)


def test_rows_of_no_sequence(device):
    """They get 0, -inf and no gradient, whatever they hold."""
    (q, k, v), cu = pack(([9, 12], [9, 12]), device, spare=5)
    for t in (q, k, v):
        t[21:] = math.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = tw.attention_varlen(*leaves, *cu, return_lse=True)
    assert (out[21:] == 0).all() and (lse[:, 21:] == -math.inf).all() and out[:21].isfinite().all()
    for gradient in torch.autograd.grad(out[:21].sum(), leaves):
        assert (gradient[21:] == 0).all() and gradient[:21].isfinite().all()


def test_given_lengths(device):
    """Bounds above the longest sequence change nothing."""
    (q, k, v), cu = pack(([9, 12], [10, 30]), device)
    expected = tw.attention_varlen(q, k, v, *cu, causal=True)
    for lengths in ((12, 30), (100, 1000)):
        got = tw.attention_varlen(q, k, v, *cu, max_seqlen_q=lengths[0], max_seqlen_k=lengths[1], causal=True)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [[0, 9, 7, 21], [0, 9, 12, 22], [-1, 9, 12, 21], [0, 9, -5, 21]], ids=str)
@pytest.mark.parametrize("side", ["q", "k"])
def test_bad_offsets(device, side, bad):
    """On CPU an error before anything is read; elsewhere such a sequence is empty, and the next call raises."""
    (q, k, v), cu = pack(([9, 3, 9], [9, 3, 9]), device)
    wrong = torch.tensor(bad, dtype=torch.int32, device=device.torch)
    cu = (wrong, cu[1]) if side == "q" else (cu[0], wrong)
    with pytest.raises(ValueError, match="cu_seqlens"):
        tw.attention_varlen(q, k, v, *cu)
        if device.kind == "cuda":
            torch.cuda.synchronize()
        tw.attention_varlen(q, k, v, *cu)


@pytest.mark.modes
def test_schedules(device):
    (q, k, v), cu = pack(([17, 1, 20], [17, 30, 12]), device, torch.float16)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run():
        out, lse = tw.attention_varlen(*leaves, *cu, causal=True, return_lse=True)
        return out, lse, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    if device.kind == "emulated":
        assert_schedules_agree(run)
    else:
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_opcheck():
    class Cpu:
        torch = torch.device("cpu")

    (q, k, v), cu = pack(([5, 4], [5, 8]), Cpu)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    ops, options = torch.ops.tilewise, pack_options("attention_varlen", q, None, causal=True)
    torch.library.opcheck(ops.attention_varlen.default, (*leaves, *cu, None, None, *options))
    out, lse = (t.detach() for t in ops.attention_varlen(*leaves, *cu, None, None, *options))
    leaves = [t.detach() for t in leaves]
    torch.library.opcheck(
        ops.attention_varlen_backward.default, (out, None, *leaves, *cu, out, lse, None, None, False, *options)
    )
