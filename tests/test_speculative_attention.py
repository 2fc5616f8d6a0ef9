"""Tree attention against ordinary causal attention over every node's own root path, and decoding with it."""

import math

import pytest
import torch

import tilewise.speculative as spec
from attention_cases import assert_lse_close
from harness.emulation import assert_schedules_agree
from harness.judge import assert_accurate, draws, yardsticks
from test_speculative import ints, on, paged, random_tree
from tilewise.reference import speculative as reference

i32 = torch.int32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(batch, nodes, heads, kv_heads, dim, page_size, dtype, longest, chain=False):
    """Random pages, a prefix per sequence, and the nodes' own keys and values behind it."""
    pages, table = paged(batch, longest + nodes, page_size, kv_heads, dim, dtype)
    parent, n_nodes, _ = random_tree(batch, nodes)
    if chain:
        parent, _, n_nodes = spec.DraftTree.chain(torch.zeros(batch, nodes, dtype=i32))
    prefix = torch.randint(0, longest + 1, (batch,), dtype=i32)
    prefix[0] = longest
    q = torch.randn(batch, heads, nodes, dim).to(dtype).transpose(1, 2)  # strided
    return q, pages, table, prefix, parent, n_nodes


def attend(device, q, pages, table, prefix, parent, n_nodes, **options):
    parent, n_nodes, prefix, table, q, pages = on(device, (parent, n_nodes, prefix, table, q, pages))
    bits = spec.tree_finalize(parent, n_nodes, prefix).ancestor_bits
    return spec.tree_attention(q, pages[0], pages[1], table, prefix, bits, **options)


def ancestors_of(parent, n_nodes):
    """bool (B, N, N): j is i or an ancestor of i."""
    batch, nodes = parent.shape
    seen = torch.zeros(batch, nodes, nodes, dtype=torch.bool)
    for b in range(batch):
        for i in range(int(n_nodes[b])):
            seen[b, i] = seen[b, parent[b, i].long()] if i else False
            seen[b, i, i] = True
    return seen


def check(device, q, pages, table, prefix, parent, n_nodes, **options):
    """Beside plain torch in the same dtype, both against float64."""
    out, lse = attend(device, q, pages, table, prefix, parent, n_nodes, return_lse=True, **options)
    where = (table, prefix, ancestors_of(parent, n_nodes), options.get("scale"))
    plain = lambda q, pages: reference.tree_attention(q, pages[0], pages[1], *where)[:1]  # noqa: E731
    assert_accurate("out", out, *yardsticks([plain], [q, pages], draws(8 * lse.numel())), 2)
    _, exact_lse = reference.tree_attention(q.double(), *pages.double(), *where)
    assert_lse_close(lse, exact_lse)
    assert not out.cpu()[exact_lse == -math.inf].any()


def test_each_row_is_causal_attention_over_its_root_path(device):
    q, pages, table, prefix, parent, n_nodes = case(2, 7, 4, 2, 64, 7, torch.float32, 30)
    out = attend(device, q, pages, table, prefix, parent, n_nodes).cpu()
    for b in range(2):
        rows = pages[:, table[b].long()].flatten(1, 2).double().repeat_interleave(2, 2).transpose(1, 2)
        for i in range(int(n_nodes[b])):
            path = [i]
            while path[0]:
                path.insert(0, int(parent[b, path[0]]))
            keys, values = rows[:, :, [*range(prefix[b]), *(int(prefix[b]) + a for a in path)]]
            text = torch.zeros_like(keys)  # queries of the whole text: only the last one is this node's
            text[:, -1] = q[b, i].double()
            exact = torch.nn.functional.scaled_dot_product_attention(text, keys, values, is_causal=True)[:, -1]
            assert (out[b, i] - exact).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("dim", [64, 128])
def test_paths(device, dtype, page_size, dim):
    check(device, *case(2, 9, 4, 2, dim, page_size, dtype, 70))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch,nodes,heads,kv_heads,longest",
    [(1, 1, 2, 2, 150), (2, 1, 4, 1, 90), (1, 3, 1, 1, 0), (1, 40, 3, 3, 33), (1, 30, 8, 2, 64), (3, 2, 3, 1, 5)],
)
@pytest.mark.modes
def test_shapes(device, dtype, batch, nodes, heads, kv_heads, longest):
    check(device, *case(batch, nodes, heads, kv_heads, 64, 16, dtype, longest))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 40, 96, 256])
