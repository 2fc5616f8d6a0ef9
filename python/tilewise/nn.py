"""Modules (``tilewise.nn``)."""

import torch

from tilewise.optim.overrides import override

__all__ = ["StableEmbedding"]


class StableEmbedding(torch.nn.Embedding):
    """An embedding that trains well with low-bit optimizer states: its rows are normalised, its states are float32.

    ``y = LayerNorm(weight[input])``, with weights of uniform Xavier initialisation, the normalisation in float32
    (float64 for float64 weights) and the result in the weight's dtype. Optimizers of this package hold its states in 32
    bits (:func:`tilewise.optim.override`), because the gradients of rare tokens differ most.
    T. Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, ICLR 2022, section 2.3.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, _weight, device, dtype: as
            in torch.nn.Embedding.
        sparse: only False, as these optimizers take dense gradients.

    Shapes: input integers (...), output (..., embedding_dim).

    Raises:
        NotImplementedError: ``sparse=True``.

    Example::

        embedding = tilewise.nn.StableEmbedding(50257, 768)
    """

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        padding_idx=None,
        max_norm=None,
        norm_type=2.0,
        scale_grad_by_freq=False,
        sparse=False,
        _weight=None,
        device=None,
        dtype=None,
    ):
        if sparse:
            raise NotImplementedError("StableEmbedding: sparse is True, expected False (no optimizer here serves it)")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            _weight=_weight,
            device=device,
            dtype=dtype,
        )
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.norm = torch.nn.LayerNorm(embedding_dim, device=device, dtype=wide)
        override(self, state_bits=32)

    def reset_parameters(self):
        torch.nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input):
        rows = super().forward(input)
        return self.norm(rows.to(self.norm.weight.dtype)).to(self.weight.dtype)

    def __setstate__(self, state):
        """Copies are overridden too."""
        super().__setstate__(state)
        override(self, state_bits=32)
