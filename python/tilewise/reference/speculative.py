"""Speculative decoding in plain Python and torch."""

import torch


def tree_finalize(parent, n_nodes, seq_lens):
    batch, nodes = parent.shape
    words = (nodes + 63) // 64
    positions = torch.full_like(parent, -1)
    first_child, next_sibling = torch.full_like(parent, -1), torch.full_like(parent, -1)
    bits = torch.zeros(batch, nodes, words * 64, dtype=torch.bool)
    for b in range(batch):
        for i in range(int(n_nodes[b])):
            up = int(parent[b, i])
            positions[b, i] = seq_lens[b] if up < 0 else positions[b, up] + 1
            if up >= 0:
                bits[b, i] = bits[b, up]
                siblings = [j for j in range(i) if parent[b, j] == up]
                if siblings:
                    next_sibling[b, siblings[-1]] = i
                else:
                    first_child[b, up] = i
            bits[b, i, i] = True
    weights = torch.ones(64, dtype=torch.int64) << torch.arange(64)
    return positions, first_child, next_sibling, (bits.view(batch, nodes, words, 64) * weights).sum(-1)
