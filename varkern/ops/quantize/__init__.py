"""Multi-scale residual quantization (VAR, arXiv 2404.02905): encode, train, dequantize, generate."""

from varkern.ops.quantize.functions import (
    maps_as_codes,
    next_scale_input,
    residual_dequantize,
    residual_quantize,
    residual_quantize_train,
    teacher_forcing_input,
)
from varkern.ops.quantize.reference import (
    AnyPhi,
    Phi,
    Size,
    code_maps_reference,
    growing_dequantize_reference,
    nearest_code_reference,
    next_scale_input_reference,
    phi_reference,
    residual_dequantize_reference,
    residual_quantize_backward_reference,
    residual_quantize_reference,
    residual_quantize_train_reference,
    teacher_forcing_input_reference,
)

__all__ = [
    "AnyPhi",
    "Phi",
    "Size",
    "code_maps_reference",
    "growing_dequantize_reference",
    "maps_as_codes",
    "nearest_code_reference",
    "next_scale_input",
    "next_scale_input_reference",
    "phi_reference",
    "residual_dequantize",
    "residual_dequantize_reference",
    "residual_quantize",
    "residual_quantize_backward_reference",
    "residual_quantize_reference",
    "residual_quantize_train",
    "residual_quantize_train_reference",
    "teacher_forcing_input",
    "teacher_forcing_input_reference",
]
