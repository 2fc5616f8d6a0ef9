"""Static shapes of draft trees."""

from typing import NamedTuple

import torch


class TreeTemplate(NamedTuple):
    """A tree shape: ``parent`` int32 (N,) and ``rank`` int32 (N,), which candidate of its parent's token a node takes.

    The root has parent -1 and rank 0.
    """

    parent: torch.Tensor
    rank: torch.Tensor

    @classmethod
    def from_levels(cls, levels, candidates: int = 8) -> "TreeTemplate":
        """The tree with ``levels[i]`` nodes at depth i + 1 whose paths are the likeliest.

        A candidate of rank r is taken to follow its parent with probability proportional to ``1 / (r + 1)``; each
        level keeps the nodes of the largest path probability, ties in index order. Nodes are numbered level by level,
        and within a level by parent, then rank, so siblings stand in the order of their ranks.

        Args:
            levels: how many nodes each depth has, from 1 on.
            candidates: how many each token has.

        Raises:
            ValueError: a level of more nodes than the one above it can have.
        """
        parent, rank = [-1], [0]
        above = [(1.0, 0)]  # (path probability, node)
        for width in levels:
            grown = [(p / (r + 1), up, r) for p, up in above for r in range(candidates)]
            if width > len(grown):
                raise ValueError(f"TreeTemplate.from_levels: levels has {width}, expected at most {len(grown)} there")
            kept = sorted(range(len(grown)), key=lambda i: (-grown[i][0], i))[:width]
            above = []
            for i in sorted(kept):
                p, up, r = grown[i]
                above.append((p, len(parent)))
                parent.append(up)
                rank.append(r)
        return cls(*(torch.tensor(column, dtype=torch.int32, device="cpu") for column in (parent, rank)))

    def to(self, device) -> "TreeTemplate":
        """The same shape on another device."""
        return TreeTemplate(*(t.to(device) for t in self))


#: The sizes of Token Recycling's static tree (Luo et al., 2024, arXiv:2408.08696): 80 nodes below the root in levels of
#: 8, 21, 25, 15, 8 and 3, with 8 candidates per token. Which nodes of a level are kept follows
#: :meth:`TreeTemplate.from_levels`.
TOKEN_RECYCLING = TreeTemplate.from_levels((8, 21, 25, 15, 8, 3))

#: A tree of 15 nodes below the root, for machines where a wider step costs time (CPUs).
DEFAULT_TEMPLATE = TreeTemplate.from_levels((4, 5, 3, 2, 1))
