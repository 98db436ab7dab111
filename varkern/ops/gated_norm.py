"""A gated residual and the adaptive layer norm after it, which every half of a transformer block ends with:

    x ← x + gate · h,    y = (x - mean(x)) · rstd(x) · (1 + scale) + shift,    rstd(x) = 1 / sqrt(var(x) + eps)

over the last axis (Peebles and Xie, arXiv 2212.09748, section 3.2). One pass over a row, for inference.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from varkern.ops._library import (
    DTYPE_CODES,
    Op,
    autograd,
    check_floats,
    check_in_place,
    check_number,
    cpu_why_not,
    cuda_why_not,
    current_backend,
    dense_last_axis,
    device_guard,
    dtype_why_not,
    extension,
    fake,
    impl,
    library,
    needs_gradient,
    reference_forced,
    stream,
)
from varkern.ops.norm import modulated_layer_norm_reference

__all__ = ["gated_residual_layer_norm_", "gated_residual_layer_norm_reference_"]

_NAMES = ("x", "h", "gate", "scale", "shift")


def gated_residual_layer_norm_reference_(
    x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> Tensor:
    """``gated_residual_layer_norm_`` in plain PyTorch; same arguments, effect and result."""
    if gate.dim() == 2:
        gate, scale, shift = gate.unsqueeze(1), scale.unsqueeze(1), shift.unsqueeze(1)
    wide = torch.promote_types(torch.promote_types(x.dtype, h.dtype), torch.promote_types(gate.dtype, torch.float32))
    x.copy_(x.to(wide) + h.to(wide) * gate.to(wide))
    return modulated_layer_norm_reference(x, scale, shift, eps).to(torch.promote_types(x.dtype, scale.dtype))


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
    check_floats("gated_residual_layer_norm_", _NAMES, (x, h, gate, scale, shift))
    check_number("gated_residual_layer_norm_", "eps", eps)
    if needs_gradient(x, h, gate, scale, shift):
        _refuse_gradient()
    if reference_forced():
        _check(x, h, gate, scale, shift)
        check_in_place("gated_residual_layer_norm_", "x", x, h, gate)
        return gated_residual_layer_norm_reference_(x, h, gate, scale, shift, eps)
    return torch.ops.varkern.gated_residual_layer_norm_(x, h, gate, scale, shift, eps, current_backend())


def _refuse_gradient(*_: object) -> NoReturn:
    raise RuntimeError(
        "gated_residual_layer_norm_ has no gradient: call it under torch.no_grad() or torch.inference_mode(), or train "
        "through modulated_layer_norm(x + gate * h, scale, shift)."
    )


def _check(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> None:
    check_floats("gated_residual_layer_norm_", _NAMES, (x, h, gate, scale, shift))
    if x.dim() != 3:
        raise ValueError(f"gated_residual_layer_norm_: x has shape {tuple(x.shape)}, give (B, L, C).")
    if not x.is_contiguous():
        raise ValueError(f"gated_residual_layer_norm_: x has strides {x.stride()}, give a contiguous tensor.")
    if h.shape != x.shape:
        raise ValueError(f"gated_residual_layer_norm_: h has shape {tuple(h.shape)}, give x's, {tuple(x.shape)}.")
    B, _, C = x.shape
    for name, tensor in (("gate", gate), ("scale", scale), ("shift", shift)):
        if tensor.shape != (B, 1, C) and tensor.shape != (B, C):
            raise ValueError(
                f"gated_residual_layer_norm_: {name} has shape {tuple(tensor.shape)}, "
                f"give {(B, 1, C)} or {(B, C)} for x of shape {tuple(x.shape)}."
            )
        if tensor.dtype != gate.dtype or tensor.dim() != gate.dim():
            raise ValueError(
                f"gated_residual_layer_norm_: {name} is {tensor.dtype} {tuple(tensor.shape)} and gate {gate.dtype} "
                f"{tuple(gate.shape)}, give gate, scale and shift one dtype and shape."
            )
    for name, tensor in (("h", h), ("gate", gate), ("scale", scale), ("shift", shift)):
        if tensor.device != x.device:
            raise ValueError(
                f"gated_residual_layer_norm_: {name} is on {tensor.device} and x on {x.device}, use one device."
            )


def _why_not_cuda(x: Tensor, h: Tensor, gate: Tensor, *_: object) -> str | None:
    return cuda_why_not(x) or dtype_why_not(x, h, gate)


def _why_not_cpu(x: Tensor, h: Tensor, gate: Tensor, *_: object) -> str | None:
    return cpu_why_not(x) or dtype_why_not(x, h, gate)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, condition = torch.zeros(2, 4, 64, device=device, dtype=dtype), torch.zeros(2, 1, 64, device=device, dtype=dtype)
    return x, x, condition


_OP = Op("gated_residual_layer_norm_", {"cuda": _why_not_cuda, "cpu": _why_not_cpu}, _example)

library.define(
    "gated_residual_layer_norm_(Tensor(a!) x, Tensor h, Tensor gate, Tensor scale, Tensor shift, float eps, "
    "str? backend) -> Tensor"
)


@impl("gated_residual_layer_norm_")
def _gated_residual_layer_norm_(
    x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str | None
) -> Tensor:
    _check(x, h, gate, scale, shift)
    backend = _OP.choose(backend, x.device.type, x, h, gate)
    if backend == "reference":
        return gated_residual_layer_norm_reference_(x, h, gate, scale, shift, eps).contiguous()
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))
    if out.numel() == 0:
        return out
    h, gate, scale, shift = (dense_last_axis(tensor) for tensor in (h, gate, scale, shift))
    B, L, C = x.shape
    with device_guard(x):
        extension(backend).gated_residual_layer_norm(
            *(tensor.data_ptr() for tensor in (x, h, gate, scale, shift, out)),
            *(B, L, C, h.stride(0), h.stride(1), gate.stride(0), scale.stride(0), shift.stride(0)),
            *(DTYPE_CODES[tensor.dtype] for tensor in (x, h, gate, out)),
            eps,
            *stream(x),
        )
    return out


@fake("gated_residual_layer_norm_")
def _fake(x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str | None) -> Tensor:
    _check(x, h, gate, scale, shift)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))


autograd("gated_residual_layer_norm_", _refuse_gradient)
