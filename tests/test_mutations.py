"""Every seeded bug in a CUDA kernel is caught, and the unchanged kernels pass the same check in every mode."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from harness.mutations import CLEAN, failure_of

# A family with many kernels has several tables, which then name it.
NAMES = sorted(p.stem for p in (Path(__file__).parent / "mutations").glob("[a-z]*.py"))
TABLES = {name: importlib.import_module(f"mutations.{name}") for name in NAMES}
CASES = [(name, mutation) for name in NAMES for mutation in TABLES[name].MUTATIONS]


def test_texts_stand_once():
    """At once for all, before the first is compiled."""
    csrc = Path(__file__).parents[1] / "csrc"
    found = {f"{n}-{m}": (csrc / m.file).read_text().count(m.old) for n, m in CASES}
    assert {name: count for name, count in found.items() if count != 1} == {}


def outcome(name, mutation):
    return failure_of(getattr(TABLES[name], "FAMILY", name), mutation, TABLES[name].check)


@pytest.mark.parametrize("name,mutation", CASES, ids=[f"{n}-{m}" for n, m in CASES])
def test_mutation_is_caught(name, mutation):
    assert outcome(name, mutation) is not None, f"{mutation.name} was not noticed"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["plain", "race"])
def test_clean_kernels_pass(name, mode):
    assert outcome(name, dataclasses.replace(CLEAN, mode=mode)) is None
