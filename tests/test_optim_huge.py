"""Parameters of more than 2^31 elements: the last ones are stepped as they are where nothing stands before them."""

import dataclasses

import pytest
import torch

from harness.emulation import blocks_from
from harness.huge import HugeTensors
from optim_cases import RULES, call, make_slot

SKIPPED = 2**31 - 2**20
OWN = 2**20 + 300  # elements with memory of their own: on both sides of 2^31, and a tail that is no whole block
CHUNK = 8192  # elements of a thread block (csrc/optim/params.h)
BLOCK = {"4bit": 128, "8bit": 256, "32bit": 1}


def _at_the_end(huge, slot, block):
    """The slot with SKIPPED elements before its own."""
    changed = {}
    for name in ("param", "grad", "first", "first_scales", "second", "second_scales"):
        t = getattr(slot, name)
        rows = SKIPPED if name in ("param", "grad") else SKIPPED // block
        if t.numel():
            changed[name] = huge.ending_with(t, rows * t[0].numel()).view(-1, *t.shape[1:])
    return dataclasses.replace(slot, **changed, step=slot.step.clone())


def _assert_same_end(form, first_block=0, skipped_blocks=0):
    slot, o = make_slot((OWN,), torch.bfloat16, None, RULES["adamw"], form), RULES["adamw"]
    with HugeTensors() as huge:
        whole = _at_the_end(huge, slot, BLOCK[form])
        assert whole.param.numel() > 2**31
        with blocks_from(skipped_blocks + first_block):
            call([whole], o)
        before = slot.map(torch.clone)
        with blocks_from(first_block):
            call([slot], o)
        assert not torch.equal(slot.param, before.param)
        for name, expected in slot.tensors().items():
            rows = expected.shape[0] if expected.ndim else None
            end = getattr(whole, name)[-rows:] if rows else getattr(whole, name)
            assert torch.equal(end, expected), name


@pytest.mark.parametrize("form", ["4bit", "8bit"])
def test_elements_beyond_2_31(form):
    """Of the machine's best instruction set; indices are the same code in all. About 100 MB, 2 to 4 s."""
    _assert_same_end(form)


@pytest.mark.parametrize("form", ["4bit", "8bit", "32bit"])
@pytest.mark.devices("emulated")
def test_thread_blocks_beyond_2_31(device, form):
    """Only the last two thread blocks run: those before and behind element 2^31."""
    _assert_same_end(form, 2**20 // CHUNK - 1, SKIPPED // CHUNK)
