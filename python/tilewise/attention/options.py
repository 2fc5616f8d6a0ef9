"""What every kind of attention shares: its options, the memory of its results, and how it is differentiated."""

import torch

from tilewise._library import check_tensors
from tilewise.attention.masks import BlockMask, pack_mask

# The order of the core's option tuple, which operators pass on as it is.
OPTION_TENSORS = ("bias", "mask", "blocks", "sink_logits", "alibi_slopes", "dropout_seed")
SCHEMA = (
    ", ".join(f"Tensor? {name}" for name in OPTION_TENSORS)
    + ", bool causal, float? scale, SymInt? window_left, SymInt? window_right, SymInt global_tokens, float softcap, "
    "float dropout_p, int block_q, int block_k, bool deterministic"
)
OPTIONS = 16
BIAS, SINK = 0, 3  # places of those that have gradients


def pack(
    operation,
    q,
    keys,
    *,
    causal=False,
    scale=None,
    window=None,
    global_tokens=0,
    softcap=0.0,
    alibi_slopes=None,
    bias=None,
    mask=None,
    block_mask=None,
    sink_logits=None,
    dropout_p=0.0,
    generator=None,
    deterministic=False,
):
    """The public keyword arguments as the tuple of SCHEMA."""
    check_tensors(operation, bias=bias, mask=mask, alibi_slopes=alibi_slopes, sink_logits=sink_logits)
    left, right = (None, None) if window is None else window
    blocks, block_q, block_k = None, 0, 0
    if block_mask is not None:
        if not isinstance(block_mask, BlockMask):
            raise TypeError(f"{operation}: block_mask is a {type(block_mask).__name__}, expected a BlockMask")
        blocks, (block_q, block_k) = block_mask.blocks, block_mask.sizes
    if mask is not None:
        mask = pack_mask(_with_four_dims(mask), keys)
    if bias is not None:
        bias = _with_four_dims(bias)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.float()
        alibi_slopes = alibi_slopes[None] if alibi_slopes.ndim == 1 else alibi_slopes
    seed = None
    if dropout_p > 0:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device, generator=generator)
    sink_logits = None if sink_logits is None else sink_logits.float()
    tensors = (bias, mask, blocks, sink_logits, alibi_slopes, seed)
    numbers = (causal, scale, left, right, global_tokens, softcap, dropout_p, block_q, block_k, deterministic)
    return (*tensors, *numbers)


def _with_four_dims(t):
    """Leading dimensions may be left out, as everywhere in torch."""
    return t[(None,) * (4 - t.ndim)] if t.ndim < 4 else t


def empty_outputs(q, v):
    """Memory for out, and for lse: (B, Hq, S), or (Hq, T) of packed tensors."""
    if q.ndim not in (3, 4) or v.ndim != q.ndim:  # nonsense, which the core then reports
        return torch.empty_like(q), q.new_empty((0,), dtype=torch.float32)
    shape = q.shape[:3] if q.ndim == 4 else (q.shape[1], q.shape[0])
    # out is in q's order of dimensions where it has q's shape
    out = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(shape, dtype=torch.float32)


def empty_gradients(q, k, v, options, bias_gradient):
    """Memory for [dq, dk, dv], then dbias if it is wanted, then dsink_logits if there are sinks."""
    grads = [torch.empty_like(t) for t in (q, k, v)]
    if bias_gradient:
        grads.append(torch.empty_like(options[BIAS], memory_format=torch.contiguous_format))
    if options[SINK] is not None:
        grads.append(torch.empty_like(options[SINK]))
    return grads


def of_options(grads, options, bias_gradient):
    """dbias and dsink_logits out of empty_gradients' list, None where it has none."""
    return grads[3] if bias_gradient else None, None if options[SINK] is None else grads[-1]


def differentiation(backward_op, tensors):
    """(backward, setup_context) of an operator whose first inputs are ``tensors`` tensors, the last the options.

    Between them stand numbers, which the backward operator takes after its tensors.
    """

    def setup_context(ctx, inputs, output):
        option_tensors = inputs[-OPTIONS:][: len(OPTION_TENSORS)]
        ctx.save_for_backward(*inputs[:tensors], *option_tensors, *output)
        ctx.numbers = inputs[tensors:-OPTIONS]
        ctx.option_numbers = inputs[-OPTIONS:][len(OPTION_TENSORS) :]
        ctx.set_materialize_grads(False)

    def backward(ctx, dout, dlse):
        saved = ctx.saved_tensors
        inputs, option_tensors, outputs = saved[:tensors], saved[tensors:-2], saved[-2:]
        options = (*option_tensors, *ctx.option_numbers)
        dout = torch.zeros_like(outputs[0]) if dout is None else dout
        at = tensors + len(ctx.numbers)
        bias_gradient = bool(ctx.needs_input_grad[at + BIAS])
        grads = backward_op(dout, dlse, *inputs, *outputs, *ctx.numbers, bias_gradient, *options)
        options_grads = [None] * OPTIONS
        options_grads[BIAS], options_grads[SINK] = of_options(grads, options, bias_gradient)
        return (*grads[:3], *[None] * (at - 3), *options_grads)

    return backward, setup_context
