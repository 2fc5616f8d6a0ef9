"""The optimizers of the bitsandbytes package, with its names, argument names and defaults.

    from tilewise.compat import bitsandbytes as bnb       # was: import bitsandbytes as bnb
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-4)

They are the optimizers of :mod:`tilewise.optim` with ``state_bits`` 8 or 32, run on CPU too, and load bitsandbytes'
state dicts (:func:`tilewise.optim.convert_state_dict`). Beside the arguments of the class of that name there:

    optim_bits           8 or 32, in the classes without bits in their name
    args                 an object with some of the following as attributes, or None
    min_8bit_size        parameters with fewer elements keep 32-bit states
    percentile_clipping  only 100; block_wise only True; is_paged, amsgrad, centered only False

What differs: rounding is to the nearest code always, weight decay comes before the update, SGD heeds ``dampening`` and
``nesterov``, RMSprop ``momentum``, Adagrad ``lr_decay`` and ``initial_accumulator_value``. The weight decay of Adam is
decoupled as in bitsandbytes, where Adam and AdamW differ in its default only.

Raises, beside what tilewise.optim raises: NotImplementedError for a value that is not served; ValueError for other
``optim_bits``.
"""

import inspect
from types import SimpleNamespace

import torch

from tilewise import nn as _nn
from tilewise import optim as _optim

_REQUIRED = inspect.Parameter.empty
_SHARED = {"args": None, "min_8bit_size": 4096, "percentile_clipping": 100, "block_wise": True}
_SERVED = {"percentile_clipping": 100, "block_wise": True, "is_paged": False, "max_unorm": 0.0, "skip_zeros": False}


def _signature(own, shared):
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = {"self": _REQUIRED, "params": _REQUIRED} | own | shared
    return inspect.Signature([inspect.Parameter(name, kind, default=default) for name, default in names.items()])


def _states(operation, given, bits):
    """The options of tilewise.optim that bitsandbytes' arguments stand for."""
    for name, served in _SERVED.items():
        if given.get(name, served) != served:
            raise NotImplementedError(
                f"{operation}: {name} is {given[name]!r}, expected {served!r} (no kernel serves it)"
            )
    asked = given.get("optim_bits", bits)
    if asked not in (8, 32) or (bits and asked not in (bits, 32)):
        raise ValueError(f"{operation}: optim_bits is {asked!r}, expected {bits or '8 or 32'}")
    return {"state_bits": bits or asked, "min_quantized_size": given["min_8bit_size"]}


def _optimizer(name, base, own, shared, bits, fixed):
    signature = _signature(own, shared)

    def __init__(self, *positional, **named):
        given = signature.bind(self, *positional, **named)
        given.apply_defaults()
        given = given.arguments
        given |= vars(given["args"]) if given["args"] is not None else {}
        states = _states(name, given, bits)
        base.__init__(self, given["params"], **{key: given[key] for key in own}, **states, **fixed)

    __init__.__signature__ = signature
    text = f"tilewise.optim.{base.__name__} with the arguments of bitsandbytes.optim.{name}."
    return type(name, (base,), {"__init__": __init__, "__doc__": text, "__module__": __name__})


def _family(name, base, own, paged=False, bits_everywhere=False, **fixed):
    """The classes <name>, <name>8bit and <name>32bit."""
    with_bits = {"optim_bits": 32} | _SHARED | ({"is_paged": False} if paged else {})
    without = with_bits if bits_everywhere else {key: with_bits[key] for key in with_bits if key != "optim_bits"}
    return (
        _optimizer(name, base, own, with_bits, None, fixed),
        _optimizer(name + "8bit", base, own, without, 8, fixed),
        _optimizer(name + "32bit", base, own, without, 32, fixed),
    )


_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
_ADAM_FIXED = {"paged": True, "bits_everywhere": True, "decoupled_weight_decay": True}
_SGD = {"lr": _REQUIRED, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
_LION = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}
_RMSPROP = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "centered": False}
_ADAGRAD = {"lr": 1e-2, "lr_decay": 0.0, "weight_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10}

Adam, Adam8bit, Adam32bit = _family("Adam", _optim.Adam, _ADAM, **_ADAM_FIXED)
AdamW, AdamW8bit, AdamW32bit = _family("AdamW", _optim.Adam, _ADAM | {"weight_decay": 1e-2}, **_ADAM_FIXED)
SGD, SGD8bit, SGD32bit = _family("SGD", _optim.SGD, _SGD)
Lion, Lion8bit, Lion32bit = _family("Lion", _optim.Lion, _LION, paged=True)
RMSprop, RMSprop8bit, RMSprop32bit = _family("RMSprop", _optim.RMSprop, _RMSPROP)
Adagrad, Adagrad8bit, Adagrad32bit = _family("Adagrad", _optim.Adagrad, _ADAGRAD, bits_everywhere=True)


class GlobalOptimManager:
    """bitsandbytes' registry of options per parameter; it writes into :func:`tilewise.optim.override`.

    Served keys are ``optim_bits`` and ``min_8bit_size``.
    """

    _instance = None
    _NAMES = {"optim_bits": "state_bits", "min_8bit_size": "min_quantized_size"}

    @classmethod
    def get_instance(cls):
        """The only one."""
        cls._instance = cls._instance or cls()
        return cls._instance

    def register_parameters(self, params):
        """Does nothing: parameters are known by themselves."""

    def override_config(self, parameters, key=None, value=None, key_value_dict=None):
        """Options for one parameter or several, as key and value or as a dict.

        Raises:
            NotImplementedError: another key than those served.
        """
        config = dict(key_value_dict or {}) | ({} if key is None else {key: value})
        for name in config:
            if name not in self._NAMES:
                served = ", ".join(self._NAMES)
                raise NotImplementedError(f"override_config: key is {name!r}, expected one of {served}")
        for p in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
            _optim.override(p, **{self._NAMES[name]: value for name, value in config.items()})

    def register_module_override(self, module, param_name, config):
        """The same for ``getattr(module, param_name)``."""
        self.override_config(getattr(module, param_name), key_value_dict=config)


_OPTIMIZERS = [
    f"{name}{bits}" for name in ("Adam", "AdamW", "SGD", "Lion", "RMSprop", "Adagrad") for bits in ("", "8bit", "32bit")
]
optim = SimpleNamespace(GlobalOptimManager=GlobalOptimManager, **{name: globals()[name] for name in _OPTIMIZERS})
nn = SimpleNamespace(StableEmbedding=_nn.StableEmbedding)

__all__ = ["GlobalOptimManager", "nn", "optim", *_OPTIMIZERS]
