"""Schedules, host threads and the watchdog."""

import threading

import numpy as np
import pytest

import cases_bugs
import emulated
import probes
from test_instructions import run

PROGRAMS = [(kernel, bug) for kernel in cases_bugs.KERNELS for bug in ("clean",)]


def output(library, mode, kernel, bug):
    verdict, digest = cases_bugs.run(library, mode, kernel, bug)
    assert verdict == "clean"
    return digest


@pytest.mark.parametrize("kernel,bug", PROGRAMS)
def test_random_schedules_are_bit_identical(libraries, kernel, bug):
    results = {output(libraries["plain"], "plain", kernel, bug)}
    for seed in range(12):
        with emulated.settings(sched="random", seed=seed, **{"async": "random"}):
            results.add(output(libraries["plain"], "plain", kernel, bug))
    assert len(results) == 1


@pytest.mark.parametrize("kernel,bug", PROGRAMS)
def test_preemption_at_every_access(libraries, kernel, bug):
    """The race build can interleave threads between any two accesses to shared memory."""
    results = {output(libraries["race"], "race", kernel, bug)}
    for seed in range(3):
        with emulated.settings(sched="random", seed=seed, preempt=8, **{"async": "random"}):
            results.add(output(libraries["race"], "race", kernel, bug))
    assert len(results) == 1


@pytest.mark.parametrize("schedule", ("fifo", "lifo"))
@pytest.mark.parametrize("order", ("lazy", "eager"))
def test_fixed_schedules(libraries, schedule, order):
    for kernel, bug in PROGRAMS:
        with emulated.settings(sched=schedule, **{"async": order}):
            output(libraries["plain"], "plain", kernel, bug)


@pytest.mark.parametrize("threads", (1, 4))
def test_blocks_on_several_host_threads(libraries, threads):
    with emulated.settings(threads=threads):
        for _ in range(5):
            output(libraries["plain"], "plain", "last_block", "clean")


@pytest.mark.parametrize("mode", ("plain", "race"))
def test_launches_from_several_host_threads(libraries, mode):
    name = "mma_m16n8k16_bf16"
    x = probes.inputs(name)
    wanted = run(libraries[mode], name, x)
    failures = []

    def work():
        for _ in range(10):
            if not np.array_equal(run(libraries[mode], name, x), wanted):
                failures.append("different result")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_errors_belong_to_the_launch(libraries):
    """A failed launch leaves nothing behind for the next."""
    failed, _ = cases_bugs.run(libraries["plain"], "plain", "gemm", "missing_arrive")
    assert "deadlock" in failed
    output(libraries["plain"], "plain", "gemm", "clean")


def test_the_seed_reproduces_a_failure(libraries):
    with emulated.settings(sched="random", seed=5, **{"async": "random"}):
        verdicts = {cases_bugs.run(libraries["plain"], "plain", "exchange", "divergent_barrier")[0] for _ in range(3)}
    assert len(verdicts) == 1


def test_grid_limits(libraries):
    x = np.zeros((32, 16), np.uint32)
    error = libraries["plain"].simt_probe(b"warp", b"shfl", emulated.pointer(x), emulated.pointer(x), 0, None)
    assert "grid dimension is zero" in emulated.message(error)
