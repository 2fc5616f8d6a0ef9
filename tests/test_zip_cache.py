"""Mixed-precision caches: which tokens are kept how, and attention to them."""

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


def held(cache):
    """The keys and values that the cache stands for, dequantised in float64, salient ones first."""
    keys, values = [], []
    for count, part in cache._parts():
        for to, pages, channels in ((keys, part.k_pages, part.k_channels), (values, part.v_pages, part.v_channels)):
            rows = pages[cache._table(part).long()].flatten(1, 2)[:, :count].transpose(1, 2)
            to.append(kv_cache.dequantize(rows.cpu(), part.format, D, channels.cpu()[:, None]))
    return torch.cat(keys, 2), torch.cat(values, 2)


def test_decode_attends_to_what_is_held(device):
    tokens, new = 40, 9
    q, k, v = prompt(device, tokens + new)
    cache = tw.ZipCache(B, 64, HKV, D, salient=0.3, interval=100, page_size=16)
    out = cache.prefill(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens])
    torch.testing.assert_close(out, tw.attention(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens], causal=True))
    assert cache.counts == [12, 28] and len(cache) == tokens
    keys, values = held(cache)
    steps = [cache.decode(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(tokens, tokens + new)]
    together = [torch.cat([old, t[:, :, tokens:].cpu().double()], 2) for old, t in ((keys, k), (values, v))]
    expected, _ = reference.attention(q[:, :, tokens:].cpu().double(), *together, causal=True)
    torch.testing.assert_close(torch.cat(steps, 2).cpu().double(), expected, rtol=1e-4, atol=1e-4)
    assert len(cache) == tokens + new


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
        assert len(cache) == 96 and sum(cache.counts) == 96
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
    ):
        with pytest.raises(ValueError, match=message):
            run()
