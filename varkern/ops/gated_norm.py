"""A gated residual and the adaptive layer norm after it, which every half of a transformer block ends with:

    x ← x + gate · h,    y = (x - mean(x)) · rstd(x) · (1 + scale) + shift,    rstd(x) = 1 / sqrt(var(x) + eps)

over the last axis (Peebles and Xie, arXiv 2212.09748, section 3.2). One pass over a row, for inference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varkern.ops._op import Op
from varkern.ops.backends import DTYPE_CODES, dense_last_axis, dtype_why_not, extension, stream
from varkern.ops.checks import check_device
from varkern.ops.norm import modulated_layer_norm_reference

__all__ = ["gated_residual_layer_norm_", "gated_residual_layer_norm_reference_"]

_NAME = "gated_residual_layer_norm_"


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | float, ...]:
    x, h = torch.zeros(2, 2, 4, 64, device=device, dtype=dtype)
    gate, scale, shift = torch.zeros(3, 2, 1, 64, device=device, dtype=dtype)
    return x, h, gate, scale, shift, 1e-6


_OP = Op(
    f"{_NAME}(Tensor(a!) x, Tensor h, Tensor gate, Tensor scale, Tensor shift, float eps) -> Tensor",
    ("cuda", "cpu"),
    _example,
    no_gradient="train through modulated_layer_norm(x + gate * h, scale, shift)",
    written_from=("h", "gate"),
)


@_OP.reference
def gated_residual_layer_norm_reference_(
    x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> Tensor:
    """``gated_residual_layer_norm_`` in plain PyTorch; same arguments, effect and result."""
    if gate.dim() == 2:
        gate, scale, shift = gate.unsqueeze(1), scale.unsqueeze(1), shift.unsqueeze(1)
    wide = torch.promote_types(torch.promote_types(x.dtype, h.dtype), torch.promote_types(gate.dtype, torch.float32))
    x.copy_(x.to(wide) + h.to(wide) * gate.to(wide))
    out = modulated_layer_norm_reference(x, scale, shift, eps)
    return out.to(torch.promote_types(x.dtype, scale.dtype)).contiguous()


def gated_residual_layer_norm_(
    x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> Tensor:
    """Adds gate · h to x in place and returns the modulated layer norm of the new x (module docstring).

    Args:
        x: (B, L, C), contiguous, float32, float16 or bfloat16; overwritten.
        h: (B, L, C), of any of these dtypes, which may differ from x's; any strides of B and L. A strided last axis is
            copied first. Must not share memory with x.
        gate, scale, shift: (B, 1, C) or (B, C), of one dtype and form, which may differ from x's; any stride of B.
        eps: added to the variance.

    Returns:
        (B, L, C), contiguous, of dtype ``torch.promote_types(x.dtype, scale.dtype)``, under autocast too. Arithmetic is
        float32. x is rounded once, to its own dtype, and what is normalised is the rounded x: y is the
        ``modulated_layer_norm`` of the x that is left.

    For inference: raises ``RuntimeError`` where a gradient would be recorded, or where the backend asked for cannot
    serve, ``ValueError`` for shapes, dtypes or devices that do not fit. Nothing is written then. float64 is computed by
    the reference.
    """
    return _OP(x, h, gate, scale, shift, eps)


@_OP.check
def _check(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
    if x.dim() != 3:
        raise ValueError(f"{_NAME}: x has shape {tuple(x.shape)}, give (B, L, C).")
    if not x.is_contiguous():
        raise ValueError(f"{_NAME}: x has strides {x.stride()}, give a contiguous tensor.")
    if h.shape != x.shape:
        raise ValueError(f"{_NAME}: h has shape {tuple(h.shape)}, give x's, {tuple(x.shape)}.")
    B, _, C = x.shape
    for name, tensor in (("gate", gate), ("scale", scale), ("shift", shift)):
        if tensor.shape != (B, 1, C) and tensor.shape != (B, C):
            raise ValueError(
                f"{_NAME}: {name} has shape {tuple(tensor.shape)}, give {(B, 1, C)} or {(B, C)} for x of shape "
                f"{tuple(x.shape)}."
            )
        if tensor.dtype != gate.dtype or tensor.dim() != gate.dim():
            raise ValueError(
                f"{_NAME}: {name} is {tensor.dtype} {tuple(tensor.shape)} and gate {gate.dtype} {tuple(gate.shape)}, "
                "give gate, scale and shift one dtype and shape."
            )
    check_device(_NAME, "x", x, h=h, gate=gate, scale=scale, shift=shift)


@_OP.limits
def _limits(backend: str, x: Tensor, h: Tensor, gate: Tensor, *_: object) -> str | None:
    return dtype_why_not(x, h, gate)


@_OP.empty
def _empty(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))


@_OP.kernels
def _launch(backend: str, x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    out = _empty(x, h, gate, scale, shift, eps)
    if out.numel() == 0:
        return out
    h, gate, scale, shift = (dense_last_axis(tensor) for tensor in (h, gate, scale, shift))
    B, L, C = x.shape
    extension(backend).gated_residual_layer_norm(
        *(tensor.data_ptr() for tensor in (x, h, gate, scale, shift, out)),
        *(B, L, C, h.stride(0), h.stride(1), gate.stride(0), scale.stride(0), shift.stride(0)),
        *(DTYPE_CODES[tensor.dtype] for tensor in (x, h, gate, out)),
        eps,
        *stream(x),
    )
    return out
