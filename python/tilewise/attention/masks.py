"""What a query may see, as tensors: boolean masks as bits, and masks of whole blocks."""

from dataclasses import dataclass

import torch

from tilewise import _C
from tilewise._library import register


@dataclass(frozen=True)
class BlockMask:
    """Which blocks of queries attend to which blocks of keys.

    Attributes:
        blocks: bool (B or 1, Hq or 1, ceil(S / bq), ceil(Sk / bk)), True = attend.
        block_size: queries and keys of a block, (bq, bk) or one number for both: multiples of 16 from 16 to 128.

    Shapes, dtype and sizes are checked where it is used: :func:`tilewise.attention` raises.
    """

    blocks: torch.Tensor
    block_size: int | tuple[int, int]

    @property
    def sizes(self) -> tuple[int, int]:
        """(bq, bk)."""
        return (self.block_size, self.block_size) if isinstance(self.block_size, int) else tuple(self.block_size)

    def dense(self, queries: int, keys: int) -> torch.Tensor:
        """The same as a boolean mask (B or 1, Hq or 1, queries, keys)."""
        block_q, block_k = self.sizes
        rows = self.blocks.repeat_interleave(block_q, 2)[:, :, :queries]
        return rows.repeat_interleave(block_k, 3)[..., :keys]


def _empty_words(mask, keys):
    if mask.ndim != 4:  # nonsense, which the core then reports
        return mask.new_empty((0,), dtype=torch.int32)
    return mask.new_empty((*mask.shape[:3], (keys + 31) // 32), dtype=torch.int32)


def _pack_mask(mask, keys):
    words = _empty_words(mask, keys)
    _C.attention_pack_mask(mask, keys, words)
    return words


pack_mask = register("attention_pack_mask(Tensor mask, SymInt keys) -> Tensor", _pack_mask, fake=_empty_words)
