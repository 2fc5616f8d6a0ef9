"""The family's operators, and how they are differentiated.

Outputs of malformed inputs are sized 0 where there is no size, and the core says what is wrong.
"""

import torch

from tilewise import _C
from tilewise._library import register, register_autograd


def _size(t: torch.Tensor, dim: int) -> int:
    return t.shape[dim] if dim < t.ndim else 0


def _nm_linear(x, values, indices, bias):
    y = x.new_empty(_size(x, 0), _size(values, 0))
    _C.nm_linear(x, values, indices, bias, y)
    return y


def _nm_linear_dx(dy, values, indices):
    dx = dy.new_empty(_size(dy, 0), 2 * _size(values, 1))
    _C.nm_linear_dx(dy, values, indices, dx)
    return dx


def _nm_linear_dvalues(dy, x, indices):
    dvalues = dy.new_empty(_size(dy, 1), _size(x, 1) // 2)
    _C.nm_linear_dvalues(dy, x, indices, dvalues)
    return dvalues


def _column_sum(dy):
    total = dy.new_empty(_size(dy, 1))
    _C.column_sum(dy, total)
    return total


nm_linear_op = register(
    "nm_linear(Tensor x, Tensor values, Tensor indices, Tensor? bias) -> Tensor",
    _nm_linear,
    fake=lambda x, values, indices, bias: x.new_empty(_size(x, 0), _size(values, 0)),
)
nm_linear_dx_op = register(
    "nm_linear_dx(Tensor dy, Tensor values, Tensor indices) -> Tensor",
    _nm_linear_dx,
    fake=lambda dy, values, indices: dy.new_empty(_size(dy, 0), 2 * _size(values, 1)),
)
nm_linear_dvalues_op = register(
    "nm_linear_dvalues(Tensor dy, Tensor x, Tensor indices) -> Tensor",
    _nm_linear_dvalues,
    fake=lambda dy, x, indices: dy.new_empty(_size(dy, 1), _size(x, 1) // 2),
)
_column_sum_op = register("column_sum(Tensor dy) -> Tensor", _column_sum, fake=lambda dy: dy.new_empty(_size(dy, 1)))


def _save_nm(ctx, inputs, output):
    x, values, indices, _ = inputs
    needs_x, needs_values, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_values else None, values if needs_x else None, indices)


def _nm_backward(ctx, dy):
    x, values, indices = ctx.saved_tensors
    dy = dy.contiguous()
    needs_x, needs_values, _, needs_bias = ctx.needs_input_grad
    return (
        nm_linear_dx_op(dy, values, indices) if needs_x else None,
        nm_linear_dvalues_op(dy, x, indices) if needs_values else None,
        None,
        _column_sum_op(dy) if needs_bias else None,
    )


register_autograd("nm_linear", _nm_backward, _save_nm)


def _csr_linear(x, values, bias, matrix, transposed, columns, tile):
    y = x.new_empty(_size(x, 0), max(_size(matrix[0], 0) - 1, 0))
    order = matrix[5] if len(matrix) > 5 else None
    crow, col, *plan = matrix[:5]
    _C.csr_linear(x, values, crow, col, columns, tile, *plan, order, bias, y)
    return y


def _csr_linear_dvalues(dy, x, matrix, tile):
    crow, col, *plan = matrix
    dvalues = dy.new_empty(_size(col, 0))
    _C.csr_linear_dvalues(dy, x, crow, col, _size(x, 1), tile, *plan, dvalues)
    return dvalues


# matrix = [crow, col, tile_ptr, records, within], transposed = the same of W^T and the order of its values, or nothing
# where no gradient of x is asked for.
csr_linear_op = register(
    "csr_linear(Tensor x, Tensor values, Tensor? bias, Tensor[] matrix, Tensor[] transposed, int columns, int tile)"
    " -> Tensor",
    _csr_linear,
    fake=lambda x, values, bias, matrix, *_: x.new_empty(_size(x, 0), max(_size(matrix[0], 0) - 1, 0)),
)
csr_linear_dvalues_op = register(
    "csr_linear_dvalues(Tensor dy, Tensor x, Tensor[] matrix, int tile) -> Tensor",
    _csr_linear_dvalues,
    fake=lambda dy, x, matrix, tile: dy.new_empty(_size(matrix[1], 0)),
)


def _save_csr(ctx, inputs, output):
    x, values, _, matrix, transposed, columns, ctx.tile = inputs
    ctx.save_for_backward(x, values, *matrix, *transposed)


def _csr_backward(ctx, dy):
    x, values, *structure = ctx.saved_tensors
    matrix, transposed = structure[:5], structure[5:]
    dy = dy.contiguous()
    needs_x, needs_values, needs_bias, *_ = ctx.needs_input_grad
    out = matrix[0].shape[0] - 1
    return (
        csr_linear_op(dy, values, None, transposed, [], out, ctx.tile) if needs_x else None,
        csr_linear_dvalues_op(dy, x, matrix, ctx.tile) if needs_values else None,
        _column_sum_op(dy) if needs_bias else None,
        [None] * len(matrix),
        [None] * len(transposed),
        None,
        None,
    )


register_autograd("csr_linear", _csr_backward, _save_csr)
