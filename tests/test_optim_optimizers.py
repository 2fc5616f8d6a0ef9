"""The optimizers of tw.optim compute what torch.optim's do, in any form of states."""

from functools import partial

import pytest
import torch

import tilewise as tw
from harness.judge import Yardstick, assert_accurate
from optimizer_cases import (
    CASES,
    MAKERS,
    copies,
    give_gradients,
    moments,
    parameters,
    train,
)
from tilewise.optim import forms
from tilewise.optim.step import Options
from tilewise.reference import optim as reference

pytestmark = pytest.mark.usefixtures("one_thread")
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


# ---- against torch ----


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_32_bit_states_follow_torch(device, case):
    """Twenty steps under a schedule: within twice the distance between torch in float32 and in float64, and 1e-6."""
    steps = 20 if device.kind == "cpu" else 4
    ours = parameters(
        device.torch, shapes=[(64, 80), (130, 33), (5,), (), (0, 3)] if device.kind == "cpu" else [(9, 50), (5,)]
    )
    theirs, exact = copies(ours), [torch.nn.Parameter(p.detach().double()) for p in ours]
    optimizers = [case.ours(ours, state_bits=32, **case.options)]
    optimizers += [case.theirs(params, **case.options) for params in (theirs, exact)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25) for optimizer in optimizers]
    for _ in range(steps):
        give_gradients(ours, theirs, exact)
        for p, q in zip(exact, ours, strict=True):
            p.grad = q.grad.double()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step(), schedule.step()
    p, q, r = (torch.cat([t.detach().flatten() for t in params]).cpu() for params in (ours, theirs, exact))
    if case.ours is tw.optim.Lion:  # a sign may fall the other way
        fallen = (p - r).abs() > 1e-5
        assert fallen.sum() <= 3
        p, q, r = p[~fallen], q[~fallen], r[~fallen]
        q = torch.where((q - r).abs() > 1e-5, r.float(), q)
    assert_accurate("parameters", p, Yardstick(r, [q.double() - r]), 2)
    assert (p - r).norm() <= 1e-6 * r.norm()


QUANTIZED = [(8, "block"), (4, "block"), (4, "rank1"), (4, "factored"), (8, "factored")]


every_form = pytest.mark.parametrize("bits,second", QUANTIZED, ids=[f"{b}-{s}" for b, s in QUANTIZED])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@every_form
def test_low_bit_states_follow_the_reference(case, bits, second):
    if second != "block" and case.ours in (tw.optim.SGD, tw.optim.Lion):
        with pytest.raises(TypeError, match="second_moment"):
            case.ours(parameters(), **case.options, second_moment=second)
    else:
        assert_follows_the_reference(case, bits, second, "cpu")


@every_form
def test_low_bit_states_on_every_device(device, bits, second):
    assert_follows_the_reference(CASES["AdamW"], bits, second, device.torch)


def assert_follows_the_reference(case, bits, second, where):
    """Three steps of decode, step in plain torch, encode; elements near the middle of two codes may differ."""
    extra = {"state_bits": bits, "min_quantized_size": 100} | ({} if second == "block" else {"second_moment": second})
    [p] = parameters(where, shapes=[(80, 111)])
    optimizer = case.ours([p], **case.options, **extra)
    group = optimizer.param_groups[0]
    rule = rule_of(optimizer, group)
    for t in (1, 2, 3):
        give_gradients([p])
        held = moments(optimizer, p) if t > 1 else initial_moments(optimizer, p, group)
        first, v = held.get(optimizer.first), held.get(optimizer.second)
        if v is not None and second == "factored":
            v = factored(rule, optimizer.state.get(p), p, held[optimizer.second])
        expected, m, v = reference.step(rule, p.detach().clone(), p.grad, first, v, t)
        optimizer.step()
        got = moments(optimizer, p)
        assert ((p.detach() - expected).abs() > 2e-6).sum() == 0
        for name, exact in ((optimizer.first, m), (optimizer.second, v)):
            if name in got:
                assert_encoded(got[name], exact, forms.find(optimizer.state[p], name), name == optimizer.first)


def rule_of(optimizer, group):
    fields = {"weight_decay": group["weight_decay"], "maximize": group["maximize"], **optimizer.numbers(group)}
    return Options(optimizer.rule, group["lr"], **fields)


