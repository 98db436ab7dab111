"""Multi-scale residual quantization (VAR, arXiv 2404.02905, algorithms 1 and 2), everything the operators call.

Read on in ``quantize_encode`` (and ``quantize_search``), ``quantize_decode``, ``quantize_backward``, and
``quantize_maps`` for what they share.
"""

from __future__ import annotations

from . import Case
from .quantize_backward import residual_quantize_backward
from .quantize_decode import next_scale_input, residual_dequantize, teacher_forcing_input
from .quantize_encode import residual_quantize
from .quantize_maps import MAX_CHANNELS

__all__ = [
    "MAX_CHANNELS",
    "next_scale_input",
    "residual_dequantize",
    "residual_quantize",
    "residual_quantize_backward",
    "teacher_forcing_input",
]

CASES: list[Case] = []  # each module lists its own kernels'
