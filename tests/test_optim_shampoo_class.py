"""What tw.optim.Shampoo has beside the other optimizers (test_optim_behaviour.py, _checkpoint.py): matrices."""

import copy

import pytest
import torch

import tilewise as tw
from optimizer_cases import assert_equal, assert_same_state, copies, give_gradients, rejected, snapshot
from tilewise.optim import shampoo

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(66, 70), (64, 5, 3), (5,), (), (0, 3), (70, 66)]
OFTEN = {"precondition_interval": 1, "root_interval": 2}


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def trained(steps=3, graft="adamw", **options):
    params = parameters()
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.01}]
    optimizer = tw.optim.Shampoo(groups, graft=graft, **OFTEN | options)
    for _ in range(steps):
        give_gradients(params)
        optimizer.step()
    return params, optimizer


def test_groups_and_parameters_without_gradient():
    params = parameters([(70, 80)] * 4)
    optimizer = tw.optim.Shampoo([{"params": params[:1], "lr": 0.0}, {"params": params[1:2], "state_bits": 32}])
    optimizer.add_param_group({"params": params[2:], "max_order": 40, "graft": "sgd"})
    before = [p.detach().clone() for p in params]
    give_gradients(params)
    params[3].grad = None
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, False, False, True]
    assert [p in optimizer.state for p in params] == [True, True, True, False]
    assert [optimizer.state[p]["blocks"].tolist()[2:] for p in params[:3]] == [[1, 1], [1, 1], [2, 2]]
    assert ["eigenvalues.70" in optimizer.state[p] for p in params[:2]] == [True, False]
    with pytest.raises(ValueError, match="state_bits is 5"):
        optimizer.add_param_group({"params": parameters(), "state_bits": 5})
    assert len(optimizer.param_groups) == 3


def test_options_decide_at_the_first_step():
    params, optimizer = trained()
    twins, other = copy.deepcopy((params, optimizer))
    for group in other.param_groups:
        group.update(state_bits=32, max_order=20, min_quantized_size=10**6)
    give_gradients(params, twins)
    optimizer.step(), other.step()
    assert_equal(params, twins)
    optimizer.param_groups[0]["graft"] = "sgd"
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="Shampoo: a state"):
        optimizer.step()
    assert_equal(params, before)


def test_overrides():
    params = parameters([(70, 80), (80, 70)])
    tw.optim.override(params[1], state_bits=32)
    optimizer = tw.optim.Shampoo(params)
    give_gradients(params)
    optimizer.step()
    assert ["eigenvalues.70" in optimizer.state[p] for p in params] == [True, False]
    assert [row.bits for row in optimizer.memory_report()] == [4, 32]


def test_states_are_not_portable():
    """Matrices belong to one sharding."""
    _, optimizer = trained()
    with pytest.raises(NotImplementedError, match="portable_state_dict: optimizer is a Shampoo"):
        tw.optim.distributed.portable_state_dict(optimizer)
    with pytest.raises(NotImplementedError, match="load_portable_state_dict: optimizer is a Shampoo"):
        tw.optim.distributed.load_portable_state_dict(optimizer, {})


# ---- capturable ----


@pytest.mark.parametrize("options", [{}, {"state_bits": 32}, {"graft": "sgd"}], ids=str)
def test_capturable_steps_are_the_same(device, options):
    """Outside of a graph; the counter is where the parameters are, what only the host asks for stays there."""
    shapes = [(66, 70), (5,)]
    ours = [torch.nn.Parameter(torch.randn(shape, device=device.torch)) for shape in shapes]
    theirs = copies(ours)
    a, b = (tw.optim.Shampoo(p, capturable=c, **OFTEN, **options) for p, c in ((ours, True), (theirs, False)))
    for _ in range(4):
        give_gradients(ours, theirs)
        a.step(), b.step()
    a.load_state_dict(a.state_dict())
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert a.state[p]["step"].device == p.device and float(a.state[p]["step"]) == 4
        assert all(a.state[p][name].is_cpu for name in ("blocks", "statistics_step", "root_step"))


