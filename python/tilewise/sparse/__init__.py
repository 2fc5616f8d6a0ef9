"""Linear layers with sparse weights: ``y = x W^T + bias`` from the kept values alone.

Formats: :class:`NMSparse` keeps two of every four consecutive inputs (Mishra et al., Accelerating Sparse Deep Neural
Networks, arXiv:2104.08378), :class:`CSR` any set of entries. Both are trained through ``weight.values``.
"""

from tilewise.sparse.csr import CSR
from tilewise.sparse.nm import NMSparse
from tilewise.sparse.products import linear, matmul
from tilewise.sparse.weight import CompressedWeight

__all__ = ["CSR", "CompressedWeight", "NMSparse", "linear", "matmul"]
