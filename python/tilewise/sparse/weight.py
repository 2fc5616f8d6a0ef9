"""What all formats of sparse weights share, and the checks of what they are made from."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CompressedWeight:
    """A weight (out, in) stored by its kept values. ``weight.values`` is an ordinary tensor: make it require gradients
    (or set it to a ``torch.nn.Parameter`` of the same shape) to train it, with the pattern fixed."""

    format: str
    _formats: dict[str, type[CompressedWeight]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        CompressedWeight._formats[cls.format] = cls

    def __init__(self, values: torch.Tensor, shape):
        self._shape = torch.Size(shape)
        self._values = values

    @property
    def values(self) -> torch.Tensor:
        """The kept values; what is set must have the same shape, dtype and device (ValueError, TypeError)."""
        return self._values

    @values.setter
    def values(self, new: torch.Tensor) -> None:
        old = self._values
        expect_tensor(type(self).__name__, "values", new, (old.dtype,), tuple(old.shape), old.device)
        self._values = new

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._values.dtype

    @property
    def device(self) -> torch.device:
        return self._values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the portable format (what ``state_dict`` holds)."""
        return sum(t.nbytes for t in self.state_dict().values() if isinstance(t, torch.Tensor))

    def __repr__(self):
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, nbytes={self.nbytes})"

    def to_dense(self) -> torch.Tensor:
        """The weight (out, in) with zeros where nothing is kept; differentiable in ``values``."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Tensors and plain numbers, the same on every device; :meth:`from_state_dict` takes them back."""
        raise NotImplementedError

    def to(self, device) -> CompressedWeight:
        """The same weight on another device (itself if it is there already)."""
        raise NotImplementedError

    @classmethod
    def from_state_dict(cls, state: dict) -> CompressedWeight:
        """Rebuilds a weight from :meth:`state_dict`.

        Raises:
            TypeError: an entry of the wrong type or dtype.
            ValueError: missing or unknown entries, another format, shapes that do not fit, illegal indices.
        """
        if not isinstance(state, dict):
            raise TypeError(f"{cls.__name__}.from_state_dict: state is a {type(state).__name__}, expected a dict")
        name = state.get("format")
        known = CompressedWeight._formats if cls is CompressedWeight else {cls.format: cls}
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"{cls.__name__}.from_state_dict: format is {name!r}, expected one of {sorted(known)}")
        return known[name]._from_state(state)

    @classmethod
    def _from_state(cls, state):
        raise NotImplementedError

    def _linear(self, x, bias):
        raise NotImplementedError


def expect_tensor(operation, name, value, dtypes, shape, device=None):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{operation}: {name} is a {type(value).__name__}, expected a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{operation}: {name} has layout {value.layout}, expected torch.strided")
    if value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{operation}: {name} has dtype {str(value.dtype).removeprefix('torch.')}, expected {expected}")
    if value.ndim != len(shape) or any(e not in (None, n) for n, e in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{operation}: {name} has shape {tuple(value.shape)}, expected {shape} (None: any)")
    if device is not None and value.device != device:
        raise ValueError(f"{operation}: {name} is on {value.device}, expected {device}")


def expect_keys(operation, state, keys):
    if set(state) != set(keys):
        raise ValueError(f"{operation}: state has entries {sorted(map(str, state))}, expected {sorted(keys)}")


def expect_ints(operation, state, keys):
    for key in keys:
        if type(state[key]) is not int:
            raise TypeError(f"{operation}: {key} is a {type(state[key]).__name__}, expected an int")
        if state[key] < 0:
            raise ValueError(f"{operation}: {key} is {state[key]}, expected at least 0")
