"""Optimizers on sharded parameters: 2 and 4 processes on gloo against one, checkpoints across numbers of processes."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.multiprocessing as multiprocessing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import tilewise as tw
from optimizer_cases import ELEMENTWISE, assert_equal, assert_same_state, give_gradients, moments, snapshot
from tilewise.optim import forms
from tilewise.optim.distributed import load_portable_state_dict, local_state_dict, portable_state_dict
from tilewise.optim.tensors import local, stream_of

# Rows over 4 processes: 3 3 3 1, 1 1 1 0 (the last is empty), 2 2 2 2 (whole blocks of 128 and 256 elements) and 2 2 1.
SHAPES = [(10, 700), (3, 2000), (8, 1024), (5,)]
SECONDS = 240  # a deadlock is a failure
TORCH_STATES = ("32", "rank1")  # through torch's own functions; 4-bit first moments are among them
STATES = {"32": {"state_bits": 32}, "8": {"state_bits": 8}, "4": {}, "rank1": {"second_moment": "rank1"}}


def shard(t, mesh):
    """Rows of a tensor that every rank has."""
    return distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)


def pairs(mesh):
    """The same parameters as DTensors and as whole tensors; the same on every rank."""
    torch.manual_seed(7)
    whole = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return [torch.nn.Parameter(shard(p.detach().clone(), mesh)) for p in whole], whole


def steps(mesh, optimizer, sharded, other, whole, count=2):
    for _ in range(count):
        give_gradients(whole)
        for p, q in zip(sharded, whole, strict=True):
            p.grad = shard(q.grad, mesh)
        optimizer.step(), other.step()


def gathered(params):
    return [p.full_tensor().detach() for p in params]


def sharded_steps(mesh):
    """Every optimizer: with 32-bit states as one process, in few bits where shards are whole blocks."""
    for make in ELEMENTWISE.values():
        for options in ({"state_bits": 32}, {"state_bits": 8}, {}):
            sharded, whole = pairs(mesh)
            optimizer, other = make(sharded, **options), make(whole, **options)
            steps(mesh, optimizer, sharded, other, whole)
            same = range(len(SHAPES)) if options.get("state_bits") == 32 else (2,)
            for i in same:
                torch.testing.assert_close(gathered(sharded)[i], whole[i].detach(), rtol=1e-6, atol=1e-7)
            for p, q in zip(sharded, whole, strict=True):  # decided by the size of the whole parameter
                name = optimizer.first or optimizer.second
                assert forms.find(optimizer.state[p], name) == forms.find(other.state[q], name)


def structured_shards(mesh):
    """Rank-1 and factored states belong to the shard's rows and columns, empty shards included."""
    for second in ("rank1", "factored"):
        torch.manual_seed(8)
        whole = [torch.nn.Parameter(torch.randn(200, 256)), torch.nn.Parameter(torch.randn(3, 64, 64))]
        sharded = [torch.nn.Parameter(shard(p.detach().clone(), mesh)) for p in whole]
        optimizer = tw.optim.AdamW(sharded, second_moment=second, lr=1e-2)
        steps(mesh, optimizer, sharded, tw.optim.AdamW(whole, second_moment=second, lr=1e-2), whole)
        rows = local(sharded[0]).shape[0]
        name = {"rank1": "exp_avg_sq_maxima", "factored": "exp_avg_sq_means"}[second]
        assert optimizer.state[sharded[0]][name].shape == (rows + 256,)
        for p, q in zip(gathered(sharded), whole, strict=True):
            assert (p - q).abs().max() < 0.1 and not torch.equal(p, torch.zeros_like(p))


def shampoo_shards(mesh):
    """A shard is a matrix of its own: as on plain parameters that are the shards."""
    sharded, whole = pairs(mesh)
    parts = [torch.nn.Parameter(local(p).detach().clone()) for p in sharded]
    options = {"lr": 0.1, "state_bits": 32, "max_order": 512, "precondition_interval": 1, "root_interval": 2}
    optimizer, other = tw.optim.Shampoo(sharded, **options), tw.optim.Shampoo(parts, **options)
    for _ in range(3):
        give_gradients(whole)
        for p, part, q in zip(sharded, parts, whole, strict=True):
            p.grad = shard(q.grad, mesh)
            part.grad = local(p.grad).clone()
        optimizer.step(), other.step()
    assert_equal([local(p) for p in sharded], parts)
    other.load_state_dict(local_state_dict(optimizer))
    with pytest.raises(NotImplementedError, match="Shampoo.state_dict: a parameter is sharded"):
        optimizer.state_dict()


