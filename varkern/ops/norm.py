"""Adaptive layer normalisation (AdaLN): layer norm without affine, scaled and shifted by the condition.

    y = (x - mean(x)) · rstd(x) · (1 + scale) + shift,    rstd(x) = 1 / sqrt(var(x) + eps)

over the last axis, from Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.ops._library import (
    DTYPE_CODES,
    Op,
    autograd,
    check_floats,
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
    kernels,
    library,
    needs_gradient,
    once_differentiable,
    reference_forced,
    stream,
    transformed,
    triton_why_not,
)

__all__ = ["modulated_layer_norm", "modulated_layer_norm_reference"]

_BACKWARD_PROGRAMS = 512  # GPU programs of a backward pass: a few for each multiprocessor
_MIN_ROWS = 8  # and rows for each at least, so that the partial sums cost little beside reading the rows


def modulated_layer_norm_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """``modulated_layer_norm`` in plain PyTorch, as an eager AdaLN block computes it; same arguments."""
    if scale.dim() == 2:
        scale, shift = scale.unsqueeze(1), shift.unsqueeze(1)
    out = F.layer_norm(x, (x.size(-1),), eps=eps).mul(scale.add(1))
    return out.add(shift) if transformed() else out.add_(shift)  # vmap cannot add in place what it alone has batched


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the last axis without affine, times (1 + scale), plus shift (module docstring).

    Args:
        x: (B, L, C), float32, float16 or bfloat16, any strides of B and L. A strided last axis is copied first.
        scale, shift: (B, 1, C) or (B, C), of one dtype, which may differ from x's; any stride of B.
        eps: added to the variance.

    Returns:
        (B, L, C), contiguous, of dtype ``torch.promote_types(x.dtype, scale.dtype)``, under autocast too: eager
        PyTorch computes layer norm in float32 there and the next linear layer rounds, here the op rounds. Statistics
        and arithmetic are float32. Differentiable once in x, scale and shift; the gradients are deterministic.

    float64 tensors are computed by ``modulated_layer_norm_reference``, which is twice differentiable, unless another
    backend is asked for. Raises ``ValueError`` for shapes, dtypes or devices that do not fit, ``RuntimeError`` where
    the backend asked for cannot serve.
    """
    check_floats("modulated_layer_norm", ("x", "scale", "shift"), (x, scale, shift))
    check_number("modulated_layer_norm", "eps", eps)
    backend = current_backend()
    if reference_forced() or (backend is None and torch.float64 in (x.dtype, scale.dtype)):
        _check(x, scale, shift)
        return modulated_layer_norm_reference(x, scale, shift, eps)
    if needs_gradient(x, scale, shift):
        return _ModulatedLayerNorm.apply(x, scale, shift, eps, backend)
    return torch.ops.varkern.modulated_layer_norm(x, scale, shift, eps, backend)


def _check(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    check_floats("modulated_layer_norm", ("x", "scale", "shift"), (x, scale, shift))
    if x.dim() != 3:
        raise ValueError(f"modulated_layer_norm: x has shape {tuple(x.shape)}, give (B, L, C).")
    B, _, C = x.shape
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor.shape != (B, 1, C) and tensor.shape != (B, C):
            raise ValueError(
                f"modulated_layer_norm: {name} has shape {tuple(tensor.shape)}, "
                f"give {(B, 1, C)} or {(B, C)} for x of shape {tuple(x.shape)}."
            )
        if tensor.device != x.device:
            raise ValueError(f"modulated_layer_norm: {name} is on {tensor.device} and x on {x.device}, use one device.")
    if scale.dtype != shift.dtype or scale.dim() != shift.dim():
        raise ValueError(
            f"modulated_layer_norm: scale is {scale.dtype} {tuple(scale.shape)} and shift {shift.dtype} "
            f"{tuple(shift.shape)}, give them one dtype and shape."
        )


def _check_backward(grad_out: Tensor, x: Tensor, scale: Tensor, statistics: Tensor) -> None:
    op = "modulated_layer_norm_backward"
    check_floats(op, ("grad_out", "statistics"), (grad_out, statistics))
    _check(x, scale, scale)
    for name, tensor, shape in (("grad_out", grad_out, x.shape), ("statistics", statistics, (2, *x.shape[:2]))):
        if tensor.shape != shape or tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)} on {tensor.device}, give {tuple(shape)} on x's device "
                f"{x.device}."
            )
    out_dtype = torch.promote_types(x.dtype, scale.dtype)
    if statistics.dtype != torch.float32 or grad_out.dtype != out_dtype:
        raise ValueError(
            f"{op}: statistics are {statistics.dtype} and grad_out {grad_out.dtype}, give float32 and {out_dtype}."
        )


