"""The emulator against what GPUs answered (tests/golden), and the recording itself."""

import numpy as np
import pytest

import emulated
import golden
import probes

RECORDED = sorted((emulated.ROOT / "tests" / "golden").glob("*.npz"))
HOST = golden.Host()


def emulate(library, name, x):
    if not name.startswith(golden.WGMMA):
        return golden.run_probe(library, HOST, name, x)
    a, b, _ = golden.wgmma_cases.inputs(name[len(golden.WGMMA) :])
    a[...] = x[: a.size].reshape(a.shape)
    b[...] = x[a.size :].reshape(b.shape)
    return golden.run_wgmma(library, HOST, name[len(golden.WGMMA) :], a, b).view(np.uint32)


def assert_agrees(library, name, x, recorded):
    """Exact instructions bit for bit; approximations within the tolerance that their model states."""
    ours = emulate(library, name, x)[:, : recorded.shape[1]]
    tolerance = np.zeros(recorded.shape)
    if not name.startswith(golden.WGMMA):
        tolerance = probes.expected(name, x)[1]
    wrong = np.argwhere(probes.mismatches(ours, recorded, tolerance))
    first = [(int(t), int(w), hex(ours[t, w]), hex(recorded[t, w])) for t, w in wrong[:5]]
    assert len(wrong) == 0, f"{name}: {len(wrong)} words; (thread, word, emulator, GPU): {first}"


def test_emulator_agrees_with_the_gpus(libraries):
    for path in RECORDED:
        for name, (x, recorded) in golden.load(path).items():
            assert_agrees(libraries["plain"], name, x, recorded)


@pytest.fixture(scope="module")
def self_recorded(libraries, tmp_path_factory):
    """A recording of the emulator in place of a GPU."""
    path = tmp_path_factory.mktemp("golden") / "emulated.npz"
    golden.save(path, golden.answers(libraries["plain"], HOST), "emulator")
    return path


def test_recording_covers_every_probe(self_recorded):
    wanted = set(probes.CASES) | {golden.WGMMA + name for name in golden.wgmma_cases.CASES}
    assert set(golden.load(self_recorded)) == wanted


def test_recording_agrees_with_the_models(self_recorded):
    bad = {name: n for name, (x, y) in golden.load(self_recorded).items() if (n := golden.differences(name, x, y))}
    assert bad == {}


def test_recording_can_be_replayed(libraries, self_recorded):
    for name, (x, recorded) in golden.load(self_recorded).items():
        assert_agrees(libraries["plain"], name, x, recorded)


@pytest.mark.parametrize("name", ("popc", "philox", "mma_sp_m16n8k32_bf16_0", "ldmatrix_x4_trans", "wgmma_bf16_n64"))
def test_a_different_gpu_would_be_noticed(libraries, self_recorded, name):
    x, recorded = golden.load(self_recorded)[name]
    recorded[0, 0] ^= 0x00400000
    with pytest.raises(AssertionError, match=f"{name}: 1 words"):
        assert_agrees(libraries["plain"], name, x, recorded)