def streams(mesh):
    """Shards draw different random bits, replicas the same."""
    p = torch.nn.Parameter(shard(torch.randn(8, 4), mesh))
    q = torch.nn.Parameter(distribute_tensor(torch.randn(8, 4), mesh, [Replicate()]))
    found = [None] * mesh.size()
    dist.all_gather_object(found, (stream_of(p, 3), stream_of(q, 3)))
    assert len({a for a, _ in found}) == mesh.size() and {b for _, b in found} == {3}


def fsdp(mesh):
    """fully_shard: the same model after three steps as without it."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(65, 70), torch.nn.GELU(), torch.nn.Linear(70, 3))
    plain = torch.nn.Sequential(torch.nn.Linear(65, 70), torch.nn.GELU(), torch.nn.Linear(70, 3))
    plain.load_state_dict(model.state_dict())
    tw.optim.override(model[2], state_bits=32)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = tw.optim.AdamW(model.parameters(), lr=1e-2, min_quantized_size=60, state_bits=8)
    other = tw.optim.AdamW(plain.parameters(), lr=1e-2, state_bits=32)
    for _ in range(3):
        x = torch.randn(16, 65)
        for m, o in ((model, optimizer), (plain, other)):
            m(x).square().mean().backward()
            o.step(), o.zero_grad()
    for p, q in zip(gathered(model.parameters()), plain.parameters(), strict=True):
        assert (p - q).norm() < 0.02 * q.norm()
    bits = [forms.find(optimizer.state[p], "exp_avg").bits for p in model.parameters()]
    assert bits == [8, 8, 32, 32]
    report = optimizer.memory_report(model.named_parameters())
    assert report[0].shape == tuple(local(model[0].weight).shape)


def portable(mesh, folder, world):
    """Reloading the same sharding gives the same training; the checkpoint is for other numbers of processes."""
    for name, options in STATES.items():
        sharded, whole = pairs(mesh)
        optimizer = tw.optim.AdamW(sharded, lr=1e-2, **options)
        steps(mesh, optimizer, sharded, tw.optim.AdamW(whole), whole)
        saved = portable_state_dict(optimizer)
        assert (
            isinstance(saved["state"]["0.0"]["exp_avg"], DTensor)
            and saved["state"]["0.0"]["exp_avg"].shape == SHAPES[0]
        )
        checkpoint.save({"optim": saved}, checkpoint_id=f"{folder}/{name}-{world}")
        again = tw.optim.AdamW(sharded, lr=0.5, **options)
        load_portable_state_dict(again, saved)
        assert again.param_groups[0]["lr"] == 1e-2
        for p in sharded:
            for key, value in optimizer.state[p].items():
                torch.testing.assert_close(again.state[p][key], value, rtol=2.0**-21, atol=0)
        torch.save([m["exp_avg"].full_tensor() for m in saved["state"].values()], f"{folder}/{name}-{world}.moments")


def load_of_others(mesh, folder, world, others):
    """Checkpoints of other numbers of processes: exact in 32 bits, requantised else."""
    for other in others:
        for name, options in STATES.items():
            sharded, whole = pairs(mesh)
            optimizer = tw.optim.AdamW(sharded, **options)
            saved = {"optim": portable_state_dict(optimizer)}
            checkpoint.load(saved, checkpoint_id=f"{folder}/{name}-{other}")
            load_portable_state_dict(optimizer, saved["optim"])
            expected = torch.load(f"{folder}/{name}-{other}.moments")
            assert optimizer.param_groups[0]["lr"] == 1e-2
            for p, exact in zip(sharded, expected, strict=True):
                assert float(optimizer.state[p]["step"]) == 2
                got = portable_state_dict(optimizer)["state"][f"0.{sharded_index(sharded, p)}"]["exp_avg"].full_tensor()
                limit = {"32": 0, "8": 0.02}.get(name, 0.25)
                assert (got - exact).norm() <= limit * exact.norm()
            steps(mesh, optimizer, sharded, tw.optim.AdamW(whole), whole, 1)


def model_of(mesh=None):
    """A network, the same in every process, whose 67 and 300 rows do not go evenly into processes; on FSDP2."""
    torch.manual_seed(11)
    model = torch.nn.Sequential(torch.nn.Linear(40, 67), torch.nn.GELU(), torch.nn.Linear(67, 300))
    return fully_shard(model, mesh=mesh) if mesh else model


def trained(mesh, **options):
    """(model, optimizer) after two steps on whole batches."""
    model = model_of(mesh)
    optimizer = tw.optim.AdamW(model.parameters(), lr=1e-2, min_quantized_size=100, **options)
    for _ in range(2):
        model(torch.randn(16, 40)).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    return model, optimizer


def whole_moments(model, optimizer):
    """{name: exp_avg} as every process sees it."""
    state = get_optimizer_state_dict(model, optimizer)["state"]
    gather = lambda t: t.full_tensor() if isinstance(t, DTensor) else t  # noqa: E731
    return {name: gather(entry["exp_avg"]).clone() for name, entry in state.items()}


def of_torch(mesh, folder, world, others):
    """torch's own get_ and set_optimizer_state_dict: through torch.distributed.checkpoint, and by one whole dict."""
    for name, options in [(name, STATES[name]) for name in TORCH_STATES]:
        model, optimizer = trained(mesh, **options)
        expected = whole_moments(model, optimizer)
        saved = get_optimizer_state_dict(model, optimizer)
        checkpoint.save({"optim": saved}, checkpoint_id=f"{folder}/torch-{name}-{world}")
        torch.save(expected, f"{folder}/torch-{name}-{world}.moments")
        whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        assert all(type(t) is torch.Tensor for entry in whole["state"].values() for t in entry.values())
        again = tw.optim.AdamW(model.parameters(), lr=0.5, min_quantized_size=100, **options)
        for given, full in ((saved, False), (whole, True)):
            set_optimizer_state_dict(model, again, given, options=StateDictOptions(full_state_dict=full))
            assert again.param_groups[0]["lr"] == 1e-2
            for p in model.parameters():
                assert again.state[p].keys() == optimizer.state[p].keys()
                for key, value in optimizer.state[p].items():
                    torch.testing.assert_close(again.state[p][key], value, rtol=2.0**-21, atol=0)
        again.load_state_dict(local_state_dict(optimizer))
        for p in model.parameters():
            assert_equal(again.state[p].values(), optimizer.state[p].values())
    for other in others:
        for name, options in [(name, STATES[name]) for name in TORCH_STATES]:
            model = model_of(mesh)
            optimizer = tw.optim.AdamW(model.parameters(), min_quantized_size=100, **options)
            saved = {"optim": get_optimizer_state_dict(model, optimizer)}
            checkpoint.load(saved, checkpoint_id=f"{folder}/torch-{name}-{other}")
            set_optimizer_state_dict(model, optimizer, saved["optim"])
            assert optimizer.param_groups[0]["lr"] == 1e-2
            found, expected = whole_moments(model, optimizer), torch.load(f"{folder}/torch-{name}-{other}.moments")
            for key, exact in expected.items():
                assert (found[key] - exact).norm() <= {"32": 0, "rank1": 0.25}[name] * exact.norm()
            assert all(float(state["step"]) == 2 for state in optimizer.state.values())