def _why_not_cuda(x: Tensor, scale: Tensor, *_: object) -> str | None:
    return cuda_why_not(x) or dtype_why_not(x, scale)


def _why_not_triton(x: Tensor, scale: Tensor, *_: object) -> str | None:
    reason = triton_why_not(x) or dtype_why_not(x, scale)
    if reason is None and x.size(-1) > (limit := kernels("norm").MAX_C):
        reason = f"C is {x.size(-1)} and its kernels hold a row of at most {limit} in registers"
    return reason


def _why_not_cpu(x: Tensor, scale: Tensor, *_: object) -> str | None:
    return cpu_why_not(x) or dtype_why_not(x, scale)


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, condition = torch.zeros(2, 4, 64, device=device, dtype=dtype), torch.zeros(2, 1, 64, device=device, dtype=dtype)
    return x, condition, condition


_OP = Op("modulated_layer_norm", {"cuda": _why_not_cuda, "triton": _why_not_triton, "cpu": _why_not_cpu}, _example)

_INPUTS = "Tensor x, Tensor scale, Tensor shift, float eps, str? backend"
library.define(f"modulated_layer_norm({_INPUTS}) -> Tensor")
# For training. statistics: float32 (2, B, L), mean and rstd of every row.
library.define(f"modulated_layer_norm_forward({_INPUTS}) -> (Tensor out, Tensor statistics)")
library.define(
    "modulated_layer_norm_backward(Tensor grad_out, Tensor x, Tensor scale, Tensor statistics, str? backend)"
    " -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift)"
)


def _pointers(statistics: Tensor) -> tuple[int, int]:
    """The addresses of mean and rstd."""
    return statistics.data_ptr(), statistics.data_ptr() + statistics.nbytes // 2


def _compute(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str | None, training: bool
) -> tuple[Tensor, Tensor | None]:
    """The result and, for training, the statistics."""
    _check(x, scale, shift)
    statistics = x.new_empty((2, *x.shape[:2]), dtype=torch.float32) if training else None
    backend = _OP.choose(backend, x.device.type, x, scale, shift)
    out_dtype = torch.promote_types(x.dtype, scale.dtype)
    if backend == "reference":
        if statistics is not None:
            variance, means = torch.var_mean(x.detach().float(), -1, correction=0)
            torch.stack((means, torch.rsqrt(variance + eps)), out=statistics)
        return modulated_layer_norm_reference(x, scale, shift, eps).to(out_dtype).contiguous(), statistics

    out = x.new_empty(x.shape, dtype=out_dtype)
    if out.numel() == 0:
        return out, statistics
    x, scale, shift = dense_last_axis(x), dense_last_axis(scale), dense_last_axis(shift)
    with device_guard(x):
        if backend == "triton":
            kernels("norm").modulated_layer_norm_forward(x, scale, shift, out, statistics, eps)
            return out, statistics
        B, L, C = x.shape
        mean, rstd = (0, 0) if statistics is None else _pointers(statistics)
        extension(backend).modulated_layer_norm_forward(
            *(x.data_ptr(), scale.data_ptr(), shift.data_ptr(), out.data_ptr(), mean, rstd),
            *(B, L, C, x.stride(0), x.stride(1), scale.stride(0), shift.stride(0)),
            *(DTYPE_CODES[x.dtype], DTYPE_CODES[scale.dtype], DTYPE_CODES[out_dtype], eps),
            *stream(x),
        )
    return out, statistics


