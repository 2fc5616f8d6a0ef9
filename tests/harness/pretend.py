"""A device that plays CUDA on a machine without a GPU, so that tensors on the wrong device are met here.

A pretended tensor says that it is on cuda:0; its memory is a CPU tensor, `host`. A dispatch mode runs every operation
on the hosts, refuses what a GPU would refuse (tensors of two devices in one call, a generator of the other device),
and runs tilewise's operators on the emulator. Import this module before torch: libtorch looks for its devices once.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
from pathlib import Path

TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
SOURCE = Path(__file__).with_name("pretend_device.cpp")


def _device_library() -> str:
    name = f"libpretend_device-{importlib.metadata.version('torch')}.so"
    library = Path(__file__).parents[2] / "build" / "emulator" / name
    if not library.exists() or library.stat().st_mtime < max(SOURCE.stat().st_mtime, TORCH.stat().st_mtime):
        library.parent.mkdir(parents=True, exist_ok=True)
        mine = library.with_suffix(f".{os.getpid()}")
        paths = [f"-I{TORCH}/include", f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", SOURCE, "-o", mine, *paths], check=True)
        mine.replace(library)
    return str(library)


_libpretend = ctypes.CDLL(_device_library(), ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from harness.emulation import emulator_library  # noqa: E402

_libpretend.pretend_register_guard()

_CONVERTS = {"_to_copy", "copy_", "_copy_from", "is_same_size", "_has_compatible_shallow_copy_type"}
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Tensor(torch.Tensor):
    __dlpack_c_exchange_api__ = None  # the core then asks for __dlpack__
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, host):
        where = (
            {"strides": host.stride(), "storage_offset": host.storage_offset()} if host.layout is torch.strided else {}
        )
        like = {"dtype": host.dtype, "layout": host.layout, "device": "cuda:0"}
        made = torch.Tensor._make_wrapper_subclass(cls, host.shape, **where, **like)
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _dispatch(function, args, kwargs or {})

    def __dlpack__(self, **options):
        return self.host.__dlpack__(**options)

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def tolist(self):
        return self.host.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def record_stream(self, _):
        pass

    def data_ptr(self):
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def __repr__(self, **_):
        return f"pretended {self.host}"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = _rebuild(self.host.clone(), self.requires_grad, isinstance(self, torch.nn.Parameter))
            memo[id(self)].grad = self.grad if self.grad is None else self.grad.clone()
        return memo[id(self)]

    def __reduce_ex__(self, _):
        return _rebuild, (self.host, self.requires_grad, isinstance(self, torch.nn.Parameter))


def _rebuild(host, requires_grad, is_parameter):
    made = Tensor(host).requires_grad_(requires_grad)
    return torch.nn.Parameter(made, requires_grad) if is_parameter else made


def _tensors(*values):
    """The tensors among arguments and their lists."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)) and value:
            found += _tensors(*value)
    return found


