"""Optimizers whose states take 4 or 8 bits per element and whose step is one fused pass (``tilewise.optim``)."""

from tilewise.optim import distributed
from tilewise.optim.adagrad import Adagrad
from tilewise.optim.adam import Adam, AdamW
from tilewise.optim.base import LowBitOptimizer
from tilewise.optim.convert import convert_state_dict
from tilewise.optim.lion import Lion
from tilewise.optim.matrices import dequantize_matrix, orthonormalize, quantize_matrix
from tilewise.optim.memory import MemoryReport
from tilewise.optim.offload import CPUOffload
from tilewise.optim.overrides import override
from tilewise.optim.quantize import dequantize_state, quantize_state
from tilewise.optim.rmsprop import RMSprop
from tilewise.optim.sgd import SGD
from tilewise.optim.shampoo import Shampoo

__all__ = [
    "Adagrad",
    "Adam",
    "AdamW",
    "CPUOffload",
    "Lion",
    "LowBitOptimizer",
    "MemoryReport",
    "RMSprop",
    "SGD",
    "Shampoo",
    "convert_state_dict",
    "dequantize_matrix",
    "dequantize_state",
    "distributed",
    "orthonormalize",
    "override",
    "quantize_matrix",
    "quantize_state",
]
