"""tw.compat.flash_attn: each function against the reference, in that library's layouts."""

import inspect
import math

import pytest
import torch

from attention_cases import DTYPES, assert_lse_close, judge
from tilewise import packing
from tilewise.compat import flash_attn
from tilewise.reference import attention as reference

pytestmark = pytest.mark.devices("cpu", "cuda")

HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
# as the library takes them -> as the reference does
OPTIONS = {
    "plain": ({}, {}),
    "scaled": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "causal": ({"causal": True}, {"causal": True}),
    "unlimited": ({"window_size": (-1, -1), "causal": True}, {"causal": True}),
    "window": ({"window_size": (7, 3)}, {"window": (7, 3)}),
    "left": ({"window_size": (7, -1)}, {"window": (7, None)}),
    "right": ({"window_size": (-1, 0)}, {"window": (None, 0)}),
    "causal-window": ({"window_size": (7, 5), "causal": True}, {"window": (7, 0), "causal": True}),
    "softcap": ({"softcap": 2.0, "deterministic": True}, {"softcap": 2.0}),
}
DTYPED = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Every option once, and every dtype.
CASES = [(name, torch.float32) for name in (*OPTIONS, "alibi", "alibi-batched", "dropout")]
CASES += [("causal", torch.float16), ("window", torch.bfloat16)]
LENGTHS = ([17, 1, 0, 30], [25, 8, 3, 30])


def options_of(name, device, heads=4, batch=2):
    """(the library's, the reference's)."""
    if name == "dropout":
        torch.manual_seed(5)
        seed = int(torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device.torch))
        return {"dropout_p": 0.25}, {"dropout_p": 0.25, "dropout_seed": seed}
    if name.startswith("alibi"):
        slopes = torch.rand((heads,) if name == "alibi" else (batch, heads)).to(device.torch)
        return {"alibi_slopes": slopes, "causal": True}, {"alibi_slopes": slopes, "causal": True}
    return OPTIONS[name]


def tensors(device, dtype, queries=33, keys=41, heads=(4, 2), batch=2, dim=64):
    sizes = (queries, heads[0]), (keys, heads[1]), (keys, heads[1])
    return [torch.randn(batch, rows, of_heads, dim).to(device.torch, dtype) for rows, of_heads in sizes]


def transposed(*all_tensors):
    return [t.transpose(1, 2) for t in all_tensors]


def plain(**options):
    def run(q, k, v):
        out, lse = reference.attention(*transposed(q, k, v), **options)
        return out.transpose(1, 2), lse

    return run


def library(function, **options):
    """function's (out, lse), its random numbers repeatable."""

    def run(*args):
        torch.manual_seed(5)
        out, lse, probabilities = function(*args, **options, return_attn_probs=True)
        assert probabilities is None
        return out, lse

    return run


@pytest.mark.parametrize("name, dtype", CASES)
def test_func(device, name, dtype):
    ours, theirs = options_of(name, device)
    inputs = tensors(device, dtype)
    run = library(flash_attn.flash_attn_func, **ours)
    judge(run, plain(**theirs), inputs, torch.randn(inputs[0].shape).to(inputs[0]), dtype)
    torch.manual_seed(5)
    assert torch.equal(flash_attn.flash_attn_func(*inputs, **ours), run(*inputs)[0])


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads(device, heads):
    inputs = tensors(device, torch.float32, heads=heads)
    run = library(flash_attn.flash_attn_func, causal=True)
    judge(run, plain(causal=True), inputs, torch.randn_like(inputs[0]), torch.float32)


