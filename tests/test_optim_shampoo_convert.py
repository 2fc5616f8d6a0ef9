"""tw.optim.convert_state_dict to Shampoo: its matrices between bits and blocks, and moments of other optimizers."""

import copy
from functools import partial

import pytest
import torch

import tilewise as tw
from optimizer_cases import assert_same_state, copies, give_gradients, moments, snapshot, train
from tilewise.optim import convert_state_dict, preconditioners, shampoo_state

pytestmark = pytest.mark.usefixtures("one_thread", "home")
SHAPES = [(66, 70), (64, 5, 3), (5,), (0, 3)]
BITS = (4, 8, 32)
make = partial(tw.optim.Shampoo, lr=1e-2, precondition_interval=1, root_interval=2, matrix_eps=1e-3)


def trained(shapes=SHAPES, steps=3, **options):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = make(params, **options)
    train(optimizer, params, steps)
    return params, optimizer


def converted(params, state_dict, **options):
    optimizer = make(copies(params), **options)
    optimizer.load_state_dict(convert_state_dict(state_dict, optimizer))
    return optimizer.param_groups[0]["params"], optimizer


def matrices(optimizer, p):
    """{order: (statistics, inverse roots)} as float32."""
    state = optimizer.state[p]
    where = shampoo_state.layout_of(state)
    slots = {
        n: [preconditioners.Slot(state, n, i) for i in range(b)] for n, b in (where.orders if where else {}).items()
    }
    return {n: (preconditioners.statistics_of(s), preconditioners.roots_of(s)) for n, s in slots.items()}


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ---- bits ----


@pytest.mark.parametrize("graft", ["adamw", "sgd"])
@pytest.mark.parametrize("source", BITS)
@pytest.mark.parametrize("target", BITS)
def test_between_bits(graft, source, target):
    """To more bits exactly, to fewer within their error; the same bits are copied bit by bit."""
    params, optimizer = trained(state_bits=source, graft=graft)
    before = snapshot(optimizer)
    twins, other = converted(params, optimizer.state_dict(), state_bits=target)
    assert_same_state(snapshot(optimizer), before)
    group = other.param_groups[0]
    assert group["graft"] == graft and group["state_bits"] == target
    if source == target:
        assert_same_state(snapshot(other), before)
    wide = target == 32 or source != 32
    for p, q in zip(params, twins, strict=True):
        assert all(float(other.state[q][name]) == float(optimizer.state[p][name]) for name in ("step", "root_step"))
        for (a, root_a), (b, root_b) in zip(matrices(optimizer, p).values(), matrices(other, q).values(), strict=True):
            assert relative(b, a) < (1e-6 if wide else 0.3) and relative(root_b, root_a) < (1e-6 if wide else 0.1)
        new = moments(other, q)
        for name, old in moments(optimizer, p).items():
            assert (new[name] - old).norm() <= (0 if target == 32 else 0.3) * old.norm()
    if target == 32:  # what 4 bits hold is continued exactly
        assert not any(name.startswith("eigen") for state in other.state.values() for name in state)
    train(other, twins, 2)
    assert all(p.isfinite().all() for p in twins)


def test_a_conversion_there_and_back_steps_alike():
    """4 bits, 32, and 4 again: the direction of the next step is the same up to what is rounded twice."""
    params, four = trained(shapes=[(66, 70)], state_bits=4)
    _, wide = converted(params, four.state_dict(), state_bits=32)
    ways = []
    for _, optimizer in ((0, four), converted(params, wide.state_dict(), state_bits=4)):
        [p] = optimizer.param_groups[0]["params"]
        torch.manual_seed(1)
        before = p.detach().clone()
        optimizer.param_groups[0]["root_interval"] = 100
        train(optimizer, [p])
        ways.append(p.detach() - before)
    assert relative(ways[1], ways[0]) < 0.1


def test_matrices_without_statistics():
    """Before T1 there are none, and none are made up."""
    params, optimizer = trained(precondition_interval=10)
    for options in ({"state_bits": 32}, {"max_order": 40}):
        twins, other = converted(params, optimizer.state_dict(), **options)
        for q in twins:
            assert float(other.state[q]["step"]) == 3 and float(other.state[q]["root_step"]) == 0
            assert not any(t.any() for pair in matrices(other, q).values() for t in pair)


def test_overrides_and_small_matrices_decide():
    params, optimizer = trained(shapes=[(66, 70), (70, 66)])
    twins = copies(params)
    tw.optim.override(twins[1], state_bits=32)
    other = make(twins, min_quantized_size=67**2)
    other.load_state_dict(convert_state_dict(optimizer.state_dict(), other))
    names = [{name for name in other.state[q] if name.startswith(("eigenvalues", "statistics."))} for q in twins]
    assert names == [{"statistics.66", "eigenvalues.70"}, {"statistics.66", "statistics.70"}]


# ---- blocks ----


def kronecker_gradient(rows, columns):
    return torch.outer(torch.randn(rows), torch.randn(columns))