def sharded_index(params, p):
    return next(i for i, q in enumerate(params) if q is p)


def zero(rank):
    """ZeroRedundancyOptimizer around these optimizers: the same parameters; states are saved and loaded."""
    for options in ({"state_bits": 32}, {}, {"second_moment": "factored"}):
        torch.manual_seed(5)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        optimizer = ZeroRedundancyOptimizer(params, tw.optim.AdamW, lr=1e-2, **options)
        other = tw.optim.AdamW(twins, lr=1e-2, **options)
        for _ in range(2):
            give_gradients(params, twins)
            optimizer.step(), other.step()
        assert_equal(params, twins)
        assert 0 < len(optimizer.optim.state) < len(params)
        optimizer.consolidate_state_dict(0)
        box = [optimizer.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(box)
        again = ZeroRedundancyOptimizer(params, tw.optim.AdamW, lr=0.5, **options)
        again.load_state_dict(box[0])
        give_gradients(params, twins)
        again.step(), other.step()
        assert_equal(params, twins)


def errors(mesh):
    """What every rank raises, and leaves alone."""
    sharded, whole = pairs(mesh)
    optimizer = tw.optim.AdamW(sharded)
    for p, q in zip(sharded, whole, strict=True):
        p.grad = shard(torch.ones_like(q), mesh)
    saved = portable_state_dict(optimizer)
    wrong = [
        (ValueError, {"state": {}, "param_groups": saved["param_groups"]}),
        (ValueError, saved | {"param_groups": []}),
        (TypeError, saved | {"state": saved["state"] | {"0.0": None}}),
        (ValueError, saved | {"state": saved["state"] | {"0.0": {"step": torch.tensor(0.0)}}}),
        (ValueError, saved | {"state": saved["state"] | {"0.0": saved["state"]["0.1"]}}),
    ]
    for error, state_dict in wrong:
        with pytest.raises(error, match="load_portable_state_dict: "):
            load_portable_state_dict(optimizer, state_dict)
    assert not optimizer.state


def work(rank, world, folder, others):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{world}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    mesh = init_device_mesh("cpu", (world,))
    sharded_steps(mesh)
    structured_shards(mesh)
    shampoo_shards(mesh)
    streams(mesh)
    fsdp(mesh)
    portable(mesh, folder, world)
    load_of_others(mesh, folder, world, others)
    of_torch(mesh, folder, world, others)
    zero(rank)
    errors(mesh)
    dist.barrier()
    dist.destroy_process_group()


def run_processes(world, folder, others):
    processes = multiprocessing.spawn(work, (world, str(folder), others), nprocs=world, join=False)
    end = time.monotonic() + SECONDS
    while not processes.join(timeout=1):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"{world} processes take longer than {SECONDS} s")


