"""The device axis of the whole suite: cpu (every instruction set of this machine) | emulated (sm_80, sm_90) | cuda.

``emulated`` runs the CUDA launchers and kernels, compiled for the host, on CPU tensors through the same Python
functions. TILEWISE_EMULATOR=plain|race|asan chooses how they were compiled; other than plain, only tests marked
``modes`` run (small inputs), and only on ``emulated``. TILEWISE_DEVICES="cpu cuda" narrows the axis,
and without cpu in it tests that have no device are left out.

``pretend``, on request alone, is the emulator behind tensors that say they are on CUDA: what a GPU would refuse, mixed
devices above all, is refused without one.
"""

import contextlib
import os
import random
from pathlib import Path

# Where a kernel reports a bad index, the next call raises: launches wait, so that tests meet the report there.
os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
# Threads that wait for the rest of their team sleep: spinning, they take the cores that other test processes need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
_KINDS = os.environ.get("TILEWISE_DEVICES", "cpu emulated cuda").split()
pretend = None
if "pretend" in _KINDS:
    from harness import pretend  # before torch

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from harness import judge  # noqa: E402
from harness.emulation import MODE, architecture, emulator_library  # noqa: E402
from tilewise import _C  # noqa: E402

if pretend:
    pretend.install()

# The families that have kernels of their own for AMX tiles, or for Hopper; the others would run the same kernels twice.
_CSRC = Path(__file__).parents[1] / "csrc"
_FAMILIES_OF = {
    "amx": tuple(p.parts[-3] for p in _CSRC.glob("*/cpu/amx.cpp")),
    "amx_fp16": ("speculative", "attention_paged", "attention_half"),  # and fp16 in all of attention and sparse
    "sm90": tuple(p.parts[-3] for p in _CSRC.glob("*/cuda/*_sm90.cu")),
}
_EMULATED = {"sm80": 800, "sm90": 901}


class Device:
    """One point of the axis: ``kind`` is cpu, emulated, cuda or pretend; ``torch`` is where its tensors live.

    ``isa`` is the instruction set of the CPU, or the architecture that the emulator stands for.
    """

    def __init__(self, kind: str, isa: str | None = None):
        self.kind, self.isa = kind, isa
        self.torch = torch.device("cuda" if kind in ("cuda", "pretend") else "cpu")
        self.small = kind in ("emulated", "pretend")  # every operation takes its time

    def __str__(self):
        return self.kind if self.isa is None else f"{self.kind}-{self.isa}"


def _devices():
    if MODE != "plain":
        return [Device("emulated", arch) for arch in _EMULATED]
    devices = [Device("cpu", isa) for isa in reversed(_C.isa_levels())]
    devices += [Device("emulated", arch) for arch in _EMULATED]
    devices += [Device("pretend")]
    devices += [Device("cuda")] if _C.cuda_architectures() and torch.cuda.is_available() else []
    return [d for d in devices if d.kind in _KINDS]


@pytest.fixture(params=_devices(), ids=str)
def device(request):
    """Selects the backend for one test; tensors go to ``device.torch``."""
    where = request.param
    before = _C.isa()
    if where.kind == "cpu":
        _C.set_isa(where.isa)
    if where.kind == "emulated":
        _C.emulate(emulator_library())
    playing = pretend.device if where.kind == "pretend" else contextlib.nullcontext()
    with architecture(_EMULATED.get(where.isa, 800)), playing:
        yield where
    _C.emulate(None)
    _C.set_isa(before)
    if where.kind == "cuda":
        _check_context()


_HOMES = [Device(kind) for kind in ("cpu", "pretend", "cuda") if kind in {d.kind for d in _devices()}]


@pytest.fixture(params=_HOMES, ids=str)
def home(request):
    """Where tensors are made that name no device: in host memory or on a GPU. For tests of Python code that allocates,
    which one instruction set of the CPU serves as well as all."""
    where = request.param
    playing = pretend.device if where.kind == "pretend" else contextlib.nullcontext()
    with playing, where.torch:
        yield where.torch


def _check_context():
    """After an illegal access every further call of a process fails: pytest-xdist starts another one."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.fixture
def one_thread():
    """For small factorisations, which other processes that share the cores would hold up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_SEED = int(os.environ.get("TILEWISE_SEED", random.SystemRandom().randrange(2**31)))


@pytest.fixture(autouse=True)
def fresh_seed(request):
    """Fresh random inputs in every run, the same for every device; TILEWISE_SEED repeats what a failed test printed."""
    request.node.user_properties.append(("seed", _SEED))
    torch.manual_seed(_SEED)
    random.seed(_SEED)
    numpy.random.seed(_SEED)
    judge.begin(_case(request.node))
    print(f"TILEWISE_SEED={_SEED}")


def _case(item):
    """What names a test on a device and its parameters, but for the device's instruction set or architecture."""
    device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    return device and (item.path, item.originalname, item.callspec.id.replace(str(device), "", 1), device.kind)


def _wanted(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    device = params.get("device") or params.get("home")
    if device and not isinstance(device, Device):
        return False  # the fixture has nothing to offer here
    only = item.get_closest_marker("devices")
    if "cpu" not in _KINDS and not device:
        return False
    if only and device and device.kind == "pretend" and only.args == ("cuda",):
        return False  # graphs, and the like
    if only and device and {"pretend": "cuda"}.get(device.kind, device.kind) not in only.args:
        return False
    own = _FAMILIES_OF.get(device.isa) if device else None
    name = item.path.stem.removeprefix("test_")
    half = device and device.isa == "amx_fp16" and any(p is torch.float16 for p in params.values())
    if own is not None and not name.startswith(own) and not (half and name.startswith(("attention", "sparse"))):
        return False
    return MODE == "plain" or bool(device and item.get_closest_marker("modes"))


def _ends(items):
    """The first and the last case of every test: devices are mixed in all cases of a test or in none."""
    first, last = {}, {}
    for item in items:
        first.setdefault((item.path, item.originalname), item)
        last[item.path, item.originalname] = item
    kept = {id(item) for item in (*first.values(), *last.values())}
    return [item for item in items if id(item) in kept]


def pytest_collection_modifyitems(config, items):
    """Leaves out, rather than skips, the combinations that a test is not about."""
    wanted = [i for i in items if _wanted(i)]
    if pretend and not config.option.keyword:
        wanted = _ends(wanted)
    names = {item: _case(item) or item.nodeid for item in wanted}
    order = {name: i for i, name in enumerate(dict.fromkeys(names.values()))}
    wanted.sort(key=lambda item: order[names[item]])  # devices of a kind after one another: see judge.begin
    kept = set(map(id, wanted))
    config.hook.pytest_deselected(items=[i for i in items if id(i) not in kept])
    items[:] = wanted
