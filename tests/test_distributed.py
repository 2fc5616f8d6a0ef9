"""tw.distributed.ring_attention: 2 and 4 processes on gloo against one process."""

import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import tilewise as tw
from attention_cases import GRADIENTS
from harness.judge import assert_accurate, draws, yardsticks
from tilewise.distributed import ring_attention, zigzag_shard, zigzag_unshard
from tilewise.reference import attention as reference

# name -> (q's shape, k's and v's, v's head dim, dtype, causal, scale); rows are those of all ranks together
CASES = {
    "dense": ((2, 2, 48, 64), (2, 2, 48, 64), 64, torch.float32, False, None),
    "causal": ((2, 2, 48, 64), (2, 2, 48, 64), 64, torch.float32, True, None),
    "gqa": ((1, 4, 64, 64), (1, 2, 64, 64), 64, torch.float32, True, 0.3),
    "cross": ((1, 4, 8, 32), (1, 1, 60, 32), 48, torch.float32, False, None),
    "bf16": ((1, 2, 96, 64), (1, 1, 96, 64), 64, torch.bfloat16, True, None),
    "f16": ((1, 2, 40, 64), (1, 1, 72, 64), 64, torch.float16, False, None),
    "no-keys": ((1, 2, 8, 64), (1, 2, 0, 64), 64, torch.float32, False, None),
    "no-rows": ((1, 2, 0, 64), (1, 2, 0, 64), 64, torch.float32, True, None),
}
# What all ranks get where the last one alone is wrong, or other than the first.
OF_ONE_RANK = {
    "dtype": "TypeError: attention: k",
    "list": "TypeError: ring_attention: v is a list",
    "dims": "ValueError: ring_attention: q has 3 dimensions, expected 4",
    "head-dim": "ValueError: attention: k has head dim 8",
    "other-dtype": "ValueError: ring_attention: .*torch.float16, .*expected those of rank 0: .*torch.float32",
    "other-causal": "ValueError: ring_attention: .*causal=True.* expected those of rank 0: .*causal=False",
    "other-scale": "ValueError: ring_attention: .*scale=0.5 .*expected those of rank 0: .*scale=None",
}
SECONDS = 240  # a deadlock is a failure


def tensors(case):
    """q, k, v and dout of all ranks."""
    q, k, v_dim, dtype, *_ = case
    shapes = q, k, (*k[:3], v_dim), (*q[:3], v_dim)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def shard(t, rank, world, causal):
    return zigzag_shard(t, rank, world) if causal else t.tensor_split(world, 2)[rank]


def unshard(shards, causal):
    return zigzag_unshard(shards) if causal else torch.cat(shards, 2)


def run_shard(whole, case, rank, world, group=None):
    """(out, dq, dk, dv) of one rank's rows; inputs are views, their rows apart in memory."""
    *_, causal, scale = case
    shards = [shard(t, rank, world, causal).transpose(1, 2).contiguous().transpose(1, 2) for t in whole]
    q, k, v = (t.requires_grad_() for t in shards[:3])
    out = ring_attention(q, k, v, group, causal, scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), shards[3])]


def errors(rank, world):
    """What every rank gets for arguments that do not fit."""
    q, last = torch.zeros(1, 2, 8, 16), rank == world - 1
    calls = {
        "uneven": lambda: ring_attention(*(t[:, :, : 8 - rank] for t in (q, q, q))),
        "odd": lambda: ring_attention(*(t[:, :, :5] for t in (q, q, q)), causal=True),
        "unlike": lambda: ring_attention(q, q[:, :, :4], q[:, :, :4], causal=True),
        "heads": lambda: ring_attention(q, q[:, :1], q),
        "other-heads": lambda: ring_attention(q[:, : 1 + rank % 2], q[:, :1], q[:, :1]),
        # what only the last rank has wrong, or has otherwise
        "dtype": lambda: ring_attention(q, q.double() if last else q, q),
        "list": lambda: ring_attention(q, q, [1] if last else q),
        "dims": lambda: ring_attention(q[0] if last else q, q, q),
        "head-dim": lambda: ring_attention(q, q[..., :8] if last else q, q),
        "other-dtype": lambda: ring_attention(*(t.half() if last else t for t in (q, q, q))),
        "other-causal": lambda: ring_attention(q, q, q, causal=last),
        "other-scale": lambda: ring_attention(q, q, q, scale=0.5 if last else None),
    }
    return {name: _message(call) for name, call in calls.items()}


