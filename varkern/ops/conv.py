"""A 3x3 convolution of the tokenizer with what stands around it: group norm and SiLU or nearest upsampling before, the
residual after.

    y = conv(up(silu(groupnorm(x)))) + bias + residual

On the CPU in float32 by Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308), channels last; elsewhere PyTorch's
convolution after varkern's group norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.ops._op import Op
from varkern.ops.backends import extension, pointer
from varkern.ops.checks import check_truth
from varkern.ops.group_norm import check_group_norm, group_norm_affine, group_norm_silu, group_norm_silu_reference

__all__ = ["Norm", "conv3x3", "conv3x3_reference"]

# Output tiles of 4 x 4, over the batch, from which on fewer multiplications pay for transforming the weights.
_MIN_TILES = 32


class Norm(NamedTuple):
    """A group norm as ``group_norm_silu`` takes it: weight and bias (C,), the groups, and what the variance gets."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | float | None, ...]:
    x = torch.zeros(1, 32, 32, 32, device=device, dtype=dtype)
    weight, affine = x.new_zeros((8, 32, 3, 3), dtype=dtype), x.new_ones((2, 32), dtype=dtype)
    return x, weight, None, affine[0], affine[1], 32, 1e-6, x.new_zeros((1, 8, 32, 32), dtype=dtype), False


_OP = Op(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, int groups, float eps, "
    "Tensor? residual, bool upsample) -> Tensor",
    ("cpu",),
    _example,
    no_gradient="train through torch.nn.functional.conv2d",
)


def conv3x3_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """``conv3x3`` in plain PyTorch; same arguments."""
    if norm is not None:
        x = group_norm_silu_reference(x, *norm)
    return _plain(x, weight, bias, residual, upsample)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: bool) -> Tensor:
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    out = F.conv2d(x, weight, bias, padding=1)
    return out if residual is None else residual + out


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    upsample: bool = False,
) -> Tensor:
    """The module docstring's y; each of norm (with its SiLU), residual and upsample may be absent.

    Args:
        x: (B, C, H, W), floating point; channels last is what the kernels read, anything else is copied.
        weight, bias: (Cout, C, 3, 3), any strides, and (Cout,); of x's dtype. The map is padded by one zero.
        norm: group norm before the convolution, followed by SiLU.
        residual: of the result's shape and dtype, added to it.
        upsample: the nearest doubling of both sides, before the convolution.

    Returns:
        (B, Cout, H, W), or (B, Cout, 2H, 2W), channels last; the same bits with any number of threads. The Winograd
        kernel's root mean square error is 1.5 to 2 times a direct float32 convolution's over 160 channels, its
        largest 2 to 3 times; more where channels are few and both are small.

    For inference: raises ``RuntimeError`` where a gradient would be recorded or the backend asked for cannot serve,
    ``ValueError`` for shapes, dtypes or devices that do not fit.
    """
    if norm is not None and not isinstance(norm, Norm):
        raise TypeError(f"conv3x3: norm is {norm!r}, give a Norm(weight, bias, groups, eps) or None.")
    check_truth("conv3x3", "upsample", upsample)
    norm_weight, norm_bias, groups, eps = norm if norm is not None else (None, None, 1, 0.0)
    norm_weight, norm_bias, groups, eps = norm if norm is not None else (None, None, 1, 0.0)
    return _OP(x, weight, bias, norm_weight, norm_bias, groups, eps, residual, upsample)


@_OP.check
def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    eps: float,
    residual: Tensor | None,
    upsample: bool,
) -> None:
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"conv3x3: x has shape {tuple(x.shape)}, give (B, C, H, W) with C, H, W > 0.")
    C = x.size(1)
    if weight.dim() != 4 or weight.shape[1:] != (C, 3, 3) or not weight.size(0):
        raise ValueError(
            f"conv3x3: weight has shape {tuple(weight.shape)}, give (Cout, {C}, 3, 3) for x {tuple(x.shape)}."
        )
    if bias is not None and bias.shape != (weight.size(0),):
        raise ValueError(f"conv3x3: bias has shape {tuple(bias.shape)}, give ({weight.size(0)},).")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("conv3x3: give both of norm's weight and bias, or neither.")
    if norm_weight is not None and norm_bias is not None:
        check_group_norm("conv3x3's norm", x, norm_weight, norm_bias, groups)
    factor = 2 if upsample else 1
    shape = (x.size(0), weight.size(0), factor * x.size(2), factor * x.size(3))
    if residual is not None and residual.shape != shape:
        raise ValueError(f"conv3x3: residual has shape {tuple(residual.shape)}, give the result's, {shape}.")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"conv3x3: {name} is {tensor.dtype} on {tensor.device} and x {x.dtype} on {x.device}, give them one "
                "dtype and device."
            )


@_OP.limits
def _limits(backend: str, x: Tensor, *_: object) -> str | None:
    return None if x.dtype == torch.float32 else f"{x.dtype} is not float32"


def _tiles(x: Tensor, upsample: bool) -> int:
    B, _, H, W = x.shape
    factor = 2 if upsample else 1
    return B * -(-factor * H // 4) * -(-factor * W // 4)


@_OP.worthwhile
def _worthwhile(x: Tensor, *rest: Tensor | float | bool | None) -> bool:
    return _tiles(x, bool(rest[-1])) >= _MIN_TILES


@_OP.empty
def _empty(x: Tensor, weight: Tensor, *rest: Tensor | float | bool | None) -> Tensor:
    B, _, H, W = x.shape
    factor = 2 if rest[-1] else 1
    return x.new_empty((B, factor * H, factor * W, weight.size(0))).permute(0, 3, 1, 2)


@_OP.flops
def _flops(a: Any) -> int:
    """Of the convolution's definition, whatever the algorithm."""
    B, C, H, W = a.x
    return 2 * B * (H << a.upsample) * (W << a.upsample) * a.weight[0] * C * 9


@_OP.eager
def _eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    eps: float,
    residual: Tensor | None,
    upsample: bool,
) -> Tensor:
    norm = None if norm_weight is None or norm_bias is None else Norm(norm_weight, norm_bias, groups, eps)
    return conv3x3_reference(x, weight, bias, norm, residual, upsample)


@_OP.reference
def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    eps: float,
    residual: Tensor | None,
    upsample: bool,
) -> Tensor:
    if norm_weight is not None and norm_bias is not None:
        x = group_norm_silu(x, norm_weight, norm_bias, groups, eps)
    if x.device.type == "cpu" and _tiles(x, upsample) < _MIN_TILES:
        # A map of few tiles is less to rearrange than its weights, which PyTorch would bring to x's format.
        x = x.contiguous()
    return _plain(x, weight, bias, residual, upsample).contiguous(memory_format=torch.channels_last)


@_OP.kernels
def _launch(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    groups: int,
    eps: float,
    residual: Tensor | None,
    upsample: bool,
) -> Tensor:
    B, C, H, W = x.shape
    out = _empty(x, weight, upsample)
    if not B:
        return out
    x = x.contiguous(memory_format=torch.channels_last)
    affine: Tensor | tuple[None, None] = (None, None)
    if norm_weight is not None and norm_bias is not None:
        affine = group_norm_affine(x, norm_weight, norm_bias, groups, eps)
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    extension(backend).conv3x3(
        *(x.data_ptr(), weight.data_ptr(), pointer(bias), pointer(affine[0]), pointer(affine[1])),
        *(pointer(residual), out.data_ptr(), B, H, W, C, weight.size(0), *weight.stride(), upsample),
    )
    return out
