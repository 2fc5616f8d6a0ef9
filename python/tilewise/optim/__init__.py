"""Optimizers whose states take 4 bits per element and whose step is one fused pass (``tilewise.optim``)."""

from tilewise.optim.adamw import AdamW
from tilewise.optim.quantize import dequantize_state, quantize_state

__all__ = ["AdamW", "dequantize_state", "quantize_state"]
