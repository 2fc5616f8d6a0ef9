"""Attention beside torch's scaled_dot_product_attention: forward, and forward with backward."""

from functools import partial

import torch
import torch.nn.functional as F

import tilewise as tw
from tilewise.bench.case import Case

# name, dtype, (batch, heads, key/value heads, length, head dim), causal, the ratio promised on one CPU thread:
# forward, forward + backward
_CPU = [
    ("fp32 causal 1K d64", torch.float32, (1, 8, 8, 1024, 64), True, 1.45, 1.6),
    ("fp32 causal 2K d64", torch.float32, (1, 4, 4, 2048, 64), True, 1.25, 1.6),
    ("fp32 causal 8K d64", torch.float32, (1, 1, 1, 8192, 64), True, 1.1, 1.6),
    ("fp32 dense 1K d64", torch.float32, (1, 8, 8, 1024, 64), False, 1.15, None),
    ("fp32 dense 1K d128", torch.float32, (1, 4, 4, 1024, 128), False, 1.05, None),
    ("fp32 causal 256 d64", torch.float32, (8, 4, 4, 256, 64), True, 1.45, 1.6),
    ("fp32 causal 2K d128", torch.float32, (1, 4, 4, 2048, 128), True, None, None),
    ("fp32 causal 2K d128 gqa", torch.float32, (1, 8, 2, 2048, 128), True, None, None),
    ("bf16 causal 1K d64", torch.bfloat16, (1, 8, 8, 1024, 64), True, 2.0, 1.8),
    ("bf16 dense 1K d64", torch.bfloat16, (1, 8, 8, 1024, 64), False, 1.75, None),
    ("fp16 causal 1K d64", torch.float16, (1, 8, 8, 1024, 64), True, None, None),
]
_CUDA = [
    (f"{name} {'causal' if causal else 'dense'} {length // 1024}K d{dim}", dtype, (batch, 16, 16, length, dim), causal)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    for batch, length in ((8, 2048), (2, 8192))
    for dim in (64, 128)
    for causal in (False, True)
]