@impl("modulated_layer_norm")
def _modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str | None) -> Tensor:
    return _compute(x, scale, shift, eps, backend, training=False)[0]


@impl("modulated_layer_norm_forward")
def _modulated_layer_norm_forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    out, statistics = _compute(x, scale, shift, eps, backend, training=True)
    assert statistics is not None
    return out, statistics


@impl("modulated_layer_norm_backward")
def _modulated_layer_norm_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(grad_out, x, scale, statistics)
    backend = _OP.choose(backend, x.device.type, x, scale)
    statistics = statistics.contiguous()
    B, _, C = x.shape
    if backend == "reference":
        mean, rstd = statistics.unsqueeze(-1)
        normed = (x.float() - mean) * rstd
        grad = grad_out.float()
        grad_scale, grad_shift = (grad * normed).sum(1), grad.sum(1)
        grad = grad * (1 + scale.float().view(B, 1, C))
        grad_x = rstd * (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True))
    else:
        grad_x = x.new_empty(x.shape)
        # Without rows nothing is launched and the sums over them are zero. The Triton kernels round by themselves.
        sums = x.new_empty if x.numel() else x.new_zeros
        dtype = scale.dtype if backend == "triton" else torch.float32
        grad_scale, grad_shift = sums((B, C), dtype=dtype), sums((B, C), dtype=dtype)
        if x.numel():
            grad_out, x, dense_scale = dense_last_axis(grad_out), dense_last_axis(x), dense_last_axis(scale)
            _launch_backward(backend, grad_out, x, dense_scale, statistics, grad_x, grad_scale, grad_shift)
    return (
        grad_x.to(x.dtype),
        grad_scale.to(scale.dtype).view(scale.shape),
        grad_shift.to(scale.dtype).view(scale.shape),
    )


def _launch_backward(
    backend: str, grad_out: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, *grads: Tensor
) -> None:
    B, L, C = x.shape
    partial: tuple[object, ...] = ()
    if backend != "cpu":
        # A GPU sums each chunk of rows into its own line of a workspace and then the lines, in a fixed order. The
        # number of chunks does not look at the device, so that every device adds in the same order.
        chunks = max(1, min(L // _MIN_ROWS, _BACKWARD_PROGRAMS // B))
        workspace = x.new_empty((2, B, chunks, C), dtype=torch.float32)
        partial = (workspace.data_ptr(), chunks)
    with device_guard(x):
        if backend == "triton":
            kernels("norm").modulated_layer_norm_backward(grad_out, x, scale, statistics, *grads, workspace)
            return
        extension(backend).modulated_layer_norm_backward(
            *(grad_out.data_ptr(), x.data_ptr(), scale.data_ptr(), *_pointers(statistics)),
            *(grad.data_ptr() for grad in grads),
            *(B, L, C, grad_out.stride(0), grad_out.stride(1), x.stride(0), x.stride(1), scale.stride(0)),
            *(DTYPE_CODES[x.dtype], DTYPE_CODES[scale.dtype], DTYPE_CODES[grad_out.dtype]),
            *partial,
            *stream(x),
        )


@fake("modulated_layer_norm")
def _fake(x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str | None) -> Tensor:
    _check(x, scale, shift)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))


@fake("modulated_layer_norm_forward")
def _fake_forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str | None) -> tuple[Tensor, Tensor]:
    return _fake(x, scale, shift, eps, backend), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


@fake("modulated_layer_norm_backward")
def _fake_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(grad_out, x, scale, statistics)
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


class _ModulatedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str | None) -> Tensor:
        out, statistics = torch.ops.varkern.modulated_layer_norm_forward(x, scale, shift, eps, backend)
        ctx.save_for_backward(x, scale, statistics)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, statistics = ctx.saved_tensors
        grads = once_differentiable(
            "modulated_layer_norm",
            (grad_out, x, scale),
            lambda: torch.ops.varkern.modulated_layer_norm_backward(grad_out, x, scale, statistics, ctx.backend),
        )
        return (*grads, None, None)


autograd("modulated_layer_norm", _ModulatedLayerNorm.apply)
