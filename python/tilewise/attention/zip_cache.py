"""A cache that keeps the tokens that matter at more bits than the others."""

import torch

from tilewise._library import check_tensors
from tilewise.attention.cache import KVCache
from tilewise.attention.dense import attention
from tilewise.attention.merge import merge_attention
from tilewise.attention.scores import attention_column_sums
from tilewise.packing import as_lengths


class ZipCache:
    """Keys and values of one layer and a batch of sequences of any lengths: salient tokens at more bits.

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

    Raises:
        ValueError: a share outside [0, 1]; of formats and sizes, when the first rows are compressed.
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
        # Tokens of each sequence: of the prompt and decoded; among them the salient and the others that are compressed.
        self.lengths, self.counts = [0] * batch, [[0] * batch, [0] * batch]
        self.caches = None  # of salient and other tokens
        self.recent = None  # q, k, v and lse of the newest tokens

    def __len__(self):
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Of the tokens that are held, pages counted in full."""
        bytes = sum(t.nbytes for t in self.recent[1:3]) if self.recent else 0
        for counts, cache in self._parts():
            bytes += sum(-(-n // self.page_size) for n in counts) * cache.nbytes // cache.k_pages.shape[0]
        return bytes

    def prefill(self, q, k, v, *, lengths=None, scale=None):
        """Causal attention of the prompts, whose keys and values are compressed.

        Args:
            q: (B, Hq, S, D); k, v: (B, Hkv, S, D), rotated if they are to be.
            lengths: tokens of each prompt, which stand first in its row: integers, or an integer tensor (B,), which is
                copied to the host. Default: S of all. What stands behind them is not looked at.
            scale: default ``1 / sqrt(D)``.

        Returns:
            out (B, Hq, S, D), 0 behind the prompts.

        Raises:
            ValueError: a cache that holds tokens, more tokens than its capacity, other shapes than it was made for;
                otherwise as :func:`tilewise.attention`.
            TypeError: as there.
        """
        operation = "ZipCache.prefill"
        check_tensors(operation, q=q, k=k, v=v)
        if len(self):
            raise ValueError(f"{operation}: the cache holds {len(self)} tokens, expected none")
        self._check(operation, k)
        rows = k.shape[2]
        lengths = [rows] * self.batch if lengths is None else as_lengths(operation, lengths)
        if len(lengths) != self.batch or max(lengths, default=0) > rows:
            raise ValueError(f"{operation}: lengths is {lengths}, expected {self.batch} of at most {rows}")
        nobody = torch.arange(rows, device=k.device) >= torch.tensor(lengths, device=k.device)[:, None]
        if min(lengths, default=rows) < rows:
            q, k, v = (t.masked_fill(nobody[:, None, :, None], 0) for t in (q, k, v))
        out, lse = attention(q, k, v, causal=True, scale=scale, return_lse=True)
        saliency = lse.new_full((self.batch, rows), -torch.inf)
        for b, n in enumerate(lengths):
            if n:
                own = (t[b : b + 1, :, :n] for t in (q, k, lse))
                saliency[b, :n] = self._saliency(*own, self._probe_rows(n, q.device), scale)[0]
        self._compress(k, v, saliency, lengths)
        self.lengths = lengths
        return out.masked_fill(nobody[:, None, :, None], 0)

    def decode(self, q, k, v, *, scale=None):
        """Attention of new tokens, which are appended, to all before them and to themselves.

        Args:
            q: (B, Hq, S, D); k, v: (B, Hkv, S, D), as many tokens of each sequence.
            scale: default ``1 / sqrt(D)``.

        Returns:
            out (B, Hq, S, D).

        Raises:
            ValueError, TypeError: as :meth:`prefill`.
        """
        check_tensors("ZipCache.decode", q=q, k=k, v=v)
        self._check("ZipCache.decode", k)
        before = self.recent[1:3] if self.recent else (k[:, :, :0], v[:, :, :0])
        keys, values = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
        parts = [attention(q, keys, values, causal=True, scale=scale, return_lse=True)]
        for counts, cache in self._parts():
            lens = torch.tensor(counts, dtype=torch.int32, device=q.device)
            parts.append(cache.attend(q, self._table(cache), lens, causal=False, scale=scale, return_lse=True))
        out, lse = merge_attention(*zip(*parts, strict=True))
        seen = (torch.cat([self.recent[0], q], 2), torch.cat([self.recent[3], lse], 2)) if self.recent else (q, lse)
        self.recent = (seen[0], keys, values, seen[1])
        self.lengths = [n + k.shape[2] for n in self.lengths]
        if keys.shape[2] >= self.interval:
            saliency = self._saliency(seen[0], keys, seen[1], None, scale)
            self._compress(keys, values, saliency, [keys.shape[2]] * self.batch)
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

    def _compress(self, k, v, saliency, lengths):
        """Appends the first ``lengths`` tokens of each sequence to the two caches.

        Where lengths differ, rows that nobody reads are written behind the shorter ones.
        """
        if self.caches is None:
            channels = {"k_channels": KVCache.channels(k), "v_channels": KVCache.channels(v)}
            pages = self.batch * -(-self.capacity // self.page_size)
            shape = (pages, self.page_size, self.kv_heads, self.head_dim)
            coded = lambda format: channels if format.startswith("int") else {}  # noqa: E731
            self.caches = [KVCache(*shape, format=f, **coded(f), device=k.device) for f in self.formats]
        salient = [round(self.salient * n) for n in lengths]
        others = [n - m for n, m in zip(lengths, salient, strict=True)]
        border = torch.tensor(salient, device=k.device)[:, None]
        end = torch.tensor(lengths, device=k.device)[:, None]
        order, behind = saliency.argsort(dim=1, descending=True, stable=True), k.shape[2]
        place = torch.arange(behind, device=k.device)
        chosen = place < border, (place >= border) & (place < end)
        for i, (mine, counts) in enumerate(zip(chosen, (salient, others), strict=True)):
            tokens = order.masked_fill(~mine, behind).sort(1).values[:, : max(counts, default=0)].clamp_max(behind - 1)
            rows = tokens[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_dim)
            start = torch.tensor(self.counts[i], dtype=torch.int32, device=k.device)
            self.caches[i].append(k.gather(2, rows), v.gather(2, rows), self._table(self.caches[i]), start)
            self.counts[i] = [before + n for before, n in zip(self.counts[i], counts, strict=True)]

    def _table(self, cache):
        pages = torch.arange(cache.k_pages.shape[0], dtype=torch.int32, device=cache.k_pages.device)
        return pages.view(self.batch, -1)

    def _parts(self):
        return [(n, c) for n, c in zip(self.counts, self.caches or (), strict=False) if any(n)]
