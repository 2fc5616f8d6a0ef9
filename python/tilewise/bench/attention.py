"""Attention beside torch's scaled_dot_product_attention: forward, and forward with backward."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tilewise as tw
from tilewise.bench import attention_parts
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
    ("fp16 causal 2K d128", torch.float16, (1, 4, 4, 2048, 128), True, None, None),
    ("fp16 dense 1K d128", torch.float16, (1, 4, 4, 1024, 128), False, None, None),
]
_CUDA = [
    (f"{name} {'causal' if causal else 'dense'} {length // 1024}K d{dim}", dtype, (batch, 16, 16, length, dim), causal)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    for batch, length in ((8, 2048), (2, 8192))
    for dim in (64, 128)
    for causal in (False, True)
]
_GQA = ("bf16 causal 8K d128 gqa", torch.bfloat16, (2, 32, 8, 8192, 128), True)


def _torch_attention(backend=None, **options):
    """torch's operator; ``backend`` keeps it to one of its implementations."""
    run = partial(F.scaled_dot_product_attention, **options)
    if backend is None:
        return run

    def only(*tensors):
        with sdpa_kernel(backend):
            return run(*tensors)

    return only


def _pair(name, device, dtype, shape, causal, forward_target=None, backward_target=None, backend=None):
    """Forward, and forward with backward."""
    batch, heads, kv_heads, length, dim = shape
    ours = lambda q, k, v: tw.attention(q, k, v, causal=causal)  # noqa: E731
    theirs = _torch_attention(backend, is_causal=causal, enable_gqa=heads != kv_heads)

    def tensors():
        make = lambda heads: torch.randn(batch, heads, length, dim, device=device, dtype=dtype)  # noqa: E731
        return [make(n) for n in (heads, kv_heads, kv_heads, heads)]

    def forward():
        qkv = tensors()[:3]
        return lambda: ours(*qkv), lambda: theirs(*qkv)

    def both():
        *qkv, dout = tensors()
        leaves = [t.requires_grad_() for t in qkv]
        differentiate = lambda f: lambda: torch.autograd.grad(f(*leaves), leaves, dout)  # noqa: E731
        return differentiate(ours), differentiate(theirs)

    flops = 4 * batch * heads * length * length * dim / (2 if causal else 1)
    least = 2 * batch * (heads + kv_heads) * length * dim * dtype.itemsize  # q, out, k and v once
    yield Case(name, None, None, flops, least, forward_target, dtype, forward)
    yield Case(f"{name} fwd+bwd", None, None, 3.5 * flops, 4 * least, backward_target, dtype, both)


def _with_options(device, dtypes, batch=1, length=1024, heads=8):
    """Options beside torch's operator with the same as its attn_mask."""
    for dtype in dtypes:
        given = partial(_heads, device, dtype, batch, heads, length, count=3)

        def masked(given=given):
            qkv, mask = given(), torch.rand(length, length, device=device) < 0.8
            return partial(tw.attention, *qkv, mask=mask), partial(_torch_attention(), *qkv, attn_mask=mask)

        def biased(given=given, dtype=dtype):
            qkv, bias = given(), torch.randn(heads, length, length, device=device).to(dtype)
            return partial(tw.attention, *qkv, bias=bias), partial(_torch_attention(), *qkv, attn_mask=bias[None])

        work = {"flops": 4 * batch * heads * length**2 * 64, "target": 1.2, "dtype": dtype}
        least, size = 4 * batch * heads * length * 64 * dtype.itemsize, f"{length // 1024}K d64"
        name = _SHORT[dtype]
        yield Case(f"{name} mask {size}", bytes=least, prepare=masked, **work)
        yield Case(f"{name} bias {size}", bytes=least + heads * length**2 * dtype.itemsize, prepare=biased, **work)


_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _heads(device, dtype, batch, heads, length, dim=64, count=1):
    return [torch.randn(batch, heads, length, dim, device=device, dtype=dtype) for _ in range(count)]


