"""Shampoo in plain torch, as straightforward as it can be: one matrix at a time, in the dtype of the arguments."""

import torch

ROW_BLOCK = 64
_T = 2 * torch.arange(16, dtype=torch.float64) - 15
_EXACT = torch.where(torch.arange(16) == 7, 0, _T * _T.abs() / 225)
SQUARES = (_EXACT * 2**23).round() / 2**23  # the code book
SCALE_FLOOR = 2.0**-78


def unpack(codes, order):
    """uint8 (..., 32 C) -> code indices (..., C, 64) in the order of the elements; those beyond the row included."""
    words = codes.long().unflatten(-1, (-1, 16, 2))
    words = words[..., 0] + 256 * words[..., 1]
    return torch.stack([words >> 4 * i & 15 for i in range(4)], -2).flatten(-2)


def row_blocks(values):
    """(..., n) -> (..., C, 64), padded with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % ROW_BLOCK))
    return padded.unflatten(-1, (-1, ROW_BLOCK))


def nearest(values, scales):
    """Code indices by exhaustive search in float64; of equals the one of smaller magnitude."""
    by_magnitude = SQUARES.abs().argsort(stable=True)
    book = SQUARES[by_magnitude] * scales.double()[..., None, None]
    return by_magnitude[(values.double()[..., None] - book).abs().argmin(-1)]


def quantize(values, keep_diagonal=False):
    """(code indices (b, n, C, 64), scales (b, n, C), diagonal (b, n) or None)."""
    diagonal = values.diagonal(dim1=-2, dim2=-1).clone() if keep_diagonal else None
    x = torch.where(values.isfinite(), values, 0)
    if keep_diagonal:
        x = x - torch.diag_embed(x.diagonal(dim1=-2, dim2=-1))
    x = row_blocks(x)
    scales = x.abs().amax(-1).clamp(min=SCALE_FLOOR)
    return nearest(x, scales), scales, diagonal


def dequantize(indices, scales, diagonal=None):
    order = indices.shape[1]
    values = (SQUARES.to(scales.dtype)[indices] * scales[..., None]).flatten(-2)[..., :order]
    if diagonal is None:
        return values
    return values - torch.diag_embed(values.diagonal(dim1=-2, dim2=-1)) + torch.diag_embed(diagonal)


def orthonormalize(rows, steps=1):
    for _ in range(steps):
        rows = 1.5 * rows - 0.5 * (rows @ rows.mT) @ rows
    return rows


def inverse_root(a, eps=1e-6):
    """(a + eps max(eigenvalues) I)^(-1/4), or the identity for zero."""
    values, vectors = torch.linalg.eigh(a)
    top = values.max()
    if top <= 0:
        return torch.eye(a.shape[-1], dtype=a.dtype)
    return vectors @ torch.diag((values.clamp(min=0) + eps * top) ** -0.25) @ vectors.mT


def cuts(size, max_order):
    """The sizes of the blocks of one dimension: as few as fit, differing by at most one, larger ones first."""
    count = -(-size // max_order)
    return [size // count + (i < size % count) for i in range(count)]


class Matrix:
    """Statistics and inverse roots of one block of a parameter."""

    def __init__(self, g, beta, eps):
        self.beta, self.eps, self.roots = beta, eps, None
        self.left = torch.zeros(g.shape[0], g.shape[0], dtype=g.dtype)
        self.right = torch.zeros(g.shape[1], g.shape[1], dtype=g.dtype)

    def update(self, g):
        self.left = self.beta * self.left + (1 - self.beta) * g @ g.mT
        self.right = self.beta * self.right + (1 - self.beta) * g.mT @ g

    def compute_roots(self):
        self.roots = [inverse_root(a, self.eps) for a in (self.left, self.right)]

    def direction(self, g):
        if self.roots is None:
            return g
        out = self.roots[0] @ g @ self.roots[1]
        size = out.norm()
        return out * (g.norm() / size) if size > 0 else out


class Shampoo:
    """The 32-bit optimizer of one parameter."""

    def __init__(
        self,
        p,
        *,
        lr,
        graft,
        betas=(0.9, 0.999),
        eps=1e-8,
        momentum=0.9,
        weight_decay=0.0,
        shampoo_beta=0.95,
        matrix_eps=1e-6,
        precondition_interval=1,
        root_interval=1,
        max_order=1200,
        maximize=False,
    ):
        self.p, self.lr, self.graft, self.betas, self.eps = p, lr, graft, betas, eps
        self.momentum, self.weight_decay, self.maximize = momentum, weight_decay, maximize
        self.intervals, self.step_count = (precondition_interval, root_interval), 0
        self.m, self.v = torch.zeros_like(p), torch.zeros_like(p)
        self.matrices, self.sizes = None, None
        if p.ndim >= 2:
            rows, columns = p.shape[0], p[0].numel()
            self.sizes = cuts(rows, max_order), cuts(columns, max_order)
            zeros = [[p.new_zeros(r, c) for c in self.sizes[1]] for r in self.sizes[0]]
            self.matrices = [[Matrix(z, shampoo_beta, matrix_eps) for z in row] for row in zeros]

    def _direction(self, g):
        if self.matrices is None:
            return g
        rows = g.reshape(g.shape[0], -1).split(self.sizes[0])
        blocks = [row.split(self.sizes[1], dim=1) for row in rows]
        out = []
        for matrices, row in zip(self.matrices, blocks, strict=True):
            for matrix, block in zip(matrices, row, strict=True):
                if self.step_count % self.intervals[0] == 0:
                    matrix.update(block)
                if self.step_count % self.intervals[1] == 0:
                    matrix.compute_roots()
            out.append(torch.cat([m.direction(b) for m, b in zip(matrices, row, strict=True)], 1))
        return torch.cat(out).reshape(g.shape)

    def step(self, g):
        g = -g if self.maximize else g
        self.step_count += 1
        g = self._direction(g)
        if self.graft == "sgd":
            self.m = self.momentum * self.m + g + self.weight_decay * self.p
            self.p = self.p - self.lr * self.m
            return self.p
        t = self.step_count
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * g
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * g * g
        denominator = (self.v / (1 - self.betas[1] ** t)).sqrt() + self.eps
        self.p = self.p * (1 - self.lr * self.weight_decay) - self.lr / (1 - self.betas[0] ** t) * self.m / denominator
        return self.p
