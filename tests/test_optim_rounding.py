"""16-bit parameters of a step: stochastic rounding and float32 masters, bit for bit."""

import dataclasses

import pytest
import torch

from optim_cases import RULES, call, make_slot, run_step
from tilewise.reference import optim as reference

HALVES = [torch.bfloat16, torch.float16]
PLAIN = RULES["sgd"]._replace(lr=2.0**-6, weight_decay=0.0, stochastic_rounding=True)


def exact_slot(n, dtype, size, stream=0):
    """A parameter and a gradient whose plain step is exact in float32, so that only its rounding is seen."""
    p = (torch.randint(-128, 128, (n,)) * size / 128).to(dtype)
    g = torch.randint(-(2**12), 2**12, (n,)).float() * size / 2**6
    return dataclasses.replace(make_slot((n,), dtype, torch.float32, PLAIN, "32bit"), param=p, grad=g, stream=stream)


def stepped(slot):
    return slot.param.float() - slot.grad * 2.0**-6


@pytest.mark.parametrize("size", [1.0, 2.0**-12, 2.0**-20, 2.0**14], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.modes
def test_bits(device, dtype, size):
    """Philox with key (seed, stream) and counter (group of 8 elements, step); float16 has subnormals and a largest."""
    slots = [exact_slot(n, dtype, size, stream) for n, stream in ((1000, 0), (77, 5), (9, 2**32 - 1))]
    o = PLAIN._replace(seed=12345)
    for got, slot in zip(run_step(slots, device, o), slots, strict=True):
        random = reference.random_bits(slot.param.numel(), 12345, slot.stream, 7)
        expected = reference.round_stochastically(stepped(slot), random, dtype)
        assert torch.equal(got.param.view(torch.int16), expected.view(torch.int16))


def test_seed_stream_and_step_change_the_bits(device):
    slot = exact_slot(512, torch.bfloat16, 1.0)
    first = run_step([slot], device, PLAIN)[0].param
    assert torch.equal(run_step([slot], device, PLAIN)[0].param, first)
    others = [
        run_step([slot], device, PLAIN._replace(seed=1)),
        run_step([dataclasses.replace(slot, stream=1)], device, PLAIN),
        run_step([dataclasses.replace(slot, step=torch.tensor(7.0))], device, PLAIN),
    ]
    for (other,) in others:
        assert not torch.equal(other.param, first)
        assert (other.param.float() - first.float()).abs().max() <= 2.0**-7  # an ulp


@pytest.mark.parametrize("size", [1.0, 2.0**-16], ids=["normal", "subnormal"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mean(device, dtype, size):
    """The mean error of n elements is within 6 standard deviations of zero; one rounding has at most half a step."""
    n = 2048 if device.small else 100_000
    slot = exact_slot(n, dtype, size)
    got, exact = run_step([slot], device, PLAIN._replace(seed=int(torch.randint(2**31, ()))))[0].param, stepped(slot)
    up = (
        torch.nextafter(exact.to(dtype).abs(), torch.tensor(torch.inf, dtype=dtype)).float()
        - exact.to(dtype).abs().float()
    )
    steps = (got.double() - exact.double()) / up.double()
    assert steps.abs().mean() > 0.05  # it does round
    assert abs(float(steps.mean())) < 6 * 0.5 / n**0.5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_special_values(device, dtype):
    slot = exact_slot(8, dtype, 1.0)
    slot.param = torch.zeros(8, dtype=dtype)
    slot.grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 2.0**-40, -(2.0**30), 1.0, -1.0])
    got = run_step([slot], device, PLAIN)[0].param
    assert got[0].isnan() and got[1] == -torch.inf and got[2] == torch.inf and got[3] == 0
    assert got[5] == (2.0**24 if dtype is torch.bfloat16 else torch.inf) and got[6] == -(2.0**-6) and got[7] == 2.0**-6


@pytest.mark.parametrize("form", ["32bit", "8bit", "4bit", "rank1", "factored"])
@pytest.mark.modes
def test_stochastic_rounding_is_near(device, form):
    """With every form of states: one of the two neighbours of the step in float32."""
    o = RULES["adamw"]._replace(stochastic_rounding=True)
    slot = make_slot((3, 100), torch.bfloat16, torch.float32, o, form)
    wide = dataclasses.replace(slot, param=slot.param.float())
    got, exact = run_step([slot], device, o)[0], run_step([wide], device, o)[0]
    assert ((got.param.float() - exact.param).abs() <= 2.0**-7 * exact.param.abs() * (1 + 1e-5)).all()
    assert torch.equal(got.first, exact.first)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("adamw", "4bit"),
        ("adam", "8bit"),
        ("adam", "rank1"),
        ("lion", "4bit"),
        ("momentum", "32bit"),
        ("adagrad", "factored"),
    ],
)
@pytest.mark.modes
def test_masters_train_as_float32(device, name, form):
    """A bfloat16 parameter with its residual is a float32 parameter, bit for bit."""
    o = RULES[name]
    wide = make_slot((3, 100), torch.float32, torch.bfloat16, o, form)
    high, residual = reference.split_master(wide.param)
    split = dataclasses.replace(wide, param=high, residual=residual).to(device)
    wide = wide.to(device)
    for _ in range(3):
        call([wide, split], o)
        assert torch.equal(reference.join_master(split.param.cpu(), split.residual.cpu()), wide.param.cpu())
        assert torch.equal(split.first, wide.first)
        assert (split.param.float() - wide.param).abs().max() <= 2.0**-8 * wide.param.abs().max()
        for s in (wide, split):
            s.grad = torch.randn(3, 100).to(torch.bfloat16).to(device.torch) if s is wide else wide.grad


def test_masters_that_are_not_finite(device):
    slot = make_slot((6,), torch.bfloat16, torch.float32, PLAIN, "32bit")
    slot.residual = torch.tensor([5, -5, 7, 0, 32767, -32768], dtype=torch.int16)
    slot.grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 0.0, 0.0])
    o = PLAIN._replace(stochastic_rounding=False)
    got = run_step([slot], device, o)[0]
    assert got.param[0].isnan() and got.param[1] == -torch.inf and got.param[2] == torch.inf
    assert (got.residual[:3] == 0).all()
    assert torch.equal(got.param[3:], slot.param[3:]) and torch.equal(got.residual[3:], slot.residual[3:])
