"""Block-causal attention of VAR's training (arXiv 2404.02905), with its prologue on q, k and v, and its gradients.

Read on in ``forward`` and ``backward``, and in ``tiles`` and ``rows`` for what
they share.
"""

from __future__ import annotations

from .. import Case
from .backward import block_causal_attention_backward
from .forward import block_causal_attention_forward

__all__ = ["DIMS", "block_causal_attention_backward", "block_causal_attention_forward"]

DIMS = (32, 64, 128)  # widths of a head: powers of two that fit, each with its configurations

CASES: list[Case] = []  # each module lists its own kernels'