def initial_moments(optimizer, p, group):
    state = optimizer.initial_state(p, group)
    return {
        name: forms.decode(forms.find(state, name), name, state, p.shape, signed)
        for name, signed in optimizer.moments(group).items()
    }


def factored(rule, state, p, initial):
    """The second moment that a factored step works with."""
    name = {"adam": "exp_avg_sq", "rmsprop": "square_avg", "adagrad": "sum"}[rule.rule]
    rows, _ = forms.as_matrix(p.shape)
    state = state or forms.encode(forms.FACTORED, name, initial, False)
    scales = state[name + "_means"]
    g = reference.effective_gradient(rule, p.detach(), p.grad)
    return lambda: reference.factored_moment(reference.factored_scales(rule, scales, g, rows), rows, p.shape)


def assert_encoded(got, exact, form, signed):
    """What a moment is decoded to, against what encoding the exact one gives: the same but where codes are close."""
    expected = forms.decode(form, "x", encoded(form, exact, signed), exact.shape, signed)
    scale = exact.abs().max()
    assert ((got - expected).abs() > 1e-6 * scale + 1e-5 * expected.abs()).sum() <= 3


def encoded(form, values, signed):
    if form.by_matrix or form is forms.FLOAT:
        return forms.encode(form, "x", values, signed)
    codes, scales = tw.optim.quantize_state(values, signed=signed, bits=form.bits)
    return {"x": codes, "x_scale": scales}


BYTES = [(4, "block", 1.0625), (8, "block", 2.03125), (4, "rank1", 0.5313 + 0.51), (4, "factored", 0.5313 + 0.02)]


@pytest.mark.parametrize("bits,second,size", BYTES, ids=[f"{b}-{s}" for b, s, _ in BYTES])
def test_bytes_of_states(bits, second, size):
    [p] = parameters(shapes=[(1000, 333)])
    optimizer = tw.optim.AdamW([p], state_bits=bits, second_moment=second)
    report = optimizer.memory_report([("weight", p)])
    train(optimizer, [p])
    taken = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
    assert taken / p.numel() == pytest.approx(size, rel=0.02) and report.state_bytes == taken
    assert report == optimizer.memory_report([("weight", p)])


def test_small_parameters_keep_32_bit_states():
    params = parameters(shapes=[(4095,), (4096,), (7,)])
    optimizer = tw.optim.AdamW([{"params": params[:2]}, {"params": params[2:], "min_quantized_size": 7}])
    train(optimizer, params)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.float32, torch.uint8, torch.uint8]


STRUCTURED = {
    (64, 64): "rank1",
    (20, 300): "block",  # 320 scales would be too many for 6000 elements
    (128, 128): "rank1",
    (64, 3, 3, 64): "rank1",  # as 192 x 192
    (40000,): "block",
    (2, 40000): "block",
}


