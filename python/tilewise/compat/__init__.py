"""The names of other libraries, so that code written for them runs on tilewise by changing an import."""

from tilewise.compat import flash_attn

__all__ = ["flash_attn"]
