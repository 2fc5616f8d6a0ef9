"""Static facts of the compiled CUDA kernels: no spills, wide accesses, tensor-core instructions where they belong.

Read from the objects of this build, so they hold for what ships; without nvcc there are no objects to read.
"""

import importlib
import os
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
