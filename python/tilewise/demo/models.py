"""The demo's two byte-level language models. B batch, S sequence, C channels."""

import math

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256


def _matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) / math.sqrt(columns)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(gain * _matrix(outputs, inputs))

    def forward(self, x):
        return F.linear(x, self.weight)


def rotary(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (B, H, S, D) at positions (B, S) or (S,)."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    if angle.ndim == 3:
        angle = angle.unsqueeze(1)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention; ``attend`` receives q (B, Hq, S, D), k and v (B, Hkv, S, D)."""

    def __init__(self, channels: int, heads: int, kv_heads: int, depth: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, channels // heads
        self.qkv = Linear(channels, (heads + 2 * kv_heads) * self.head_dim)
        self.out = Linear(channels, channels, gain=1 / math.sqrt(2 * depth))

    def forward(self, x, positions, attend):
        batch, length, channels = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        out = attend(rotary(q, positions), rotary(k, positions), v)
        return self.out(out.transpose(1, 2).reshape(batch, length, channels))


class SparseMlp(nn.Module):
    def __init__(self, channels: int, depth: int, backend):
        super().__init__()
        self.up = backend.sparse_linear(_matrix(4 * channels, channels) * math.sqrt(2))
        self.down = backend.sparse_linear(_matrix(channels, 4 * channels) / math.sqrt(depth))

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class TransformerBlock(nn.Module):
    def __init__(self, channels, heads, kv_heads, depth, backend):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, bias=False), nn.LayerNorm(channels, bias=False)
        self.attention = Attention(channels, heads, kv_heads, depth)
        self.mlp = SparseMlp(channels, depth, backend)

    def forward(self, x, positions, attend):
        x = x + self.attention(self.norm1(x), positions, attend)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Pre-norm transformer with rotary grouped-query attention and 2:4-sparse MLPs."""

    def __init__(self, backend, channels=128, depth=4, heads=2, kv_heads=1):
        super().__init__()
        self.backend, self.channels = backend, channels
        self.embedding = nn.Parameter(0.5 * _matrix(VOCABULARY, channels))
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, kv_heads, depth, backend) for _ in range(depth))
        self.norm = nn.LayerNorm(channels, bias=False)
        self.head = Linear(channels, VOCABULARY)

    def forward(self, tokens, positions=None, attend=None):
        """Logits (B, S, 256). ``attend(layer)`` may give each layer another way to attend (a cache, say)."""
        if positions is None:
            positions = torch.arange(tokens.shape[1])
        x = F.embedding(tokens, self.embedding)
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, attend(layer) if attend else self.backend.attention)
        return self.head(self.norm(x))


class LongFilter(nn.Module):
    """An implicit filter as long as the window: a small network of the position under an exponential decay."""

    def __init__(self, channels: int, length: int, features: int = 16, width: int = 32):
        super().__init__()
        t = torch.linspace(0, 1, length).unsqueeze(-1)
        waves = 2 * math.pi * t * torch.arange(1, features // 2 + 1)
        self.register_buffer("positions", torch.cat([t, waves.sin(), waves.cos()], dim=-1))  # [l, features + 1]
        self.inner = Linear(features + 1, width, gain=4.0)
        self.outer = Linear(width, channels)
        decay = torch.logspace(0.5, 3.0, channels)  # from the whole window down to a few bytes
        self.register_buffer("window", torch.exp(-t * decay).T.contiguous())  # [c, l]

    def forward(self):
        """(C, L)."""
        hidden = torch.sin(self.inner(self.positions))  # [l, width]
        return 0.3 * (self.outer.weight @ hidden.T) * self.window


class LongConvBlock(nn.Module):
    """Hyena-style operator: two gates around a convolution as long as the window."""

    def __init__(self, channels, length, depth, backend):
        super().__init__()
        self.backend = backend
        self.norm1, self.norm2 = nn.LayerNorm(channels, bias=False), nn.LayerNorm(channels, bias=False)
        self.inputs = Linear(channels, 3 * channels)
        self.taps = nn.Parameter(torch.tensor([[1.0], [0.3], [0.1]]).repeat(1, channels))  # short convolution
        self.filter = LongFilter(channels, length)
        self.skip = nn.Parameter(torch.ones(channels))
        self.out = Linear(channels, channels, gain=1 / math.sqrt(2 * depth))
        self.up, self.down = Linear(channels, 2 * channels, gain=math.sqrt(2)), Linear(2 * channels, channels)

    def forward(self, x):
        padded = F.pad(self.norm1(x), (0, 0, 2, 0))
        h = sum(self.taps[i] * padded[:, 2 - i : padded.shape[1] - i] for i in range(3))
        pregate, u, postgate = self.inputs(h).transpose(1, 2).contiguous().chunk(3, dim=1)
        y = self.backend.long_conv(u, self.filter(), pregate, postgate, self.skip)
        x = x + self.out(y.transpose(1, 2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LongConvModel(nn.Module):
    """Hyena-style language model: no attention, every layer sees the whole window."""

    def __init__(self, backend, channels=128, depth=3, length=4096):
        super().__init__()
        self.embedding = nn.Parameter(0.5 * _matrix(VOCABULARY, channels))
        self.blocks = nn.ModuleList(LongConvBlock(channels, length, depth, backend) for _ in range(depth))
        self.norm = nn.LayerNorm(channels, bias=False)
        self.head = Linear(channels, VOCABULARY)

    def forward(self, tokens):
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def bits_per_byte(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next byte over windows (B, S + 1), in bits."""
    logits = model(windows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    return loss / math.log(2)
