"""Attention over sequences that are spread over processes (torch.distributed)."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tilewise._library import check_tensors
from tilewise.attention import attention, merge_attention
from tilewise.attention import options as attention_options
from tilewise.attention.dense import attention_backward_op

__all__ = ["ring_attention", "zigzag_shard", "zigzag_unshard"]


def ring_attention(q, k, v, group=None, causal=False, scale=None):
    """:func:`tilewise.attention` of a sequence whose rows are spread over the N processes of ``group``.

    Keys and values stay. The queries go round from rank to rank; whoever holds them attends to its own keys and sends
    (out, lse) straight back to their owner, who joins them (TokenRing, Liu et al., arXiv:2412.20501). In the backward
    q, dout and two numbers a row go round, dq comes back, dk and dv gather where the keys are. What travels does so
    while the step before it computes. Partial results are joined in float32.

    All ranks of the group call it, and its backward, in the same order. Before anything else travels, each tells the
    others what it was given and whether it can work with that, so that an error of one, or a mismatch, is an error on
    all of them; on a GPU that waits for the device once a call.

    Args:
        q: (B, Hq, S / N, D), this rank's rows; float32, float16 or bfloat16.
        k, v: (B, Hkv, Sk / N, D) and (B, Hkv, Sk / N, Dv).
        group: a process group; default the world.
        causal: S = Sk, and rank r holds what :func:`zigzag_shard` gives it, so that all ranks have equal work. Without
            causality any rows may be anywhere.
        scale: default ``1 / sqrt(D)``.

    Returns:
        out (B, Hq, S / N, Dv), of this rank's rows. Differentiable in q, k and v.

    Raises:
        ValueError: shapes that do not fit, an odd number of rows or rows unlike the keys with ``causal``, no process
            group; anything that differs between ranks.
        TypeError, NotImplementedError: as :func:`tilewise.attention`.
        All ranks raise what the first of them does that cannot work.
    """
    ring = _Ring.of(group)
    _agree(ring, _problem(q, k, v, causal, scale), q, k, v, causal, scale)
    if not q.numel() or not k.numel():  # the same on every rank
        return attention(q, k, v, scale=scale)
    return _RingAttention.apply(q, k, v, ring, causal, scale)


def zigzag_shard(t, rank, world, dim=2):
    """The rows of ``t`` that rank ``rank`` of ``world`` has: chunks ``rank`` and ``2 world - 1 - rank`` of 2 world.

    A causal mask leaves late rows more work than early ones; two such chunks have the same together on every rank.

    Args:
        t: any shape and dtype.
        rank, world: whose rows, and how many ranks there are.
        dim: the dimension of rows; default that of (B, H, S, D).

    Returns:
        ``t`` with 1 / world of its rows; a copy, differentiable.

    Raises:
        ValueError: a size in ``dim`` that is not a multiple of 2 world, a rank outside 0..world - 1.
    """
    check_tensors("zigzag_shard", t=t)
    if not 0 <= rank < world:
        raise ValueError(f"zigzag_shard: rank is {rank}, expected 0 to {world - 1}")
    if t.shape[dim] % (2 * world):
        raise ValueError(f"zigzag_shard: t has {t.shape[dim]} rows, expected a multiple of {2 * world}")
    chunks = t.tensor_split(2 * world, dim)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]], dim)


def zigzag_unshard(shards, dim=2):
    """The whole tensor of all ranks' shards: the inverse of :func:`zigzag_shard`.

    Args:
        shards: those of all ranks, in rank order, alike in shape.
        dim: the dimension of rows.

    Returns:
        The tensor with as many rows as all of them have; differentiable.

    Raises:
        ValueError: a shard with an odd number of rows.
        TypeError: shards that are not tensors.
    """
    shards = list(shards)
    check_tensors("zigzag_unshard", **{f"shards[{i}]": t for i, t in enumerate(shards)})
    for i, t in enumerate(shards):
        if t.shape[dim] % 2:
            raise ValueError(f"zigzag_unshard: shards[{i}] has {t.shape[dim]} rows, expected an even number")
    early, late = zip(*(t.tensor_split(2, dim) for t in shards), strict=True)
    return torch.cat([*early, *reversed(late)], dim)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ring, causal, scale):
        parts = _Parts(q.shape[2], causal)

        def attend(packet, owner):
            rows, keys, diagonal = parts.of(owner, ring.rank)
            (q,) = packet
            return attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal=diagonal, scale=scale, return_lse=True)

        def answer(holder):
            rows = parts.of(ring.rank, holder)[0]
            lse = q.new_empty(q.shape[:3], dtype=torch.float32)[:, :, rows]
            return q.new_empty((*lse.shape, v.shape[3])), torch.empty_like(lse)

        out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=torch.float32)
        lse = out.new_full(q.shape[:3], -torch.inf)
        for holder, (part, part_lse) in _go_round(ring, [q], attend, answer):
            rows = parts.of(ring.rank, holder)[0]
            joined = merge_attention([out[:, :, rows], part.float()], [lse[:, :, rows], part_lse])
            out[:, :, rows], lse[:, :, rows] = joined
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.parts, ctx.scale = ring, parts, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        ring, parts, dim = ctx.ring, ctx.parts, q.shape[3]
        dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
        # A part's gradient needs lse and delta = rowsum(dout * out) of the whole row. The operator takes out in delta's
        # place, and the gradient of lse, which enters as -delta does: so out can stay at home.
        delta = (dout.float() * out.float()).sum(-1)
        no_out = out.new_zeros((1, 1, 1, out.shape[3]))

        def differentiate(packet, owner):
            rows, keys, diagonal = parts.of(owner, ring.rank)
            q_and_dout, statistics = packet[0][:, :, rows], packet[1][..., rows].contiguous()
            q, dout = q_and_dout[..., :dim], q_and_dout[..., dim:]
            tensors = q, k[:, :, keys], v[:, :, keys], no_out.expand_as(dout), statistics[0]
            options = attention_options.pack("ring_attention", q, k.shape[2], causal=diagonal, scale=ctx.scale)
            dq, dk_part, dv_part = attention_backward_op(dout, statistics[1], *tensors, False, *options)
            dk[:, :, keys] += dk_part
            dv[:, :, keys] += dv_part
            return (dq.contiguous(),)

        def answer(holder):
            return (torch.empty_like(q[:, :, parts.of(ring.rank, holder)[0]], memory_format=torch.contiguous_format),)

        dq = torch.zeros_like(q, dtype=torch.float32)
        packet = [torch.cat([q, dout], -1), torch.stack([lse, -delta])]
        for holder, (part,) in _go_round(ring, packet, differentiate, answer):
            dq[:, :, parts.of(ring.rank, holder)[0]] += part
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


@dataclass(frozen=True)
class _Parts:
    """Which of an owner's rows see which of a holder's keys; each has ``rows`` rows."""

    rows: int
    causal: bool

    def of(self, owner, holder) -> tuple[slice, slice, bool]:
        """(rows, keys, whether causal among them).

        A zigzag shard is an early chunk, in rank order, and a late one, in reverse order behind all early ones.
        """
        everything, half = slice(None), self.rows // 2
        if not self.causal or owner == holder:
            return everything, everything, self.causal
        if holder < owner:  # its early chunk is before both of the owner's, its late one behind both
            return everything, slice(None, half), False
        return slice(half, None), everything, False


@dataclass(frozen=True)
class _Ring:
    group: "dist.ProcessGroup | None"
    rank: int
    world: int

    @staticmethod
    def of(group) -> "_Ring":
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("ring_attention: group has no processes, expected torch.distributed to be initialized")
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("ring_attention: group is without this process, expected one that it belongs to")
        return _Ring(group, rank, dist.get_world_size(group))

    @property
    def device(self) -> torch.device:
        """Where what the group exchanges has to be."""
        on_gpu = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def after(self, steps) -> int:
        """The rank so many steps on."""
        return (self.rank + steps) % self.world

    def exchange(self, sent, to, received, source) -> list:
        """Requests of one exchange, which no rank's program waits for: every rank posts its sends and receives at once.

        The ranks are those of the group; all post the same exchanges in the same order.
        """
        peer = lambda rank: rank if self.group is None else dist.get_global_rank(self.group, rank)  # noqa: E731
        sends = [dist.P2POp(dist.isend, t, peer(to), self.group) for t in sent]
        receives = [dist.P2POp(dist.irecv, t, peer(source), self.group) for t in received]
        return dist.batch_isend_irecv(sends + receives)


def _go_round(ring, packet, compute: Callable, answer: Callable) -> Iterator[tuple[int, tuple]]:
    """Sends ``packet`` to all ranks, and yields (rank, what it computed of the packet), in the order of the ring.

    ``compute(packet, owner)`` gives this rank's answer to another's packet; ``answer(rank)`` empty memory for another's
    answer to ours. In step s everyone has the packet of the rank s before, passes it on, computes, and returns the
    answer to its owner; answers are awaited a step later.
    """
    packet = [t.contiguous() for t in packet]
    awaited = None
    for step in range(ring.world):
        owner, passing = ring.after(-step), []
        following = [torch.empty_like(t) for t in packet]
        if step + 1 < ring.world:
            passing = ring.exchange(packet, ring.after(1), following, ring.after(-1))
        computed = [t.contiguous() for t in compute(packet, owner)]
        if awaited:
            yield _arrived(*awaited)
        if step == 0:
            yield ring.rank, computed
        else:
            helper = ring.after(step)
            received = answer(helper)
            awaited = ring.exchange(computed, owner, received, helper), helper, received, computed
        _wait(passing)
        packet = following
    if awaited:
        yield _arrived(*awaited)


def _arrived(requests, helper, received, sent):
    """``sent`` is kept alive until it is away."""
    _wait(requests)
    return helper, received


def _wait(requests):
    for request in requests:
        request.wait()


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError)
_TEXT = 240  # bytes of a message that the others get to read


def _problem(q, k, v, causal, scale):
    """The error that this rank's arguments are, or None."""
    try:
        check_tensors("ring_attention", q=q, k=k, v=v)
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.ndim != 4:
                raise ValueError(f"ring_attention: {name} has {t.ndim} dimensions, expected 4")
        with torch.no_grad():  # the core's own checks
            attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], scale=scale)
        rows, keys = q.shape[2], k.shape[2]
        if causal and rows != keys:
            raise ValueError(f"ring_attention: k has {keys} rows, expected {rows} (q's) with causal")
        if causal and rows % 2:
            raise ValueError(f"ring_attention: q has {rows} rows, expected an even number with causal (zigzag_shard)")
    except _ERRORS as error:
        return error
    return None


