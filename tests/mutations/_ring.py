"""Seeded bugs in what the Hopper kernels share: forward's and backward's checks must catch each."""

from harness.mutations import Mutation

RING = "attention/cuda/ring.h"

MUTATIONS = [
    Mutation("stage_not_awaited", RING, "    if (reused()) mbar_wait(", "    if (false) mbar_wait(", "race"),
    Mutation("stage_not_released", RING, "(lane_id() == 0) mbar_arrive(", "(false) mbar_arrive(", "plain"),
    Mutation("wrong_phase", RING, "&full[stage()], phase())", "&full[stage()], phase() ^ 1)", "plain"),
    Mutation("phase_never_turns", RING, "&full[stage()], phase())", "&full[stage()], 0)", "race"),
    Mutation("cleared_rows_not_fenced", RING, "  fence_proxy_async();  // wgmma", "  // wgmma", "race"),
    Mutation("cleared_by_one_group", RING, "  bar_sync(barrier, kConsumerThreads);\n", "", "race"),
]
