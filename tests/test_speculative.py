"""Speculative decoding against the reference, on every device."""

import pytest
import tilewise.speculative as spec
import torch
from harness.emulation import assert_schedules_agree
from tilewise.reference import speculative as reference


def random_tree(batch, nodes):
    n_nodes = torch.randint(1, nodes + 1, (batch,), dtype=torch.int32)
    parent = torch.full((batch, nodes), -2, dtype=torch.int32)
    for b in range(batch):
        for i in range(int(n_nodes[b])):
            parent[b, i] = int(torch.randint(0, i, ())) if i else -1
    return parent, n_nodes, torch.randint(0, 1000, (batch,), dtype=torch.int32)


@pytest.mark.parametrize("batch,nodes", [(1, 1), (2, 5), (3, 64), (2, 65), (1, 256)])
@pytest.mark.modes
def test_tree_finalize(device, batch, nodes):
    tree = random_tree(batch, nodes)
    got = spec.tree_finalize(*(t.to(device.torch) for t in tree))
    for name, a, b in zip(spec.TreeLinks._fields, got, reference.tree_finalize(*tree), strict=True):
        assert torch.equal(a.cpu(), b), name


def test_tree_finalize_bad_parent(device):
    parent = torch.tensor([[-1, 0, 2, 1]], dtype=torch.int32, device=device.torch)
    counts = torch.tensor([4], dtype=torch.int32, device=device.torch)
    with pytest.raises(ValueError, match="parent"):
        links = spec.tree_finalize(parent, counts, counts)
        assert links.positions.tolist() == [[4, 5, -1, 6]]  # the bad node counts as padding
        spec.tree_finalize(parent, counts, counts)


@pytest.mark.modes
def test_schedules(device):
    if device.kind == "emulated":
        tree = random_tree(2, 40)
        assert_schedules_agree(lambda: tuple(spec.tree_finalize(*tree)))