def _agree(ring, problem, q, k, v, causal, scale):
    """Raises on every rank if there is a problem on one, or if they were given different things.

    One exchange of a few numbers: what is wrong, if anything, or what was given.
    """
    if ring.world == 1:
        if problem is not None:
            raise problem
        return
    given, text = [-1] * 17, b""
    if problem is None:
        bits = struct.unpack("q", struct.pack("d", -1.0 if scale is None else scale))[0]
        given = [len(_ERRORS), *q.shape, *k.shape, *v.shape, _DTYPES.index(q.dtype), bool(causal), scale is None, bits]
    else:
        kind = next(i for i, error in enumerate(_ERRORS) if isinstance(problem, error))
        given, text = [kind, *given[1:]], str(problem).encode()[:_TEXT]
    own = torch.tensor([*given, *text.ljust(_TEXT, b"\0")], dtype=torch.int64, device=ring.device)
    gathered = [torch.empty_like(own) for _ in range(ring.world)]
    dist.all_gather(gathered, own, group=ring.group)
    table = [t.tolist() for t in gathered]
    for rank, (kind, *rest) in enumerate(table):
        if kind < len(_ERRORS):
            message = bytes(rest[-_TEXT:]).rstrip(b"\0").decode(errors="replace")
            raise problem if rank == ring.rank else _ERRORS[kind](f"{message} (on rank {rank})")
    for rank, other in enumerate(table):
        if other[:17] != table[0][:17]:
            raise ValueError(
                f"ring_attention: {_told(other)} on rank {rank}, expected those of rank 0: {_told(table[0])}"
            )


def _told(given):
    _, *numbers = given
    shapes, (dtype, causal, default, bits) = numbers[:12], numbers[12:16]
    scale = None if default else struct.unpack("d", struct.pack("q", bits))[0]
    shapes = ", ".join(str(tuple(shapes[i : i + 4])) for i in (0, 4, 8))
    return f"q, k and v have shapes {shapes}, {_DTYPES[dtype]}, causal={bool(causal)}, scale={scale}"
