"""Packed queries of different numbers over paged caches: against float64 and against one sequence at a time; errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise as tw
from attention_cases import DTYPES, assert_lse_close
from harness.emulation import assert_schedules_agree
from harness.judge import assert_accurate, draws, yardsticks
from test_attention_cache import dequantized, filled
from test_speculative import ints, on, paged
from tilewise.packing import offsets
from tilewise.reference import attention as reference

i32 = torch.int32
OPTIONS = {
    "causal": {},
    "all": {"causal": False},
    "scale": {"scale": -0.3},
    "window": {"window": (17, None)},
    "both-sides": {"causal": False, "window": (9, 3)},
    "left": {"causal": False, "window": (9, None)},
    "right": {"causal": False, "window": (None, 0)},
    "softcap": {"softcap": 1.5},
    "splits": {"num_splits": 3},
}
QUERIES, KEYS = [5, 1, 0, 41, 1, 20], [20, 9, 3, 60, 0, 12]


def case(queries, keys, heads, kv_heads, dim, page_size, dtype, behind=2):
    """Strided queries, some of them nobody's, and pages in random order."""
    pages, table = paged(len(keys), max(*keys, 1), page_size, kv_heads, dim, dtype)
    q = torch.randn(heads, sum(queries) + behind, dim).to(dtype).transpose(0, 1)
    return q, pages, table, offsets(queries), ints(keys)


def attend(device, q, pages, *rest, **options):
    q, pages, *rest = on(device, (q, pages, *rest))
    return tw.paged_attention_varlen(q, pages[0], pages[1], *rest, **options)


def plain(table, cu, lens, options):
    """Sequence by sequence."""
    options = {name: value for name, value in options.items() if name != "num_splits"}

    def run(q, pages):
        out, lse = torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), -math.inf)
        for b, (start, end) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
            own = q[start:end].transpose(0, 1)[None], *pages, table[b : b + 1], lens[b : b + 1]
            of_sequence = reference.paged_attention(*own, **options)
            out[start:end], lse[:, start:end] = of_sequence[0][0].transpose(0, 1), of_sequence[1][0]
        return out, lse

    return run