@pytest.mark.parametrize("shape", STRUCTURED, ids=str)
def test_which_parameters_have_structured_states(shape):
    [p] = parameters(shapes=[shape])
    optimizer = tw.optim.AdamW([p], second_moment="rank1")
    train(optimizer, [p], 2)
    assert forms.find(optimizer.state[p], "exp_avg_sq").label == STRUCTURED[shape]
    assert forms.as_matrix((64, 3, 3, 64)) == (192, 192) and forms.as_matrix((7, 2, 3)) == (7, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_8_bit_states_meet_the_criteria_of_bitsandbytes(device, dtype):
    """Fifty steps beside torch from the same parameters: states within 3e-3 and 0.1 %, parameters within 6e-5."""
    shape, steps = ((1024, 4097), 50) if device.kind != "emulated" else ((64, 97), 10)
    p = torch.nn.Parameter((torch.randn(shape, device=device.torch) * 0.1).to(dtype))
    exact = torch.nn.Parameter(p.detach().float().clone())
    ours, theirs = tw.optim.AdamW([p], state_bits=8), torch.optim.AdamW([exact], fused=True)
    grads = (torch.randn(shape[0] + steps + 1, shape[1], device=device.torch) * 0.01).to(dtype)
    for t in range(1, steps + 1):
        p.grad = grads[t : t + shape[0]]  # an element's differ from step to step
        exact.grad = p.grad.float()
        ours.step(), theirs.step()
        with torch.no_grad():
            error = (p.float() - exact).abs().mean()
            assert error < (6e-5 if dtype is torch.float32 else 1.7e-4)
            exact.copy_(p)
        for name, values in moments(ours, p).items() if t % 10 == 0 else ():
            close = torch.isclose(values, theirs.state[exact][name], atol=3e-3, rtol=1e-3)
            assert (~close).sum() < 20


# ---- bfloat16 parameters ----


@every_optimizer
def test_masters_train_as_float32(make):
    """Parameter and residual together are the float32 parameter of a run without them."""
    params = parameters(dtype=torch.bfloat16, shapes=[(70, 80), (3,)])
    twins = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer, other = make(params, master_weights=True, state_bits=32), make(twins, state_bits=32)
    for _ in range(5):
        give_gradients(params)
        for p, twin in zip(params, twins, strict=True):
            twin.grad = p.grad.float()
        optimizer.step(), other.step()
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(reference.join_master(p.detach(), optimizer.state[p]["residual"]), twin.detach())
        assert (
            torch.equal(p.detach(), twin.detach().to(torch.bfloat16)) or (p - twin).abs().max() < 2**-7 * p.abs().max()
        )


def test_stochastic_rounding_is_unbiased_and_repeats():
    """Steps far below a bfloat16 parameter's precision: lost to nearest rounding, kept on average by stochastic."""
    runs = {}
    for name, options in {
        "nearest": {},
        "a": {"stochastic_rounding": True},
        "b": {"stochastic_rounding": True, "seed": 1},
    }.items():
        for repeat in range(2):
            p = torch.nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
            optimizer = tw.optim.SGD([p], lr=1e-4, **options)
            for _ in range(20):
                p.grad = torch.ones_like(p)
                optimizer.step()
            runs[name, repeat] = p.detach().float()
    assert (runs["nearest", 0] == 1).all()
    for name in "ab":
        assert torch.equal(runs[name, 0], runs[name, 1])
        assert abs(runs[name, 0].mean() - (1 - 20e-4)) < 2e-4
    assert not torch.equal(runs["a", 0], runs["b", 0])


def test_parameters_draw_different_random_bits():
    params = [torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = tw.optim.SGD(params, lr=1e-3, stochastic_rounding=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*params)


# ---- training ----


def loss_at_the_end(seed, make_optimizer, steps=200):
    """The loss at the end of training a small network on a task it can learn: next tokens of a noisy rule."""
    torch.manual_seed(seed)
    embed, hidden, head = torch.nn.Embedding(64, 32), torch.nn.Linear(128, 64), torch.nn.Linear(64, 64)
    params = [p for layer in (embed, hidden, head) for p in layer.parameters()]
    optimizer, losses = make_optimizer(params), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        tokens, noise = torch.randint(64, (128, 4)), torch.randint(3, (128,))
        logits = head(torch.nn.functional.gelu(hidden(embed(tokens).flatten(1))))
        loss = torch.nn.functional.cross_entropy(logits, (tokens[:, 0] // 4 * 4 + noise) % 64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20, losses[0]


@pytest.mark.parametrize("options,limit", [({"state_bits": 4}, 1.01), ({"state_bits": 8}, 1.003)], ids=["4", "8"])
def test_training_reaches_the_same_loss(options, limit):
    """Over three seeds: close to torch.optim.AdamW, far below where it began."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products; other processes may share the cores
    ours = [
        loss_at_the_end(i, lambda p: tw.optim.AdamW(p, lr=1e-2, min_quantized_size=64, **options)) for i in range(3)
    ]
    theirs = [loss_at_the_end(seed, partial(torch.optim.AdamW, lr=1e-2)) for seed in range(3)]
    torch.set_num_threads(threads)
    mean = lambda runs, i: sum(run[i] for run in runs) / len(runs)  # noqa: E731
    assert mean(theirs, 0) < 0.4 * mean(theirs, 1)
    assert mean(ours, 0) < limit * mean(theirs, 0)


def test_capturable_on_any_device(device):
    """Counters where the parameters are; the same steps."""
    ours, theirs = (lambda p: (p, copies(p)))(parameters(device.torch, shapes=[(70, 80), (3,)]))
    a, b = tw.optim.AdamW(ours, capturable=True), tw.optim.AdamW(theirs)
    for _ in range(3):
        give_gradients(ours, theirs)
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert a.state[p]["step"].device == p.device and float(a.state[p]["step"]) == 3
