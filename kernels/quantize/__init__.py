"""Multi-scale residual quantization (VAR, arXiv 2404.02905, algorithms 1 and 2), everything the operators call.

Read on in ``encode`` (and ``search``), ``dequantize``, ``backward``, and
``maps`` for what they share.
"""

from __future__ import annotations

from .. import Case
from .backward import residual_quantize_backward
from .dequantize import next_scale_input, residual_dequantize, teacher_forcing_input
from .encode import residual_quantize
from .maps import MAX_CHANNELS

__all__ = [
    "MAX_CHANNELS",
    "next_scale_input",
    "residual_dequantize",
    "residual_quantize",
    "residual_quantize_backward",
    "teacher_forcing_input",
]

CASES: list[Case] = []  # each module lists its own kernels'