def check(device, q, pages, table, cu, lens, **options):
    out, lse = attend(device, q, pages, table, cu, lens, return_lse=True, **options)
    run = plain(table, cu, lens, options)
    rulers = yardsticks([lambda q, pages: run(q, pages)[:1]], [q, pages], draws(8 * lse.numel()))
    assert_accurate("out", out, *rulers, 2)
    exact_lse = run(q.double(), pages.double())[1]
    assert_lse_close(lse, exact_lse)
    assert not out.cpu().transpose(0, 1)[exact_lse == -math.inf].any()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_options(device, dtype, options):
    check(device, *case(QUERIES, KEYS, 4, 2, 64, 16, dtype), **options)


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (6, 2), (8, 1)])
@pytest.mark.modes
def test_heads(device, heads, kv_heads):
    check(device, *case([3, 1, 30], [9, 20, 31], heads, kv_heads, 40, 7, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_chunks_of_long_prompts(device, dtype):
    """More queries than a chunk has, in front of, between and behind single ones."""
    queries, keys = ([1, 130, 1, 70], [50, 130, 9, 90]) if device.kind != "emulated" else ([1, 70], [9, 80])
    check(device, *case(queries, keys, 2, 2, 64, 16, dtype, behind=0))
    check(device, *case(queries, keys, 2, 2, 64, 16, dtype), window=(33, None))


@pytest.mark.parametrize("queries", [[1, 1, 1], [4, 4, 4], [0, 0, 0]], ids=str)
def test_equal_numbers_are_paged_attention(device, queries):
    q, pages, table, cu, lens = case(queries, [9, 30, 2], 4, 2, 64, 8, torch.float32, behind=0)
    out, lse = attend(device, q, pages, table, cu, lens, return_lse=True)
    rows, pages, table, lens = on(device, (q.unflatten(0, (3, -1)).transpose(1, 2), pages, table, lens))
    expected, expected_lse = tw.paged_attention(rows, pages[0], pages[1], table, lens, return_lse=True)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(0, 1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.transpose(0, 1).flatten(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("format", ["int8", "int4", "int2", "bfp12"])
@pytest.mark.devices("cpu", "emulated")
def test_codes(device, format):
    cache, table, _, _ = filled(format, 3, 2, 40, 64)
    queries, lens = [1, 9, 3], ints([40, 21, 33])
    q = torch.randn(sum(queries), 4, 64)
    out = cache.attend_varlen(q, table, offsets(queries), lens)
    k, v = dequantized(cache, table, 40)
    for b, rows in enumerate(out.split(queries)):
        own = q.split(queries)[b].transpose(0, 1)[None].double()
        exact, _ = reference.attention(own, k[b : b + 1, :, : lens[b]], v[b : b + 1, :, : lens[b]], causal=True)
        torch.testing.assert_close(rows.double(), exact[0].transpose(0, 1), atol=3e-5, rtol=1e-4)


def test_what_stands_behind_is_not_read(device):
    """NaN behind every sequence, in the queries of nobody, and in the pages of nobody."""
    q, pages, table, cu, lens = case(QUERIES, KEYS, 2, 1, 64, 8, torch.float32)
    expected, expected_lse = attend(device, q, pages, table, cu, lens, return_lse=True)
    q[sum(QUERIES) :] = math.nan
    own = torch.zeros(pages.shape[1:3], dtype=torch.bool)
    for b, length in enumerate(KEYS):
        at = torch.arange(length)
        own[table[b, at // 8].long(), at % 8] = True
    pages[:, ~own] = math.nan
    out, lse = attend(device, q, pages, table, cu, lens, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_bound_on_the_longest(device):
    inputs = case(QUERIES, KEYS, 2, 1, 64, 8, torch.float32)
    for options in ({}, {"causal": False, "window": (9, 3)}):
        out = attend(device, *inputs, max_seqlen_q=max(QUERIES), **options)
        torch.testing.assert_close(attend(device, *inputs, max_seqlen_q=50, **options), out, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("empty", ["batch", "tokens", "heads"])
def test_empty(device, empty):
    q = torch.randn(0 if empty == "tokens" else 3, 0 if empty == "heads" else 4, 64)
    batch = 0 if empty == "batch" else 2
    rest = torch.zeros(batch, 2, dtype=i32), torch.zeros(batch + 1, dtype=i32), torch.ones(batch, dtype=i32)
    out, lse = attend(device, q, torch.randn(2, 5, 4, 2, 64), *rest, return_lse=True)
    assert out.shape == q.shape and lse.shape == (q.shape[1], q.shape[0])
    assert not out.any() and (lse == -math.inf).all()


@pytest.mark.devices("emulated")
@pytest.mark.modes
def test_schedules(device):
    inputs = case([3, 1, 20], [9, 40, 30], 2, 1, 64, 16, torch.bfloat16)
    assert_schedules_agree(lambda: attend(device, *inputs, num_splits=2, return_lse=True), 4)


@pytest.mark.devices("cpu")
def test_registered(device):
    q, pages, *rest = case([3, 1], [9, 5], 2, 1, 64, 8, torch.float32)
    args = (q, pages[0], pages[1], *rest, 3, True, None, 5, None, 0.0, None, 0, None, None)
    torch.library.opcheck(torch.ops.tilewise.paged_attention_varlen.default, args)


ERRORS = {
    "q 4-d": (lambda a: {"q": a["q"][None]}, ValueError, "q has shape"),
    "q dtype": (lambda a: {"q": a["q"].double()}, TypeError, "q"),
    "q heads": (lambda a: {"q": a["q"][:, :3]}, ValueError, "q has 3 heads"),
    "q no tensor": (lambda a: {"q": 3}, TypeError, "q is a int"),
    "pages differ": (lambda a: {"v_pages": a["v_pages"][:2]}, ValueError, "v_pages"),
    "table batch": (lambda a: {"block_table": a["block_table"][:1]}, ValueError, "block_table"),
    "page beyond pool": (lambda a: {"block_table": a["block_table"] + 50}, ValueError, "block_table.*expected 0"),
    "lens dtype": (lambda a: {"seq_lens": a["seq_lens"].long()}, TypeError, "seq_lens"),
    "lens negative": (lambda a: {"seq_lens": a["seq_lens"] - 100}, ValueError, "seq_lens.*expected at least 0"),
    "lens too long": (lambda a: {"seq_lens": a["seq_lens"] + 100}, ValueError, "seq_lens.*block_table"),
    "cu dtype": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].long()}, TypeError, "cu_seqlens_q has dtype"),
    "cu batch": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"][1:]}, ValueError, "cu_seqlens_q has shape .2,."),
    "cu from 1": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"] + 1}, ValueError, "cu_seqlens_q is .1, "),
    "cu decreases": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].flip(0)}, ValueError, "cu_seqlens_q is"),
    "cu overruns": (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"] * 3}, ValueError, "expected from 0 to at most 6"),
    "longest": (lambda a: {"max_seqlen_q": 2}, ValueError, "max_seqlen_q is 2, expected at least 3"),
    "longest negative": (lambda a: {"max_seqlen_q": -1}, ValueError, "max_seqlen_q is -1"),
    "window": (lambda a: {"window": (-1, None)}, ValueError, "window"),
    "num_splits": (lambda a: {"num_splits": 0}, ValueError, "num_splits is 0"),
}


@pytest.mark.parametrize("change,kind,message", ERRORS.values(), ids=ERRORS)
def test_errors(change, kind, message):
    names = ("q", "k_pages", "v_pages", "block_table", "cu_seqlens_q", "seq_lens")
    q, pages, *rest = case([3, 1], [9, 5], 4, 2, 64, 8, torch.float32)
    args = dict(zip(names, (q, *pages, *rest), strict=True))
    args.update(change(args))
    with pytest.raises(kind, match=f"paged_attention.*: .*{message}"):
        tw.paged_attention_varlen(*[args.pop(name) for name in names], **args)


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_any_input(data):
    """A listed error or the right result, and the inputs stay as they are."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    odd = lambda usual, strange: strange if draw(0, 29) == 0 else usual  # noqa: E731
    batch, kv_heads, group, dim, page, per_row = draw(0, 3), draw(1, 2), draw(1, 2), draw(1, 9), draw(1, 3), draw(0, 3)
    queries = [data.draw(st.sampled_from([0, 1, 1, 2, 70])) for _ in range(batch)]
    pages = torch.randn(2, 4, page, kv_heads, dim)
    table = torch.randint(0, odd(4, 9), (batch, per_row), dtype=i32)
    lens = torch.randint(odd(0, -2), odd(per_row * page, 12) + 1, (batch,), dtype=i32)
    cu = offsets(queries) + odd(0, 1)
    q = torch.randn(max(0, sum(queries) + draw(0, 1) - odd(0, 1)), odd(kv_heads * group, 3), odd(dim, 5))
    window = data.draw(st.sampled_from([None, (1, None), (None, 0), (2, 1), (None, -1)]))
    options = {"causal": data.draw(st.booleans()), "window": window}
    longest = data.draw(st.sampled_from([None, None, 70, 1]))
    before = [t.clone() for t in (q, pages, table, cu, lens)]
    try:
        out, lse = tw.paged_attention_varlen(
            q, pages[0], pages[1], table, cu, lens, max_seqlen_q=longest, return_lse=True, **options
        )
    except (ValueError, TypeError):
        out = None
    assert all(torch.equal(a, b) for a, b in zip(before, (q, pages, table, cu, lens), strict=True))
    if out is not None:
        exact, exact_lse = plain(table.clamp(0, 3), cu, lens, options)(q.double(), pages.double())
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
