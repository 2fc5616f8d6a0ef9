"""Real text as bytes: the Python standard library's own sources, or a file."""

import sysconfig
from pathlib import Path

import torch


def load_bytes(text: str | None = None, limit: int = 12_000_000) -> torch.Tensor:
    """uint8 (n,): the file ``text``, or the standard library's .py files in alphabetical order."""
    if text:
        return torch.frombuffer(bytearray(Path(text).read_bytes()[:limit]), dtype=torch.uint8)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    content = b"\n".join(path.read_bytes() for path in sources)[:limit]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class Corpus:
    """A training part and a held-out part (the last tenth), both as random windows that a seed repeats."""

    def __init__(self, data: torch.Tensor):
        if data.numel() < 100_000:
            raise ValueError(f"demo: text has {data.numel()} bytes, expected at least 100000")
        split = data.numel() * 9 // 10
        self.train, self.held_out = data[:split].long(), data[split:].long()

    @staticmethod
    def windows(part: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """int64 (count, length + 1): inputs and, shifted by one, targets."""
        length = min(length, part.numel() - 2)
        starts = torch.randint(0, part.numel() - length - 1, (count,), generator=generator)
        return torch.stack([part[s : s + length + 1] for s in starts.tolist()])
