"""A cache that keeps the tokens that matter at more bits than the others."""

import torch

from tilewise._library import check_tensors
from tilewise.attention.cache import KVCache
from tilewise.attention.dense import attention
from tilewise.attention.merge import merge_attention
from tilewise.attention.scores import attention_column_sums


class ZipCache:
    """Keys and values of one layer and a batch of sequences of one length: salient tokens at more bits.

    He et al., ZipCache, arXiv:2405.14256. A token's saliency is the mean weight that probe rows give it, normalised by
    how many of them see it. After the prompt, and then whenever ``interval`` new tokens have come, the share
    ``salient`` of them goes to a :class:`KVCache` of the first of ``formats``, the others to one of the second. Newer
    tokens stay as they are. Attention to the three joins by log-sum-exp (:func:`merge_attention`); nothing is
    dequantised outside of it.

    Args:
        batch, capacity: how many sequences, and tokens of each.
        kv_heads, head_dim: of keys and values.
        salient: share of tokens at more bits, from 0 to 1.
        formats: of salient and other tokens, as in :class:`KVCache`.
        interval: how many new tokens are compressed at a time.
        probes: share of the prompt's rows that judge saliency, half of them the last, half drawn at random.
        page_size: tokens of a page.
        generator: of the random rows.
    """

    def __init__(
        self,
        batch,
        capacity,
        kv_heads,
        head_dim,
        *,
        salient=0.4,
        formats=("int4", "int2"),
        interval=100,
        probes=0.1,
        page_size=64,
        generator=None,
    ):
        for name, share in (("salient", salient), ("probes", probes)):
            if not 0 <= share <= 1:
                raise ValueError(f"ZipCache: {name} is {share}, expected 0 to 1")
        self.batch, self.capacity, self.kv_heads, self.head_dim = batch, capacity, kv_heads, head_dim
        self.salient, self.formats, self.interval, self.probes = salient, tuple(formats), interval, probes
        self.page_size, self.generator = page_size, generator
        self.caches, self.counts = None, [0, 0]  # of salient and other tokens
        self.recent = None  # q, k, v and lse of the newest tokens

    def __len__(self):
        return sum(self.counts) + (self.recent[1].shape[2] if self.recent else 0)

    @property
    def nbytes(self) -> int:
        """Of the tokens that are held, pages counted in full."""
        pages = sum(-(-n // self.page_size) * c.nbytes // c.k_pages.shape[0] for n, c in self._parts())
        return pages * self.batch + (sum(t.nbytes for t in self.recent[1:3]) if self.recent else 0)

    def prefill(self, q, k, v, *, scale=None):
        """Causal attention of the prompt, whose keys and values are compressed.

        Args:
            q: (B, Hq, S, D); k, v: (B, Hkv, S, D), rotated if they are to be.

        Returns:
            out (B, Hq, S, D).
        """
        check_tensors("ZipCache.prefill", q=q, k=k, v=v)
        if len(self):
            raise ValueError(f"ZipCache.prefill: the cache holds {len(self)} tokens, expected none")
        self._check("ZipCache.prefill", k)
        out, lse = attention(q, k, v, causal=True, scale=scale, return_lse=True)
        self._compress(k, v, self._saliency(q, k, lse, self._probe_rows(q.shape[2], q.device), scale))
        return out

    def decode(self, q, k, v, *, scale=None):
        """Attention of new tokens, which are appended, to all before them and to themselves.

        Args:
            q: (B, Hq, S, D); k, v: (B, Hkv, S, D).

        Returns:
            out (B, Hq, S, D).
        """
        check_tensors("ZipCache.decode", q=q, k=k, v=v)
        self._check("ZipCache.decode", k)
        before = self.recent[1:3] if self.recent else (k[:, :, :0], v[:, :, :0])
        keys, values = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
        parts = [attention(q, keys, values, causal=True, scale=scale, return_lse=True)]
        for count, cache in self._parts():
            lens = torch.full((self.batch,), count, dtype=torch.int32, device=q.device)
            parts.append(cache.attend(q, self._table(cache), lens, causal=False, scale=scale, return_lse=True))
        out, lse = merge_attention(*zip(*parts, strict=True))
        seen = (torch.cat([self.recent[0], q], 2), torch.cat([self.recent[3], lse], 2)) if self.recent else (q, lse)
        self.recent = (seen[0], keys, values, seen[1])
        if keys.shape[2] >= self.interval:
            self._compress(keys, values, self._saliency(seen[0], keys, seen[1], None, scale))
            self.recent = None
        return out

    def _check(self, operation, k):
        expected = (self.batch, self.kv_heads, k.shape[2] if k.ndim == 4 else "S", self.head_dim)
        if tuple(k.shape) != expected:
            raise ValueError(f"{operation}: k has shape {tuple(k.shape)}, expected {expected}")
        if len(self) + k.shape[2] > self.capacity:
            raise ValueError(f"{operation}: {len(self)} + {k.shape[2]} tokens, expected at most {self.capacity}")

    def _probe_rows(self, rows, device):
        half = max(1, round(rows * self.probes / 2))
        drawn = torch.randint(0, max(rows, 1), (half,), device=device, generator=self.generator)
        return torch.cat([torch.arange(max(0, rows - half), rows, device=device), drawn])

    @staticmethod
    def _saliency(q, k, lse, rows, scale):
        """(B, S): the mean over heads, too."""
        return attention_column_sums(q, k, lse, rows=rows, causal=True, scale=scale).mean(1)

    def _compress(self, k, v, saliency):
        if self.caches is None:
            channels = {"k_channels": KVCache.channels(k), "v_channels": KVCache.channels(v)}
            pages = self.batch * -(-self.capacity // self.page_size)
            shape = (pages, self.page_size, self.kv_heads, self.head_dim)
            coded = lambda format: channels if format.startswith("int") else {}  # noqa: E731
            self.caches = [KVCache(*shape, format=f, **coded(f), device=k.device) for f in self.formats]
        count = round(self.salient * k.shape[2])
        order = saliency.argsort(dim=1, descending=True, stable=True)
        for i, tokens in enumerate((order[:, :count], order[:, count:])):
            rows = tokens.sort(1).values[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
            start = torch.full((self.batch,), self.counts[i], dtype=torch.int32, device=k.device)
            self.caches[i].append(k.gather(2, rows), v.gather(2, rows), self._table(self.caches[i]), start)
            self.counts[i] += rows.shape[2]

    def _table(self, cache):
        pages = torch.arange(cache.k_pages.shape[0], dtype=torch.int32, device=cache.k_pages.device)
        return pages.view(self.batch, -1)

    def _parts(self):
        return [(n, c) for n, c in zip(self.counts, self.caches or (), strict=False) if n]