@pytest.mark.parametrize("shape", [(66, 70), (40, 90)], ids=str)
@pytest.mark.parametrize("target", [30, 45, 24])
def test_smaller_blocks_of_kronecker_products(shape, target):
    """One gradient u v^T: the statistics of every part are those that an optimizer of that size would have."""
    whole = torch.nn.Parameter(torch.randn(shape))
    [cut] = copies([whole])
    a, b = make([whole], state_bits=32), make([cut], state_bits=32, max_order=target)
    whole.grad = kronecker_gradient(*shape)
    cut.grad = whole.grad.clone()
    a.step(), b.step()
    [p], other = converted([whole], a.state_dict(), state_bits=32, max_order=target)
    assert torch.equal(other.state[p]["blocks"], b.state[cut]["blocks"])
    for order, (expected, _) in matrices(b, cut).items():
        torch.testing.assert_close(matrices(other, p)[order][0], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("source,target", [(24, 1200), (30, 45), (45, 30)])
def test_other_blocks(bits, source, target):
    """Squares of every row and column survive, so do counters; roots are those of the new statistics."""
    params, optimizer = trained(shapes=[(66, 70)], state_bits=32, max_order=source)
    [p], other = converted(params, optimizer.state_dict(), state_bits=bits, max_order=target, min_quantized_size=1)
    [old] = params
    assert other.param_groups[0]["max_order"] == target
    assert int(other.state[p]["root_step"]) == 2 and int(other.state[p]["statistics_step"]) == 3
    for a, b in zip(squares(optimizer, old), squares(other, p), strict=True):
        assert relative(b, a) < (1e-5 if bits == 32 else 0.3)
    found = copy.deepcopy(matrices(other, p))
    state, group = other.state[p], other.param_groups[0]
    for order, (average, roots) in found.items():
        slots = [preconditioners.Slot(state, order, i) for i in range(len(average))]
        preconditioners.compute_roots(slots, group["matrix_eps"])
        torch.testing.assert_close(roots, matrices(other, p)[order][1], rtol=1e-3, atol=1e-3 * float(roots.max()))
    train(other, [p], 2)
    assert p.isfinite().all()


def squares(optimizer, p):
    """Sums of squares of all rows, and of all columns, that the statistics stand for."""
    where, found = shampoo_state.layout_of(optimizer.state[p]), matrices(optimizer, p)
    sums = torch.zeros(where.rows), torch.zeros(where.columns)
    for block in where.blocks:
        for total, at, (order, i) in zip(sums, (block.rows, block.columns), (block.left, block.right), strict=True):
            total[at] += found[order][0][i].diagonal()
    return sums


def test_between_blocks_nothing_is_known():
    params, optimizer = trained(shapes=[(66, 70)], state_bits=32, max_order=40)
    [p], other = converted(params, optimizer.state_dict(), state_bits=32)
    left, right = matrices(other, p)[66][0][0], matrices(other, p)[70][0][0]
    assert not left[:33, 33:].any() and not right[:35, 35:].any()
    first, second = (matrices(optimizer, params[0])[33][0][i] for i in (0, 1))  # of the two blocks of the first rows
    torch.testing.assert_close(left[:33, :33], first + second)


# ---- from other optimizers ----


@pytest.mark.parametrize("theirs", [torch.optim, tw.optim], ids=["torch", "tilewise"])
@pytest.mark.parametrize("graft", ["adamw", "sgd"])
def test_moments_of_the_grafted_rule(theirs, graft):
    """Until there are roots it trains on as that optimizer does; then its matrices begin."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    own = {"state_bits": 32} if theirs is tw.optim else {}
    rule = (
        theirs.AdamW(params, lr=0.02, **own) if graft == "adamw" else theirs.SGD(params, lr=0.02, momentum=0.8, **own)
    )
    train(rule, params, 3)
    twins = copies(params)
    optimizer = make(twins, graft=graft, state_bits=32, root_interval=6, precondition_interval=6)
    optimizer.load_state_dict(convert_state_dict(rule.state_dict(), optimizer))
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.02 and group["graft"] == graft and (graft == "adamw" or group["momentum"] == 0.8)
    for _ in range(2):
        give_gradients(params, twins)
        rule.step(), optimizer.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
    train(optimizer, twins, 3)
    assert float(optimizer.state[twins[0]]["root_step"]) == 6
    assert matrices(optimizer, twins[0])[66][1].any()


def test_momentum_of_bitsandbytes():
    """It keeps momentum as a beta."""
    p = torch.nn.Parameter(torch.randn(5, 6))
    group = {"lr": 0.25, "weight_decay": 0.0, "betas": (0.7, 0.0), "eps": 0.0, "params": [0]}
    held = {"step": 7, "state1": torch.randn(5, 6)}
    optimizer = make([p], graft="sgd")
    optimizer.load_state_dict(convert_state_dict({"state": {0: held}, "param_groups": [group]}, optimizer))
    assert optimizer.param_groups[0]["momentum"] == 0.7 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], held["state1"])


# ---- bad input ----

WRONG = {
    "another rule's": lambda d: d["state"][0].pop("exp_avg"),
    "no blocks": lambda d: d["state"][0].pop("blocks"),
    "no statistics": lambda d: d["state"][0].pop("eigenvalues.66"),
    "truncated": lambda d: d["state"][0].update({"root.66": d["state"][0]["root.66"][:, :-1]}),
    "NaN": lambda d: d["state"][0]["eigenvalues.66"].fill_(float("nan")),
    "other graft": lambda d: d["param_groups"][0].update(graft="sgd"),
    "bad option": lambda d: d["param_groups"][0].update(shampoo_beta=2.0),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_dicts(name):
    params, optimizer = trained()
    wrong = snapshot(optimizer)
    WRONG[name](wrong)
    with pytest.raises(ValueError, match="convert_state_dict: "):
        convert_state_dict(wrong, make(copies(params), state_bits=32))


def test_states_of_other_rules():
    params, optimizer = trained()
    for rule in (tw.optim.SGD(params, momentum=0.9), tw.optim.Adagrad(params), torch.optim.RMSprop(params)):
        train(rule, params)
        with pytest.raises(ValueError, match="convert_state_dict: "):
            convert_state_dict(rule.state_dict(), optimizer)
    with pytest.raises(ValueError, match="convert_state_dict: "):
        convert_state_dict(optimizer.state_dict(), tw.optim.AdamW(params))