def _message(call):
    try:
        call()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def work(rank, world, folder):
    """One process: all cases, then the first within a group of some ranks, then the errors."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    inputs = torch.load(f"{folder}/inputs")
    found = {name: run_shard(inputs[name], case, rank, world) for name, case in CASES.items()}
    members = list(range(1, world, 2))
    group = dist.new_group(members)
    if rank in members:
        found["group"] = run_shard(inputs["causal"], CASES["causal"], members.index(rank), len(members), group)
    else:
        found["outside"] = _message(lambda: ring_attention(*inputs["dense"][:3], group))
    found["errors"] = errors(rank, world)
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def run_processes(world, folder):
    processes = multiprocessing.spawn(work, (world, str(folder)), nprocs=world, join=False)
    end = time.monotonic() + SECONDS
    while not processes.join(timeout=1):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"{world} processes take longer than {SECONDS} s")
    return [torch.load(folder / str(rank)) for rank in range(world)]


def assert_right(name, case, whole, found):
    """Out and gradients of all ranks: errors at most twice, and three times, those of one process."""
    *_, dtype, causal, scale = case
    results = [unshard(list(shards), causal) for shards in zip(*found, strict=True)]

    def evaluated(run):
        def evaluate(*tensors):
            leaves = [t.detach().requires_grad_() for t in tensors[:3]]
            out = run(*leaves, causal=causal, scale=scale)
            return out.detach(), *torch.autograd.grad(out, leaves, tensors[3])

        return evaluate

    exact = evaluated(lambda *tensors, **options: reference.attention(*tensors, **options)[0])
    rulers = yardsticks([evaluated(tw.attention)], whole, draws(whole[0].numel()), exact)
    for i, (part, result, ruler) in enumerate(zip(("out", *GRADIENTS), results, rulers, strict=True)):
        assert result.dtype == dtype
        assert_accurate(f"{name}: {part}", result, ruler, 3 if i else 2)


@pytest.mark.parametrize("world", [2, 4])
def test_processes(world, tmp_path):
    inputs = {name: tensors(case) for name, case in CASES.items()}
    torch.save(inputs, tmp_path / "inputs")
    found = run_processes(world, tmp_path)
    for name, case in CASES.items():
        assert_right(name, case, inputs[name], [of_rank[name] for of_rank in found])
    assert_right("group", CASES["causal"], inputs["causal"], [found[rank]["group"] for rank in range(1, world, 2)])
    for rank, of_rank in enumerate(found):
        messages = of_rank["errors"]
        assert "on rank 1, expected those of rank 0" in messages["uneven"], rank
        assert "q has 5 rows, expected an even number" in messages["odd"]
        assert "k has 4 rows, expected 8" in messages["unlike"]
        assert "v has 2 heads, expected 1" in messages["heads"]
        assert "on rank 1, expected those of rank 0" in messages["other-heads"]
        for what, message in OF_ONE_RANK.items():
            assert re.match(message, messages[what]), f"{what} on rank {rank}: {messages[what]}"
            assert f"on rank {world - 1}" in messages[what] or (rank == world - 1 and "other" not in what)
    assert "group is without this process" in found[0]["outside"]


def test_one_process(tmp_path):
    """A ring of one is plain attention, bit for bit."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = tensors(CASES["gqa"])
        out, *gradients = run_shard(whole, CASES["gqa"], 0, 1)
    finally:
        dist.destroy_process_group()
    leaves = [t.requires_grad_() for t in whole[:3]]
    expected = tw.attention(*leaves, causal=True, scale=0.3)
    assert torch.equal(out, expected)
    for got, exact in zip(gradients, torch.autograd.grad(expected, leaves, whole[3]), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 2, -1])
def test_zigzag(world, dim):
    shape = [3, 4, 5]
    shape[dim] = 4 * world
    t = torch.randn(shape)
    shards = [zigzag_shard(t, rank, world, dim) for rank in range(world)]
    assert torch.equal(zigzag_unshard(shards, dim), t)
    chunks = t.chunk(2 * world, dim)
    for rank, of_rank in enumerate(shards):
        assert torch.equal(of_rank, torch.cat([chunks[rank], chunks[-1 - rank]], dim))


def test_zigzag_shares_the_work_evenly():
    """Each rank's rows see the same number of keys, and each step of the ring computes the same number of scores."""
    rows, world = 48, 4
    seen = reference.visible(rows, rows, causal=True)
    work = [zigzag_shard(seen, rank, world, 0).sum() for rank in range(world)]
    assert len(set(map(int, work))) == 1
    for owner in range(world):
        of_owner = zigzag_shard(seen, owner, world, 0)
        pairs = [zigzag_shard(of_owner, holder, world, 1).sum() for holder in range(world) if holder != owner]
        assert all(int(n) == (rows // world) ** 2 // 2 for n in pairs)


Q = torch.zeros(1, 1, 8, 16)
BAD = {
    "no-group": (ValueError, "expected torch.distributed to be initialized", lambda: ring_attention(Q, Q, Q)),
    "shard-rows": (ValueError, "t has 8 rows, expected a multiple of 6", lambda: zigzag_shard(Q, 0, 3)),
    "shard-rank": (ValueError, "rank is 2, expected 0 to 1", lambda: zigzag_shard(Q, 2, 2)),
    "unshard-rows": (ValueError, "shards.1. has 7 rows", lambda: zigzag_unshard([Q, Q[:, :, 1:]])),
}


@pytest.mark.parametrize("error, message, call", BAD.values(), ids=BAD)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()
