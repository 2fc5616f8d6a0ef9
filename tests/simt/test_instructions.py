"""Every instruction of the emulator against a numpy model, under fixed and random schedules."""

import ctypes

import numpy as np
import pytest

import emulated
import golden
import probes
import wgmma_cases
from emulated import message, pointer

HOST = golden.Host()


def run(library, name, x):
    return golden.run_probe(library, HOST, name, x)


def check(name, x, y):
    words, tolerance = probes.expected(name, x)
    wrong = np.argwhere(probes.mismatches(y[:, : words.shape[1]], words, tolerance))
    first = [(int(t), int(w), hex(y[t, w]), hex(words[t, w])) for t, w in wrong[:5]]
    assert len(wrong) == 0, f"{name}: {len(wrong)} words differ; (thread, word, got, expected): {first}"


@pytest.mark.parametrize("name", probes.CASES)
def test_matches_the_model(libraries, name):
    x = probes.inputs(name)
    check(name, x, run(libraries["plain"], name, x))


@pytest.mark.parametrize("name", probes.CASES)
def test_race_build_is_clean_and_identical(libraries, name):
    x = probes.inputs(name)
    assert np.array_equal(run(libraries["plain"], name, x), run(libraries["race"], name, x))


@pytest.mark.parametrize("seed", range(3))
def test_random_schedules_change_nothing(libraries, seed):
    for name in probes.CASES:
        x = probes.inputs(name)
        fixed = run(libraries["plain"], name, x)
        with emulated.settings(sched="random", seed=seed, **{"async": "random"}):
            assert np.array_equal(fixed, run(libraries["plain"], name, x)), name


def test_the_model_can_fail():
    name = "mma_m16n8k16_bf16"
    x = probes.inputs(name)
    words, _ = probes.expected(name, x)
    y = np.zeros_like(x)
    y[:, :4] = words
    check(name, x, y)
    y[37, 2] ^= 1  # the last bit of an exact result
    y[0, 0] = 0x7FC00000
    with pytest.raises(AssertionError, match="words differ"):
        check(name, x, y)


def test_the_model_of_philox_gives_the_published_answer():
    """Of key and counter zero (Random123's known answers; the others have a fourth word)."""
    assert probes.philox(0, 0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


# ---- bulk copies ----


@pytest.mark.parametrize("mode", ("plain", "race"))
@pytest.mark.parametrize("nbytes", (16, 4096, 8192))
def test_bulk_copy(libraries, mode, nbytes):
    rng = np.random.default_rng(nbytes)
    source = emulated.aligned((nbytes // 4 + 4,), np.uint32)
    source[:] = rng.integers(0, 2**32, source.shape, dtype=np.uint32)
    target = emulated.aligned(source.shape, np.uint32)
    error = libraries[mode].simt_bulk_probe(pointer(source), pointer(target), nbytes, None)
    assert message(error) == ""
    assert np.array_equal(target[: nbytes // 4], source[: nbytes // 4])
    assert not target[nbytes // 4 :].any()


# ---- TMA ----

TMA_SHAPES = {  # dims, box, coordinates: innermost first
    "2d_inside": ((128, 40), (64, 16), (64, 8)),
    "2d_past_the_end": ((72, 20), (64, 16), (24, 12)),
    "2d_before_the_start": ((72, 20), (64, 16), (-8, -3)),
    "2d_narrow_box": ((64, 64), (32, 32), (16, 16)),
    "3d_heads": ((64, 24, 3), (64, 16, 2), (0, 10, 1)),
    "4d": ((64, 9, 3, 4), (64, 4, 2, 2), (0, 7, 2, 3)),
    "5d_attention_tile": ((64, 40, 2, 3, 2), (64, 32, 2, 1, 1), (0, 20, 0, 2, 1)),
}


def swizzled_order(box):
    """Byte offset of each element of a box, as it lies in shared memory."""
    offset = np.arange(int(np.prod(box))) * 2
    return offset ^ ((offset >> 7 & 7) << 4)


def box_of(tensor, box, coords):
    """The box's elements in order, zero outside, and the index of each inside."""
    grid = np.meshgrid(*(np.arange(b) + c for b, c in zip(box[::-1], coords[::-1], strict=True)), indexing="ij")
    inside = np.all([(g >= 0) & (g < n) for g, n in zip(grid, tensor.shape, strict=True)], axis=0)
    clipped = tuple(np.clip(g, 0, n - 1) for g, n in zip(grid, tensor.shape, strict=True))
    return np.where(inside, tensor[clipped], 0), inside, clipped


def tma(library, store, shape, tensor, tile):
    dims, box, coords = shape
    error = library.simt_tma_probe(
        int(store),
        len(dims),
        (ctypes.c_uint64 * 5)(*dims),
        (ctypes.c_uint32 * 5)(*box),
        (ctypes.c_int32 * 5)(*coords),
        pointer(tensor),
        pointer(tile),
        None,
    )
    assert message(error) == ""


@pytest.mark.parametrize("mode", ("plain", "race"))
@pytest.mark.parametrize("order", ("lazy", "eager", "random"))
@pytest.mark.parametrize("name", TMA_SHAPES)
def test_tma_load(libraries, name, order, mode):
    dims, box, coords = TMA_SHAPES[name]
    rng = np.random.default_rng(1)
    tensor = emulated.aligned(dims[::-1], np.uint16)
    tensor[:] = rng.integers(1, 2**16, tensor.shape)
    tile = emulated.aligned((int(np.prod(box)),), np.uint16)
    with emulated.settings(**{"async": order}):
        tma(libraries[mode], False, TMA_SHAPES[name], tensor, tile)
    wanted = np.zeros_like(tile)
    wanted[swizzled_order(box) // 2] = box_of(tensor, box, coords)[0].ravel()
    assert np.array_equal(tile, wanted)


@pytest.mark.parametrize("mode", ("plain", "race"))
@pytest.mark.parametrize("name", TMA_SHAPES)
def test_tma_store(libraries, name, mode):
    dims, box, coords = TMA_SHAPES[name]
    rng = np.random.default_rng(2)
    tensor = emulated.aligned(dims[::-1], np.uint16)
    tensor[:] = 7
    tile = emulated.aligned((int(np.prod(box)),), np.uint16)
    tile[:] = rng.integers(1, 2**16, tile.shape)
    wanted = tensor.copy()
    _, inside, index = box_of(tensor, box, coords)
    values = tile[swizzled_order(box) // 2].reshape(inside.shape)
    wanted[tuple(i[inside] for i in index)] = values[inside]
    tma(libraries[mode], True, TMA_SHAPES[name], tensor, tile)
    assert np.array_equal(tensor, wanted)


# ---- wgmma ----


@pytest.mark.parametrize("mode", ("plain", "race"))
@pytest.mark.parametrize("name", wgmma_cases.CASES)
def test_wgmma(libraries, name, mode):
    a, b, wanted = wgmma_cases.inputs(name)
    with emulated.settings(**{"async": "random"}):
        d = golden.run_wgmma(libraries[mode], HOST, name, a, b)
    assert np.array_equal(d, wanted)
