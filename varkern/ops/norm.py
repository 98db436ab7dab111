"""Adaptive layer normalisation (AdaLN): layer norm without affine, scaled and shifted by the condition.

    y = (x - mean(x)) · rstd(x) · (1 + scale) + shift,    rstd(x) = 1 / sqrt(var(x) + eps)

over the last axis, from Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748, section 3.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.ops._op import Op
from varkern.ops.backends import (
    DTYPE_CODES,
    dense_last_axis,
    dtype_why_not,
    extension,
    stream,
    transformed,
    triton_kernels,
)
from varkern.ops.checks import check_device

__all__ = ["modulated_layer_norm", "modulated_layer_norm_reference"]

_NAME = "modulated_layer_norm"
_BACKWARD_PROGRAMS = 512  # GPU programs of a backward pass: a few for each multiprocessor
_MIN_ROWS = 8  # and rows for each at least, so that the partial sums cost little beside reading the rows


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | float, ...]:
    scale, shift = torch.zeros(2, 2, 1, 64, device=device, dtype=dtype)
    return torch.zeros(2, 4, 64, device=device, dtype=dtype), scale, shift, 1e-6


def _example_backward(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, scale = torch.zeros(2, 4, 64, device=device, dtype=dtype), torch.zeros(2, 1, 64, device=device, dtype=dtype)
    return x, x, scale, torch.ones(2, 2, 4, device=device, dtype=torch.float32)


_INPUTS, _BACKENDS = "Tensor x, Tensor scale, Tensor shift, float eps", ("cuda", "triton", "cpu")
_OP = Op(f"{_NAME}({_INPUTS}) -> Tensor", _BACKENDS, _example)
# For training. statistics: float32 (2, B, L), mean and rstd of every row.
_FORWARD = Op(f"{_NAME}_forward({_INPUTS}) -> (Tensor out, Tensor statistics)", _BACKENDS, _example)
_BACKWARD = Op(
    f"{_NAME}_backward(Tensor grad_out, Tensor x, Tensor scale, Tensor statistics)"
    " -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift)",
    _BACKENDS,
    _example_backward,
)
_OP.gradient(_BACKWARD, _FORWARD)


@_OP.eager
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
    return _OP(x, scale, shift, eps)


@_OP.by_pytorch
def _by_pytorch(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> bool:
    return torch.float64 in (x.dtype, scale.dtype)


@_OP.check
@_FORWARD.check
def _check(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
    if x.dim() != 3:
        raise ValueError(f"{_NAME}: x has shape {tuple(x.shape)}, give (B, L, C).")
    B, _, C = x.shape
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor.shape != (B, 1, C) and tensor.shape != (B, C):
            raise ValueError(
                f"{_NAME}: {name} has shape {tuple(tensor.shape)}, give {(B, 1, C)} or {(B, C)} for x of shape "
                f"{tuple(x.shape)}."
            )
    check_device(_NAME, "x", x, scale=scale, shift=shift)
    if scale.dtype != shift.dtype or scale.dim() != shift.dim():
        raise ValueError(
            f"{_NAME}: scale is {scale.dtype} {tuple(scale.shape)} and shift {shift.dtype} {tuple(shift.shape)}, give "
            "them one dtype and shape."
        )


@_BACKWARD.check
def _check_backward(grad_out: Tensor, x: Tensor, scale: Tensor, statistics: Tensor) -> None:
    _check(x, scale, scale, 0.0)
    out_dtype = torch.promote_types(x.dtype, scale.dtype)
    rows = (2, *x.shape[:2])
    for name, tensor, shape, dtype in (
        ("grad_out", grad_out, x.shape, out_dtype),
        ("statistics", statistics, rows, torch.float32),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"{_NAME}_backward: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, give {dtype} "
                f"{tuple(shape)} on x's device {x.device}."
            )


@_OP.limits
@_FORWARD.limits
def _limits(backend: str, x: Tensor, scale: Tensor, *_: object) -> str | None:
    if backend == "triton" and x.size(-1) > (limit := triton_kernels("norm").MAX_C):
        return f"C is {x.size(-1)} and its kernels hold a row of at most {limit} in registers"
    return dtype_why_not(x, scale)


@_BACKWARD.limits
def _limits_backward(backend: str, grad_out: Tensor, x: Tensor, scale: Tensor, *_: object) -> str | None:
    return _limits(backend, x, scale)


@_OP.empty
def _empty(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))


@_FORWARD.empty
def _empty_forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty(x, scale, shift, eps), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)


@_BACKWARD.empty
def _empty_backward(grad_out: Tensor, x: Tensor, scale: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@_OP.reference
def _reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    out = modulated_layer_norm_reference(x, scale, shift, eps)
    return out.to(torch.promote_types(x.dtype, scale.dtype)).contiguous()


@_FORWARD.reference
def _reference_forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, means = torch.var_mean(x.float(), -1, correction=0)
    return _reference(x, scale, shift, eps), torch.stack((means, torch.rsqrt(variance + eps)))


@_BACKWARD.reference
def _reference_backward(grad_out: Tensor, x: Tensor, scale: Tensor, statistics: Tensor) -> tuple[Tensor, ...]:
    mean, rstd = statistics.unsqueeze(-1)
    normed = (x.float() - mean) * rstd
    grad = grad_out.float()
    grad_scale, grad_shift = (grad * normed).sum(1), grad.sum(1)
    grad = grad * (1 + scale.float().view(x.size(0), 1, x.size(2)))
    grad_x = rstd * (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True))
    return _rounded(x, scale, grad_x, grad_scale, grad_shift)


def _rounded(x: Tensor, scale: Tensor, grad_x: Tensor, grad_scale: Tensor, grad_shift: Tensor) -> tuple[Tensor, ...]:
    grads = (grad.to(scale.dtype).view(scale.shape) for grad in (grad_scale, grad_shift))
    return (grad_x.to(x.dtype), *grads)


def _pointers(statistics: Tensor | None) -> tuple[int, int]:
    """The addresses of mean and rstd."""
    return (0, 0) if statistics is None else (statistics[0].data_ptr(), statistics[1].data_ptr())


@_OP.kernels
def _launch(backend: str, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return _normalise(backend, x, scale, shift, eps, _empty(x, scale, shift, eps), None)


@_FORWARD.kernels
def _launch_forward(backend: str, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, statistics = _empty_forward(x, scale, shift, eps)
    return _normalise(backend, x, scale, shift, eps, out, statistics), statistics


def _normalise(
    backend: str, x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: Tensor, statistics: Tensor | None
) -> Tensor:
    if out.numel() == 0:
        return out
    x, scale, shift = dense_last_axis(x), dense_last_axis(scale), dense_last_axis(shift)
    if backend == "triton":
        triton_kernels("norm").modulated_layer_norm_forward(x, scale, shift, out, statistics, eps)
        return out
    extension(backend).modulated_layer_norm_forward(
        *(x.data_ptr(), scale.data_ptr(), shift.data_ptr(), out.data_ptr(), *_pointers(statistics)),
        *(*x.shape, x.stride(0), x.stride(1), scale.stride(0), shift.stride(0)),
        *(DTYPE_CODES[x.dtype], DTYPE_CODES[scale.dtype], DTYPE_CODES[out.dtype], eps),
        *stream(x),
    )
    return out


@_BACKWARD.kernels
def _launch_backward(
    backend: str, grad_out: Tensor, x: Tensor, scale: Tensor, statistics: Tensor
) -> tuple[Tensor, ...]:
    B, L, C = x.shape
    grad_x = x.new_empty(x.shape)
    # Without rows nothing is launched and the sums over them are zero. The Triton kernels round by themselves.
    sums = x.new_empty if x.numel() else x.new_zeros
    dtype = scale.dtype if backend == "triton" else torch.float32
    grad_scale, grad_shift = sums((B, C), dtype=dtype), sums((B, C), dtype=dtype)
    if x.numel() == 0:
        return _rounded(x, scale, grad_x, grad_scale, grad_shift)
    grads = (grad_x, grad_scale, grad_shift)
    grad_out, x, dense_scale = dense_last_axis(grad_out), dense_last_axis(x), dense_last_axis(scale)
    statistics = statistics.contiguous()
    partial: tuple[object, ...] = ()
    if backend != "cpu":
        # A GPU sums each chunk of rows into its own line of a workspace and then the lines, in a fixed order. The
        # number of chunks does not look at the device, so that every device adds in the same order.
        chunks = max(1, min(L // _MIN_ROWS, _BACKWARD_PROGRAMS // B))
        workspace = x.new_empty((2, B, chunks, C), dtype=torch.float32)
        partial = (workspace.data_ptr(), chunks)
    if backend == "triton":
        triton_kernels("norm").modulated_layer_norm_backward(grad_out, x, dense_scale, statistics, *grads, workspace)
    else:
        extension(backend).modulated_layer_norm_backward(
            *(grad_out.data_ptr(), x.data_ptr(), dense_scale.data_ptr(), *_pointers(statistics)),
            *(grad.data_ptr() for grad in grads),
            *(B, L, C, grad_out.stride(0), grad_out.stride(1), x.stride(0), x.stride(1), dense_scale.stride(0)),
            *(DTYPE_CODES[x.dtype], DTYPE_CODES[scale.dtype], DTYPE_CODES[grad_out.dtype]),
            *partial,
            *stream(x),
        )
    return _rounded(x, scale, *grads)