@pytest.mark.parametrize("name", ["causal", "window", "dropout"])
def test_packed_func(device, name):
    """qkv and kv in one tensor: the bits, and the gradients, of the three apart."""
    ours, _ = options_of(name, device)
    q, k, v = tensors(device, torch.float32, queries=33, keys=33, heads=(4, 4))
    dout = torch.randn_like(q)

    def outcome(function, *leaves):
        leaves = [t.clone().requires_grad_() for t in leaves]
        out, lse = library(function, **ours)(*leaves)
        return out, lse, *torch.autograd.grad(out, leaves, dout)

    out, lse, dq, dk, dv = outcome(flash_attn.flash_attn_func, q, k, v)
    got = outcome(flash_attn.flash_attn_qkvpacked_func, torch.stack([q, k, v], 2))
    for a, b in zip(got, (out, lse, torch.stack([dq, dk, dv], 2)), strict=True):
        assert torch.equal(a, b)
    got = outcome(flash_attn.flash_attn_kvpacked_func, q, torch.stack([k, v], 2))
    for a, b in zip(got, (out, lse, dq, torch.stack([dk, dv], 2)), strict=True):
        assert torch.equal(a, b)


def packed(device, dtype, heads=(4, 2), lengths=LENGTHS):
    shapes = (sum(lengths[0]), heads[0]), (sum(lengths[1]), heads[1]), (sum(lengths[1]), heads[1])
    cu = [packing.offsets(n, device.torch) for n in lengths]
    return [torch.randn(*shape, 64).to(device.torch, dtype) for shape in shapes], (*cu, *map(max, lengths))


@pytest.mark.parametrize("name, dtype", [case for case in CASES if case[0] in OPTIONS])
def test_varlen_func(device, name, dtype):
    ours, theirs = OPTIONS[name]
    inputs, sequences = packed(device, dtype)
    run = library(lambda q, k, v, **o: flash_attn.flash_attn_varlen_func(q, k, v, *sequences, **o), **ours)
    by_sequence = lambda q, k, v: reference.attention_varlen(q, k, v, *sequences[:2], **theirs)  # noqa: E731
    judge(run, by_sequence, inputs, torch.randn(inputs[0].shape).to(inputs[0]), dtype)
    assert run(*inputs)[1].shape == (4, sum(LENGTHS[0]))


@pytest.mark.parametrize("name", [*OPTIONS, "alibi-batched"])
def test_varlen_func_of_keys_in_use(device, name):
    """seqused_k: the bits, and the gradients, of a call without the keys that are not in use."""
    ours, _ = options_of(name, device, batch=4)
    (q, k, v), (cu_q, cu_k, *longest) = packed(device, torch.float32)
    used = [25, 5, 0, 18]
    kept = torch.cat([torch.arange(a, a + n) for a, n in zip(cu_k.tolist(), used, strict=False)]).to(device.torch)
    dout = torch.randn_like(q)

    def outcome(k, v, ends, **more):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        sequences = cu_q, ends, *longest
        out, lse, _ = flash_attn.flash_attn_varlen_func(*leaves, *sequences, return_attn_probs=True, **ours, **more)
        return out, lse, *torch.autograd.grad(out, leaves, dout)

    out, lse, dq, *of_keys = outcome(k, v, cu_k, seqused_k=torch.tensor(used, dtype=torch.int32, device=device.torch))
    expected = outcome(k[kept], v[kept], packing.offsets(used, device.torch))
    for got, right in zip((out, lse, dq, *(t[kept] for t in of_keys)), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)
    for gradient in of_keys:
        assert not gradient.index_fill(0, kept, 0).any() and gradient.any()


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("name", OPTIONS)
def test_varlen_func_in_pages(device, page_size, name):
    """block_table: what packed keys give, with lengths by cu_seqlens_k or seqused_k; nothing to differentiate."""
    (q, k, v), (cu_q, cu_k, *longest) = packed(device, torch.float32)
    per_row = -(-max(LENGTHS[1]) // page_size)
    table = torch.randperm(4 * per_row).view(4, -1).to(device.torch, torch.int32)
    rows = [packing.pad(t, LENGTHS[1], length=per_row * page_size, value=math.nan) for t in (k, v)]
    pools = [pages_of(t, table, page_size) for t in rows]
    options = OPTIONS[name][0] | {"return_attn_probs": True}
    expected = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, **options)
    options["block_table"] = table
    out, lse, _ = flash_attn.flash_attn_varlen_func(q.requires_grad_(), *pools, cu_q, cu_k, *longest, **options)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)
    assert not out.requires_grad and out.any()
    options["seqused_k"] = cu_k.diff()
    assert torch.equal(flash_attn.flash_attn_varlen_func(q, *pools, cu_q, None, *longest, **options)[0], out)


