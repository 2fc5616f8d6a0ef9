"""The names of other libraries, so that code written for them runs on tilewise by changing an import."""

from tilewise.compat import bitsandbytes, flash_attn

__all__ = ["bitsandbytes", "flash_attn"]