def test_other_head_dims(device, dtype, dim):
    check(device, *case(2, 5, 2, 1, dim, 4, dtype, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "nodes,heads,kv_heads,dim,longest",
    [(33, 2, 2, 64, 100), (50, 1, 1, 33, 64), (23, 6, 2, 40, 95), (65, 4, 1, 128, 129), (49, 1, 1, 72, 31)],
)
def test_many_rows(device, dtype, nodes, heads, kv_heads, dim, longest):
    """Rows and channels beyond whole tiles, blocks of keys that all rows see, that some see, and both."""
    if device.small:
        nodes, longest = nodes // 2, longest // 2
    check(device, *case(1, nodes, heads, kv_heads, dim, 16, dtype, longest))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_prefix(device, dtype):
    """Long enough to be split between processors and merged again."""
    if device.small:
        check(device, *case(1, 3, 2, 1, 64, 16, dtype, 600))
        return
    check(device, *case(1, 5, 2, 1, 64, 16, dtype, 3000))
    check(device, *case(2, 1, 4, 2, 128, 16, dtype, 3000))


@pytest.mark.parametrize("nodes", [70, 256])
def test_chain_is_causal_attention(device, nodes):
    if device.small:
        nodes //= 2
    check(device, *case(1, nodes, 2, 1, 64, 16, torch.bfloat16, 5, chain=True))


def test_scale_and_defaults(device):
    inputs = case(1, 6, 2, 1, 64, 16, torch.float32, 20)
    check(device, *inputs, scale=0.3)
    check(device, *inputs, scale=-0.3)
    default = attend(device, *inputs)
    assert torch.equal(default, attend(device, *inputs, scale=1 / 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nodes,dim", [(6, 64), (40, 64), (40, 100)])
def test_large_scores_and_rising_maximum(device, dtype, nodes, dim):
    """Later blocks exceed the first one's maximum by more than float32's exponent range can hide."""
    nodes = 6 if device.small else nodes
    q, pages, table, prefix, parent, n_nodes = case(1, nodes, 2, 1, dim, 16, dtype, 400)
    keys = pages[0][table[0].long()].flatten(0, 1)
    keys *= torch.linspace(0.1, 40, len(keys))[:, None, None]
    pages[0][table[0].long()] = keys.view(-1, 16, 1, dim)
    check(device, q, pages, table, prefix, parent, n_nodes)


@pytest.mark.parametrize("nodes", [5, 40])
@pytest.mark.parametrize("keys,values", [((1e-9, 1e-9), (1e9, 1e9)), ((1, 1), (1e-8, 1e8)), ((1, 1), (1e8, 1e-8))])
def test_sizes_beyond_fp16(device, nodes, keys, values):
    """Keys and values of any size, and values that grow or shrink from one end of the sequence to the other."""
    nodes = 5 if device.small else nodes
    q, pages, table, prefix, parent, n_nodes = case(1, nodes, 4, 2, 64, 16, torch.float32, 400)
    for rows, (first, last) in zip(pages, (keys, values), strict=True):
        sizes = torch.logspace(math.log10(first), math.log10(last), table.shape[1])
        rows[table[0].long()] *= sizes[:, None, None, None]
    check(device, q / keys[0], pages, table, prefix, parent, n_nodes)


@pytest.mark.parametrize("nodes", [5, 40])
@pytest.mark.parametrize("first,last", [(1, 1e-8), (1, 1 / 64), (1 / 64, 1), (1e-8, 1)])
def test_keys_that_grow_or_shrink(device, nodes, first, last):
    """A block of keys may not fit the range of the one before. Small keys have equal weights, which round alike."""
    nodes = 5 if device.small else nodes
    q, pages, table, prefix, parent, n_nodes = case(1, nodes, 4, 2, 64, 16, torch.float32, 400)
    sizes = torch.logspace(math.log10(first), math.log10(last), table.shape[1])
    pages[0][table[0].long()] *= sizes[:, None, None, None]
    check(device, q, pages, table, prefix, parent, n_nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("others", [0, 40])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_on_its_path(device, dtype, others, value):
    """NaN in a query reaches that row; NaN in a key every row that sees it. Infinite queries make NaN scores."""
    others = 0 if device.small else others
    q, pages, table, prefix, _, _ = case(1, 4 + others, 1, 1, 64, 16, dtype, 10)
    parent, n_nodes = ints([[-1, 0, 0, 1] + [2] * others]), ints([4 + others])
    q[0, 2] = value
    out = attend(device, q, pages, table, prefix, parent, n_nodes)
    assert out.isnan().any(-1).flatten().tolist() == [False, False, True, False] + [False] * others
    page, slot = divmod(10 + 1, 16)
    q = torch.randn_like(q)
    pages[0][table[0, page].long(), slot] = math.nan
    out = attend(device, q, pages, table, prefix, parent, n_nodes)
    assert out.isnan().any(-1).flatten().tolist() == [False, True, False, True] + [False] * others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("nodes", [4, 40])
def test_infinite_keys_and_values(device, dtype, dim, nodes):
    """A key of infinite score takes no weight if that is -inf; an infinite value reaches its channel alone."""
    nodes = 4 if device.small else nodes
    q, pages, table, prefix, parent, n_nodes = case(1, nodes, 1, 1, dim, 16, dtype, 120)
    q[..., 0] = q[..., 0].abs() + 1
    parent[:] = 0
    parent[:, 0], n_nodes[:] = -1, nodes
    clean, lse = attend(device, q, pages, table, prefix, parent, n_nodes, return_lse=True)
    row = lambda key: (table[0, key // 16].long(), key % 16)  # noqa: E731
    pages[0][row(7)][0, 0] = -math.inf
    pages[1][row(50)][0, 3] = math.inf
    out, hidden_lse = attend(device, q, pages, table, prefix, parent, n_nodes, return_lse=True)
    assert (out[..., 3] == math.inf).all()
    assert out[..., :3].isfinite().all() and out[..., 4:].isfinite().all()
    assert (hidden_lse < lse).all()


def test_pages_that_nobody_sees_may_hold_anything(device):
    q, pages, table, prefix, parent, n_nodes = case(2, 5, 2, 1, 64, 4, torch.bfloat16, 40)
    prefix = ints([17, 40])
    n_nodes = n_nodes.clamp(max=3)
    parent[:, 3:] = -2
    clean = attend(device, q, pages, table, prefix, parent, n_nodes)
    for b in range(2):
        rows = pages[:, table[b].long()].flatten(1, 2)
        rows[:, int(prefix[b]) + int(n_nodes[b]) :] = math.nan
        pages[:, table[b].long()] = rows.view(2, -1, 4, 1, 64)
    assert torch.equal(attend(device, q, pages, table, prefix, parent, n_nodes), clean)


@pytest.mark.parametrize("empty", ["batch", "nodes", "heads"])
def test_empty(device, empty):
    q = torch.zeros(0 if empty == "batch" else 2, 0 if empty == "nodes" else 3, 0 if empty == "heads" else 4, 64)
    pages = torch.zeros(2, 5, 4, 2, 64)
    lens, table = torch.zeros(len(q), dtype=i32), torch.zeros(len(q), 2, dtype=i32)
    bits = torch.zeros(*q.shape[:2], -(-q.shape[1] // 64), dtype=torch.int64)
    inputs = on(device, (q, *pages, table, lens, bits))
    out, lse = spec.tree_attention(*inputs, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]


def test_bad_indices_are_safe_on_the_device(device):
    """Without a host check the kernel goes on with what exists, and the next call raises."""
    if device.kind == "cpu":
        return
    q, pages, table, prefix, parent, n_nodes = case(1, 4, 2, 1, 64, 4, torch.bfloat16, 20)
    for bad_table, bad_prefix in ((table + 1000, prefix), (table, prefix + 1000), (table - 1000, prefix - 1000)):
        attend(device, q, pages, bad_table, bad_prefix, parent, n_nodes)
        with pytest.raises(ValueError, match="earlier tilewise call"):
            attend(device, q, pages, table, prefix, parent, n_nodes)
    check(device, q, pages, table, prefix, parent, n_nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.modes
def test_schedules(device, dtype):
    if device.kind != "emulated":
        return
    inputs = case(1, 5, 2, 1, 64, 16, dtype, 140)
    assert_schedules_agree(lambda: attend(device, *inputs, return_lse=True), 4)


# ---- decoding: speculative text equals plain greedy text ----


class TinyTransformer:
    """Two layers, random float32 weights, rotary-free: positions enter through a fixed embedding."""

    def __init__(self, vocab=11, heads=4, kv_heads=2, dim=64):
        width = heads * dim
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.tokens, self.positions = torch.randn(vocab, width), torch.randn(4096, width)
        self.layers = [
            [torch.randn(width, n * dim) / width**0.5 for n in (heads, kv_heads, kv_heads, heads)] for _ in range(2)
        ]
        self.head = torch.randn(width, vocab) / width**0.5

    def logits(self, tree, caches, table, prefix):
        links = tree.finalize(prefix)
        x = self.tokens[tree.tokens.long()] + self.positions[links.positions.clamp(min=0).long()]
        for (wq, wk, wv, wo), (k_pages, v_pages) in zip(self.layers, caches, strict=True):
            q, k, v = ((x @ w).unflatten(-1, (-1, self.dim)) for w in (wq, wk, wv))
            spec.append_kv(k_pages, v_pages, table, prefix, k, v, n_nodes=tree.n_nodes)
            out = spec.tree_attention(q, k_pages, v_pages, table, prefix, links.ancestor_bits)
            x = x + torch.tanh(out.flatten(2) @ wo.T)
        return x @ self.head

    def caches(self, batch, capacity, page_size=7):
        found = [paged(batch, capacity, page_size, self.kv_heads, self.dim, torch.float32) for _ in self.layers]
        return [(pages[0], pages[1]) for pages, _ in found], found[0][1]


def decode(model, prompt, steps, draft, learn=lambda tokens, logits, n_nodes: None):
    """Greedy text of at least ``steps`` tokens per sequence, and the number of forward passes it took."""
    batch, length = prompt.shape
    caches, table = model.caches(batch, length + 12 * steps + 128)
    prefix = torch.zeros(batch, dtype=i32)
    tree = spec.DraftTree.chain(prompt)
    logits = model.logits(tree, caches, table, prefix)
    prefix += length
    root = logits[:, -1].argmax(-1).to(i32)
    texts, passes = [[int(r)] for r in root], 0
    while min(map(len, texts)) < steps:
        tree = draft(root)
        logits = model.logits(tree, caches, table, prefix)
        found = spec.verify_greedy(tree.parent, tree.tokens, logits, n_nodes=tree.n_nodes)
        learn(tree.tokens, logits, tree.n_nodes)
        spec.compact_kv(caches, table, prefix, found.path, found.accept_len)
        prefix = prefix + found.accept_len + 1
        root = found.out_tokens.gather(1, found.accept_len.long()[:, None])[:, 0]
        for text, new, count in zip(texts, found.out_tokens.tolist(), found.accept_len.tolist(), strict=True):
            text += new[: count + 1]
        passes += 1
    return [text[:steps] for text in texts], passes


def test_speculative_text_is_greedy_text(device):
    if device.kind != "cpu":
        return  # the operators are the same; the emulator would take minutes
    model = TinyTransformer()
    prompt = torch.randint(0, 11, (3, 9), dtype=i32)
    plain, plain_passes = decode(model, prompt, 40, lambda root: spec.DraftTree.chain(root[:, None]))
    table = torch.full((11, 8), -1, dtype=i32)

    def learn(tokens, logits, n_nodes):
        spec.table_update(table, tokens, logits.topk(8).indices.to(i32), n_nodes=n_nodes)

    for template in (spec.DEFAULT_TEMPLATE, spec.TOKEN_RECYCLING):
        table.fill_(-1)
        text, passes = decode(
            model, prompt, 40, lambda root, shape=template: spec.tree_from_template(shape, table, root), learn
        )
        assert text == plain
        assert passes < plain_passes  # some drafts were accepted

    sequences = torch.tensor([[t[i : i + 4] for i in range(30)] for t in plain], dtype=i32)
    text, _ = decode(model, prompt, 40, lambda root: spec.tree_from_sequences(sequences, root, max_nodes=40))
    assert text == plain