def _map(change, value):
    """Arguments or results with their tensors replaced."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(change, v) for v in value)
    return value


def _check_devices(function, tensors):
    ours = [t for t in tensors if isinstance(t, Tensor)]
    name = function.overloadpacket.__name__
    if not ours or len(ours) == len(tensors) or name in _CONVERTS:
        return
    if name in _INDEXES and isinstance(tensors[0], Tensor):  # indices may be on the CPU
        return
    scalars = torch.Tag.pointwise in function.tags or name in ("fill_", "masked_fill_", "masked_fill", "where", "lerp_")
    if any(not isinstance(t, Tensor) and (t.dim() or not scalars) for t in tensors):
        where = ", ".join(f"{t.device} {tuple(t.shape)}" for t in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} got {where}")


def _host_generator(generator, on_cuda):
    """A CPU generator in the state of this one, and what gives its new state back."""
    if (generator.device.type == "cuda") != on_cuda:
        raise RuntimeError(f"Expected a '{'cuda' if on_cuda else 'cpu'}' device type for generator")
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    return twin, lambda: generator.set_state(twin.get_state())


def _dispatch(function, args, kwargs):
    tensors = _tensors(*args, *kwargs.values())
    if function.namespace == "tilewise":
        return _operator(function, args, kwargs)
    kwargs, ours = dict(kwargs), any(isinstance(t, Tensor) for t in tensors)
    asked = next((a for a in (*args, kwargs.get("device")) if isinstance(a, torch.device)), None)
    on_cuda = asked.type == "cuda" if asked is not None else ours
    pinned = kwargs.pop("pin_memory", False)
    if pinned and on_cuda:
        raise RuntimeError("Only dense CPU tensors can be pinned")
    if not ours and not on_cuda and kwargs.get("generator") is None:
        return function(*args, **kwargs)
    if asked is None:
        _check_devices(function, tensors)
    args = [torch.device("cpu") if isinstance(a, torch.device) else a for a in args]
    if kwargs.get("device"):
        kwargs["device"] = torch.device("cpu")
    done = lambda: None  # noqa: E731
    if kwargs.get("generator") is not None:
        kwargs["generator"], done = _host_generator(kwargs["generator"], on_cuda)
    given = {id(t.host if isinstance(t, Tensor) else t): t for t in tensors}
    unwrap = lambda x: x.host if isinstance(x, Tensor) else x  # noqa: E731
    out = function(*_map(unwrap, args), **{name: _map(unwrap, value) for name, value in kwargs.items()})
    done()

    def wrap(x):
        return given[id(x)] if id(x) in given else Tensor(x) if on_cuda else x

    return _map(wrap, out)


def _operator(function, args, kwargs):
    """A tilewise operator: one that runs Python code goes through the mode again, the others get host memory."""
    ours = _on_one_device(function.overloadpacket.__name__, args, kwargs)
    key = torch._C.DispatchKey.CUDA if ours else torch._C.DispatchKey.CPU
    if ours and _runs_no_python(function):
        key, args = torch._C.DispatchKey.CPU, _map(lambda x: x.host if isinstance(x, Tensor) else x, args)
    with device, _emulated(ours):
        return function._op_dk(key, *args, **kwargs)


@functools.cache
def _runs_no_python(operator) -> bool:
    return "operator.cpp" in torch._C._dispatch_dump(operator.name())


@contextlib.contextmanager
def _emulated(wanted, depth=[0]):  # noqa: B006 (kept between calls: operators nest)
    from tilewise import _C

    depth[0] += wanted
    _C.emulate(emulator_library() if depth[0] else None)
    try:
        yield
    finally:
        depth[0] -= wanted
        _C.emulate(emulator_library() if depth[0] else None)


def _on_one_device(name, args, kwargs) -> bool:
    """Whether it is CUDA; the optimizers' step counters may be in host memory."""
    if name == "optimizer_step":
        args = [a for i, a in enumerate(args) if i != 7]
    tensors = _tensors(*args, *kwargs.values())
    ours = sum(isinstance(t, Tensor) for t in tensors)
    if 0 < ours < len(tensors):
        raise ValueError(f"{name}: tensors on cuda and cpu, expected one device")
    return ours > 0


class _Device(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls):  # it would be imported for the purpose
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _dispatch(function, args, kwargs or {})


device = _Device()


def _core(function):
    """A function of tilewise._C that runs emulated if it is given pretended tensors."""

    def call(*args, **kwargs):
        with _emulated(_on_one_device(function.__name__, args, kwargs)):
            return function(*args, **kwargs)

    return call


class _Stream:
    device, cuda_stream = torch.device("cuda:0"), 0
    wait_stream = wait_event = record_event = synchronize = lambda self, *_: None


def _pretend_torch():
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None, "synchronize": None,
        "get_device_capability": (8, 0), "get_device_name": "pretended", "empty_cache": None, "manual_seed_all": None,
        "current_stream": _Stream(), "default_stream": _Stream(), "is_current_stream_capturing": False,
        "memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None, "set_device": None,
        "is_bf16_supported": True,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    torch.cuda.Stream, torch.cuda.stream = lambda *_: _Stream(), lambda _: contextlib.nullcontext()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") goes through the mode
    torch.autograd.set_multithreading_enabled(False)  # torch starts no thread for a device that is not there
    torch.serialization.add_safe_globals([_rebuild])


def install():
    """To be called once, before tests are collected."""
    _pretend_torch()
    from tilewise import _C

    for name, function in vars(_C).copy().items():
        if callable(function) and name not in ("emulate", "set_isa"):
            setattr(_C, name, _core(function))