def test_processes(tmp_path):
    """4 processes, then 2 that load what the 4 saved, then this one."""
    run_processes(4, tmp_path, [])
    run_processes(2, tmp_path, [4])
    for name, options in STATES.items():
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        optimizer = tw.optim.AdamW(params, **options)
        saved = {"optim": portable_state_dict(optimizer)}
        checkpoint.load(saved, checkpoint_id=f"{tmp_path}/{name}-4")
        load_portable_state_dict(optimizer, saved["optim"])
        for p, exact in zip(params, torch.load(f"{tmp_path}/{name}-4.moments"), strict=True):
            error = (moments(optimizer, p)["exp_avg"] - exact).norm()
            assert error <= {"32": 0, "8": 0.02}.get(name, 0.25) * exact.norm()


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_portable_states_of_one_process(make):
    """Names of parameters, masters and all: out and in again is the same."""
    named = [(f"layer.{i}", torch.nn.Parameter(torch.randn(s).bfloat16())) for i, s in enumerate([(70, 80), (5,)])]
    optimizer = make(named, master_weights=True)
    params = [p for _, p in named]
    give_gradients(params)
    optimizer.step()
    saved = portable_state_dict(optimizer)
    assert list(saved["state"]) == ["layer.0", "layer.1"]
    other = make(named, master_weights=True, lr=0.5)
    load_portable_state_dict(other, saved)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for p in params:
        for name, value in optimizer.state[p].items():
            torch.testing.assert_close(other.state[p][name], value, rtol=2.0**-21, atol=0)
    before = snapshot(optimizer)
    for entry in saved["state"].values():  # as loading a checkpoint into it would
        for value in entry.values():
            value.fill_(1)
    assert_same_state(snapshot(optimizer), before)
