"""The operators: one file each with the public function, its reference in plain PyTorch, and its kernels' launch.

Every op is used through the function of its file; ``_op`` makes of what the file says all that PyTorch wants to know.
"""

from varkern.ops._op import explain
from varkern.ops.attention import (
    block_causal_attention,
    block_causal_attention_qkv,
    block_causal_attention_qkv_reference,
    block_causal_attention_reference,
    cached_attention,
    cached_attention_reference,
)
from varkern.ops.backends import current_backend, reference_forced, use_backend
from varkern.ops.conv import conv3x3, conv3x3_reference
from varkern.ops.flops import register_formulas
from varkern.ops.gated_norm import gated_residual_layer_norm_, gated_residual_layer_norm_reference_
from varkern.ops.group_norm import (
    group_norm_affine,
    group_norm_affine_reference,
    group_norm_silu,
    group_norm_silu_reference,
)
from varkern.ops.norm import modulated_layer_norm, modulated_layer_norm_reference
from varkern.ops.quantize import (
    next_scale_input,
    residual_dequantize,
    residual_quantize,
    residual_quantize_train,
    teacher_forcing_input,
)
from varkern.ops.sampling import filter_logits, sample_tokens

__all__ = [
    "block_causal_attention",
    "block_causal_attention_qkv",
    "block_causal_attention_qkv_reference",
    "block_causal_attention_reference",
    "cached_attention",
    "cached_attention_reference",
    "conv3x3",
    "conv3x3_reference",
    "current_backend",
    "explain",
    "filter_logits",
    "gated_residual_layer_norm_",
    "gated_residual_layer_norm_reference_",
    "group_norm_affine",
    "group_norm_affine_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "modulated_layer_norm",
    "modulated_layer_norm_reference",
    "next_scale_input",
    "reference_forced",
    "residual_dequantize",
    "residual_quantize",
    "residual_quantize_train",
    "sample_tokens",
    "teacher_forcing_input",
    "use_backend",
]

register_formulas()
