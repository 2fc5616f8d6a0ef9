"""Seeded bugs in the speculative kernels."""

import torch

import tilewise.speculative as spec
from harness.mutations import Mutation
from tilewise.reference import speculative as reference

_TREE, _BUILD, _PAGES, _VERIFY = (f"speculative/cuda/{name}.h" for name in ("tree", "build", "pages", "verify"))
_ATTENTION, _ROWS = "common/paged/cuda/attention.h", "common/paged/cuda/rows.h"

MUTATIONS = [
    Mutation("no_barrier", _TREE, "    sync_block();\n", "", "race"),
    Mutation("depth_not_counted", _TREE, "depth += s.parent[a] >= 0;", "", "plain"),
    Mutation(
        "levels_without_barrier",
        _BUILD,
        "s.token[i] = candidate(q, i, s.token[s.parent[i]]);\n      sync_block();",
        "s.token[i] = candidate(q, i, s.token[s.parent[i]]);",
        "race",
    ),
    Mutation(
        "new_node_not_shared",
        _BUILD,
        "      s.token[at] = token;\n    }\n    sync_warp();",
        "      s.token[at] = token;\n    }",
        "race",
    ),
    Mutation(
        "first_row_stays", _BUILD, "int i = row + 1 + lane_id(); i < rows;", "int i = lane_id(); i < row;", "plain"
    ),
    Mutation(
        "descending_moves",
        _PAGES,
        "for (int j = 1; j <= accepted; j++)\n      reinterpret_cast",
        "for (int j = accepted; j >= 1; j--)\n      reinterpret_cast",
        "plain",
    ),
    Mutation("padding_appended", _PAGES, "|| i >= checked_count(p.n_nodes, b, p.nodes, 0, q.fault)", "", "plain"),
    Mutation("last_of_ties", _VERIFY, "0xffffffffu - (uint32_t)index);", "(uint32_t)index);", "plain"),
    Mutation(
        "best_read_early",
        _VERIFY,
        "if (lane_id() == 0) s.best[warp_id()] = key;\n    sync_block();",
        "if (lane_id() == 0) s.best[warp_id()] = key;",
        "race",
    ),
    Mutation("tail_not_masked", _ATTENTION, "if (masked && ", "if (false && ", "plain"),
    Mutation("no_wait_for_copy", _ATTENTION, "cp_async_wait<1>();", "cp_async_wait<2>();", "race"),
    Mutation(
        "stage_refilled_early",
        _ATTENTION,
        "sync_copies();  // everyone has read the stage that is filled next",
        "",
        "race",
    ),
    Mutation("sum_not_rescaled", _ATTENTION, "run.sum[h] * shrink + sum", "run.sum[h] + sum", "plain"),
    Mutation("joined_early", _ATTENTION, "    sync_block();\n    store(p,", "    store(p,", "race"),
    Mutation("merge_ignores_lse", _ROWS, "sum += exp2_approx((lse - base) * kLog2e) *", "sum +=", "plain"),
]


def _tree():
    parent = torch.tensor([[-1, 0, 0, 1, 1, 2, 5, -2]], dtype=torch.int32)
    return parent, torch.tensor([7], dtype=torch.int32), torch.tensor([10], dtype=torch.int32)


def _same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def _check_trees(generator):
    parent, n_nodes, lens = _tree()
    _same(spec.tree_finalize(parent, n_nodes, lens), reference.tree_finalize(parent, n_nodes, lens))
    table = torch.stack([torch.randperm(20, generator=generator)[:8] for _ in range(20)]).to(torch.int32)
    roots = torch.tensor([3, 7], dtype=torch.int32)
    template = spec.DEFAULT_TEMPLATE
    _same(spec.tree_from_template(template, table, roots), reference.tree_from_template(*template, table, roots))
    sequences = torch.randint(0, 3, (2, 3, 4), generator=generator, dtype=torch.int32)
    _same(spec.tree_from_sequences(sequences, roots), reference.tree_from_sequences(sequences, roots, 13))
    expected = table.clone()
    topk = torch.arange(32, dtype=torch.int32).view(1, 4, 8)
    spec.table_update(table, torch.tensor([[5, 6, 5, 6]], dtype=torch.int32), topk)
    expected[5], expected[6] = topk[0, 2], topk[0, 3]
    assert torch.equal(table, expected)
    tokens = torch.randint(0, 3, parent.shape, generator=generator, dtype=torch.int32)
    logits = torch.randint(0, 2, (1, 8, 70), generator=generator).float()
    tokens[0, 1] = logits[0, 0].argmax()
    _same(
        spec.verify_greedy(parent, tokens, logits, n_nodes=n_nodes),
        reference.verify_greedy(parent, tokens, logits, n_nodes, 7),
    )


def _check_caches(generator):
    parent, n_nodes, _ = _tree()
    pages = torch.randn(2, 12, 16, 1, 64, generator=generator).bfloat16()
    table = torch.randperm(12, generator=generator)[None].to(torch.int32)
    prefix = torch.tensor([150], dtype=torch.int32)
    fresh = torch.randn(2, 1, 8, 1, 64, generator=generator).bfloat16()
    flat = pages[:, table[0].long()].flatten(1, 2)
    flat[:, 150:157] = fresh[:, 0, :7]
    spec.append_kv(pages[0], pages[1], table, prefix, fresh[0], fresh[1], n_nodes=n_nodes)
    assert torch.equal(pages[:, table[0].long()].flatten(1, 2), flat)
    q = torch.randn(1, 8, 2, 64, generator=generator).bfloat16()
    links = spec.tree_finalize(parent, n_nodes, prefix)
    ancestors = (links.ancestor_bits >> torch.arange(8) & 1).bool()
    for long_table in (table, torch.cat([table] * 3, 1)):  # the longer one has room for several splits
        out = spec.tree_attention(q, pages[0], pages[1], long_table, prefix, links.ancestor_bits)
        exact, _ = reference.tree_attention(q.double(), *pages.double(), table, prefix, ancestors)
        assert ((out - exact).norm() <= 0.01 * exact.norm()).item()
    path, accept = torch.tensor([[0, 2, 5, 6]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    flat[:, 150:154] = flat[:, [150, 152, 155, 156]].clone()
    spec.compact_kv([(pages[0], pages[1])], table, prefix, path, accept)
    assert torch.equal(pages[:, table[0].long()].flatten(1, 2), flat)


def check():
    generator = torch.Generator().manual_seed(5)
    _check_trees(generator)
    _check_caches(generator)
