"""Token trees, greedy verification and paged caches against the reference, on every device."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise.speculative as spec
from harness.emulation import assert_schedules_agree
from tilewise.reference import speculative as reference

i32 = torch.int32


def ints(values, device=None):
    return torch.tensor(values, dtype=i32, device=device and device.torch)


def random_tree(batch, nodes):
    n_nodes = torch.randint(1, nodes + 1, (batch,), dtype=i32)
    parent = torch.full((batch, nodes), -2, dtype=i32)
    for b in range(batch):
        for i in range(int(n_nodes[b])):
            parent[b, i] = int(torch.randint(0, i, ())) if i else -1
    return parent, n_nodes, torch.randint(0, 1000, (batch,), dtype=i32)


def assert_same(got, expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b), f"output {i}: {a} != {b}"


def on(device, tensors):
    return tuple(t.to(device.torch) for t in tensors)


# ---- tree_finalize ----


@pytest.mark.parametrize("batch,nodes", [(1, 1), (2, 5), (3, 64), (2, 65), (1, 256), (0, 3)])
@pytest.mark.modes
def test_tree_finalize(device, batch, nodes):
    tree = random_tree(batch, nodes)
    assert_same(spec.tree_finalize(*on(device, tree)), reference.tree_finalize(*tree))


def test_known_tree(device):
    """Tree mask rows 1000/1100/1010/1011 at sequence length 12."""
    links = spec.tree_finalize(ints([[-1, 0, 0, 2]], device), ints([4], device), ints([12], device))
    assert links.first_child.tolist() == [[1, -1, 3, -1]]
    assert links.next_sibling.tolist() == [[-1, 2, -1, -1]]
    assert links.positions.tolist() == [[12, 13, 13, 14]]
    assert links.ancestor_bits.flatten().tolist() == [0b0001, 0b0011, 0b0101, 0b1101]


def test_tree_finalize_bad_parent(device):
    parent = ints([[-1, 0, 2, 1]], device)
    counts = ints([4], device)
    with pytest.raises(ValueError, match="parent"):
        links = spec.tree_finalize(parent, counts, counts)
        assert links.positions.tolist() == [[4, 5, -1, 6]]  # the bad node counts as padding
        spec.tree_finalize(parent, counts, counts)


# ---- builders ----


def random_table(vocab, candidates):
    table = torch.stack([torch.randperm(vocab)[:candidates] for _ in range(vocab)]).to(i32)
    table[torch.rand(table.shape) < 0.15] = -1
    table[torch.rand(table.shape) < 0.05] = vocab + 7
    return table


@pytest.mark.parametrize(
    "template", [spec.DEFAULT_TEMPLATE, spec.TOKEN_RECYCLING, spec.TreeTemplate.from_levels((1,) * 5)]
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.modes
def test_tree_from_template(device, template, batch):
    table, roots = random_table(50, 8), torch.randint(0, 50, (batch,), dtype=i32)
    got = spec.tree_from_template(template, table.to(device.torch), roots.to(device.torch))
    assert_same(got, reference.tree_from_template(*template, table, roots))


def test_templates():
    for template, levels in ((spec.TOKEN_RECYCLING, (8, 21, 25, 15, 8, 3)), (spec.DEFAULT_TEMPLATE, (4, 5, 3, 2, 1))):
        nodes = len(template.parent)
        links = spec.tree_finalize(template.parent[None], ints([nodes]), ints([0]))
        assert torch.bincount(links.positions[0].long()).tolist() == [1, *levels]
        pairs = set(zip(template.parent.tolist(), template.rank.tolist(), strict=True))
        assert len(pairs) == nodes  # siblings are distinct
    with pytest.raises(ValueError, match="levels"):
        spec.TreeTemplate.from_levels((9,))


@pytest.mark.parametrize("shape,max_nodes", [((1, 1, 1), None), ((2, 4, 5), None), ((3, 6, 4), 7), ((2, 0, 3), None)])
@pytest.mark.modes
def test_tree_from_sequences(device, shape, max_nodes):
    sequences = torch.randint(-1, 3, shape, dtype=i32)
    roots = torch.randint(0, 3, shape[:1], dtype=i32)
    got = spec.tree_from_sequences(*on(device, (sequences, roots)), max_nodes=max_nodes)
    assert_same(got, reference.tree_from_sequences(sequences, roots, got.parent.shape[1]))


@pytest.mark.parametrize("batch,nodes,candidates", [(1, 1, 1), (2, 40, 8), (3, 7, 5), (1, 100, 3)])
@pytest.mark.modes
def test_table_update(device, batch, nodes, candidates):
    table = torch.randint(0, 9, (11, candidates), dtype=i32)
    tokens = torch.randint(0, 11, (batch, nodes), dtype=i32)  # duplicates: the last one stays
    topk = torch.randint(100, 999, (batch, nodes, candidates), dtype=i32)
    n_nodes = torch.randint(0, nodes + 1, (batch,), dtype=i32)
    for counts in (n_nodes, None):
        expected, got = table.clone(), table.clone().to(device.torch)
        for b in range(batch):
            for i in range(nodes if counts is None else int(counts[b])):
                expected[tokens[b, i].long()] = topk[b, i]
        where = counts.to(device.torch) if counts is not None else None
        before = got._version
        spec.table_update(got, *on(device, (tokens, topk)), n_nodes=where)
        assert torch.equal(got.cpu(), expected) and got._version > before


# ---- verification ----


def test_known_verification(device):
    """The sibling lists next_token [[1,2,-1,4,5,-1],[4,2,3,-1,5,-1]], next_sibling [[-1,3,..],[..,-1,1,-1]]."""
    parent = ints([[-1, 0, 1, 0, 3, 4], [-1, 0, 1, 2, 0, 4]], device)
    tokens = ints([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]], device)
    target = ints([[13, 0, 0, 14, 15, 99], [24, 0, 0, 0, 25, 98]], device)
    got = spec.verify_greedy(parent, tokens, target, n_nodes=ints([6, 6], device), max_depth=3)
    assert got.accept_len.tolist() == [3, 2]
    assert got.path.tolist() == [[0, 3, 4, 5], [0, 4, 5, -1]]
    assert got.out_tokens.tolist() == [[13, 14, 15, 99], [24, 25, 98, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch,nodes,vocab,max_depth", [(2, 6, 3, None), (3, 40, 2, 4), (1, 1, 7, None), (2, 9, 1, 0)])
@pytest.mark.modes
def test_verify_greedy(device, dtype, batch, nodes, vocab, max_depth):
    parent, n_nodes, _ = random_tree(batch, nodes)
    tokens = torch.randint(0, vocab, (batch, nodes), dtype=i32)
    logits = torch.randint(-1, 2, (batch, nodes, vocab)).to(dtype)  # many ties
    depth = nodes - 1 if max_depth is None else max_depth
    expected = reference.verify_greedy(parent, tokens, logits, n_nodes, depth)
    tree = on(device, (parent, tokens))
    for scores in (logits, logits.argmax(-1).to(i32)):
        got = spec.verify_greedy(*tree, scores.to(device.torch), n_nodes=n_nodes.to(device.torch), max_depth=max_depth)
        assert_same(got, expected)


@pytest.mark.parametrize("vocab", [1, 5, 17, 1000, 70001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_choice_is_torch_argmax(device, dtype, vocab):
    rows = torch.randn(10, 1, vocab).to(dtype)
    rows[1:4] = rows[1:4].round()  # ties
    rows[4] = -math.inf
    rows[5] = -math.inf
    rows[5, 0, vocab // 2] = 0.0
    rows[6, 0, vocab // 3 :] = math.nan  # the first NaN wins
    rows[7, 0, -1] = math.nan
    rows[8] = -0.0
    rows[8, 0, vocab // 2 :] = 0.0  # equal to -0
    rows[9] = math.inf
    one = torch.ones(10, dtype=i32, device=device.torch)
    wide = torch.zeros(10, 2, vocab + 8, dtype=dtype, device=device.torch)
    wide[:, :1, :vocab] = rows.to(device.torch)
    for logits in (rows.to(device.torch), wide[:, :1, :vocab]):
        got = spec.verify_greedy(-one[:, None], one[:, None], logits, n_nodes=one)
        assert torch.equal(got.out_tokens[:, 0].cpu(), rows.argmax(-1)[:, 0].to(i32))


# ---- paged caches ----


def paged(batch, positions, page_size, heads, dim, dtype):
    """Pools with a few pages too many, and a shuffled block table."""
    per_row = -(-positions // page_size)
    pool = batch * per_row + 2
    table = torch.randperm(pool)[: batch * per_row].view(batch, per_row).to(i32)
    return torch.randn(2, pool, page_size, heads, dim).to(dtype), table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("dim", [64, 6, 1])
@pytest.mark.modes
def test_append_kv(device, dtype, page_size, dim):
    batch, nodes, heads = 2, 5, 2
    pages, table = paged(batch, 30, page_size, heads, dim, dtype)
    fresh = torch.randn(2, batch, heads, nodes, dim).to(dtype).transpose(2, 3)  # strided
    start, n_nodes = ints([3, 20]), ints([5, 2])
    expected = pages.clone()
    for b in range(batch):
        for i in range(int(n_nodes[b])):
            page, slot = divmod(int(start[b]) + i, page_size)
            expected[:, table[b, page].long(), slot] = fresh[:, b, i]
    got = pages.to(device.torch).clone()
    where = on(device, (table, start, *fresh, n_nodes))
    spec.append_kv(got[0], got[1], *where[:4], n_nodes=where[4])
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("dim", [64, 3])
@pytest.mark.modes
def test_compact_kv(device, dtype, page_size, dim):
    layers, heads = 3, 2
    caches, table = [], None
    for _ in range(layers):
        pages, table = paged(3, 40, page_size, heads, dim, dtype)
        caches.append(pages)
    prefix, accept = ints([3, 25, 0]), ints([4, 0, 3])
    path = ints([[0, 2, 3, 7, 12], [0, -1, -1, -1, -1], [0, 1, 2, 5, -1]])
    expected = [pages.clone() for pages in caches]
    for pages, want in zip(caches, expected, strict=True):
        for b in range(3):
            for j in range(int(accept[b]) + 1):
                to, source = (divmod(int(prefix[b]) + i, page_size) for i in (j, int(path[b, j])))
                want[:, table[b, to[0]].long(), to[1]] = pages[:, table[b, source[0]].long(), source[1]]
    got = [pages.to(device.torch).clone() for pages in caches]
    spec.compact_kv([(p[0], p[1]) for p in got], *on(device, (table, prefix, path, accept)))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.modes
def test_schedules(device):
    if device.kind != "emulated":
        return
    tree = random_tree(2, 40)
    tokens, logits = torch.randint(0, 3, (2, 40), dtype=i32), torch.randn(2, 40, 3)
    table, sequences = random_table(30, 8), torch.randint(-1, 3, (2, 4, 5), dtype=i32)
    roots, topk = ints([3, 4]), torch.randint(0, 9, (2, 40, 8), dtype=i32)

    def updated():
        fresh = table.clone()
        spec.table_update(fresh, tokens, topk)
        return fresh

    assert_schedules_agree(lambda: tuple(spec.tree_finalize(*tree)))
    assert_schedules_agree(lambda: tuple(spec.verify_greedy(tree[0], tokens, logits, n_nodes=tree[1])))
    assert_schedules_agree(lambda: tuple(spec.tree_from_template(spec.DEFAULT_TEMPLATE, table, roots)))
    assert_schedules_agree(lambda: tuple(spec.tree_from_sequences(sequences, roots)))
    assert_schedules_agree(updated)


# ---- errors ----


def arguments():
    """One valid call of each operator, by name."""
    pages, table = paged(2, 12, 4, 2, 8, torch.float32)
    parent, n_nodes, lens = ints([[-1, 0, 0], [-1, 0, -2]]), ints([3, 2]), ints([4, 7])
    bits = spec.tree_finalize(parent, n_nodes, lens).ancestor_bits
    path, accept = ints([[0, 2], [0, -1]]), ints([1, 0])
    return {
        "tree_finalize": {"parent": parent, "n_nodes": n_nodes, "seq_lens": lens},
        "tree_from_template": {
            "template": spec.TreeTemplate(ints([-1, 0, 1]), ints([0, 1, 0])),
            "table": random_table(5, 2),
            "root_tokens": ints([0, 4]),
        },
        "tree_from_sequences": {"sequences": ints([[[1, 2]], [[3, -1]]]), "root_tokens": ints([0, 4])},
        "table_update": {"table": random_table(5, 2), "tokens": ints([[1, 2]]), "topk": ints([[[0, 1], [2, 3]]])},
        "tree_attention": {
            "q": torch.randn(2, 3, 4, 8),
            "k_pages": pages[0],
            "v_pages": pages[1],
            "block_table": table,
            "prefix_len": lens,
            "ancestor_bits": bits,
        },
        "append_kv": {
            "k_pages": pages[0],
            "v_pages": pages[1],
            "block_table": table,
            "start": lens,
            "k": torch.randn(2, 3, 2, 8),
            "v": torch.randn(2, 3, 2, 8),
        },
        "compact_kv": {
            "caches": [(pages[0], pages[1])],
            "block_table": table,
            "prefix_len": lens,
            "path": path,
            "accept_len": accept,
        },
        "verify_greedy": {"parent": parent, "tokens": parent + 5, "logits": torch.randn(2, 3, 9), "n_nodes": n_nodes},
    }


BAD = [  # operator, argument, value, error, message
    ("tree_finalize", "parent", ints([-1, 0]), ValueError, "parent"),
    ("tree_finalize", "parent", torch.zeros(2, 3), TypeError, "parent has dtype float32"),
    ("tree_finalize", "parent", torch.full((2, 257), -1, dtype=i32), ValueError, "257"),
    ("tree_finalize", "n_nodes", ints([0, 1]), ValueError, "n_nodes"),
    ("tree_finalize", "n_nodes", [3, 2], TypeError, "expected a torch.Tensor"),
    ("tree_from_template", "template", (ints([-1, 0, 2]), ints([0, 1, 0])), ValueError, "parent of node 2"),
    ("tree_from_template", "template", (ints([-1, 0, 1]), ints([0, 2, 0])), ValueError, "rank of node 1"),
    ("tree_from_template", "root_tokens", ints([5]), ValueError, "root_tokens"),
    ("tree_from_template", "table", torch.zeros(5, 2), TypeError, "table"),
    ("tree_from_sequences", "max_nodes", 257, ValueError, "max_nodes"),
    ("tree_from_sequences", "max_nodes", 0, ValueError, "max_nodes"),
    ("tree_from_sequences", "root_tokens", ints([1]), ValueError, "root_tokens"),
    ("table_update", "tokens", ints([[1, 5]]), ValueError, "tokens"),
    ("table_update", "topk", ints([[[0, 1]]]), ValueError, "topk"),
    ("table_update", "n_nodes", ints([3]), ValueError, "n_nodes"),
    ("tree_attention", "q", torch.randn(2, 3, 3, 8), ValueError, "3 heads"),
    ("tree_attention", "q", torch.randn(2, 3, 4, 9), ValueError, "head dim 9"),
    ("tree_attention", "q", torch.randn(2, 3, 4, 8).half(), TypeError, "float16"),
    ("tree_attention", "q", torch.randn(2, 3, 8, 4).transpose(2, 3), ValueError, "stride"),
    ("tree_attention", "prefix_len", ints([10, 7]), ValueError, "prefix_len"),
    ("tree_attention", "prefix_len", ints([-1, 7]), ValueError, "prefix_len"),
    ("tree_attention", "block_table", ints([[0, 8, 1], [0, 1, 2]]), ValueError, "block_table"),
    ("tree_attention", "block_table", ints([[0, -1, 1], [0, 1, 2]]), ValueError, "block_table"),
    ("tree_attention", "ancestor_bits", torch.zeros(2, 3, 2, dtype=torch.int64), ValueError, "ancestor_bits"),
    ("tree_attention", "ancestor_bits", torch.full((2, 3, 1), 8), ValueError, "ancestor_bits"),
    ("tree_attention", "scale", math.nan, ValueError, "scale"),
    ("append_kv", "start", ints([10, 0]), ValueError, "start"),
    ("append_kv", "k", torch.randn(2, 3, 2, 8).half(), TypeError, "k has dtype"),
    ("append_kv", "v", torch.randn(2, 2, 2, 8), ValueError, "v has shape"),
    ("append_kv", "n_nodes", ints([4, 0]), ValueError, "n_nodes"),
    ("compact_kv", "path", ints([[0, 0], [0, -1]]), ValueError, "path"),
    ("compact_kv", "path", ints([[1, 2], [0, -1]]), ValueError, "path"),
    ("compact_kv", "accept_len", ints([2, 0]), ValueError, "accept_len"),
    ("compact_kv", "prefix_len", ints([12, 0]), ValueError, "prefix_len"),
    ("verify_greedy", "logits", torch.randn(2, 3, 0), ValueError, "logits"),
    ("verify_greedy", "logits", torch.randn(2, 3, 9).double(), TypeError, "logits"),
    ("verify_greedy", "max_depth", 256, ValueError, "max_depth"),
    ("verify_greedy", "n_nodes", ints([4, 2]), ValueError, "n_nodes"),
]


@pytest.mark.parametrize("operator,argument,value,error,message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(operator, argument, value, error, message):
    call = arguments()[operator]
    getattr(spec, operator)(**call)
    call = arguments()[operator] | {argument: value}
    mutable = [t for name in ("table", "k_pages", "v_pages") if torch.is_tensor(t := call.get(name))]
    before = [t.clone() for t in mutable]
    with pytest.raises(error, match=message):
        getattr(spec, operator)(**call)
    for now, then in zip(mutable, before, strict=True):
        assert torch.equal(now, then)


OPS = torch.ops.tilewise


def test_opcheck():
    for name, call in arguments().items():
        if name == "compact_kv":
            call = dict(k_pages=[call["caches"][0][0]], v_pages=[call["caches"][0][1]], **call)
            del call["caches"]
        if name == "tree_from_template":
            template = call.pop("template")
            call = {"parent": template.parent, "rank": template.rank, **call}
        extra = {
            "tree_from_sequences": {"max_nodes": 3},
            "table_update": {"n_nodes": None},
            "tree_attention": {"scale": 0.5},
            "append_kv": {"n_nodes": None},
            "verify_greedy": {"max_depth": 2},
        }.get(name, {})
        torch.library.opcheck(getattr(OPS, name).default, tuple((call | extra).values()))


small = st.integers(-3, 4)


@settings(max_examples=2000, deadline=None)
@given(data=st.data())
def test_odd_integers(data):
    """Any integers in the index tensors: a listed error and nothing written, or the right result."""
    name = data.draw(st.sampled_from(sorted(arguments())))
    call = arguments()[name]
    indices = [key for key, t in call.items() if torch.is_tensor(t) and t.dtype == i32]
    victim = data.draw(st.sampled_from(indices))
    tensor = call[victim].clone()
    flat = tensor.view(-1)
    flat[data.draw(st.integers(0, flat.numel() - 1))] = data.draw(st.one_of(small, st.integers(-(2**31), 2**31 - 1)))
    call[victim] = tensor
    pages = call["caches"][0] if name == "compact_kv" else ()
    mutable = [*pages, *(call[k] for k in ("table", "k_pages", "v_pages") if k in call)]
    before = [t.clone() for t in mutable]
    try:
        got = getattr(spec, name)(**call)
    except (ValueError, TypeError):
        assert all(torch.equal(a, b) for a, b in zip(mutable, before, strict=True))
        return
    if name == "tree_finalize":
        assert_same(got, reference.tree_finalize(**call))
    if name == "tree_from_template":
        assert_same(got, reference.tree_from_template(*call["template"], call["table"], call["root_tokens"]))
    if name == "tree_from_sequences":
        assert_same(got, reference.tree_from_sequences(*call.values(), got.parent.shape[1]))
    if name == "verify_greedy":
        assert_same(got, reference.verify_greedy(**call, max_depth=2))
    if name == "tree_attention":
        assert torch.isfinite(got).all()
