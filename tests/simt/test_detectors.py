"""The detector matrix: seeded bugs, the modes that must catch each, and the words of the diagnosis.

It proves that the detectors are alive. Modes: `plain` is the fixed schedule, `random` some random ones (any may catch
it), `race` the race checker, `asan` AddressSanitizer and UBSan. A mode that is not named may or may not notice.
"""

import pytest

import cases_bugs
import emulated

WRONG = "wrong result"
DIVERGENT = "divergent warp collective"

# kernel, bug, words by mode
MATRIX = [
    # ---- block barriers, warp synchronisation ----
    ("exchange", "missing_barrier", {"race": "read of a write that is not synchronised", "plain": WRONG}),
    ("exchange", "missing_second_barrier", {"race": "write races with an earlier read"}),
    ("exchange", "missing_sync_warp", {"race": "read of a write that is not synchronised"}),
    ("exchange", "shuffle_is_no_barrier", {"race": "read of a write that is not synchronised"}),
    ("exchange", "divergent_barrier", {"plain": "divergent sync_block", "race": "divergent sync_block"}),
    ("exchange", "barrier_not_reached", {"plain": "divergent sync_block", "race": "divergent sync_block"}),
    ("exchange", "exit_before_barrier", {"plain": "after 32 threads exited", "random": "exit"}),
    ("exchange", "named_barrier_counts", {"plain": "threads expected here", "random": "threads expected"}),
    ("exchange", "named_barrier_odd", {"plain": "thread count 100 is not a multiple of 32"}),
    ("exchange", "named_barrier_deadlock", {"plain": "deadlock", "random": "threads 0-63: bar_sync"}),
    ("exchange", "barrier_id", {"plain": "barrier id 16 is not in 0..15"}),
    # ---- warp collectives ----
    ("exchange", "divergent_shuffle", {"plain": "deadlock", "random": "shfl"}),
    ("exchange", "overlapping_masks", {"plain": "deadlock", "random": "overlaps the mask"}),
    ("exchange", "lane_outside_mask", {"plain": "lane is not in its own mask"}),
    ("exchange", "shuffle_from_outside", {"plain": "reads lane 16, which is not in the mask"}),
    ("exchange", "different_collectives", {"plain": DIVERGENT, "random": DIVERGENT}),
    # ---- addresses ----
    (
        "exchange",
        "smem_write_past_end",
        {"plain": "shared memory overrun", "race": "overrun", "asan": "AddressSanitizer"},
    ),
    ("exchange", "smem_read_past_end", {"race": "out-of-bounds read", "asan": "AddressSanitizer"}),
    ("exchange", "global_write_past_end", {"asan": "heap-buffer-overflow"}),
    ("exchange", "misaligned_load16", {"plain": "load16: misaligned address", "race": "misaligned address"}),
    ("exchange", "misaligned_cp_async", {"plain": "shared address not 16-byte aligned"}),
    ("exchange", "smem_addr_of_global", {"plain": "is not in shared memory"}),
    ("exchange", "int_overflow", {"asan": "signed integer overflow"}),
    ("exchange", "uninitialised", {"plain": WRONG, "race": "read of uninitialised shared memory"}),
    # ---- between blocks ----
    ("exchange", "inter_block_race", {"race": "write-write race between blocks"}),
    ("exchange", "inter_block_read", {"race": "between blocks"}),
    ("exchange", "spin_on_atomic", {"plain": "spin loop"}),
    ("last_block", "no_release_fence", {"race": "write-read race between blocks"}),
    ("last_block", "no_acquire_fence", {"race": "write-read race between blocks"}),
    # ---- cp.async ----
    ("pipeline", "no_copy_wait", {"plain": WRONG, "random": WRONG, "race": "while an async copy is in flight"}),
    ("pipeline", "no_barrier_after_wait", {"race": "read", "plain": WRONG}),
    ("pipeline", "refill_too_early", {"race": "write races with an earlier read"}),
    # ---- operands ----
    ("operands", "metadata_equal", {"plain": "illegal metadata nibble 0"}),
    ("operands", "metadata_descending", {"plain": "illegal metadata nibble 1", "race": "illegal metadata nibble"}),
    ("operands", "tf32_not_rounded", {"plain": "not rounded with to_tf32"}),
    ("operands", "ldmatrix_misaligned", {"plain": "ldmatrix: shared address not 16-byte aligned"}),
    ("operands", "ldmatrix_past_end", {"plain": "ldmatrix: shared address out of bounds"}),
    # ---- mbarriers and TMA ----
    ("gemm", "no_barrier_after_init", {"race": "not synchronised", "random": "never initialised"}),
    ("gemm", "mbarrier_uninitialised", {"plain": "never initialised"}),
    ("gemm", "too_many_arrivals", {"random": "more arrivals than the mbarrier expects"}),
    ("gemm", "tx_too_large", {"plain": "tx-count 16", "random": "deadlock", "race": "deadlock"}),
    ("gemm", "tx_too_small", {"race": "while an async copy is in flight"}),
    (
        "gemm",
        "no_empty_wait",
        {"plain": "more arrivals than", "random": "more arrivals than", "race": "more arrivals than"},
    ),
    ("gemm", "no_full_wait", {"plain": "more arrivals than", "race": "while an async copy is in flight"}),
    ("gemm", "early_release", {"race": "write races with an earlier read"}),
    ("gemm", "missing_arrive", {"plain": "128 of 128 arrivals pending", "random": "deadlock", "race": "deadlock"}),
    ("gemm", "tile_misaligned", {"plain": "tile not 1024-byte aligned"}),
    ("gemm", "tile_past_end", {"plain": "shared address out of bounds"}),
    ("gemm", "wrong_rank", {"plain": "3 coordinates for a tensor map of rank 2"}),
    ("gemm", "missing_proxy_fence", {"race": "async-proxy read of a generic write without fence.proxy.async"}),
    ("gemm", "generic_write_unfenced", {"race": "generic write without fence.proxy.async"}),
    ("gemm", "store_tile_reused_early", {"race": "write while an async operation may still read", "plain": WRONG}),
    ("gemm", "exit_before_store_is_read", {"plain": "may still read shared memory"}),
    # ---- wgmma ----
    ("gemm", "no_wgmma_fence", {"plain": "without wgmma.fence"}),
    ("gemm", "accumulator_read_in_flight", {"plain": WRONG, "random": WRONG}),
    ("gemm", "accumulator_written_in_flight", {"plain": "wrote accumulator 3 while", "random": "wrote accumulator 3"}),
    ("gemm", "exit_with_wgmma_in_flight", {"plain": "exits without waiting for the wgmma"}),
    ("gemm", "descriptor_past_end", {"plain": "wgmma descriptor: reads shared memory at offset"}),
    ("gemm", "descriptors_differ", {"plain": "descriptors differ between threads"}),
    ("gemm", "divergent_warpgroup", {"plain": "divergent warpgroup collective", "random": "divergent warpgroup"}),
    ("gemm", "too_many_registers", {"plain": "the block has"}),
    ("register_operand", "fragment_changed_in_flight", {"plain": "thread 9 changed", "random": "thread 9 changed"}),
]

