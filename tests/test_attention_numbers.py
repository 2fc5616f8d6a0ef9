"""Numbers that no kernel could use: a scale, softcap or base that is NaN, infinite, or beyond float32."""

import math

import pytest
import torch

import tilewise as tw
from tilewise import block_sparsity, rope
from tilewise.compat import flash_attn
from tilewise.distributed import ring_attention

# Values, and what a message says of them; a float32 would hold the last as inf.
BAD = {"nan": "nan", "inf": "inf", "-inf": "-inf", "1e300": r"1e\+300"}

Q, KV = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 4, 8)
PACKED, OFFSETS = torch.zeros(4, 1, 8), torch.tensor([0, 4], dtype=torch.int32)
PAGES, TABLE, LENGTH = torch.zeros(1, 4, 1, 8), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([4]).int()
LSE, BITS = torch.zeros(1, 2, 3), torch.zeros(1, 3, 1, dtype=torch.int64)


def out_variant(**options):
    torch.ops.tilewise.attention_out(Q, KV, KV, torch.empty_like(Q), torch.empty(1, 2, 3), **options)


# Every function that takes a scale.
SCALED = {
    "attention": lambda **o: tw.attention(Q, KV, KV, **o),
    "attention, no rows": lambda **o: tw.attention(Q[:, :, :0], KV, KV, **o),
    "attention_out": out_variant,
    "attention_varlen": lambda **o: tw.attention_varlen(PACKED, PACKED, PACKED, OFFSETS, OFFSETS, **o),
    "attention_column_sums": lambda **o: tw.attention_column_sums(Q, KV, LSE, **o),
    "attention_block_max": lambda **o: tw.attention_block_max(Q, KV, LSE, 16, **o),
    "paged_attention": lambda **o: tw.paged_attention(Q, PAGES, PAGES, TABLE, LENGTH, **o),
    "paged_attention_varlen": lambda **o: tw.paged_attention_varlen(PACKED, PAGES, PAGES, TABLE, OFFSETS, LENGTH, **o),
    "tree_attention": lambda **o: tw.speculative.tree_attention(
        Q.transpose(1, 2), PAGES, PAGES, TABLE, LENGTH - 4, BITS, **o
    ),
    "tensor_attention": lambda **o: tw.tensor_attention(KV, KV, KV, KV, KV, **o),
    "tensor_attention, no pairs": lambda **o: tw.tensor_attention(KV, KV[:, :, :0], KV, KV[:, :, :0], KV, **o),
    "tensor_attention, no rows": lambda **o: tw.tensor_attention(KV[:, :, :0], KV, KV, KV, KV, **o),
    "shared_prefix_attention": lambda **o: tw.shared_prefix_attention(Q, KV, KV, KV, KV, **o),
    "lm_infinite_attention": lambda **o: tw.lm_infinite_attention(KV, KV, KV, window=2, global_tokens=1, **o),
    "flash_attn_func": lambda scale: flash_attn.flash_attn_func(*(t.transpose(1, 2) for t in (Q, KV, KV)), 0.0, scale),
    "ZipCache.prefill": lambda **o: tw.ZipCache(1, 4, 1, 8).prefill(KV, KV, KV, **o),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("call", SCALED.values(), ids=SCALED)
def test_scale(call, bad):
    with pytest.raises(ValueError, match=rf"attention\w*: scale is {BAD[bad]}, expected a finite number"):
        call(scale=float(bad))


def test_scale_of_a_ring(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="attention: scale is nan, expected a finite number"):
            ring_attention(KV, KV, KV, scale=math.nan)
    finally:
        torch.distributed.destroy_process_group()


CAPPED = ("attention", "attention, no rows", "attention_varlen", "paged_attention", "paged_attention_varlen")


@pytest.mark.parametrize("bad", [*BAD, "-1"])
@pytest.mark.parametrize("name", CAPPED)
def test_softcap(name, bad):
    with pytest.raises(ValueError, match=rf"attention\w*: softcap is {BAD.get(bad, bad)}, expected"):
        SCALED[name](softcap=float(bad))


@pytest.mark.parametrize("bad", ["nan", "inf", "1", "-0.1"])
@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_dropout(name, bad):
    with pytest.raises(ValueError, match=rf"attention\w*: dropout_p is {bad}, expected"):
        SCALED[name](dropout_p=float(bad))


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_block_builders(bad):
    for operation, call in (
        ("vertical_slash", lambda **o: block_sparsity.vertical_slash(Q, KV, vertical=1, slash=1, **o)),
        ("segment_criticality", lambda **o: block_sparsity.segment_criticality(Q, KV, **o)),
    ):
        with pytest.raises(ValueError, match=f"{operation}: scale is {bad}, expected a finite number"):
            call(scale=float(bad))


def test_threshold():
    weight = torch.zeros(24, 5)
    with pytest.raises(ValueError, match="seer_gate: threshold is nan, expected a number"):
        block_sparsity.seer_gate(Q, KV, weight, weight, block_size=16, threshold=math.nan)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "0.0", "-1.0"])
def test_theta(bad):
    for call in (
        lambda theta: rope.table(torch.arange(3), 8, theta=theta),
        lambda theta: rope.apply(Q, torch.arange(3), theta=theta),
        lambda theta: rope.reposition(Q, 0, 3, theta=theta),
        lambda theta: tw.lm_infinite_attention(KV, KV, KV, window=2, global_tokens=1, theta=theta),
    ):
        with pytest.raises(ValueError, match=f"rope.table: theta is {bad}, expected a finite number above 0"):
            call(float(bad))


def test_no_channels():
    """A head dim of 0 has no default scale; it is the head dim that is wrong."""
    none = torch.zeros(1, 2, 3, 0)
    with pytest.raises(NotImplementedError, match="attention: q has head dim 0, expected"):
        tw.attention(none, none, none)
    with pytest.raises(NotImplementedError, match="attention: q has head dim 0, expected"):
        tw.tensor_attention(none, none, none, none, none)
    assert block_sparsity.vertical_slash(none, none, vertical=1, slash=1).blocks.all()