def _sparse(device, dtypes, length=4096, heads=4, batch=1, dim=64, block=64):
    """What blocks leave out, beside all of it."""
    for dtype in dtypes:
        given = partial(_heads, device, dtype, batch, heads, length, dim, count=3)
        flops, least = 4 * batch * heads * length**2 * dim, 4 * batch * heads * length * dim * dtype.itemsize

        def blocks(percent, given=given):
            qkv = given()
            keep = torch.rand(1, heads, length // block, length // block, device=device) < percent / 100
            ours = partial(tw.attention, *qkv, block_mask=tw.BlockMask(keep, block))
            return ours, partial(_torch_attention(), *qkv)

        def window(given=given):
            qkv = given()
            ours = partial(tw.attention, *qkv, causal=True, window=(256, 0))
            return ours, partial(_torch_attention(is_causal=True), *qkv)

        name, size = _SHORT[dtype], f"{length // 1024}K"
        for percent in (10, 25, 50, 100):
            kept, work = partial(blocks, percent), flops * percent / 100
            yield Case(
                f"{name} {percent} % of blocks {size} / dense", flops=work, bytes=least, dtype=dtype, prepare=kept
            )
        work = flops * 256 / length
        yield Case(f"{name} causal window 256 {size} / causal", flops=work, bytes=least, dtype=dtype, prepare=window)


def _varlen(device, dtype=torch.float32, heads=8, dim=64, lengths=(1000, 40, 300, 700, 10, 500)):
    """Packed sequences of mixed lengths; torch pads them to the longest, which makes 57 % of its rows padding."""
    batch, longest, total = len(lengths), max(lengths), sum(lengths)

    def prepare():
        cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        qkv = [torch.randn(total, heads, dim, device=device, dtype=dtype) for _ in range(3)]
        padded = [torch.zeros(batch, heads, longest, dim, device=device, dtype=dtype) for _ in range(3)]
        for tensor, packed in zip(padded, qkv, strict=True):
            for b, rows in enumerate(packed.split(lengths)):
                tensor[b, :, : lengths[b]] = rows.transpose(0, 1)
        options = {"max_seqlen_q": longest, "max_seqlen_k": longest, "causal": True}
        ours = lambda: tw.attention_varlen(*qkv, cu, cu, **options)  # noqa: E731
        return ours, partial(_torch_attention(is_causal=True), *padded)

    flops = 2 * heads * dim * sum(n * n for n in lengths)
    least = 4 * total * heads * dim * dtype.itemsize
    name = f"{_SHORT[dtype]} packed, mixed lengths"
    target = 2.5 if device.type == "cpu" else None
    return Case(name, flops=flops, bytes=least, target=target, dtype=dtype, prepare=prepare)


def _tiny(device):
    """The cost of a call: one query on eight keys into given memory, beside torch's out-variant of an addition."""
    q, k = torch.randn(1, 1, 1, 64, device=device), torch.randn(1, 1, 8, 64, device=device)
    out, lse = torch.empty_like(q), torch.empty(1, 1, 1, device=device)
    write = torch.ops.tilewise.attention_out.default
    return Case(
        "one query, out variant / add(out=)", lambda: write(q, k, k, out, lse), lambda: torch.add(q, q, out=out)
    )


def _few_queries(device, dtype, queries, heads=32, kv_heads=8, keys=4096, dim=128, batch=1):
    """Some tokens behind contiguous keys and values."""

    def prepare():
        q = torch.randn(batch, heads, queries, dim, device=device).to(dtype)
        k, v = torch.randn(2, batch, kv_heads, keys, dim, device=device).to(dtype)
        return partial(tw.attention, q, k, v), partial(_torch_attention(enable_gqa=True), q, k, v)

    many = f"{batch} x " if batch > 1 else ""
    return Case(
        f"{str(dtype)[6:]} {many}{queries} queries {heads}/{kv_heads} heads d{dim} {keys} keys",
        flops=4 * batch * heads * queries * dim * keys,
        bytes=2 * batch * kv_heads * keys * dim * dtype.itemsize,
        dtype=dtype,
        prepare=prepare,
    )


def _decode(device, form, heads, kv_heads, keys=8192, dim=128, page=16, target=None, batch=1):
    """One token a sequence behind a cache in pages, beside torch, whose keys and values lie ready in its own layout.

    ``form``: a dtype, or the format of a quantised cache, then beside torch in bfloat16.
    """
    quantised = isinstance(form, str)
    dtype = torch.bfloat16 if quantised else form
    pages = batch * -(-keys // page)

    def prepare():
        table = torch.randperm(pages, device=device).view(batch, -1).int()
        lens = torch.full((batch,), keys, dtype=torch.int32, device=device)
        q = torch.randn(batch, heads, 1, dim, device=device).to(dtype)
        k, v = (torch.randn(batch, kv_heads, keys, dim, device=device, dtype=dtype) for _ in range(2))
        cache = tw.KVCache(pages, page, kv_heads, dim, format=form if quantised else _SHORT[dtype], device=device)
        cache.append(k, v, table, torch.zeros_like(lens))
        theirs = partial(_torch_attention(enable_gqa=heads != kv_heads), q, k, v)
        if quantised:
            return lambda: cache.attend(q, table, lens), theirs
        return lambda: tw.paged_attention(q, cache.k_pages, cache.v_pages, table, lens), theirs

    row = tw.KVCache(1, 1, 1, dim, format=form).nbytes if quantised else 2 * dim * dtype.itemsize
    many = f"{batch} x " if batch > 1 else ""
    size = f"{many}{heads}/{kv_heads} heads d{dim} {keys} keys"
    return Case(
        f"decode {form} {size} (torch: bfloat16)" if quantised else f"decode {str(dtype)[6:]} {size}",
        flops=4 * batch * heads * dim * keys,
        bytes=batch * keys * kv_heads * row,
        target=target,
        dtype=dtype,
        prepare=prepare,
    )


def _cpu_cases(device):
    f32, bf16 = torch.float32, torch.bfloat16
    pairs = [case for name, *row in _CPU for case in _pair(name, device, *row)]
    decode = [
        _decode(device, bf16, 32, 8, target=2.3),
        _decode(device, bf16, 8, 8),
        _decode(device, f32, 32, 8),
        _decode(device, "int4", 32, 8, target=3.2),
        _decode(device, "int4", 8, 8, target=2.2),
        *(_decode(device, format, 32, 8) for format in ("int8", "int2", "bfp12")),
    ]
    few = [_few_queries(device, dtype, n) for dtype in (f32, bf16) for n in (1, 8)]
    return [
        *pairs, *_with_options(device, (f32, bf16)), *_sparse(device, (f32, bf16)), _varlen(device), *few, *decode
    ]  # fmt: skip


def _cuda_cases(device):
    """Beside torch's flash backend; caches of 1 GB and more, so that they come from memory, on every processor."""
    f32, bf16 = torch.float32, torch.bfloat16
    flash, promised = SDPBackend.FLASH_ATTENTION, "bf16 causal 8K d128"
    rows = sorted([*_CUDA, _GQA], key=lambda row: not row[0].startswith(promised))  # the promised ones first
    pairs = [
        case
        for name, *row in rows
        for case in _pair(name, device, *row, forward_target=1.0 if name == promised else None, backend=flash)
    ]
    name, *row = rows[0]
    cudnn = _pair(f"{name} / cuDNN", device, *row, backend=SDPBackend.CUDNN_ATTENTION)
    decode = [
        _decode(device, bf16, 32, 8, batch=32),
        _decode(device, bf16, 32, 8, keys=32768, batch=8),
        _decode(device, bf16, 8, 8, batch=32),
        _decode(device, bf16, 32, 8, batch=1),
        _decode(device, f32, 32, 8, batch=32),
        *(_decode(device, format, 32, 8, batch=32) for format in ("int8", "int4")),
    ]
    few = [_few_queries(device, bf16, n, keys=8192, batch=32) for n in (1, 8)]
    options = _with_options(device, (bf16,), batch=4, length=4096, heads=16)
    sparse = _sparse(device, (bf16,), length=8192, heads=16, batch=2, dim=128)
    packed = _varlen(device, bf16, heads=16, dim=128, lengths=(4000, 400, 3000, 7000, 100, 5000, 1000, 2000))
    return [*pairs[:2], *decode, *pairs[2:], *cudnn, packed, *few, *options, *sparse]


def cases(device: torch.device) -> list[Case]:
    found = _cpu_cases(device) if device.type == "cpu" else _cuda_cases(device)
    return [*found, *attention_parts.cases(device), _tiny(device)]