CLEAN = [
    ("exchange", "clean"),
    ("pipeline", "clean"),
    ("last_block", "clean"),
    ("operands", "clean"),
    ("gemm", "clean"),
    ("gemm", "generic_write_fenced"),
    ("register_operand", "clean"),
]
SEEDS = range(6)


def verdicts(libraries, mode, kernel, bug):
    """The verdict of a mode; for random the verdicts of several schedules."""
    if mode == "asan":
        emulated.build()
        code = f"import cases_bugs; cases_bugs.main({kernel!r}, {bug!r})"
        return [emulated.run_sanitized(code)]
    if mode != "random":
        return [cases_bugs.run(libraries[mode], mode, kernel, bug)[0]]
    found = []
    for seed in SEEDS:
        with emulated.settings(sched="random", seed=seed, **{"async": "random"}):
            found.append(cases_bugs.run(libraries["plain"], "plain", kernel, bug)[0])
    return found


@pytest.mark.parametrize(
    "kernel,bug,mode,words",
    [
        pytest.param(kernel, bug, mode, words, id=f"{kernel}-{bug}-{mode}")
        for kernel, bug, expected in MATRIX
        for mode, words in expected.items()
    ],
)
def test_bug_is_caught(libraries, kernel, bug, mode, words):
    found = verdicts(libraries, mode, kernel, bug)
    assert any(words in verdict for verdict in found), f"expected {words!r}, got {found}"


@pytest.mark.parametrize("mode", ("plain", "random", "race", "asan"))
@pytest.mark.parametrize("kernel,bug", CLEAN)
def test_clean_kernel_stays_clean(libraries, kernel, bug, mode):
    assert {verdict.strip() for verdict in verdicts(libraries, mode, kernel, bug)} == {"clean"}


def test_diagnosis_names_the_line(libraries):
    verdict = cases_bugs.run(libraries["race"], "race", "exchange", "missing_barrier")[0]
    assert "bug_kernels.cu:" in verdict and "earlier: thread" in verdict


def test_deadlock_lists_who_waits_where(libraries):
    verdict = cases_bugs.run(libraries["plain"], "plain", "gemm", "missing_arrive")[0]
    assert "threads 0-127: mbar_wait(mbarrier at smem+" in verdict
    assert "waits for parity" in verdict and "bug_kernels_sm90.cu:" in verdict