def test_packed_varlen_func(device):
    (q, k, v), (cu, _, longest, _) = packed(device, torch.float32, (4, 4), (LENGTHS[0], LENGTHS[0]))
    dout = torch.randn_like(q)

    def outcome(run, *leaves):
        leaves = [t.clone().requires_grad_() for t in leaves]
        out, lse, _ = run(*leaves, causal=True, return_attn_probs=True)
        return out, lse, *torch.autograd.grad(out, leaves, dout)

    ends = (cu, cu, longest, longest)
    out, lse, *grads = outcome(lambda *t, **o: flash_attn.flash_attn_varlen_func(*t, *ends, **o), q, k, v)
    qkv, kv = torch.stack([q, k, v], 1), torch.stack([k, v], 1)
    got = outcome(lambda t, **o: flash_attn.flash_attn_varlen_qkvpacked_func(t, cu, longest, **o), qkv)
    for a, b in zip(got, (out, lse, torch.stack(grads, 1)), strict=True):
        assert torch.equal(a, b)
    got = outcome(lambda *t, **o: flash_attn.flash_attn_varlen_kvpacked_func(*t, *ends, **o), q, kv)
    for a, b in zip(got, (out, lse, grads[0], torch.stack(grads[1:], 1)), strict=True):
        assert torch.equal(a, b)


def test_strided_inputs(device):
    """Any strides, also of the last dimension: the bits of contiguous tensors."""
    q, k, v = tensors(device, torch.float32)
    expected = flash_attn.flash_attn_func(q, k, v, causal=True)
    sliced = [torch.stack([t, t + 1], 3)[:, :, :, 0] for t in (q, k, v)]
    heads_before_rows = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    dims_first = [t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for t in (q, k, v)]
    for views in (sliced, heads_before_rows, dims_first):
        assert torch.equal(flash_attn.flash_attn_func(*views, causal=True), expected)
    (q, k, v), sequences = packed(device, torch.float32)
    dims_first = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (q, k, v)]
    got = flash_attn.flash_attn_varlen_func(*dims_first, *sequences)
    assert torch.equal(got, flash_attn.flash_attn_varlen_func(q, k, v, *sequences))


def rotated(x, places, cos, sin, interleaved):
    """x (B, S, H, D) as complex numbers times those of the tables' rows places (B, S)."""
    pairs = cos.shape[1]
    turning = x[..., : 2 * pairs].double()
    view = turning.unflatten(-1, (pairs, 2)) if interleaved else turning.unflatten(-1, (2, pairs)).transpose(-1, -2)
    angle = torch.complex(cos.double(), sin.double())[places][:, :, None]
    view = torch.view_as_real(torch.view_as_complex(view.contiguous()) * angle)
    view = view.flatten(-2) if interleaved else view.transpose(-1, -2).flatten(-2)
    return torch.cat([view.to(x), x[..., 2 * pairs :]], -1)


def cache_case(device, dtype, *, queries, new, rows=4, capacity=48, heads=(4, 2)):
    """q, both caches, k and v, and how much each of three sequences holds."""
    randn = lambda *shape: torch.randn(*shape, 64).to(device.torch, dtype)  # noqa: E731
    q, caches = randn(3, queries, heads[0]), [randn(rows, capacity, heads[1]) for _ in range(2)]
    added = [randn(3, new, heads[1]) for _ in range(2)] if new else [None, None]
    past = torch.tensor([20, 0, capacity - new], dtype=torch.int32, device=device.torch)
    return q, caches, added, past


