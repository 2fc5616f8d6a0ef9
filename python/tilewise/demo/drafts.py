"""Drafts by retrieval: how the text went on, wherever it ran as it does now (He et al., REST, arXiv:2311.08252)."""

import torch

CONTEXT = 7  # bytes that a place is found by: as many as a positive int64 holds
MATCHES = ((7, 2), (4, 2))  # so many bytes alike, so many places
REACH = 8  # bytes that are taken from a place
INDEXED_BYTES = 4_000_000  # the index is 16 times that


def _last_bytes(columns: list[torch.Tensor]) -> torch.Tensor:
    """Bytes as one integer, the last in the highest place: contexts that end alike are neighbours when sorted."""
    key = torch.zeros_like(columns[-1])
    for column in reversed(columns):
        key = key << 8 | column
    return key


class Retrieval:
    """An index of ``text``, int64 (n,): every place, sorted by the bytes before it."""

    def __init__(self, text: torch.Tensor):
        text = text[:INDEXED_BYTES]
        places = text.numel() - CONTEXT - REACH
        self.keys, self.places = _last_bytes([text[i : i + places] for i in range(CONTEXT)]).sort()
        self.text = text.to(torch.int32)

    def continuations(self, context: torch.Tensor) -> torch.Tensor:
        """int32 (B, width, REACH): what followed the bytes (B, CONTEXT), longest match first; -1 where none did."""
        key = _last_bytes(list(context.unbind(1)))
        return torch.cat([self._matches(key, alike, count) for alike, count in MATCHES], dim=1)

    def _matches(self, key, alike, count):
        free = 8 * (CONTEXT - alike)
        least = key >> free << free
        begin, end = torch.searchsorted(self.keys, torch.stack([least, least + (1 << free)]))
        spread = (end - begin).unsqueeze(1) * torch.arange(count) // count
        found = self.places[(begin.unsqueeze(1) + spread).clamp(max=len(self.places) - 1)]
        ahead = self.text[found.unsqueeze(2) + CONTEXT + torch.arange(REACH)]
        return torch.where((end > begin)[:, None, None], ahead, -1)