def _pair(name, device, dtype, shape, causal, forward_target=None, backward_target=None):
    batch, heads, kv_heads, length, dim = shape
    q, dout = (torch.randn(batch, heads, length, dim, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(batch, kv_heads, length, dim, device=device, dtype=dtype) for _ in range(2))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    ours = lambda q, k, v: tw.attention(q, k, v, causal=causal)  # noqa: E731
    theirs = lambda q, k, v: F.scaled_dot_product_attention(  # noqa: E731
        q, k, v, is_causal=causal, enable_gqa=heads != kv_heads
    )
    flops = 4 * batch * heads * length * length * dim / (2 if causal else 1)
    tensors = 2 * q.nbytes + 2 * k.nbytes  # q, out, k and v once
    differentiate = lambda f: lambda: torch.autograd.grad(f(*leaves), leaves, dout)  # noqa: E731
    yield Case(name, lambda: ours(q, k, v), lambda: theirs(q, k, v), flops, tensors, forward_target)
    yield Case(f"{name} fwd+bwd", differentiate(ours), differentiate(theirs), 3.5 * flops, 4 * tensors, backward_target)


def _with_options(device):
    """Options beside torch's operator with the same as its attn_mask; what blocks leave out, beside all of it."""
    q, k, v = (torch.randn(1, 8, 1024, 64, device=device) for _ in range(3))
    mask = torch.rand(1024, 1024, device=device) < 0.8
    bias = torch.randn(8, 1024, 1024, device=device)
    flops, tensors = 4 * 8 * 1024**2 * 64, 4 * q.nbytes
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        given = [t.to(dtype) for t in (q, k, v)]
        ours, theirs = partial(tw.attention, *given), partial(F.scaled_dot_product_attention, *given)
        bytes = tensors * dtype.itemsize / 4
        yield Case(
            f"{name} mask 1K d64", partial(ours, mask=mask), partial(theirs, attn_mask=mask), flops, bytes, target=1.2
        )
        cast = bias.to(dtype)
        yield Case(
            f"{name} bias 1K d64",
            partial(ours, bias=cast),
            partial(theirs, attn_mask=cast[None]),
            flops,
            bytes + cast.nbytes,
            target=1.2,
        )


def _sparse(device, length=4096, heads=4, block=64):
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        q, k, v = (torch.randn(1, heads, length, 64, device=device, dtype=dtype) for _ in range(3))
        flops, tensors = 4 * heads * length**2 * 64, 4 * q.nbytes
        dense = partial(F.scaled_dot_product_attention, q, k, v)
        for percent in (10, 25, 50, 100):
            keep = torch.rand(1, heads, length // block, length // block, device=device) < percent / 100
            ours = partial(tw.attention, q, k, v, block_mask=tw.BlockMask(keep, block))
            yield Case(f"{name} {percent} % of blocks 4K / dense", ours, dense, flops * percent / 100, tensors)
        ours = partial(tw.attention, q, k, v, causal=True, window=(256, 0))
        causal = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        yield Case(f"{name} causal window 256 4K / causal", ours, causal, flops * 256 / length, tensors)


def _varlen(device, dtype=torch.float32, heads=8, dim=64):
    """Packed sequences of mixed lengths; torch pads them to the longest, which makes 57 % of its rows padding."""
    lengths = [1000, 40, 300, 700, 10, 500]
    batch, longest, total = len(lengths), max(lengths), sum(lengths)
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    q, k, v = (torch.randn(total, heads, dim, device=device, dtype=dtype) for _ in range(3))
    padded = [torch.zeros(batch, heads, longest, dim, device=device, dtype=dtype) for _ in range(3)]
    for tensor, packed in zip(padded, (q, k, v), strict=True):
        for b, rows in enumerate(packed.split(lengths)):
            tensor[b, :, : lengths[b]] = rows.transpose(0, 1)
    return Case(
        "fp32 packed, mixed lengths",
        lambda: tw.attention_varlen(q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True),
        lambda: F.scaled_dot_product_attention(*padded, is_causal=True),
        flops=2 * heads * dim * sum(n * n for n in lengths),
        bytes=4 * q.nbytes,
        target=2.5 if q.device.type == "cpu" else None,
    )


def _tiny(device):
    """The cost of a call: one query on eight keys into given memory, beside torch's out-variant of an addition."""
    q, k = torch.randn(1, 1, 1, 64, device=device), torch.randn(1, 1, 8, 64, device=device)
    out, lse = torch.empty_like(q), torch.empty(1, 1, 1, device=device)
    write = torch.ops.tilewise.attention_out.default
    return Case(
        "one query, out variant / add(out=)", lambda: write(q, k, k, out, lse), lambda: torch.add(q, q, out=out)
    )


def _few_queries(device, dtype, queries, heads=32, kv_heads=8, keys=4096, dim=128):
    """Some tokens behind contiguous keys and values."""
    q = torch.randn(1, heads, queries, dim, device=device).to(dtype)
    k, v = torch.randn(2, 1, kv_heads, keys, dim, device=device).to(dtype)
    return Case(
        f"{str(dtype)[6:]} {queries} queries {heads}/{kv_heads} heads d{dim} {keys} keys",
        lambda: tw.attention(q, k, v),
        lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        flops=4 * heads * queries * dim * keys,
        bytes=2 * k.nbytes,
    )


def _decode(device, dtype, heads, kv_heads, keys=8192, dim=128, page=16, target=None):
    """One token behind a cache in pages, beside torch, whose keys and values lie ready in its own layout."""
    pages = -(-keys // page)
    k_pages, v_pages = torch.randn(2, pages, page, kv_heads, dim, device=device).to(dtype)
    table = torch.randperm(pages, device=device)[None].int()
    lens = torch.tensor([keys], dtype=torch.int32, device=device)
    q = torch.randn(1, heads, 1, dim, device=device).to(dtype)
    gathered = (p.index_select(0, table[0]).flatten(0, 1)[:keys] for p in (k_pages, v_pages))
    k, v = (t.transpose(0, 1)[None].contiguous() for t in gathered)
    return Case(
        f"decode {str(dtype)[6:]} {heads}/{kv_heads} heads d{dim} {keys} keys",
        lambda: tw.paged_attention(q, k_pages, v_pages, table, lens),
        lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads),
        flops=4 * heads * dim * keys,
        bytes=2 * keys * kv_heads * dim * q.element_size(),
        target=target,
    )


def _decode_codes(device, format, heads, kv_heads, keys=8192, dim=128, page=16, target=None):
    """The same with a quantised cache, beside torch in bfloat16."""
    beside = _decode(device, torch.bfloat16, heads, kv_heads, keys, dim, page)
    pages = -(-keys // page)
    cache = tw.KVCache(pages, page, kv_heads, dim, format=format, device=device)
    table = torch.randperm(pages, device=device)[None].int()
    k, v = torch.randn(2, 1, kv_heads, keys, dim, device=device)
    cache.append(k, v, table, torch.zeros(1, dtype=torch.int32, device=device))
    lens = torch.tensor([keys], dtype=torch.int32, device=device)
    q = torch.randn(1, heads, 1, dim, device=device).bfloat16()
    return Case(
        f"decode {format} {heads}/{kv_heads} heads d{dim} {keys} keys (torch: bfloat16)",
        lambda: cache.attend(q, table, lens),
        beside.torch,
        flops=beside.flops,
        bytes=cache.nbytes,
        target=target,
    )


def cases(device: torch.device) -> list[Case]:
    rows = _CPU if device.type == "cpu" else _CUDA
    pairs = [case for name, *row in rows for case in _pair(name, device, *row)]
    options = [*_with_options(device), *_sparse(device)] if device.type == "cpu" else []
    decode = [
        _decode(device, torch.bfloat16, 32, 8, target=2.3),
        _decode(device, torch.bfloat16, 8, 8),
        _decode(device, torch.float32, 32, 8),
    ]
    if device.type == "cpu":
        decode += [
            _decode_codes(device, "int4", 32, 8, target=3.2),
            _decode_codes(device, "int4", 8, 8, target=2.2),
            *(_decode_codes(device, format, 32, 8) for format in ("int8", "int2", "bfp12")),
        ]
    few = [_few_queries(device, dtype, n) for dtype in (torch.float32, torch.bfloat16) for n in (1, 8)]
    return [*pairs, *options, _varlen(device), *few, *decode, _tiny(device)]
