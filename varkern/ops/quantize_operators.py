"""The operators of multi-scale residual quantization: schemas, backends, gradients. See ``quantize``.

What they share: ``codebook`` (V, Cv), ``phi_weight`` (n, Cv, Cv, 3, 3) and ``phi_bias`` (n, Cv), all float32;
``ratio`` of phi; ``phi_of_scale``, for each scale the phi out of n, n = 0 being the identity; ``sizes``, flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from varkern._kept import kept
from varkern.ops import quantize_reference as reference
from varkern.ops._library import (
    Op,
    autograd,
    cpu_why_not,
    device_guard,
    extension,
    fake,
    impl,
    kernels,
    library,
    needs_gradient,
    once_differentiable,
    triton_why_not,
)
from varkern.ops.quantize_checks import (
    check_backward,
    check_features,
    check_indices,
    check_range,
    check_sizes,
    check_step,
    check_teacher,
    pairs,
    positions,
)
from varkern.ops.quantize_reference import Phi

__all__ = ["dequantize", "quantize"]


def _why_not_cpu(tensor: Tensor, *_: object) -> str | None:
    return cpu_why_not(tensor)


def _why_not_cpu_step(f_hat: Tensor, *_: object) -> str | None:
    if not f_hat.is_contiguous():
        return f"f_hat of strides {f_hat.stride()} is not contiguous"
    return cpu_why_not(f_hat)


def _triton_channels(tensor: Tensor, Cv: int) -> str | None:
    reason = triton_why_not(tensor)
    if reason is None and Cv > (limit := kernels("quantize").MAX_CHANNELS):
        reason = f"Cv is {Cv} and its kernels hold codes of at most {limit} channels in registers"
    return reason


def _why_not_triton(tensor: Tensor, codebook: Tensor, *_: object) -> str | None:
    return _triton_channels(tensor, codebook.size(-1))


def _why_not_triton_step(f_hat: Tensor, *_: object) -> str | None:
    if not f_hat.is_contiguous():
        return f"f_hat of strides {f_hat.stride()} is not contiguous"
    return _triton_channels(f_hat, f_hat.size(1))


def _example_quantize(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(shape, dtype=torch.float32, device=device) for shape in ((1, 8, 2, 2), (16, 8)))


def _example_indices(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    indices = torch.zeros(1, 5, dtype=torch.int64, device=device)
    return indices, torch.zeros(16, 8, dtype=torch.float32, device=device)


def _example_step(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(shape, dtype=torch.float32, device=device) for shape in ((1, 8, 2, 2), (1, 8, 1, 1)))


_WHY_NOT: dict[str, Callable[..., str | None]] = {"triton": _why_not_triton, "cpu": _why_not_cpu}
_QUANTIZE = Op("residual_quantize", _WHY_NOT, _example_quantize)
_DEQUANTIZE = Op("residual_dequantize", _WHY_NOT, _example_indices)
_TEACHER = Op("teacher_forcing_input", _WHY_NOT, _example_indices)
_STEP = Op("next_scale_input", {"triton": _why_not_triton_step, "cpu": _why_not_cpu_step}, _example_step)

_MAPS = "Tensor codebook, Tensor phi_weight, Tensor phi_bias, float ratio, int[] phi_of_scale, int[] sizes"
library.define(
    f"residual_quantize(Tensor features, {_MAPS}, bool cosine, bool all_f_hats, str? backend)"
    " -> (Tensor f_hats, Tensor indices)"
)
library.define(
    f"residual_quantize_backward(Tensor grad_f_hats, Tensor indices, {_MAPS}, str? backend)"
    " -> (Tensor grad_codebook, Tensor grad_phi_weight, Tensor grad_phi_bias)"
)
library.define(f"residual_dequantize(Tensor indices, {_MAPS}, int H, int W, str? backend) -> Tensor")
library.define(f"teacher_forcing_input(Tensor indices, {_MAPS}, str? backend) -> Tensor")
library.define(
    "next_scale_input(Tensor(a!) f_hat, Tensor codes, Tensor? phi_weight, Tensor? phi_bias, float ratio,"
    " int[] following, str? backend) -> Tensor"
)


@kept
def _scales(sizes: tuple[int, ...], phi_of_scale: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The schedule as csrc/ops/quantize.h has it, (K, 3) int64: height, width, phi; and its address.

    Sizes without a phi of their own follow the last scale that runs.
    """
    phis = [*phi_of_scale, *[0] * (len(sizes) // 2 - len(phi_of_scale))]
    schedule = np.array([(*size, phi) for size, phi in zip(pairs(sizes), phis, strict=True)], dtype=np.int64)
    return schedule, schedule.ctypes.data


def _maps(
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    B: int,
    H: int,
    W: int,
) -> tuple[int | float, ...]:
    """The leading arguments of every launch; the tensors are contiguous."""
    _, scales = _scales(tuple(sizes), tuple(phi_of_scale))
    pointers = (codebook.data_ptr(), phi_weight.data_ptr(), phi_bias.data_ptr(), scales)
    return (*pointers, phi_weight.size(0), B, *codebook.shape, H, W, len(phi_of_scale), ratio)


def _phis(phi_weight: Tensor, phi_bias: Tensor, ratio: float, phi_of_scale: Sequence[int]) -> list[Phi]:
    if phi_weight.size(0) == 0:
        return [Phi(None, None, 0.0)] * len(phi_of_scale)
    return [Phi(phi_weight[i], phi_bias[i], ratio) for i in phi_of_scale]


@impl("residual_quantize")
def _residual_quantize(
    features: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    cosine: bool,
    all_f_hats: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    check_features("residual_quantize", features, codebook, phi_weight, phi_bias, ratio, phi_of_scale, sizes)
    backend = _QUANTIZE.choose(backend, features.device.type, features, codebook)
    bank = (phi_weight.contiguous(), phi_bias.contiguous(), ratio, phi_of_scale)
    if backend == "reference":
        with torch.autocast(features.device.type, enabled=False):
            each, maps = reference.residual_quantize_reference(
                features, codebook, _phis(*bank), pairs(sizes), cosine, all_f_hats
            )
        return torch.stack(maps).contiguous(), torch.cat(each, 1)
    codebook = codebook.contiguous()
    if backend == "triton":
        with device_guard(features):
            indices, f_hats = kernels("quantize").residual_quantize(
                features, codebook, *bank, pairs(sizes), cosine, all_f_hats
            )
            return f_hats, indices
    f_hats, indices = _empty_quantize(features, phi_of_scale, sizes, all_f_hats)
    if features.size(0):
        extension(backend).residual_quantize(
            *_maps(codebook, *bank, sizes, features.size(0), *features.shape[2:]),
            *(features.data_ptr(), *features.stride(), indices.data_ptr(), f_hats.data_ptr(), cosine, all_f_hats),
        )
    return f_hats, indices


def _empty_quantize(
    features: Tensor, phi_of_scale: Sequence[int], sizes: Sequence[int], all_f_hats: bool
) -> tuple[Tensor, Tensor]:
    f_hats = features.new_empty((len(phi_of_scale) if all_f_hats else 1, *features.shape))
    return f_hats, features.new_empty((features.size(0), positions(sizes)), dtype=torch.int64)


@fake("residual_quantize")
def _fake_quantize(
    features: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    cosine: bool,
    all_f_hats: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    check_features("residual_quantize", features, codebook, phi_weight, phi_bias, ratio, phi_of_scale, sizes)
    return _empty_quantize(features, phi_of_scale, sizes, all_f_hats)


@impl("residual_quantize_backward")
def _residual_quantize_backward(
    grad_f_hats: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad_f_hats, indices, codebook, phi_weight, phi_bias, phi_of_scale, sizes)
    check_range("residual_quantize_backward", indices, codebook.size(0))
    backend = _QUANTIZE.choose(backend, indices.device.type, indices, codebook)
    codebook, indices, grad_f_hats = codebook.contiguous(), indices.contiguous(), grad_f_hats.contiguous()
    bank = (phi_weight.contiguous(), phi_bias.contiguous(), ratio, phi_of_scale)
    if backend == "triton":
        with device_guard(indices):
            # The features and f_hats of the forward pass change nothing, the codes being given.
            return kernels("quantize").residual_quantize_backward(
                grad_f_hats[0], codebook, *bank, pairs(sizes), indices, grad_f_hats, grad_f_hats
            )
    if backend == "reference" or indices.numel() == 0:
        with torch.autocast(indices.device.type, enabled=False):
            return _reference_backward(grad_f_hats, indices, codebook, *bank, sizes)
    grads = (torch.empty_like(codebook), torch.empty_like(bank[0]), torch.empty_like(bank[1]))
    extension(backend).residual_quantize_backward(
        *_maps(codebook, *bank, sizes, indices.size(0), *grad_f_hats.shape[3:]),
        *(indices.data_ptr(), grad_f_hats.data_ptr(), *(grad.data_ptr() for grad in grads)),
    )
    return grads


def _reference_backward(
    grad_f_hats: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = torch.zeros_like(phi_weight), torch.zeros_like(phi_bias)
    if indices.numel() == 0:
        return torch.zeros_like(codebook), grad_weight, grad_bias
    phis = _phis(phi_weight, phi_bias, ratio, phi_of_scale)
    grad_codebook, grad_phis = reference.residual_quantize_backward_reference(
        grad_f_hats, indices, codebook, phis, pairs(sizes)
    )
    for i, grad in zip(phi_of_scale, grad_phis, strict=True):
        if grad is not None:
            grad_weight[i] += grad[0]
            grad_bias[i] += grad[1]
    return grad_codebook, grad_weight, grad_bias


@fake("residual_quantize_backward")
def _fake_backward(
    grad_f_hats: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad_f_hats, indices, codebook, phi_weight, phi_bias, phi_of_scale, sizes)
    return tuple(tensor.new_empty(tensor.shape) for tensor in (codebook, phi_weight, phi_bias))  # type: ignore[return-value]


@impl("residual_dequantize")
def _residual_dequantize(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    H: int,
    W: int,
    backend: str | None,
) -> Tensor:
    check_indices("residual_dequantize", indices, codebook, phi_weight, phi_bias, phi_of_scale, sizes)
    check_sizes("residual_dequantize", (H, W))
    check_range("residual_dequantize", indices, codebook.size(0))
    backend = _DEQUANTIZE.choose(backend, indices.device.type, indices, codebook)
    codebook, bank = codebook.contiguous(), (phi_weight.contiguous(), phi_bias.contiguous(), ratio, phi_of_scale)
    if backend == "reference":
        maps = reference.code_maps_reference(indices, codebook, pairs(sizes))
        with torch.autocast(indices.device.type, enabled=False):
            return torch.stack(reference.residual_dequantize_reference(maps, _phis(*bank), (H, W))).contiguous()
    if backend == "triton":
        with device_guard(indices):
            return kernels("quantize").residual_dequantize(indices, codebook, *bank, pairs(sizes), H, W)
    B, indices = indices.size(0), indices if indices.stride(1) == 1 else indices.contiguous()
    f_hats = codebook.new_empty(len(phi_of_scale), B, codebook.size(1), H, W)
    if B:
        extension(backend).residual_dequantize(
            *_maps(codebook, *bank, sizes, B, H, W), indices.data_ptr(), indices.stride(0), f_hats.data_ptr(), 0
        )
    return f_hats


@fake("residual_dequantize")
def _fake_dequantize(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    H: int,
    W: int,
    backend: str | None,
) -> Tensor:
    check_indices("residual_dequantize", indices, codebook, phi_weight, phi_bias, phi_of_scale, sizes)
    check_sizes("residual_dequantize", (H, W))
    return codebook.new_empty(len(phi_of_scale), indices.size(0), codebook.size(1), H, W)


@impl("teacher_forcing_input")
def _teacher_forcing_input(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    backend: str | None,
) -> Tensor:
    given = check_teacher(indices, codebook, phi_weight, phi_bias, phi_of_scale, sizes)
    check_range("teacher_forcing_input", indices, codebook.size(0))
    backend = _TEACHER.choose(backend, indices.device.type, indices, codebook)
    codebook, bank = codebook.contiguous(), (phi_weight.contiguous(), phi_bias.contiguous(), ratio, phi_of_scale)
    if backend == "reference":
        maps = reference.code_maps_reference(indices, codebook, pairs(sizes)[:given])
        with torch.autocast(indices.device.type, enabled=False):
            out = reference.teacher_forcing_input_reference(maps, _phis(*bank), pairs(sizes))
        return out.contiguous()
    if backend == "triton":
        with device_guard(indices):
            return kernels("quantize").teacher_forcing_input(indices, codebook, *bank, pairs(sizes))
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    out = _empty_input(indices, codebook, given, sizes)
    if indices.size(0):
        extension(backend).residual_dequantize(
            *_maps(codebook, *bank, sizes[: 2 * given + 2], indices.size(0), *sizes[-2:]),
            *(indices.data_ptr(), indices.stride(0), 0, out.data_ptr()),
        )
    return out


def _empty_input(indices: Tensor, codebook: Tensor, given: int, sizes: Sequence[int]) -> Tensor:
    return codebook.new_empty(indices.size(0), positions(sizes[2 : 2 * given + 2]), codebook.size(1))


@fake("teacher_forcing_input")
def _fake_teacher_forcing_input(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    backend: str | None,
) -> Tensor:
    given = check_teacher(indices, codebook, phi_weight, phi_bias, phi_of_scale, sizes)
    return _empty_input(indices, codebook, given, sizes)


@impl("next_scale_input")
def _next_scale_input(
    f_hat: Tensor,
    codes: Tensor,
    phi_weight: Tensor | None,
    phi_bias: Tensor | None,
    ratio: float,
    following: Sequence[int],
    backend: str | None,
) -> Tensor:
    check_step(f_hat, codes, phi_weight, phi_bias, following)
    backend = _STEP.choose(backend, f_hat.device.type, f_hat)
    size = (following[0], following[1]) if following else None
    if backend == "reference":
        with torch.autocast(f_hat.device.type, enabled=False):
            _, out = reference.next_scale_input_reference(f_hat, codes, Phi(phi_weight, phi_bias, ratio), size)
        return out.contiguous() if following else f_hat.new_empty(0)
    weight = None if phi_weight is None else phi_weight.contiguous()
    bias = None if phi_bias is None else phi_bias.contiguous()
    if backend == "triton":
        with device_guard(f_hat):
            out = kernels("quantize").next_scale_input(f_hat, codes, weight, bias, ratio, size)
        return out if following else f_hat.new_empty(0)
    out = f_hat.new_empty((*f_hat.shape[:2], *following) if following else 0)
    pointers = (0 if tensor is None else tensor.data_ptr() for tensor in (weight, bias))
    if f_hat.size(0):
        extension(backend).next_scale_input(
            *(f_hat.data_ptr(), codes.data_ptr(), *codes.stride(), *pointers, out.data_ptr() if following else 0),
            *(*f_hat.shape, *codes.shape[2:], *(following or (0, 0)), ratio),
        )
    return out


@fake("next_scale_input")
def _fake_next_scale_input(
    f_hat: Tensor,
    codes: Tensor,
    phi_weight: Tensor | None,
    phi_bias: Tensor | None,
    ratio: float,
    following: Sequence[int],
    backend: str | None,
) -> Tensor:
    check_step(f_hat, codes, phi_weight, phi_bias, following)
    return f_hat.new_empty((*f_hat.shape[:2], *following) if following else 0)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        f_hats, indices = torch.ops.varkern.residual_quantize(features, *args)
        ctx.save_for_backward(indices, *args[:3])
        ctx.rest, ctx.all_f_hats, ctx.backend = args[3:6], args[7], args[8]
        ctx.mark_non_differentiable(indices)
        return f_hats, indices

    @staticmethod
    def backward(ctx: Any, grad_f_hats: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.all_f_hats:  # only the last one was given
            before = grad_f_hats.new_zeros(len(ctx.rest[1]) - 1, *grad_f_hats.shape[1:])
            grad_f_hats = torch.cat((before, grad_f_hats))
        return (None, *_backward("residual_quantize", ctx, grad_f_hats), None, None, None)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, *args: Any) -> Tensor:
        ctx.save_for_backward(indices, *args[:3])
        ctx.rest, ctx.backend = args[3:6], args[8]
        return torch.ops.varkern.residual_dequantize(indices, *args)

    @staticmethod
    def backward(ctx: Any, grad_f_hats: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_backward("residual_dequantize", ctx, grad_f_hats), None, None, None)


def _backward(op: str, ctx: Any, grad_f_hats: Tensor) -> tuple[Tensor | None, ...]:
    indices, *bank = ctx.saved_tensors
    grads = once_differentiable(
        op,
        (grad_f_hats, *bank),
        lambda: torch.ops.varkern.residual_quantize_backward(grad_f_hats, indices, *bank, *ctx.rest, ctx.backend),
    )
    return (*grads, None, None, None)


def quantize(features: Tensor, codebook: Tensor, phi_weight: Tensor, phi_bias: Tensor, *rest: Any) -> Any:
    """The operator ``residual_quantize``, with gradients in codebook and phi where they are needed."""
    if needs_gradient(codebook, phi_weight, phi_bias):
        return _Quantize.apply(features, codebook, phi_weight, phi_bias, *rest)
    return torch.ops.varkern.residual_quantize(features, codebook, phi_weight, phi_bias, *rest)


def dequantize(indices: Tensor, codebook: Tensor, phi_weight: Tensor, phi_bias: Tensor, *rest: Any) -> Any:
    """The operator ``residual_dequantize``, with gradients in codebook and phi where they are needed."""
    if needs_gradient(codebook, phi_weight, phi_bias):
        return _Dequantize.apply(indices, codebook, phi_weight, phi_bias, *rest)
    return torch.ops.varkern.residual_dequantize(indices, codebook, phi_weight, phi_bias, *rest)


autograd("residual_quantize", _Quantize.apply)
autograd("residual_dequantize", _Dequantize.apply)


def _refuse_gradient(*_: object) -> NoReturn:
    raise RuntimeError(
        "torch.ops.varkern.next_scale_input has no gradient: call varkern.ops.next_scale_input, or use torch.no_grad()."
    )


autograd("next_scale_input", _refuse_gradient)