def expected_of_cache(q, caches, added, past, rows, begin, theirs):
    """What the call should return and leave in the caches, sequence by sequence."""
    caches = [c.clone() for c in caches]
    outs, lses = [], []
    for b, (row, first, end) in enumerate(zip(rows, begin, past.tolist(), strict=True)):
        if added[0] is not None:
            for cache, t in zip(caches, added, strict=True):
                cache[row, end : end + t.shape[1]] = t[b]
            end += added[0].shape[1]
        options = dict(theirs)
        if "alibi_slopes" in options and options["alibi_slopes"].ndim == 2:
            options["alibi_slopes"] = options["alibi_slopes"][b : b + 1]
        seen = [c[row, first:end].transpose(0, 1)[None].double() for c in caches]
        out, lse = reference.attention(q[b].transpose(0, 1)[None].double(), *seen, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.stack(outs), torch.stack(lses), caches


TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check_cache(q, caches, added, past, dtype, theirs, *, rows=(0, 1, 2), begin=(0, 0, 0), turned=None, **ours):
    """``turned`` are q and k as the rotation should leave them."""
    turned_q, turned_k = turned or (q, added[0])
    expected = expected_of_cache(turned_q, caches, [turned_k, added[1]], past, rows, begin, theirs)
    out, lse = flash_attn.flash_attn_with_kvcache(q, *caches, *added, **ours, return_softmax_lse=True)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out.double(), expected[0], rtol=tolerance, atol=tolerance)
    assert out.norm() > 0 and out.dtype == dtype
    assert_lse_close(lse, expected[1])
    for cache, left in zip(caches, expected[2], strict=True):
        torch.testing.assert_close(cache, left, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    return out, lse


@pytest.mark.parametrize("queries, new", [(1, 1), (5, 5), (3, 0), (2, 4)])
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@DTYPED
def test_with_kvcache(device, dtype, queries, new, causal):
    case = cache_case(device, dtype, queries=queries, new=new)
    options = {"causal": causal}
    check_cache(*case, dtype, options, cache_seqlens=case[3], **options)


@pytest.mark.parametrize("name", [*OPTIONS, "alibi", "alibi-batched"])
def test_options_with_kvcache(device, name):
    ours, theirs = options_of(name, device, batch=3)
    ours = {n: value for n, value in ours.items() if n != "deterministic"}
    case = cache_case(device, torch.float32, queries=5, new=5)
    check_cache(*case, torch.float32, theirs, cache_seqlens=case[3], **ours)


def test_one_length_for_all(device):
    q, caches, added, _ = cache_case(device, torch.float32, queries=2, new=2)
    past = torch.full((3,), 9, dtype=torch.int32)
    check_cache(q, caches, added, past, torch.float32, {}, cache_seqlens=9)
    capacity = torch.full((3,), 48, dtype=torch.int32)
    check_cache(q, caches, [None, None], capacity, torch.float32, {})


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
def test_rows_and_leftpad(device, causal):
    q, caches, added, past = cache_case(device, torch.float32, queries=4, new=4)
    rows = torch.tensor([3, 0, 2], dtype=torch.int32, device=device.torch)
    leftpad = torch.tensor([7, 0, 30], dtype=torch.int32, device=device.torch)
    options = {"cache_seqlens": past, "cache_batch_idx": rows, "cache_leftpad": leftpad, "causal": causal}
    places = {"rows": rows.tolist(), "begin": leftpad.tolist()}
    check_cache(q, caches, added, past, torch.float32, {"causal": causal}, **options, **places)
    # Rows that two sequences share, read only.
    rows = torch.tensor([1, 1, 0], dtype=torch.int32, device=device.torch)
    options = {"cache_seqlens": past, "cache_batch_idx": rows, "causal": causal}
    check_cache(q, caches, [None, None], past, torch.float32, {"causal": causal}, **options, rows=rows.tolist())


def pages_of(cache, table, page_size):
    """The rows of a cache as pages in the order of a table, in a pool that has others."""
    pool = torch.randn(int(table.max()) + 2, page_size, *cache.shape[2:]).to(cache)
    pool[table.long()] = cache[: table.shape[0]].unflatten(1, (-1, page_size))
    return pool


@pytest.mark.parametrize("page_size", [4, 16, 48])
@pytest.mark.parametrize("name", ["plain", "causal", "window", "causal-window", "softcap"])
@pytest.mark.parametrize("queries", [1, 5])
def test_pages(device, page_size, name, queries):
    """The same cache in pages: what the rows give, and the new keys where the table says."""
    ours, _ = OPTIONS[name]
    ours = {n: value for n, value in ours.items() if n != "deterministic"}
    q, caches, added, past = cache_case(device, torch.float32, queries=queries, new=queries)
    table = torch.randperm(3 * 48 // page_size).view(3, -1).to(device.torch, torch.int32)
    pools = [pages_of(cache, table, page_size) for cache in caches]
    angles = torch.rand(48, 16) * 6
    options = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    options = {n: t.to(device.torch) for n, t in options.items()} | ours | {"return_softmax_lse": True}
    out, lse = flash_attn.flash_attn_with_kvcache(q, *caches, *added, cache_seqlens=past, **options)
    got = flash_attn.flash_attn_with_kvcache(q, *pools, *added, cache_seqlens=past, block_table=table, **options)
    torch.testing.assert_close(got[0], out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], lse, rtol=1e-5, atol=1e-5)
    for cache, pool in zip(caches, pools, strict=True):
        assert torch.equal(pool[table.long()].flatten(1, 2), cache[:3])


def test_num_splits(device):
    q, caches, _, past = cache_case(device, torch.float32, queries=1, new=0)
    expected = flash_attn.flash_attn_with_kvcache(q, *caches, cache_seqlens=past)
    for splits in (1, 3):
        got = flash_attn.flash_attn_with_kvcache(q, *caches, cache_seqlens=past, num_splits=splits)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("name", ["plain", "causal", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_rotary(device, dtype, name, interleaved):
    """Keys turn by their places; queries too where they are ordered, and by the first place where they are not."""
    ours, theirs = OPTIONS[name]
    q, caches, added, past = cache_case(device, dtype, queries=3, new=3)
    angles = torch.rand(50, 16) * 6
    tables = angles.cos().to(device.torch, dtype), angles.sin().to(device.torch, dtype)
    places = past.long()[:, None] + torch.arange(3, device=device.torch)
    places_q = places[:, :1].expand_as(places) if name == "plain" else places
    turned = (rotated(q, places_q, *tables, interleaved), rotated(added[0], places, *tables, interleaved))
    options = {"rotary_cos": tables[0], "rotary_sin": tables[1], "rotary_interleaved": interleaved}
    check_cache(q, caches, added, past, dtype, theirs, turned=turned, cache_seqlens=past, **options, **ours)


def test_strided_caches(device):
    """Caches that are views: of one buffer of both, and of every other head."""
    q, caches, added, past = cache_case(device, torch.float32, queries=2, new=2)
    both = torch.stack(caches, 2)
    views = [both[:, :, 0], both[:, :, 1]]
    check_cache(q, views, added, past, torch.float32, {"causal": True}, cache_seqlens=past, causal=True)
    assert torch.equal(views[0][0, 20:22], added[0][0]), "written through the view"


def test_decoding_is_prefill(device):
    """A prompt read token by token through the cache gives what one causal call gives."""
    q, k, v = tensors(device, torch.float32, queries=12, keys=12)
    caches = [torch.full((2, 16, 2, 64), math.nan, device=device.torch) for _ in range(2)]
    steps = [
        flash_attn.flash_attn_with_kvcache(q[:, i : i + 1], *caches, k[:, i : i + 1], v[:, i : i + 1], cache_seqlens=i)
        for i in range(12)
    ]
    expected = flash_attn.flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_through_the_cache(device):
    q, caches, _, past = cache_case(device, torch.float32, queries=1, new=0)
    assert not flash_attn.flash_attn_with_kvcache(q.requires_grad_(), *caches, cache_seqlens=past).requires_grad


# The argument lists that callers rely on: order and defaults.
OF_ALL = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 alibi_slopes=None "
OF_ALL += "deterministic=False return_attn_probs=False"
SEQUENCES = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q k v {OF_ALL}",
    "flash_attn_qkvpacked_func": f"qkv {OF_ALL}",
    "flash_attn_kvpacked_func": f"q kv {OF_ALL}",
    "flash_attn_varlen_func": f"q k v {SEQUENCES} {OF_ALL} block_table=None seqused_k=None",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {OF_ALL}",
    "flash_attn_varlen_kvpacked_func": f"q kv {SEQUENCES} {OF_ALL}",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
    "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1, -1) "
    "softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    found = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert " ".join(str(p) for p in found) == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found)


def test_every_name_is_tested():
    assert set(flash_attn.__all__) == set(SIGNATURES)


Q, K = torch.zeros(2, 3, 4, 64), torch.zeros(2, 9, 2, 64)
N, TABLE = torch.zeros(2, 3, 2, 64), torch.zeros(9, 8)
CU = torch.tensor([0, 3], dtype=torch.int32)


def with_cache(**changes):
    given = {"q": Q, "k_cache": K.clone(), "v_cache": K.clone(), "k": N, "v": N, "cache_seqlens": 2} | changes
    return lambda: flash_attn.flash_attn_with_kvcache(**given)


def with_pages(**changes):
    given = {"q": Q[0], "k": K, "v": K, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 3, "max_seqlen_k": 9}
    given |= {"block_table": CU[:1, None]} | changes
    return lambda: flash_attn.flash_attn_varlen_func(**given)


BAD = {
    "list": (TypeError, "flash_attn_func: q is a list", lambda: flash_attn.flash_attn_func([1], K, K)),
    "dims": (ValueError, "flash_attn_func: k has 3 dim", lambda: flash_attn.flash_attn_func(Q, K[0], K)),
    "heads": (ValueError, "v has 1 heads", lambda: flash_attn.flash_attn_func(Q, K, K[:, :, :1])),
    "dtype": (TypeError, "attention: k", lambda: flash_attn.flash_attn_func(Q, K.half(), K)),
    "dropout": (ValueError, "dropout_p is 1", lambda: flash_attn.flash_attn_func(Q, K, K, 1.0)),
    "qkv": (
        ValueError,
        "qkv has size 2 in dimension 2",
        lambda: flash_attn.flash_attn_qkvpacked_func(Q[:, :, None].repeat(1, 1, 2, 1, 1)),
    ),
    "kv": (ValueError, "kv has 4 dim", lambda: flash_attn.flash_attn_kvpacked_func(Q, K)),
    "varlen-dims": (ValueError, "q has 4 dim", lambda: flash_attn.flash_attn_varlen_func(Q, K, K, CU, CU, 3, 3)),
    "varlen-packed-beside-table": (ValueError, "k has 3 dim", with_pages(k=K[0], v=K[0])),
    "varlen-alibi-beside-table": (
        NotImplementedError,
        "alibi_slopes is given, expected None beside a block_table",
        with_pages(alibi_slopes=torch.ones(4)),
    ),
    "varlen-dropout-beside-table": (NotImplementedError, "dropout_p is given", with_pages(dropout_p=0.5)),
    "varlen-no-lengths": (ValueError, "cu_seqlens_k and seqused_k are None", with_pages(cu_seqlens_k=None)),
    "varlen-table-too-short": (ValueError, "seq_lens of sequence 0 is 10", with_pages(cu_seqlens_k=CU // 3 * 10)),
    "varlen-no-keys": (
        ValueError,
        "cu_seqlens_k is None",
        lambda: flash_attn.flash_attn_varlen_func(Q[0], N[0], N[0], CU, None, 3, 3),
    ),
    "varlen-used": (
        ValueError,
        "seqused_k has shape .2,.",
        lambda: flash_attn.flash_attn_varlen_func(Q[0], N[0], N[0], CU, CU, 3, 3, seqused_k=CU),
    ),
    "varlen-used-beyond": (
        ValueError,
        "cu_seqlens_k",
        lambda: flash_attn.flash_attn_varlen_func(Q[0], N[0], N[0], CU, CU, 3, 3, seqused_k=CU[1:] + 1),
    ),
    "varlen-used-negative": (
        ValueError,
        "seqused_k has .-1.",
        lambda: flash_attn.flash_attn_varlen_func(Q[0], N[0], N[0], CU, CU, 3, 3, seqused_k=CU[:1] - 1),
    ),
    "alone": (ValueError, "v is None, expected a tensor beside k", with_cache(v=None)),
    "cos-alone": (ValueError, "rotary_sin is None", with_cache(rotary_cos=TABLE)),
    "cos-without-k": (ValueError, "k is None", with_cache(k=None, v=None, rotary_cos=TABLE, rotary_sin=TABLE)),
    "cos-short": (ValueError, "rotary_cos has shape .8, 8.", with_cache(rotary_cos=TABLE[1:], rotary_sin=TABLE[1:])),
    "sin-other": (ValueError, "rotary_sin has shape .9, 7.", with_cache(rotary_cos=TABLE, rotary_sin=TABLE[:, 1:])),
    "no-lengths": (ValueError, "cache_seqlens is None", with_cache(cache_seqlens=None)),
    "too-long": (ValueError, "length 10, expected at most 9", with_cache(cache_seqlens=7)),
    "negative": (ValueError, "cache_leftpad has", with_cache(cache_seqlens=-4)),
    "lengths": (ValueError, "cache_seqlens has shape", with_cache(cache_seqlens=CU[:1])),
    "lengths-dtype": (TypeError, "cache_seqlens is torch.float32", with_cache(cache_seqlens=torch.zeros(2))),
    "rows": (ValueError, "cache_batch_idx has .0, 3.", with_cache(cache_batch_idx=CU)),
    "few-rows": (ValueError, "k_cache has 1 rows", with_cache(k_cache=K[:1], v_cache=K[:1])),
    "leftpad": (ValueError, "cache_leftpad has .0, 6.", with_cache(cache_leftpad=2 * CU)),
    "table-dims": (ValueError, "block_table has 1 dim", with_cache(block_table=CU)),
    "table-rows": (ValueError, "cache_batch_idx is given", with_cache(block_table=CU[:, None], cache_batch_idx=CU)),
    "table-leftpad": (
        NotImplementedError,
        "cache_leftpad is given, expected None beside a block_table",
        with_cache(block_table=CU[:, None], cache_leftpad=CU),
    ),
    "table-pages": (ValueError, "block_table|page", with_cache(block_table=CU[:, None])),
    "cache-dtype": (TypeError, "k", with_cache(k_cache=K.half(), v_cache=K.half())),
}


@pytest.mark.parametrize("error, message, call", BAD.values(), ids=BAD)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_written_before_an_error():
    cache = torch.zeros(2, 9, 2, 64)
    with pytest.raises(ValueError, match="length 10"):
        flash_attn.flash_attn_with_kvcache(Q, cache, cache.clone(), N + 1, N + 1, cache_seqlens=7)
    assert (cache == 0).all()


@pytest.mark.parametrize("batch, queries", [(0, 3), (2, 0)])
def test_empty(device, batch, queries):
    inputs = tensors(device, torch.float32, batch=batch, queries=queries)
    assert flash_attn.flash_attn_func(*inputs).shape == (batch, queries, 4, 64)
    out, lse = flash_attn.flash_attn_with_kvcache(*inputs, cache_seqlens=3, return_softmax_lse=True)
    assert out.shape == (batch, queries, 4, 64) and lse.shape == (batch, 4, queries)
