"""Benchmarks of the speculative family: ``cases(device)``."""

import torch

import tilewise.speculative as spec
from tilewise.bench.case import Case

PREFIX, PAGE, VOCAB = 8192, 16, 128256


def _binary_tree(device, batch, nodes):
    """Every node's parent, (batch, nodes), and the number of nodes, (batch,)."""
    parent = ((torch.arange(nodes, device=device) + 1) // 2 - 1).to(torch.int32)
    return parent.repeat(batch, 1), torch.full((batch,), nodes, dtype=torch.int32, device=device)


def _attention_case(device, dtype, nodes, heads, kv_heads, dim, contiguous=False, batch=1) -> Case:
    """Trees behind an 8K prefix of a paged cache, beside masked attention by torch, which has to gather the pages;
    ``contiguous`` spares it that: K and V lie ready in its own layout."""
    keys = PREFIX + nodes

    def prepare():
        pool = batch * -(-keys // PAGE)
        k_pages, v_pages = (torch.randn(pool, PAGE, kv_heads, dim, device=device).to(dtype) for _ in range(2))
        table = torch.randperm(pool, device=device).view(batch, -1).to(torch.int32)
        prefix = torch.full((batch,), PREFIX, dtype=torch.int32, device=device)
        q = torch.randn(batch, nodes, heads, dim, device=device).to(dtype)
        bits = spec.tree_finalize(*_binary_tree(device, batch, nodes), prefix).ancestor_bits

        def gathered():
            pages = (p.index_select(0, table.flatten()).view(batch, -1, kv_heads, dim) for p in (k_pages, v_pages))
            return [p[:, :keys].transpose(1, 2) for p in pages]

        k, v = (t.contiguous() for t in gathered()) if contiguous else (None, None)
        mask = torch.ones(nodes, keys, dtype=torch.bool, device=device)
        mask[:, PREFIX:] = (bits[0, :, :1] >> torch.arange(nodes, device=device) & 1).bool()
        queries = q.transpose(1, 2).contiguous()

        def masked(k, v):
            return torch.nn.functional.scaled_dot_product_attention(
                queries, k, v, attn_mask=mask, enable_gqa=heads != kv_heads
            )

        theirs = (lambda: masked(k, v)) if contiguous else (lambda: masked(*gathered()))
        return lambda: spec.tree_attention(q, k_pages, v_pages, table, prefix, bits), theirs

    many = f"{batch} x " if batch > 1 else ""
    name = f"tree_attention {str(dtype)[6:]} {many}N={nodes} heads={heads}/{kv_heads} D={dim} prefix={PREFIX}"
    return Case(
        f"{name}, torch spared the pages" if contiguous else name,
        flops=4.0 * batch * nodes * heads * dim * keys,
        bytes=2.0 * batch * keys * kv_heads * dim * dtype.itemsize,
        target=3.0 if nodes >= 16 and not contiguous else None,
        dtype=dtype,
        prepare=prepare,
    )


def _verify_case(device, nodes=32, batch=1) -> Case:
    def prepare():
        logits = torch.randn(batch, nodes, VOCAB, device=device)
        parent, count = _binary_tree(device, batch, nodes)
        tokens = torch.randint(0, VOCAB, (batch, nodes), device=device, dtype=torch.int32)
        tokens[:, 1] = logits[:, 0].argmax(-1)
        return lambda: spec.verify_greedy(parent, tokens, logits, n_nodes=count), lambda: logits.argmax(-1)

    many = f"{batch} x " if batch > 1 else ""
    return Case(
        f"verify_greedy {many}N={nodes} V={VOCAB}, one draft accepted (torch: argmax of all rows)",
        bytes=2.0 * batch * VOCAB * 4,
        prepare=prepare,
    )


def cases(device: torch.device) -> list[Case]:
    """On CUDA a batch whose caches are too large for the L2 cache."""
    batch = 16 if device.type == "cuda" else 1
    shapes = [(1, 32, 8, 128), (16, 8, 8, 128), (16, 32, 8, 128), (64, 8, 8, 64), (64, 32, 8, 128)]
    found = [
        _attention_case(device, t, *s, contiguous=contiguous, batch=batch)
        for t in (torch.float32, torch.bfloat16)
        for contiguous in (False, True)
        for s in shapes
    ]
    return [*found, _verify_case(device, batch=batch)]
