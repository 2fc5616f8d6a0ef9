"""Seeded bugs in attention over paged caches."""

import torch

import tilewise as tw
from harness.mutations import Mutation
from tilewise.reference import attention as reference

FAMILY = "attention"
PAGED, PAGED_TILES = "attention/cuda/paged.h", "common/paged/cuda/attention.h"
PAGED_ROWS = "common/paged/cuda/rows.h"

MUTATIONS = [
    Mutation("window_ignored", PAGED, "key >= first && key < end", "key < end", "plain"),
    Mutation("diagonal_too_long", PAGED, "shift + token + right + 1", "shift + token + right + 2", "plain"),
    Mutation(
        "full_by_the_last_token", PAGED, "full_end = end_key(first_token)", "full_end = end_key(last_token)", "plain"
    ),
    Mutation("pages_not_shared_out", PAGED_TILES, "t.first_tile = begin + from;", "t.first_tile = from;", "plain"),
    Mutation(
        "cap_after_the_mask", PAGED_TILES, "if (limit != 0.f) score = softcap", "if (masked) score = softcap", "plain"
    ),
    Mutation("pages_not_awaited", PAGED_TILES, "cp_async_wait<1>();", "cp_async_wait<2>();", "race"),
    Mutation("splits_unweighted", PAGED_ROWS, "sum += exp2_approx((lse - base) * kLog2e) *", "sum +=", "plain"),
]


def _check(dim=64, **options):
    """Several splits, key tiles with and without masks, a length that ends within a page."""
    generator = torch.Generator().manual_seed(2)
    k_pages, v_pages = torch.randn(2, 30, 16, 1, dim, generator=generator).bfloat16()
    table = torch.randperm(30, generator=generator)[:25][None].int()
    lens = torch.tensor([390], dtype=torch.int32)
    q = torch.randn(1, 2, 5, dim, generator=generator).bfloat16()
    out, lse = tw.paged_attention(q, k_pages, v_pages, table, lens, return_lse=True, num_splits=2, **options)
    pages = (k_pages.double(), v_pages.double())
    expected, expected_lse = reference.paged_attention(q.double(), *pages, table, lens, **options)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    assert (out - expected).norm() < 0.02 * expected.norm()


def check():
    _check(window=(300, None), softcap=2.0)
