"""Seeded bugs in column sums and block maxima of the attention map."""

import torch
import torch.nn.functional as F

import tilewise as tw
from harness.mutations import Mutation

FAMILY = "attention"
SCORES = "attention/cuda/scores.h"

MUTATIONS = [
    Mutation("hidden_keys_weigh", SCORES, "if (nearest < own + Engine::kWarpKeys - 1)", "if (nearest < own)", "plain"),
    Mutation("last_query_left_out", SCORES, "end = query + 1;", "end = query;", "plain"),
    Mutation(
        "maxima_not_begun_anew",
        SCORES,
        "    clear();\n  }\n  SIMT_DEVICE void finish",
        "  }\n  SIMT_DEVICE void finish",
        "plain",
    ),
    Mutation("stage_reused_early", SCORES, "sync_block();  // this stage has arrived", "//", "race"),
    Mutation("maxima_read_early", SCORES, "sync_block();  // every warp's maxima", "//", "race"),
]


def _check(dtype):
    """Several tiles of queries and of keys, causal, blocks that end within tiles."""
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(1, 1, 70, 64, generator=generator), torch.randn(1, 1, 150, 64, generator=generator)
    q, k = q.to(dtype), k.to(dtype)
    scores = q.double() @ k.double().transpose(-1, -2) / 8
    scores = scores.masked_fill(torch.ones(70, 150, dtype=torch.bool).triu(150 - 70 + 1), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    sums = tw.attention_column_sums(q, k, lse.float(), causal=True, normalize=False)
    torch.testing.assert_close(sums.double(), weights.sum(2), rtol=1e-4, atol=1e-5)
    maxima = tw.attention_block_max(q, k, lse.float(), (48, 80), causal=True)
    pooled = F.max_pool2d(F.pad(weights, (0, 10, 0, 26)), (48, 80))
    torch.testing.assert_close(maxima.double(), pooled, rtol=1e-4, atol=1e-5)


def check():
    _check(torch.float32)
    _check(torch.bfloat16)
