"""Group normalisation (Wu and He, arXiv 1803.08494) with SiLU, for the tokenizer's convolutions.

    y = silu((x - mean) · rstd · weight + bias),    rstd = 1 / sqrt(var + eps),    silu(z) = z / (1 + exp(-z))

Mean and variance are those of a group's channels over all positions of an image. What a group does to a channel is one
multiplication and one addition; ``group_norm_affine`` gives those two numbers alone, for a kernel that applies them
while it loads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.ops._op import Op
from varkern.ops.backends import DTYPE_CODES, dtype_why_not, extension, pointer, stream
from varkern.ops.checks import check_device

__all__ = ["group_norm_affine", "group_norm_affine_reference", "group_norm_silu", "group_norm_silu_reference"]


def _example_affine(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | float, ...]:
    weight, bias = torch.ones(2, 64, device=device, dtype=dtype)
    return torch.zeros(1, 64, 4, 4, device=device, dtype=dtype), weight, bias, 32, 1e-6


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | float, ...]:
    return (*_example_affine(device, dtype), True)


_INPUTS, _BACKENDS = "Tensor x, Tensor weight, Tensor bias, int num_groups, float eps", ("cuda", "cpu")
_INSTEAD = "train through torch.nn.functional.group_norm"
_SILU = Op(f"group_norm_silu({_INPUTS}, bool silu) -> Tensor", _BACKENDS, _example, no_gradient=f"{_INSTEAD} and silu")
_AFFINE = Op(f"group_norm_affine({_INPUTS}) -> Tensor", _BACKENDS, _example_affine, no_gradient=_INSTEAD)


@_SILU.eager
def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6, silu: bool = True
) -> Tensor:
    """``group_norm_silu`` in plain PyTorch, as an eager decoder computes it; same arguments and result."""
    dtype = x.dtype
    if weight.dtype != dtype:
        x, weight, bias = x.float(), weight.float(), bias.float()
    out = torch.group_norm(x, num_groups, weight, bias, eps)
    return (F.silu(out, inplace=True) if silu else out).to(dtype)


@_AFFINE.reference
def group_norm_affine_reference(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6) -> Tensor:
    """``group_norm_affine`` in plain PyTorch; same arguments and result."""
    wide = x if x.dtype == torch.float64 else x.float()
    grouped = wide.flatten(2).unflatten(1, (num_groups, x.size(1) // num_groups)).flatten(2)
    variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
    multiplier = torch.rsqrt(variance + eps) * weight.to(wide.dtype).view(num_groups, -1)
    offset = bias.to(wide.dtype).view(num_groups, -1) - mean * multiplier
    return torch.stack((multiplier, offset)).flatten(2).float()


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6, silu: bool = True
) -> Tensor:
    """Group normalisation, then SiLU (module docstring).

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16. Contiguous or channels_last memory is read as it lies, channels
            next to each other being the faster form on CUDA; other strides are copied first.
        weight, bias: (C,), of one floating-point dtype, which may differ from x's; used in float32.
        num_groups: a divisor of C.
        eps: added to the variance.
        silu: False leaves the activation out.

    Returns:
        (B, C, H, W) of x's dtype and memory format, under autocast too: eager PyTorch normalises in float32 there and
        the next convolution rounds, here the op rounds. Arithmetic is float32, sums are combined in float64 and in an
        order fixed by the shapes: the same bits whatever the device's size and the number of threads. The mean is
        subtracted before anything is multiplied, so a large mean costs no more than x's own rounding.

    For inference: raises ``RuntimeError`` where a gradient would be recorded, or where the backend asked for cannot
    serve, ``ValueError`` for shapes, dtypes or devices that do not fit. float64 is computed by the reference.
    """
    return _SILU(x, weight, bias, num_groups, eps, silu)


def group_norm_affine(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6) -> Tensor:
    """What group normalisation multiplies every channel with, and what it adds: y = x · a + b.

    Arguments and errors are those of ``group_norm_silu``.

    Returns:
        (2, B, C) float32: a = rstd · weight and b = bias - mean · a, of statistics in float64. b is computed from the
        rounded a, so that a's rounding is relative to x - mean, not to x. What this form loses is the rounding of b
        itself, up to 2⁻²⁴ · |b|: with |mean| = 1000 standard deviations 6e-5 of a standard deviation of y. That is what
        PyTorch's own kernels lose, which have the same form; a fused multiply-add adds nothing to it.
        ``group_norm_silu`` does not lose it.
    """
    return _AFFINE(x, weight, bias, num_groups, eps)


@_SILU.check
def _check(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> None:
    check_group_norm("group_norm_silu", x, weight, bias, num_groups)


@_AFFINE.check
def _check_affine(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> None:
    check_group_norm("group_norm_affine", x, weight, bias, num_groups)


def check_group_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> None:
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, give (B, C, H, W) with C, H, W > 0.")
    C = x.size(1)
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"{op}: num_groups is {num_groups}, give a divisor of the {C} channels.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (C,):
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, give ({C},) for {C} channels.")
    check_device(op, "x", x, weight=weight, bias=bias)
    if weight.dtype != bias.dtype:
        raise ValueError(f"{op}: weight is {weight.dtype} and bias {bias.dtype}, give them one dtype.")


@_SILU.limits
@_AFFINE.limits
def _limits(backend: str, x: Tensor, *_: object) -> str | None:
    return dtype_why_not(x)


@_SILU.empty
def _empty(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=_format(x))


@_AFFINE.empty
def _empty_affine(x: Tensor, *_: object) -> Tensor:
    return x.new_empty((2, x.size(0), x.size(1)), dtype=torch.float32)


@_SILU.reference
def _reference(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    out = group_norm_silu_reference(x, weight, bias, num_groups, eps, silu)
    return out.contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    """Of the result, and of the copy of an x that has neither."""
    return torch.channels_last if x.stride(1) == 1 and not x.is_contiguous() else torch.contiguous_format


def _chunk_pixels(C: int, P: int, num_groups: int, channels_last: bool) -> int:
    """How many pixels a block of the CUDA kernels takes.

    By the image's shape alone, so that its bits depend on neither the device nor the batch. Channels next to each
    other: up to 512 blocks an image, of 16 pixels at least; else up to 16 a group, of 4096 elements at least.
    """
    if channels_last:
        return max(16, -(-P // 512))
    pixels = max(4096 * num_groups // C, -(-P // 16), 1)
    return -(-pixels // 8) * 8


@_SILU.kernels
def _launch(backend: str, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool) -> Tensor:
    out = _empty(x)
    coefficients = x.new_empty((3, x.size(0), x.size(1)), dtype=torch.float32)
    _fill(backend, x, weight, bias, num_groups, eps, silu, out, coefficients)
    return out


@_AFFINE.kernels
def _launch_affine(backend: str, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    coefficients = _empty_affine(x)
    _fill(backend, x, weight, bias, num_groups, eps, False, None, coefficients)
    return coefficients


def _fill(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    out: Tensor | None,
    coefficients: Tensor,
) -> None:
    """Write out, if there is one, and the coefficients: (2, B, C), or (3, B, C) with those of out."""
    B, C, H, W = x.shape
    if B == 0:
        return
    x = x.contiguous(memory_format=_format(x))
    weight, bias = (tensor.detach().float().contiguous() for tensor in (weight, bias))
    channels_last = _format(x) == torch.channels_last
    extra: tuple[int, ...] = ()
    if backend == "cuda":
        pixels = _chunk_pixels(C, H * W, num_groups, channels_last)
        partial = x.new_empty((B, num_groups, -(-H * W // pixels), 2), dtype=torch.float64)
        extra = partial.data_ptr(), pixels, *stream(x)
    extension(backend).group_norm(
        *(x.data_ptr(), weight.data_ptr(), bias.data_ptr()),
        *(pointer(out), coefficients.data_ptr(), B, C, H * W, num_groups),
        *(DTYPE_CODES[x.dtype], channels_last, silu, eps),
        *extra,
    )