@pytest.mark.parametrize("bits", [4, 32])
def test_what_a_graph_holds(monkeypatch, bits):
    """Steps as a graph would replay them: roots of the moment, before there are any the gradient itself."""
    options = {"graft": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0, "state_bits": bits}
    options |= {"precondition_interval": 3, "root_interval": 3}
    [p], [q], [r] = (ours := parameters([(66, 70)])), copies(ours), copies(ours)
    graph, eager = tw.optim.Shampoo([p], capturable=True, **options), tw.optim.Shampoo([q], **options)
    plain = torch.optim.SGD([r], lr=1.0)

    def captured_step():
        with monkeypatch.context() as patch:
            patch.setattr(shampoo, "_is_captured", lambda p: True)
            graph.step()

    for t in range(1, 4):
        give_gradients([p], [q], [r])
        captured_step(), eager.step(), plain.step()
        torch.testing.assert_close(p, r, rtol=0, atol=1e-6)
        held = [t.clone() for t in graph.state[p].values()]
        graph.update_preconditioners()
        changed = not all(map(torch.equal, held, graph.state[p].values()))
        assert changed == (t == 3)
    for name, value in eager.state[q].items():
        assert torch.equal(graph.state[p][name], value), name
    held = snapshot(graph)
    graph.update_preconditioners()  # nothing is due any more
    assert_same_state(snapshot(graph), held)
    with torch.no_grad():
        p.zero_(), q.zero_()
    give_gradients([p], [q])
    captured_step(), eager.step()
    assert torch.equal(p, q) and not torch.equal(p, -p.grad)


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("bits", [4, 32])
def test_cuda_graph(device, bits):
    """Replays beside steps that are not captured, with the same updates between them."""
    ours = [torch.nn.Parameter(torch.randn(shape, device=device.torch)) for shape in ((66, 70), (5,))]
    theirs = copies(ours)
    options = {"lr": 1e-2, "state_bits": bits, "precondition_interval": 2, "root_interval": 2, "capturable": True}
    optimizer, other = tw.optim.Shampoo(ours, **options), tw.optim.Shampoo(theirs, **options)
    for _ in range(2):  # creates the states
        give_gradients(ours, theirs)
        optimizer.step(), other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    other.param_groups[0].update(precondition_interval=10**6, root_interval=10**6)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn_like(q)
            p.grad.copy_(q.grad)
        graph.replay(), other.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        optimizer.update_preconditioners()
        other.param_groups[0].update(precondition_interval=2, root_interval=2)
        other.update_preconditioners()
        other.param_groups[0].update(precondition_interval=10**6, root_interval=10**6)
    assert int(optimizer.state[ours[0]]["root_step"]) == 6


def test_wrong_parameters():
    """Found before anything changes, the first parameter included."""
    first = parameters([(6, 7)])
    for dtype in (torch.float64, torch.complex64):
        params = [*first, *parameters([(5, 6)], dtype)]
        give_gradients(params)
        with pytest.raises(TypeError, match="Shampoo: param has dtype"):
            tw.optim.Shampoo(params).step()
    p = parameters([(50, 4)])[0]
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (50, 4), check_invariants=True)
    expanded = torch.nn.Parameter(torch.randn(1, 40).expand(50, 40))
    expanded.grad = torch.ones(50, 40)
    for wrong, error, message in ((p, TypeError, "layout"), (expanded, ValueError, "overlap")):
        before = first[0].detach().clone()
        optimizer = tw.optim.Shampoo([*first, wrong])
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(first[0], before) and not optimizer.state


def test_a_gradient_of_another_shape():
    params = parameters([(66, 70), (70, 66)])
    give_gradients(params)
    params[1].data = torch.randn(66, 70)
    before = [p.detach().clone() for p in params]
    optimizer = tw.optim.Shampoo(params, **OFTEN)
    for call in (optimizer.step, optimizer.update_preconditioners):
        with pytest.raises(ValueError, match=r"Shampoo: a gradient has shape \(70, 66\)"):
            call()
    assert_equal(params, before)
    assert not optimizer.state


# ---- saving and loading ----


def put(name, change, index=0):
    """Replaces one tensor of a state by a function of it."""
    return lambda d: d["state"][index].__setitem__(name, change(d["state"][index][name]))


WRONG_STATES = {
    "group option missing": (ValueError, lambda d: d["param_groups"][0].pop("max_order")),
    "other graft": (ValueError, lambda d: d["param_groups"][0].__setitem__("graft", "sgd")),
    "tensor missing": (ValueError, lambda d: d["state"][0].pop("eigenvalues.66")),
    "tensor too many": (ValueError, lambda d: d["state"][0].__setitem__("statistics.66", torch.zeros(1, 66, 66))),
    "truncated codes": (ValueError, put("eigenvectors.66", lambda t: t[:, :-1])),
    "other parameter's": (ValueError, lambda d: d["state"].update({0: d["state"][1], 1: d["state"][0]})),
    "codes as float": (TypeError, put("root.70", torch.Tensor.float)),
    "no tensor": (TypeError, put("root_diagonal.70", torch.Tensor.tolist)),
    "NaN root": (ValueError, put("root_diagonal.70", lambda t: t * float("nan"))),
    "negative scale": (ValueError, put("root_scales.70", torch.neg)),
    "negative eigenvalues": (ValueError, put("eigenvalues.70", lambda t: -1 - t)),
    "infinite statistics": (ValueError, put("statistics.15", lambda t: t + float("inf"), 1)),
    "roots of tomorrow": (ValueError, put("root_step", lambda t: t + 9)),
    "other blocks": (ValueError, put("blocks", lambda t: t + 1)),
    "too many blocks": (ValueError, put("blocks", lambda t: t + 10**6)),
    "negative blocks": (ValueError, put("blocks", torch.neg)),
    "no blocks": (ValueError, put("blocks", torch.zeros_like)),
    "meta tensor": (ValueError, put("root.66", lambda t: t.to("meta"))),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_wrong_state_dict_changes_nothing(name):
    error, spoil = WRONG_STATES[name]
    params, optimizer = trained()
    wrong = snapshot(optimizer)
    spoil(wrong)
    rejected(optimizer, wrong, error, "Shampoo.load_state_dict: ")
