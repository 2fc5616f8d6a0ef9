"""Every seeded bug in a CUDA kernel is caught, and the unchanged kernels pass the same check in every mode."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from harness.mutations import CLEAN, failure_of

FAMILIES = sorted(p.stem for p in (Path(__file__).parent / "mutations").glob("[a-z]*.py"))
TABLES = {family: importlib.import_module(f"mutations.{family}") for family in FAMILIES}
CASES = [(family, mutation) for family in FAMILIES for mutation in TABLES[family].MUTATIONS]


@pytest.mark.parametrize("family,mutation", CASES, ids=[f"{f}-{m}" for f, m in CASES])
def test_mutation_is_caught(family, mutation):
    assert failure_of(family, mutation, TABLES[family].check) is not None, f"{mutation.name} was not noticed"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["plain", "race"])
def test_clean_kernels_pass(family, mode):
    assert failure_of(family, dataclasses.replace(CLEAN, mode=mode), TABLES[family].check) is None
