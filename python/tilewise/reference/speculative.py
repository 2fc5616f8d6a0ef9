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


def tree_from_template(parent, rank, table, root_tokens):
    trees = []
    for root in root_tokens.tolist():
        nodes, place = [(-1, root)], [0]
        for i in range(1, len(parent)):
            up = place[int(parent[i])]
            token = int(table[nodes[up][1], int(rank[i])]) if up >= 0 else -1
            place.append(len(nodes) if 0 <= token < len(table) else -1)
            if place[-1] >= 0:
                nodes.append((up, token))
        trees.append(nodes)
    return _pack(trees, len(parent))


def tree_from_sequences(sequences, root_tokens, max_nodes):
    trees = []
    for b, root in enumerate(root_tokens.tolist()):
        nodes = [(-1, root)]
        for sequence in sequences[b].tolist():
            at = 0
            for token in sequence:
                if token < 0 or (at, token) not in nodes[1:] and len(nodes) == max_nodes:
                    break
                if (at, token) not in nodes[1:]:
                    nodes.append((at, token))
                at = nodes.index((at, token), 1)
        trees.append(nodes)
    return _pack(trees, max_nodes)


def _pack(trees, width):
    padded = [nodes + [(-2, 0)] * (width - len(nodes)) for nodes in trees]
    parent, tokens = (torch.tensor([[node[i] for node in tree] for tree in padded], dtype=torch.int32) for i in (0, 1))
    return parent, tokens, torch.tensor([len(nodes) for nodes in trees], dtype=torch.int32)


def tree_attention(q, k_pages, v_pages, block_table, prefix_len, ancestors, scale=None):
    """Masked attention; ``ancestors`` bool (B, N, N): node i sees node j. Padding gives 0 and -inf."""
    group = q.shape[2] // k_pages.shape[2]
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
    for b, prefix in enumerate(prefix_len.tolist()):
        seen = torch.nn.functional.pad(ancestors[b], (prefix, 0), value=True)
        keys = seen.shape[1]
        k, v = (p[block_table[b].long()].flatten(0, 1)[:keys].repeat_interleave(group, 1) for p in (k_pages, v_pages))
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        scores = q[b].transpose(0, 1) @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~seen, -torch.inf)
        used = ancestors[b].any(-1)
        out[b] = torch.where(used[:, None, None], (scores.softmax(-1) @ v).transpose(0, 1), 0)
        lse[b] = torch.where(used[:, None], scores.logsumexp(-1).transpose(0, 1), -torch.inf)
    return out, lse


def verify_greedy(parent, tokens, logits, n_nodes, max_depth):
    batch = len(parent)
    accept_len = torch.zeros(batch, dtype=torch.int32)
    path, out = (torch.full((batch, max_depth + 1), -1, dtype=torch.int32) for _ in range(2))
    for b in range(batch):
        at, depth = 0, 0
        path[b, 0] = 0
        while True:
            choice = int(logits[b, at].argmax()) if logits.ndim == 3 else int(logits[b, at])
            out[b, depth] = choice
            children = [i for i in range(1, int(n_nodes[b])) if parent[b, i] == at and tokens[b, i] == choice]
            if not children or depth == max_depth:
                break
            at, depth = children[0], depth + 1
            path[b, depth] = at
        accept_len[b] = depth
    return accept_len, path, out
