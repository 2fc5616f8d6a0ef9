"""tw.optim.CPUOffload: states and master parameters in host memory."""

import copy

import pytest
import torch

import tilewise as tw
from optimizer_cases import MAKERS, assert_equal, copies, give_gradients, parameters, through_file

pytestmark = pytest.mark.usefixtures("one_thread", "home")
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def loss_of(params):
    return sum((p.float().square().sum() + p.float().sin().sum()) for p in params)


@every_optimizer
def test_follows_the_optimizer_itself(make):
    """The same as the optimizer over parameters in host memory, under a schedule and with a group added."""
    ours, theirs = (lambda p: (p, copies(p, "cpu")))(parameters())
    a, b = tw.optim.CPUOffload(ours[:3], make.func, **make.keywords), make(theirs[:3])
    for optimizer, params in ((a, ours), (b, theirs)):
        optimizer.add_param_group({"params": params[3:], "lr": 0.1})
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (a, b)]
    for _ in range(3):
        give_gradients(ours, theirs)
        for optimizer, schedule in zip((a, b), schedules, strict=True):
            optimizer.step(), schedule.step()
        assert_equal(ours, theirs)
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]
    a.zero_grad()
    assert all(p.grad is None for p in ours)


@every_optimizer
def test_float32_masters_of_bfloat16_parameters(make):
    """Gradients come through the hooks; parameters are the masters rounded, those of a float32 run."""
    params = parameters(dtype=torch.bfloat16, shapes=[(70, 80), (5,)])
    masters = [torch.nn.Parameter(p.detach().cpu().float()) for p in params]
    optimizer = tw.optim.CPUOffload(params, make.func, master_dtype=torch.float32, **make.keywords)
    other = make(masters)
    for _ in range(3):
        optimizer.zero_grad(), other.zero_grad()
        loss_of(params).backward()
        loss_of(params).backward()  # gradients add up
        torch.nn.utils.clip_grad_norm_(params, 3.0)  # after they were copied
        for p, master in zip(params, masters, strict=True):
            master.grad = p.grad.cpu().float()
        optimizer.step(), other.step()
        for p, master, held in zip(params, masters, optimizer.state_dict()["masters"], strict=True):
            assert torch.equal(held, master) and torch.equal(p.cpu(), master.to(torch.bfloat16))


def test_parameters_without_gradient_and_closures():
    params = parameters(dtype=torch.bfloat16, shapes=[(70, 80), (5,)])
    optimizer = tw.optim.CPUOffload(params, torch.optim.SGD, lr=0.1, master_dtype=torch.float32)
    before = [p.detach().clone() for p in params]

    def closure():
        optimizer.zero_grad()
        loss = loss_of(params[:1])
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[-1] < losses[0] and torch.equal(params[1], before[1])
    loss_of(params).backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert not torch.equal(params[0], before[0]) and torch.equal(params[1], before[1])


def test_saving_and_loading():
    params = parameters(dtype=torch.bfloat16, shapes=[(70, 80), (5,)])
    make = lambda p, **o: tw.optim.CPUOffload(p, tw.optim.AdamW, master_dtype=torch.float32, **o)  # noqa: E731
    optimizer, twins = make(params, lr=1e-3), None
    loss_of(params).backward()
    optimizer.step()
    twins = copies(params)
    other = make(twins, lr=0.5)
    saved = optimizer.state_dict()
    other.load_state_dict(through_file(saved))
    assert other.param_groups[0]["lr"] == 1e-3
    for p, o in ((params, optimizer), (twins, other)):
        o.zero_grad()
        loss_of(p).backward()
        o.step()
    assert_equal(params, twins)
    assert_equal(optimizer.state_dict()["masters"], other.state_dict()["masters"])
    before = other.state_dict()
    for wrong, error in (
        ({"masters": []}, ValueError),
        ({"state": None}, TypeError),
        ({"param_groups": []}, ValueError),
    ):
        with pytest.raises(error, match="load_state_dict: "):
            other.load_state_dict(before | wrong)
        assert_equal(other.state_dict()["masters"], before["masters"])
    other.load_state_dict({name: before[name] for name in ("state", "param_groups")})
    assert torch.equal(other.state_dict()["masters"][0], twins[0].cpu().float())
    assert other.memory_report([("weight", twins[0])])[0].name == "weight"


def test_grad_scaler(home):
    params = parameters(dtype=torch.float32, shapes=[(70, 80)])
    optimizer = tw.optim.CPUOffload(params, lr=1e-2)
    scaler = torch.amp.GradScaler(home.type, init_scale=64.0)
    for bad in (False, True):
        before = params[0].detach().clone()
        optimizer.zero_grad()
        scaler.scale(loss_of(params) * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer), scaler.update()
        assert torch.equal(params[0], before) == bad and params[0].isfinite().all()


def test_errors():
    optimizer = tw.optim.CPUOffload(parameters())
    with pytest.raises(TypeError, match="CPUOffload: cannot be pickled"):
        copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match="AdamW: lr is -1"):
        tw.optim.CPUOffload(parameters(), lr=-1)
    with pytest.raises(ValueError, match="AdamW: state_bits is 5"):
        optimizer.add_param_group({"params": parameters(), "state_bits": 5})
    assert len(optimizer.param_groups) == 1
    p = torch.nn.Parameter(torch.randn(5, 4, dtype=torch.bfloat16))
    optimizer = tw.optim.CPUOffload([p], master_dtype=torch.float32)
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4, dtype=torch.bfloat16), (5, 4), check_invariants=True)
    with pytest.raises(TypeError, match="layout"):
        optimizer.step()
