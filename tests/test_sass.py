"""Static facts of the compiled CUDA kernels: no spills, wide accesses, tensor-core instructions where they belong.

Read from the objects of this build, so they hold for what ships; without nvcc there are no objects to read.
"""

import importlib
import os
import re
from pathlib import Path

import pytest

from simt import sass as facts_of
from tilewise import _C

ROOT = Path(__file__).parents[1]
BUILD = Path(os.environ.get("TILEWISE_BUILD_DIR", ROOT / "build"))
FAMILIES = sorted(p.stem for p in (Path(__file__).parent / "sass_facts").glob("[a-z]*.py"))

pytestmark = pytest.mark.skipif(not _C.cuda_architectures(), reason="a CPU-only build has no compiled CUDA kernels")


@pytest.mark.parametrize("family", FAMILIES)
def test_facts(family):
    objects = sorted(BUILD.glob(f"CMakeFiles/tilewise.dir/csrc/{family}/cuda/*.o"))
    assert objects, f"no CUDA objects of {family} in {BUILD}"
    facts = importlib.import_module(f"sass_facts.{family}").FACTS
    facts_of.assert_facts(facts_of.read_all(objects), facts)


def test_softmax_runs_beside_the_products_on_hopper():
    """The wait for P V stands at the top of the loop, behind the whole softmax of the iteration before.

    ptxas silently hoists it above the softmax when they share a basic block; nothing would overlap then.
    """
    waits = {n: f"WARPGROUP.DEPBAR.LE gsb0, 0x{n}" for n in (0, 1)}
    found = facts_of.loops(next(BUILD.glob("CMakeFiles/tilewise.dir/csrc/attention/cuda/forward_sm90.cu.o")))
    # General's loop has many blocks; its wait cannot leave the first of them.
    kernels = {name: bodies for name, bodies in found.items() if re.search("ForwardSm90<.*(Dense|Causal)", name)}
    assert kernels
    for name, bodies in kernels.items():
        main = [b for b in bodies if any(waits[1] in i for i in b) and len(b) < 1200]
        assert main, f"{name}: no main loop"
        for body in main:
            last = [next(i for i, text in enumerate(body) if wait in text) for wait in waits.values()]
            softmax = sum(text.startswith("MUFU.EX2") for text in body[last[1] :])
            assert last[0] < 16 and softmax >= 32, (
                f"{name}: waits at {last} of {len(body)}, then {softmax} exponentials"
            )


def test_issuing_does_not_limit_the_forward_on_hopper():
    """Two warps of a scheduler issue the unmasked loop in the time that the tensor cores take for its products."""
    found = facts_of.loops(next(BUILD.glob("CMakeFiles/tilewise.dir/csrc/attention/cuda/forward_sm90.cu.o")))
    kernels = {name: bodies for name, bodies in found.items() if re.search("ForwardSm90<.*(Dense|Causal)", name)}
    assert kernels
    for name, bodies in kernels.items():
        dim, keys = map(int, re.search(r"16, (\d+), (\d+),", name).groups())
        body = min((b for b in bodies if sum("HGMMA" in i for i in b) >= dim // 16 + keys // 16), key=len)
        clocks = 4 * 128 * keys * dim // 4096
        assert 2 * len(body) <= clocks, f"{name}: two warps issue {len(body)} instructions each in {clocks} clocks"


@pytest.mark.parametrize("kind,second", [("Queries", 0), ("Keys", 1)])
def test_exponentials_run_beside_the_product_of_dp_on_hopper(kind, second):
    """Between the waits for the scores and for dP stand all exponentials of a step.

    Where they share a basic block with the second wait, ptxas hoists it above them.
    """
    waits = {n: f"WARPGROUP.DEPBAR.LE gsb0, 0x{n}" for n in (0, 1)}
    found = facts_of.loops(next(BUILD.glob("CMakeFiles/tilewise.dir/csrc/attention/cuda/backward_sm90.cu.o")))
    kernels = {name: bodies for name, bodies in found.items() if re.search(f"{kind}Sm90<.*(Dense|Causal)", name)}
    assert kernels
    for name, bodies in kernels.items():
        body = min((b for b in bodies if sum("HGMMA" in i for i in b) > 8), key=len)
        exponentials = [i for i, text in enumerate(body) if text.startswith("MUFU.EX2")]
        scores = max(i for i in range(exponentials[0]) if waits[1] in body[i])
        dp = next(i for i in range(scores + 1, len(body)) if waits[second] in body[i])
        columns = int(re.search(r"16, \d+, (\d+),", name)[1])  # a thread has half as many scores
        assert len(exponentials) == columns // 2 and exponentials[-1] < dp, f"{name}: waits at {scores} and {dp}"
