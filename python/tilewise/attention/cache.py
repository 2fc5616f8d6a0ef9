"""Keys and values of one layer in pages, as numbers or as codes."""

import torch

from tilewise import _C, rope
from tilewise._library import check_tensors, core, register
from tilewise.attention.k_sort import channel_order, expect_order, pairs_of, sort_channels
from tilewise.attention.paged import FORMATS, attend_pages, pack_options
from tilewise.attention.paged_varlen import attend_packed

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_cache_append_op = register(
    "cache_append(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor start, Tensor k, Tensor v, "
    "int format, Tensor? k_channels, Tensor? v_channels, Tensor? cos, Tensor? sin, bool interleaved) -> ()",
    core("cache_append"),
    fake=lambda *_: None,
)
_cache_rotate_op = register(
    "cache_rotate(Tensor(a!) k_pages, Tensor block_table, Tensor positions, int dim, int format, "
    "Tensor? k_channels, Tensor cos, Tensor sin, bool interleaved) -> ()",
    core("cache_rotate"),
    fake=lambda *_: None,
)


class KVCache:
    """Keys and values of one layer in pages, quantised on the way in and read as they are by attention.

    Formats: ``fp32``, ``fp16``, ``bf16``; ``int8``, ``int4``, ``int2``, channel-separable tokenwise (He et al.,
    ZipCache, arXiv:2405.14256): with a number c for each key head and channel, a row x of one token and head is stored
    as x / c = scale * code + zero, with one bf16 scale and zero for the row; ``bfp12``, 4-bit two's complement
    mantissas with an 8-bit exponent for each 32 channels. No row is ever dequantised but in attention's registers and
    blocks of keys: for K, c joins the query, for V the output.

    Args:
        num_pages, page_size, kv_heads, head_dim: the pool; head_dim from 1 to 256.
        format: one of the above.
        k_channels, v_channels: float32 (Hkv, D), c of the int formats; None: ones. :meth:`channels` finds them.
        k_order: integers (Hkv, D), the order in which pages keep the channels of keys; None: as they are. Of bfp12 a
            block should hold channels of one size (K-sort, arXiv:2403.20137): :meth:`order` finds it. Queries are
            sorted alike; nothing else changes. Where nothing turns behind the projections, their rows can be sorted
            once instead.
        device: of the pages.

    Attributes:
        k_pages, v_pages: (P, page_size, Hkv, D), or uint8 (P, page_size, Hkv, row bytes) of codes.

    Raises:
        ValueError: another format, head dim or order. Of k_channels and v_channels, when rows are written or read.
        TypeError: channels or an order that are not tensors.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        format: str = "bf16",
        k_channels: torch.Tensor | None = None,
        v_channels: torch.Tensor | None = None,
        k_order: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ):
        if format not in _DTYPES and format not in FORMATS:
            known = ", ".join([*_DTYPES, *FORMATS[1:]])
            raise ValueError(f"KVCache: format is {format!r}, expected one of {known}")
        if not 1 <= head_dim <= 256:
            raise ValueError(f"KVCache: head_dim is {head_dim}, expected 1 to 256")
        check_tensors("KVCache", k_channels=k_channels, v_channels=v_channels)
        self.format, self.head_dim = format, head_dim
        self.k_channels, self.v_channels, self.k_order = k_channels, v_channels, None
        if k_order is not None:
            self._order = expect_order("KVCache", k_order, kv_heads, head_dim)
            self.k_order = self._order.to(device)
            if k_channels is not None and k_channels.shape == k_order.shape:
                self.k_channels = k_channels.gather(1, self.k_order)
        self._code = FORMATS.index(format) if format in FORMATS else 0
        dtype, width = _DTYPES.get(format, torch.uint8), head_dim
        if self._code:
            width = _C.cache_row_bytes(self._code, head_dim)
        shape = (num_pages, page_size, kv_heads, width)
        self.k_pages, self.v_pages = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    @staticmethod
    def channels(x: torch.Tensor) -> torch.Tensor:
        """sqrt(max |x|) of every head and channel of (B, Hkv, S, D) calibration data, 1 where all is zero."""
        largest = x.detach().float().abs().amax((0, 2))
        return torch.where(largest > 0, largest.sqrt(), torch.ones_like(largest)).contiguous()

    order = staticmethod(channel_order)

    @property
    def nbytes(self) -> int:
        """Of both pools of pages."""
        return self.k_pages.nbytes + self.v_pages.nbytes

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        block_table: torch.Tensor,
        start: torch.Tensor,
        *,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        theta: float | None = None,
        positions: torch.Tensor | None = None,
        rotary_dim: int | None = None,
        interleaved: bool = False,
    ) -> None:
        """Writes k, v (B, Hkv, S, D) to positions ``start[b] + i`` of the sequences, in place.

        Keys are rotated (RoPE, Su et al., arXiv:2104.09864) on the way by cos and sin, float32 (B or 1, S, R / 2), or
        by ``theta``: then by position * theta^(-2 i / rotary_dim), positions (B, S) by default those written to. Pairs
        are channels (i, i + R / 2), or with ``interleaved`` (2 i, 2 i + 1). A row that is not finite becomes NaN.

        Raises:
            ValueError: wrong shape; on CPU, positions beyond the block table or pages beyond the pool (nothing is
                written). On CUDA those are skipped and the next tilewise call on the device raises.
            TypeError: wrong dtype; k and v have the pages' dtype, any float of codes.
        """
        check_tensors("KVCache.append", k=k, v=v, block_table=block_table, start=start, cos=cos, sin=sin)
        if theta is not None:
            if cos is not None:
                raise ValueError("KVCache.append: theta and cos are given, expected one of them")
            if positions is None:
                positions = start[:, None] + torch.arange(k.shape[2], device=start.device)
            cos, sin = rope.table(positions, rotary_dim or self.head_dim, theta=theta)
        k = sort_channels(k, self.k_order)
        heads = {t.shape[1] for t in (k, v) if t.ndim == 4}
        for head, *angles in self._turning("KVCache.append", heads, cos, sin, interleaved):
            pages = _of_head(self.k_pages, 2, head), _of_head(self.v_pages, 2, head)
            rows = _of_head(k, 1, head), _of_head(v, 1, head)
            channels = _of_head(self.k_channels, 0, head), _of_head(self.v_channels, 0, head)
            _cache_append_op(*pages, block_table, start, *rows, self._code, *channels, *angles, interleaved)
        torch.autograd.graph.increment_version((self.k_pages, self.v_pages))

    def attend(
        self,
        q: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        return_lse: bool = False,
        **options,
    ):
        """:func:`paged_attention` of q (B, Hq, S, D) to this cache, with its options, results and errors.

        q has the pages' dtype; beside codes any of float32, float16 and bfloat16.
        """
        pages = (self.k_pages, self.v_pages, block_table, seq_lens)
        q = sort_channels(q, self.k_order)
        return attend_pages(q, *pages, self._options(options), return_lse)

    def attend_varlen(
        self,
        q: torch.Tensor,
        block_table: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        max_seqlen_q: int | None = None,
        return_lse: bool = False,
        **options,
    ):
        """:func:`paged_attention_varlen` of q (T, Hq, D) to this cache; dtypes as in :meth:`attend`."""
        pages = (self.k_pages, self.v_pages, block_table, cu_seqlens_q, seq_lens)
        if self.k_order is not None and q.ndim == 3:
            q = sort_channels(q.transpose(0, 1)[None], self.k_order)[0].transpose(0, 1)
        return attend_packed(q, *pages, self._options(options), max_seqlen_q, return_lse)

    def _options(self, given):
        return pack_options(**given, format=self._code, channels=(self.k_channels, self.v_channels))

    def update_rope(
        self,
        block_table: torch.Tensor,
        positions: torch.Tensor,
        delta: torch.Tensor | int,
        *,
        theta: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
    ) -> None:
        """Moves cached keys by ``delta`` positions: rotates them further, in place.

        For caches of text that is used again elsewhere (Ma et al., Block-Attention, arXiv:2409.15355). Codes are made
        anew, which rounds once more.

        Args:
            block_table: int32 (B, pages per sequence).
            positions: int32 (B, N), where the keys stand; none may stand twice.
            delta: a number or integers (B, N), may be negative.
            theta, rotary_dim, interleaved: as in :meth:`append`.

        Raises:
            ValueError: wrong shape; on CPU, positions beyond the block table or pages beyond the pool. On CUDA those
                are skipped and the next tilewise call on the device raises.
            TypeError: wrong dtype.
        """
        check_tensors("KVCache.update_rope", block_table=block_table, positions=positions)
        moved = torch.as_tensor(delta, device=positions.device).expand(positions.shape)
        cos, sin = rope.table(moved, rotary_dim or self.head_dim, theta=theta)
        for head, *angles in self._turning("KVCache.update_rope", {self.k_pages.shape[2]}, cos, sin, interleaved):
            pages, channels = _of_head(self.k_pages, 2, head), _of_head(self.k_channels, 0, head)
            options = (self.head_dim, self._code, channels, *angles, interleaved)
            _cache_rotate_op(pages, block_table, positions, *options)
        torch.autograd.graph.increment_version((self.k_pages,))

    def _turning(self, operation, heads, cos, sin, interleaved):
        """(head, cos, sin): all heads at once, None, or those with channels in their own order one by one.

        Nonsense goes on as it is: the core reports it.
        """
        known = cos is not None and sin is not None and cos.shape == sin.shape and 2 * cos.shape[-1] <= self.head_dim
        if self.k_order is None or not known or heads != {len(self._order)}:
            yield None, cos, sin
            return
        pairs = pairs_of(operation, self._order, 2 * cos.shape[-1], interleaved).to(cos.device)
        for head, of_head in enumerate(pairs):
            yield head, cos[..., of_head].contiguous(), sin[..., of_head].contiguous()

    def compact(
        self, block_table: torch.Tensor, prefix_len: torch.Tensor, path: torch.Tensor, accept_len: torch.Tensor
    ) -> None:
        """:func:`speculative.compact_kv` of this cache: keeps the rows of the accepted nodes of a tree."""
        from tilewise.speculative import compact_kv

        compact_kv([(self.k_pages, self.v_pages)], block_table, prefix_len, path, accept_len)


def _of_head(t, dim, head):
    return t if t is None or head is None else t.narrow(dim, head, 1)
