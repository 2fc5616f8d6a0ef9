"""Speculative decoding with token trees (``tilewise.speculative``).

B batch, N nodes per tree (at most 256), W = ceil(N / 64), V vocabulary. A tree is ``parent`` int32 (B, N): node 0 is
the root (parent -1) and stands for the last committed token, every other node's parent precedes it, and slots from
``n_nodes[b]`` on are padding (-2). K and V live in pages (P, page_size, Hkv, D); the tokens before the root fill
positions ``[0, prefix_len)`` of a sequence, node i stands at position ``prefix_len + i``.

A step of greedy decoding, with no host synchronisation anywhere::

    tree = tree_from_template(TOKEN_RECYCLING, table, root_tokens)
    links = tree.finalize(prefix_len)
    for each layer:
        append_kv(k_pages, v_pages, block_table, prefix_len, k, v, n_nodes=tree.n_nodes)
        x = tree_attention(q, k_pages, v_pages, block_table, prefix_len, links.ancestor_bits)
    accept_len, path, out_tokens = verify_greedy(*tree[:2], logits, n_nodes=tree.n_nodes)
    compact_kv(caches, block_table, prefix_len, path, accept_len)
    prefix_len = prefix_len + accept_len + 1          # out_tokens[:, : accept_len + 1] are the new tokens
    root_tokens = out_tokens.gather(1, accept_len.long()[:, None])[:, 0]

Plain decoding is the tree of one node, and a prompt's prefill is a row of chains of up to 256 nodes
(:meth:`DraftTree.chain`).
"""

from tilewise.speculative.attention import tree_attention
from tilewise.speculative.cache import append_kv, compact_kv
from tilewise.speculative.template import DEFAULT_TEMPLATE, TOKEN_RECYCLING, TreeTemplate
from tilewise.speculative.tree import (
    MAX_NODES,
    DraftTree,
    TreeLinks,
    table_update,
    tree_finalize,
    tree_from_sequences,
    tree_from_template,
)
from tilewise.speculative.verify import Verified, verify_greedy

__all__ = [
    "DEFAULT_TEMPLATE",
    "MAX_NODES",
    "TOKEN_RECYCLING",
    "DraftTree",
    "TreeLinks",
    "TreeTemplate",
    "Verified",
    "append_kv",
    "compact_kv",
    "table_update",
    "tree_attention",
    "tree_finalize",
    "tree_from_sequences",
    "tree_from_template",
    "verify_greedy",
]
