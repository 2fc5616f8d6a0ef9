"""Mixed-precision caches: which tokens are kept how, and attention to them."""

from unittest import mock

import pytest
import torch

import tilewise as tw
from tilewise.reference import attention as reference
from tilewise.reference import kv_cache

B, HQ, HKV, D = 2, 4, 2, 64


def prompt(device, tokens, dtype=torch.float32):
    q = torch.randn(B, HQ, tokens, D).to(device.torch, dtype)
    k, v = (torch.randn(B, HKV, tokens, D).to(device.torch, dtype) for _ in range(2))
    k[:, :, ::7] *= 2.5  # some keys that matter
    return q, k, v


def held(cache, b):
    """The keys and values that the cache stands for of sequence b, dequantised in float64, salient ones first."""
    keys, values = [], []
    for counts, part in cache._parts():
        for to, pages, channels in ((keys, part.k_pages, part.k_channels), (values, part.v_pages, part.v_channels)):
            rows = pages[cache._table(part)[b].long()].flatten(0, 1)[: counts[b]].transpose(0, 1)
            to.append(kv_cache.dequantize(rows.cpu(), part.format, D, channels.cpu()[:, None]))
    return torch.cat(keys, 1), torch.cat(values, 1)


@pytest.mark.parametrize("lengths", [[40, 40], [40, 13], [5, 40], [40, 0]], ids=str)
def test_decode_attends_to_what_is_held(device, lengths):
    """Prompts of any lengths: what stands behind them is not looked at, and new tokens follow each prompt."""
    tokens, new = 40, 9
    q, k, v = prompt(device, tokens + new)
    prompts = [t[:, :, :tokens].clone() for t in (q, k, v)]
    for t in prompts:
        for b, n in enumerate(lengths):
            t[b, :, n:] = torch.nan
    cache = tw.ZipCache(B, 64, HKV, D, salient=0.3, interval=100, page_size=16)
    out = cache.prefill(*prompts, lengths=lengths)
    salient = [round(0.3 * n) for n in lengths]
    assert cache.counts == [salient, [n - m for n, m in zip(lengths, salient, strict=True)]]
    assert cache.lengths == lengths and len(cache) == tokens
    before = [held(cache, b) for b in range(B)]
    steps = [cache.decode(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(tokens, tokens + new)]
    for b, n in enumerate(lengths):
        own = [t[b : b + 1, :, :n] for t in (q, k, v)]
        torch.testing.assert_close(out[b : b + 1, :, :n], tw.attention(*own, causal=True), rtol=1e-5, atol=1e-5)
        assert not out[b, :, n:].any()
        new_rows = [t[b, :, tokens:].cpu().double() for t in (q, k, v)]
        seen = [torch.cat([old, t], 1)[None] for old, t in zip(before[b], new_rows[1:], strict=True)]
        expected, _ = reference.attention(new_rows[0][None], *seen, causal=True)
        got = torch.cat(steps, 2)[b : b + 1].cpu().double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert cache.lengths == [n + new for n in lengths]


def test_lengths_are_those_of_sequences_alone(device):
    """A batch of two prompts, through intervals of compression: the outputs and sizes of two batches of one."""
    q, k, v = prompt(device, 64)
    lengths, options = (
        [32, 19],
        {"salient": 0.4, "probes": 0.0, "interval": 4, "page_size": 8, "formats": ("int8", "int4")},
    )

    def run(members):
        cache = tw.ZipCache(len(members), 96, HKV, D, **options)
        cache._probe_rows = lambda rows, device: torch.arange(rows, device=device)
        channels = {"k_channels": torch.ones(HKV, D), "v_channels": torch.ones(HKV, D)}  # a batch has them in common
        with mock.patch.object(tw.KVCache, "channels", lambda x: channels["k_channels"].to(device.torch)):
            longest = max(lengths[b] for b in members)
            outs = [cache.prefill(*(t[members, :, :longest] for t in (q, k, v)), lengths=[lengths[b] for b in members])]
            outs += [cache.decode(*(t[members, :, i : i + 1] for t in (q, k, v))) for i in range(32, 45)]
        return outs, cache

    together, cache = run([0, 1])
    sizes = 0
    for b, n in enumerate(lengths):
        alone, own = run([b])
        torch.testing.assert_close(together[0][b, :, :n], alone[0][0, :, :n], rtol=1e-5, atol=1e-5)
        for got, expected in zip(together[1:], alone[1:], strict=True):
            torch.testing.assert_close(got[b], expected[0], rtol=1e-4, atol=1e-4)
        assert [of[b] for of in cache.counts] == [of[0] for of in own.counts]
        sizes += own.nbytes
    assert cache.nbytes == sizes


def test_salient_tokens_by_definition(device):
    """All rows as probes: the tokens with the largest normalised column sums go to the first cache, in order."""
    q, k, v = prompt(device, 30)
    cache = tw.ZipCache(B, 32, HKV, D, salient=0.5, probes=1.0, page_size=8, formats=("fp32", "int8"))
    cache._probe_rows = lambda rows, device: torch.arange(rows, device=device)
    cache.prefill(q, k, v)
    group = k.cpu().double().repeat_interleave(2, 1)
    scores = q.cpu().double() @ group.transpose(-1, -2) / D**0.5
    weights = scores.masked_fill(torch.ones(30, 30).triu(1).bool(), -torch.inf).softmax(-1)
    saliency = (weights.sum(2) / torch.arange(30, 0, -1)).mean(1)
    for b in range(B):
        tokens = saliency[b].topk(15).indices.sort().values
        kept = cache.caches[0].k_pages[cache._table(cache.caches[0])[b].long()].flatten(0, 1)[:15].transpose(0, 1)
        assert torch.equal(kept.cpu(), k[b].cpu()[:, tokens])


def test_more_bits_less_error(device):
    """Compression every interval; the error falls with the share of salient tokens, and so does what is saved."""
    q, k, v = prompt(device, 96)
    exact = tw.attention(q, k, v, causal=True)[:, :, 64:]
    errors, sizes = [], []
    for salient in (0.0, 0.5, 1.0):
        cache = tw.ZipCache(B, 128, HKV, D, salient=salient, formats=("int8", "int2"), interval=8, page_size=8)
        cache.prefill(q[:, :, :64], k[:, :, :64], v[:, :, :64])
        out = torch.cat([cache.decode(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(64, 96)], 2)
        assert len(cache) == 96 and [sum(of) for of in zip(*cache.counts, strict=True)] == [96] * B
        errors.append(float((out - exact).norm() / exact.norm()))
        sizes.append(cache.nbytes)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.03 and errors[0] < 1
    assert sizes[0] < sizes[1] < sizes[2] < k.nbytes + v.nbytes


def test_errors():
    class Cpu:
        torch = torch.device("cpu")

    q, k, v = prompt(Cpu, 10)
    for run, message in (
        (lambda: tw.ZipCache(B, 8, HKV, D, salient=1.5), "salient is 1.5, expected 0 to 1"),
        (lambda: tw.ZipCache(B, 8, HKV, D).prefill(q, k, v), "0 [+] 10 tokens, expected at most 8"),
        (lambda: tw.ZipCache(B, 16, 1, D).prefill(q, k, v), "k has shape"),
        (lambda: tw.ZipCache(B, 16, HKV, D, formats=("int5", "int2")).prefill(q, k, v), "format is 'int5'"),
        (lambda: tw.ZipCache(B, 16, HKV, D).prefill(q, k, v, lengths=[3]), "lengths is .3., expected 2 of at most 10"),
        (lambda: tw.ZipCache(B, 16, HKV, D).prefill(q, k, v, lengths=[3, 11]), "expected 2 of at most 10"),
        (lambda: tw.ZipCache(B, 16, HKV, D).prefill(q, k, v, lengths=[3, -1]), "lengths has -1"),
    ):
        with pytest.raises(ValueError, match=message):
            run()
