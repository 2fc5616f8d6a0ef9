"""Few queries and many keys: the ranges that keys are split into on CUDA, with pages and without."""

import pytest
import torch

import tilewise as tw
from attention_cases import DTYPES, Shape, inputs, judge
from harness.emulation import assert_schedules_agree
from tilewise import _C
from tilewise.attention.paged import FORMATS
from tilewise.reference import attention as reference

SMS = 132  # of an H100, which the numbers of ranges are meant for


def paged_splits(batch, heads, kv_heads, tokens, dim, keys, dtype, format="native"):
    """How many ranges there are, by the workspace that they need. Nothing is computed: the tensors have no memory."""
    q = torch.zeros(1, dtype=dtype).expand(batch, heads, tokens, dim)
    pages = torch.zeros(1, dtype=dtype if format == "native" else torch.uint8).expand(1, 16, kv_heads, dim)
    table = torch.zeros(1, dtype=torch.int32).expand(batch, keys // 16)
    floats = _C.paged_attention_workspace(q, pages, pages, table, None, FORMATS.index(format))
    return max(1, floats // (batch * heads * tokens * (dim + 1)))


def dense_splits(batch, heads, kv_heads, queries, dim, keys, dtype):
    q, k = (torch.zeros(1, dtype=dtype).expand(batch, h, n, dim) for h, n in ((heads, queries), (kv_heads, keys)))
    return max(1, _C.attention_workspace(q, k) // (batch * heads * queries * (dim + 1)))


# tokens, heads, dim, type and format; the rows that a block of the kernel has, all of one key head or not, and how many
# of its blocks fit into a multiprocessor.
KERNELS = {
    "one token": ((1, 32, 8, 128, torch.bfloat16), "native", 16, True, 2),
    "one token, D 64": ((1, 32, 8, 64, torch.bfloat16), "native", 16, True, 4),
    "full tile": ((4, 32, 8, 128, torch.float16), "native", 16, True, 2),
    "larger tile": ((5, 32, 8, 128, torch.float16), "native", 64, True, 2),
    "codes": ((1, 32, 8, 128, torch.bfloat16), "int4", 8, True, 3),
    "codes, widened": ((1, 32, 2, 128, torch.bfloat16), "bfp12", 16, True, 2),
    "codes, larger tile": ((5, 32, 8, 64, torch.bfloat16), "int4", 64, True, 3),
    "fp32": ((1, 32, 8, 128, torch.float32), "native", 4, False, 6),
    "odd head dim": ((2, 32, 8, 96, torch.bfloat16), "native", 4, False, 6),
}


@pytest.mark.devices("emulated")
@pytest.mark.parametrize("shape,format,rows,of_key_head,per_sm", KERNELS.values(), ids=KERNELS)
def test_ranges_fill_the_gpu(device, shape, format, rows, of_key_head, per_sm):
    """Few sequences have blocks for nine tenths of the places at least; many sequences are not split."""
    tokens, heads, kv_heads, dim, dtype = shape
    units = -(-tokens * heads // kv_heads // rows) * kv_heads if of_key_head else -(-tokens * heads // rows)
    slots = SMS * per_sm
    splits = {b: paged_splits(b, heads, kv_heads, tokens, dim, 2**20, dtype, format) for b in (1, 3, 7, 500)}
    blocks = {b: b * units * n for b, n in splits.items()}
    for batch in (1, 3, 7):
        rounds = -(-blocks[batch] // slots)
        assert blocks[batch] >= 0.9 * rounds * slots, f"{batch} sequences: {blocks[batch]} blocks on {slots} places"
    assert splits[500] == 1
    assert paged_splits(1, heads, kv_heads, tokens, dim, 496, dtype, format) == 1, "a range of fewer than 256 keys"


@pytest.mark.devices("emulated")
def test_prompts_are_not_split(device):
    """Where the tiles of queries are enough: a second range would keep them from the kernel that has no ranges."""
    assert paged_splits(1, 32, 8, 2048, 128, 8192, torch.bfloat16) == 1
    assert paged_splits(1, 32, 8, 448, 128, 8192, torch.bfloat16) == 1  # 224 blocks of 64 on 264 places
    assert paged_splits(1, 32, 8, 64, 128, 8192, torch.bfloat16) > 1


@pytest.mark.devices("emulated")
def test_dense_attention_is_split_as_pages_are(device):
    for dtype in DTYPES.values():
        for queries in (1, 4, 9):
            shape = (1, 32, 8, queries, 128, 8192, dtype)
            assert dense_splits(*shape) == paged_splits(*shape) > 1
    assert dense_splits(1, 32, 8, 33, 128, 8192, torch.bfloat16) == 1


DENSE = {  # batch, heads, key heads, queries, keys, head dim; options
    "one": ((1, 4, 2, 1, 700, 64), {}),
    "causal": ((1, 2, 2, 3, 520, 128), {"causal": True}),
    "window": ((2, 2, 1, 2, 520, 40), {"window": (300, 100), "softcap": 3.0}),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape,options", DENSE.values(), ids=DENSE)
@pytest.mark.modes
def test_dense_decoding(device, dtype, shape, options):
    """Against float64 beside plain torch, gradients too, which need the lse that the ranges were merged to."""
    batch, heads, kv_heads, queries, keys, dim = shape
    if device.kind == "emulated":
        assert dense_splits(batch, heads, kv_heads, queries, dim, keys, dtype) == 2
    tensors = inputs(Shape(batch, heads, kv_heads, queries, keys, dim, dim), dtype, device)
    kernel = lambda q, k, v: tw.attention(q, k, v, return_lse=True, **options)  # noqa: E731
    plain = lambda q, k, v: reference.attention(q, k, v, **options)  # noqa: E731
    judge(kernel, plain, tensors, torch.randn_like(tensors[0]), dtype)


@pytest.mark.modes
@pytest.mark.devices("emulated")
def test_schedules(device):
    q, k, v = inputs(Shape(1, 4, 2, 2, 600, 64, 64), torch.bfloat16, device)
    assert_schedules_agree(lambda: tw.attention(q, k, v, causal=True, return_lse=True), 4)


@pytest.mark.devices("emulated")
def test_ranges_without_keys(device):
    """A narrow window leaves ranges that nobody sees."""
    q, k, v = inputs(Shape(1, 2, 1, 1, 900, 64, 64), torch.bfloat16, device)
    out, lse = tw.attention(q, k, v, window=(10, 0), return_lse=True)
    near = [t[:, :, -11:] for t in (k, v)]
    expected, expected_lse = reference.attention(q.double(), *(t.double() for t in near))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
