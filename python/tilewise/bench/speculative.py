"""Benchmarks of the speculative family: ``cases(device)``."""

import torch

import tilewise.speculative as spec
from tilewise.bench.case import Case

PREFIX, PAGE, VOCAB = 8192, 16, 128256


def _attention_case(device, dtype, nodes, heads, kv_heads, dim, contiguous=False) -> Case:
    """A tree behind an 8K prefix of a paged cache, beside masked attention by torch, which has to gather the pages;
    ``contiguous`` spares it that: K and V lie ready in its own layout."""
    keys = PREFIX + nodes
    pool = -(-keys // PAGE)
    k_pages, v_pages = torch.randn(2, pool, PAGE, kv_heads, dim, device=device).to(dtype)
    table = torch.randperm(pool, device=device)[None].to(torch.int32)
    prefix = torch.tensor([PREFIX], dtype=torch.int32, device=device)
    q = torch.randn(1, nodes, heads, dim, device=device).to(dtype)
    parent = ((torch.arange(nodes, device=device) + 1) // 2 - 1).to(torch.int32)[None]  # a binary tree
    bits = spec.tree_finalize(parent, torch.tensor([nodes], dtype=torch.int32, device=device), prefix).ancestor_bits

    def gathered():
        pages = (p.index_select(0, table[0]) for p in (k_pages, v_pages))
        return [p.flatten(0, 1)[:keys].transpose(0, 1)[None] for p in pages]

    k, v = (t.contiguous() for t in gathered())
    mask = torch.ones(nodes, keys, dtype=torch.bool, device=device)
    mask[:, PREFIX:] = (bits[0, :, :1] >> torch.arange(nodes, device=device) & 1).bool()
    queries = q.transpose(1, 2).contiguous()

    def masked(k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            queries, k, v, attn_mask=mask, enable_gqa=heads != kv_heads
        )

    name = f"tree_attention {str(dtype)[6:]} N={nodes} heads={heads}/{kv_heads} D={dim} prefix={PREFIX}"
    return Case(
        f"{name}, torch spared the pages" if contiguous else name,
        tilewise=lambda: spec.tree_attention(q, k_pages, v_pages, table, prefix, bits),
        torch=lambda: masked(k, v) if contiguous else masked(*gathered()),
        flops=4.0 * nodes * heads * dim * keys,
        bytes=2.0 * keys * kv_heads * dim * q.element_size(),
        target=3.0 if nodes >= 16 and not contiguous else None,
    )


def _verify_case(device, nodes=32) -> Case:
    logits = torch.randn(1, nodes, VOCAB, device=device)
    parent = ((torch.arange(nodes, device=device) + 1) // 2 - 1).to(torch.int32)[None]
    tokens = torch.randint(0, VOCAB, (1, nodes), device=device, dtype=torch.int32)
    tokens[0, 1] = logits[0, 0].argmax()
    count = torch.tensor([nodes], dtype=torch.int32, device=device)
    return Case(
        f"verify_greedy N={nodes} V={VOCAB}, one draft accepted (torch: argmax of all rows)",
        tilewise=lambda: spec.verify_greedy(parent, tokens, logits, n_nodes=count),
        torch=lambda: logits.argmax(-1),
        bytes=2.0 * VOCAB * 4,
    )


def cases(device: torch.device) -> list[Case]:
    shapes = [(1, 32, 8, 128), (16, 8, 8, 128), (16, 32, 8, 128), (64, 8, 8, 64), (64, 32, 8, 128)]
    found = [
        _attention_case(device, t, *s, contiguous=contiguous)
        for t in (torch.float32, torch.bfloat16)
        for contiguous in (False, True)
        for s in shapes
    ]
    return [*found, _verify_case(device)]
