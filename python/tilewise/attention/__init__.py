"""Scaled dot-product attention, dense and over packed sequences.

    out = softmax(scale * q k^T) v          lse = log(sum(exp(scale * q k^T)))

computed block by block with running softmax statistics, so that no S x Sk matrix is stored (Dao et al.,
FlashAttention, arXiv:2205.14135; FlashAttention-2, arXiv:2307.08691). Gradients recompute the probabilities from lse.
"""

from tilewise.attention.cache import KVCache
from tilewise.attention.dense import attention
from tilewise.attention.lm_infinite import lm_infinite_attention
from tilewise.attention.masks import BlockMask
from tilewise.attention.merge import merge_attention, shared_prefix_attention
from tilewise.attention.paged import paged_attention
from tilewise.attention.paged_varlen import paged_attention_varlen
from tilewise.attention.scores import attention_block_max, attention_column_sums
from tilewise.attention.tensor import tensor_attention
from tilewise.attention.varlen import attention_varlen
from tilewise.attention.zip_cache import ZipCache

__all__ = [
    "BlockMask",
    "KVCache",
    "ZipCache",
    "attention",
    "attention_block_max",
    "attention_column_sums",
    "attention_varlen",
    "lm_infinite_attention",
    "merge_attention",
    "paged_attention",
    "paged_attention_varlen",
    "shared_prefix_attention",
    "tensor_attention",
]
