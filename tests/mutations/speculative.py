"""Seeded bugs in the speculative kernels."""

import tilewise.speculative as spec
import torch
from harness.mutations import Mutation
from tilewise.reference import speculative as reference

MUTATIONS = [
    Mutation("no_barrier", "speculative/cuda/tree.h", "    sync_block();\n", "", "race"),
    Mutation("depth_not_counted", "speculative/cuda/tree.h", "depth += s.parent[a] >= 0;", "", "plain"),
]


def check():
    parent = torch.tensor([[-1, 0, 0, 1, 1, 2, 5, -2]], dtype=torch.int32)
    tree = parent, torch.tensor([7], dtype=torch.int32), torch.tensor([10], dtype=torch.int32)
    for got, expected in zip(spec.tree_finalize(*tree), reference.tree_finalize(*tree), strict=True):
        assert torch.equal(got, expected)
