"""The operators of multi-scale residual quantization: schemas, backends, gradients. See ``quantize``.

What they share: ``codebook`` (V, Cv), ``phi_weight`` (n, Cv, Cv, 3, 3) and ``phi_bias`` (n, Cv), all float32;
``ratio`` of phi; ``phi_of_scale``, for each scale the phi out of n, n = 0 being the identity; ``sizes``, flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from varkern._kept import kept
from varkern.ops._op import Op
from varkern.ops.backends import dense_last_axis, extension, pointer, triton_kernels
from varkern.ops.quantize import reference
from varkern.ops.quantize.checks import (
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
from varkern.ops.quantize.reference import Phi

__all__ = ["DEQUANTIZE", "QUANTIZE", "STEP", "TEACHER"]


def _bank(device: torch.device) -> tuple[Any, ...]:
    shapes = ((16, 8), (1, 8, 8, 3, 3), (1, 8))
    return *(torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes), 0.5, [0, 0], [1, 1, 2, 2]


def _indices(device: torch.device, n: int = 5) -> Tensor:
    return torch.zeros(1, n, dtype=torch.int64, device=device)


def _map(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=device)


def _example_teacher(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    *bank, sizes = _bank(device)
    return _indices(device), *bank, [*sizes, 3, 3]


_MAPS, _BACKENDS = (
    "Tensor codebook, Tensor phi_weight, Tensor phi_bias, float ratio, int[] phi_of_scale, int[] sizes",
    ("triton", "cpu"),
)
QUANTIZE = Op(
    f"residual_quantize(Tensor features, {_MAPS}, bool cosine, bool all_f_hats) -> (Tensor f_hats, Tensor indices)",
    _BACKENDS,
    lambda device, dtype: (_map(device, 1, 8, 2, 2), *_bank(device), False, True),
)
# grad_f_hats (K, B, Cv, H, W), or of the last one alone, (1, B, Cv, H, W).
_BACKWARD = Op(
    f"residual_quantize_backward(Tensor grad_f_hats, Tensor indices, {_MAPS})"
    " -> (Tensor grad_codebook, Tensor grad_phi_weight, Tensor grad_phi_bias)",
    _BACKENDS,
    lambda device, dtype: (_map(device, 2, 1, 8, 2, 2), _indices(device), *_bank(device)),
    integers=("indices",),
)
QUANTIZE.gradient(_BACKWARD)
DEQUANTIZE = Op(
    f"residual_dequantize(Tensor indices, {_MAPS}, int H, int W) -> Tensor f_hats",
    _BACKENDS,
    lambda device, dtype: (_indices(device), *_bank(device), 2, 2),
    integers=("indices",),
)
DEQUANTIZE.gradient(_BACKWARD)
TEACHER = Op(
    f"teacher_forcing_input(Tensor indices, {_MAPS}) -> Tensor",
    _BACKENDS,
    _example_teacher,
    integers=("indices",),
    detached=True,
)
STEP = Op(
    "next_scale_input(Tensor(a!) f_hat, Tensor codes, Tensor? phi_weight, Tensor? phi_bias, float ratio,"
    " int[] following) -> Tensor",
    _BACKENDS,
    lambda device, dtype: (_map(device, 1, 8, 2, 2), _map(device, 1, 8, 1, 1), None, None, 0.0, [2, 2]),
    no_gradient="call varkern.ops.next_scale_input",
)


@QUANTIZE.limits
@_BACKWARD.limits
@DEQUANTIZE.limits
@TEACHER.limits
def _limits(backend: str, *args: Tensor) -> str | None:
    if backend != "triton":
        return None
    codebook = next(tensor for tensor in args[1:] if tensor.dim() == 2 and tensor.is_floating_point())
    return _channels(codebook.size(1))


@STEP.limits
def _limits_step(backend: str, f_hat: Tensor, *_: object) -> str | None:
    if not f_hat.is_contiguous():
        return f"f_hat of strides {f_hat.stride()} is not contiguous"
    return _channels(f_hat.size(1)) if backend == "triton" else None


def _channels(Cv: int) -> str | None:
    if Cv > (limit := triton_kernels("quantize").MAX_CHANNELS):
        return f"Cv is {Cv} and its kernels hold codes of at most {limit} channels in registers"
    return None


@kept
def _scales(sizes: tuple[int, ...], phi_of_scale: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The schedule as csrc/ops/quantize.h has it, (K, 3) int64: height, width, phi; and its address.

    Sizes without a phi of their own follow the last scale that runs.
    """
    phis = [*phi_of_scale, *[0] * (len(sizes) // 2 - len(phi_of_scale))]
    schedule = np.array([(*size, phi) for size, phi in zip(pairs(sizes), phis, strict=True)], dtype=np.int64)
    return schedule, schedule.ctypes.data


class _Maps(NamedTuple):
    """What all operators but the step share (module docstring)."""

    codebook: Tensor
    phi_weight: Tensor
    phi_bias: Tensor
    ratio: float
    phi_of_scale: Sequence[int]
    sizes: Sequence[int]

    def contiguous(self) -> _Maps:
        codebook, phi_weight, phi_bias = (tensor.contiguous() for tensor in self[:3])
        return self._replace(codebook=codebook, phi_weight=phi_weight, phi_bias=phi_bias)

    def phis(self) -> list[Phi]:
        if self.phi_weight.size(0) == 0:
            return [Phi(None, None, 0.0)] * len(self.phi_of_scale)
        return [Phi(self.phi_weight[i], self.phi_bias[i], self.ratio) for i in self.phi_of_scale]

    def codes(self, indices: Tensor) -> list[Tensor]:
        """Of the scales that have a phi: code vectors (B, Cv, h_k, w_k)."""
        return reference.code_maps_reference(indices, self.codebook, pairs(self.sizes)[: len(self.phi_of_scale)])

    def arguments(self, sizes: Sequence[int], B: int, H: int, W: int) -> tuple[int | float, ...]:
        """The leading arguments of every launch on the CPU; the tensors are contiguous."""
        _, scales = _scales(tuple(sizes), tuple(self.phi_of_scale))
        pointers = (*(tensor.data_ptr() for tensor in self[:3]), scales)
        return (*pointers, self.phi_weight.size(0), B, *self.codebook.shape, H, W, len(self.phi_of_scale), self.ratio)


@QUANTIZE.check
def _check_quantize(features: Tensor, *args: Any) -> None:
    check_features("residual_quantize", features, *args[:6])


@QUANTIZE.empty
def _empty_quantize(features: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    phi_of_scale, sizes, _, all_f_hats = args[4:]
    f_hats = features.new_empty((len(phi_of_scale) if all_f_hats else 1, *features.shape))
    return f_hats, features.new_empty((features.size(0), positions(sizes)), dtype=torch.int64)


@QUANTIZE.reference
def _quantize_reference(features: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    maps, settings = _Maps(*args[:6]), args[6:]
    with torch.autocast(features.device.type, enabled=False):
        each, f_hats = reference.residual_quantize_reference(
            features, maps.codebook, maps.phis(), pairs(maps.sizes), *settings
        )
    return torch.stack(f_hats).contiguous(), torch.cat(each, 1)


@QUANTIZE.kernels
def _launch_quantize(backend: str, features: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    maps, settings = _Maps(*args[:6]).contiguous(), args[6:]
    if backend == "triton":
        launch = triton_kernels("quantize").residual_quantize
        indices, f_hats = launch(features, *maps[:5], pairs(maps.sizes), *settings)
        return f_hats, indices
    f_hats, indices = _empty_quantize(features, *args)
    if features.size(0):
        extension(backend).residual_quantize(
            *maps.arguments(maps.sizes, features.size(0), *features.shape[2:]),
            *(features.data_ptr(), *features.stride(), indices.data_ptr(), f_hats.data_ptr(), *settings),
        )
    return f_hats, indices


@_BACKWARD.check
def _check_backward(grad_f_hats: Tensor, indices: Tensor, *args: Any) -> None:
    check_backward(grad_f_hats, indices, *args[:3], *args[4:])


@_BACKWARD.check_values
def _check_backward_values(grad_f_hats: Tensor, indices: Tensor, codebook: Tensor, *_: object) -> None:
    check_range("residual_quantize_backward", indices, codebook.size(0))


@_BACKWARD.empty
def _empty_backward(grad_f_hats: Tensor, indices: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in args[:3])


def _of_all_scales(grad_f_hats: Tensor, K: int) -> Tensor:
    """(K, B, Cv, H, W), contiguous: zeros before the last one where that alone was given."""
    if grad_f_hats.size(0) == K:
        return grad_f_hats.contiguous()
    return torch.cat((grad_f_hats.new_zeros(K - 1, *grad_f_hats.shape[1:]), grad_f_hats))


@_BACKWARD.reference
def _backward_reference(grad_f_hats: Tensor, indices: Tensor, *args: Any) -> tuple[Tensor, ...]:
    maps = _Maps(*args)
    grad_codebook, grad_weight, grad_bias = (torch.zeros_like(tensor) for tensor in maps[:3])
    if indices.numel() == 0:
        return grad_codebook, grad_weight, grad_bias
    grad_f_hats = _of_all_scales(grad_f_hats, len(maps.phi_of_scale))
    with torch.autocast(indices.device.type, enabled=False):
        grad_codebook, grad_phis = reference.residual_quantize_backward_reference(
            grad_f_hats, indices, maps.codebook, maps.phis(), pairs(maps.sizes)
        )
    for i, grad in zip(maps.phi_of_scale, grad_phis, strict=True):
        if grad is not None:
            grad_weight[i] += grad[0]
            grad_bias[i] += grad[1]
    return grad_codebook, grad_weight, grad_bias


@_BACKWARD.kernels
def _launch_backward(backend: str, grad_f_hats: Tensor, indices: Tensor, *args: Any) -> tuple[Tensor, ...]:
    maps = _Maps(*args).contiguous()
    if indices.numel() == 0:
        return _backward_reference(grad_f_hats, indices, *maps)
    indices, grad_f_hats = indices.contiguous(), _of_all_scales(grad_f_hats, len(maps.phi_of_scale))
    if backend == "triton":
        # The features and f_hats of the forward pass change nothing, the codes being given.
        return triton_kernels("quantize").residual_quantize_backward(
            grad_f_hats[0], *maps[:5], pairs(maps.sizes), indices, grad_f_hats, grad_f_hats
        )
    grads = tuple(torch.empty_like(tensor) for tensor in maps[:3])
    extension(backend).residual_quantize_backward(
        *maps.arguments(maps.sizes, indices.size(0), *grad_f_hats.shape[3:]),
        *(indices.data_ptr(), grad_f_hats.data_ptr(), *(grad.data_ptr() for grad in grads)),
    )
    return grads


@DEQUANTIZE.check
def _check_dequantize(indices: Tensor, *args: Any) -> None:
    check_indices("residual_dequantize", indices, *args[:3], *args[4:6])
    check_sizes("residual_dequantize", args[6:])


@DEQUANTIZE.check_values
def _check_dequantize_values(indices: Tensor, codebook: Tensor, *_: object) -> None:
    check_range("residual_dequantize", indices, codebook.size(0))


@DEQUANTIZE.empty
def _empty_dequantize(indices: Tensor, codebook: Tensor, *args: Any) -> Tensor:
    return codebook.new_empty(len(args[3]), indices.size(0), codebook.size(1), *args[5:])


@DEQUANTIZE.reference
def _dequantize_reference(indices: Tensor, *args: Any) -> Tensor:
    maps, (H, W) = _Maps(*args[:6]), args[6:]
    with torch.autocast(indices.device.type, enabled=False):
        f_hats = reference.residual_dequantize_reference(maps.codes(indices), maps.phis(), (H, W))
    return torch.stack(f_hats).contiguous()


@DEQUANTIZE.kernels
def _launch_dequantize(backend: str, indices: Tensor, *args: Any) -> Tensor:
    maps, size = _Maps(*args[:6]).contiguous(), args[6:]
    if backend == "triton":
        return triton_kernels("quantize").residual_dequantize(indices, *maps[:5], pairs(maps.sizes), *size)
    f_hats = _empty_dequantize(indices, *args)
    return _cpu_dequantize(backend, indices, maps, maps.sizes, size, f_hats, None)


def _cpu_dequantize(
    backend: str,
    indices: Tensor,
    maps: _Maps,
    sizes: Sequence[int],
    size: Sequence[int],
    f_hats: Tensor | None,
    inputs: Tensor | None,
) -> Tensor:
    """Fill and return f_hats (K, B, Cv, H, W), or the inputs of the scales after each."""
    out = f_hats if inputs is None else inputs
    assert out is not None
    if B := indices.size(0):
        indices = dense_last_axis(indices)
        extension(backend).residual_dequantize(
            *maps.arguments(sizes, B, *size),
            *(indices.data_ptr(), indices.stride(0), pointer(f_hats), pointer(inputs)),
        )
    return out


@TEACHER.check
def _check_teacher(indices: Tensor, *args: Any) -> None:
    check_teacher(indices, *args[:3], *args[4:])


@TEACHER.check_values
def _check_teacher_values(indices: Tensor, codebook: Tensor, *_: object) -> None:
    check_range("teacher_forcing_input", indices, codebook.size(0))


@TEACHER.empty
def _empty_input(indices: Tensor, codebook: Tensor, *args: Any) -> Tensor:
    *_, phi_of_scale, sizes = args
    return codebook.new_empty(indices.size(0), positions(sizes[2 : 2 * len(phi_of_scale) + 2]), codebook.size(1))


@TEACHER.reference
def _teacher_reference(indices: Tensor, *args: Any) -> Tensor:
    maps = _Maps(*args)
    with torch.autocast(indices.device.type, enabled=False):
        inputs = reference.teacher_forcing_input_reference(maps.codes(indices), maps.phis(), pairs(maps.sizes))
    return inputs.contiguous()


@TEACHER.kernels
def _launch_teacher(backend: str, indices: Tensor, *args: Any) -> Tensor:
    maps = _Maps(*args).contiguous()
    if backend == "triton":
        return triton_kernels("quantize").teacher_forcing_input(indices, *maps[:5], pairs(maps.sizes))
    sizes, size = maps.sizes[: 2 * len(maps.phi_of_scale) + 2], maps.sizes[-2:]
    return _cpu_dequantize(backend, indices, maps, sizes, size, None, _empty_input(indices, *args))


@STEP.check
def _check_step(f_hat: Tensor, codes: Tensor, *args: Any) -> None:
    weight, bias, _, following = args
    check_step(f_hat, codes, weight, bias, following)


@STEP.empty
def _empty_step(f_hat: Tensor, *args: Any) -> Tensor:
    following = args[-1]
    return f_hat.new_empty((*f_hat.shape[:2], *following) if following else 0)


@STEP.reference
def _step_reference(f_hat: Tensor, *args: Any) -> Tensor:
    codes, weight, bias, ratio, following = args
    size = (following[0], following[1]) if following else None
    with torch.autocast(f_hat.device.type, enabled=False):
        _, out = reference.next_scale_input_reference(f_hat, codes, Phi(weight, bias, ratio), size)
    return out.contiguous() if following else f_hat.new_empty(0)


@STEP.kernels
def _launch_step(backend: str, f_hat: Tensor, *args: Any) -> Tensor:
    codes, weight, bias, ratio, following = args
    if weight is not None and bias is not None:
        weight, bias = weight.contiguous(), bias.contiguous()
    if backend == "triton":
        size = (following[0], following[1]) if following else None
        out = triton_kernels("quantize").next_scale_input(f_hat, codes, weight, bias, ratio, size)
        return out if following else f_hat.new_empty(0)
    out = _empty_step(f_hat, following)
    if f_hat.size(0):
        extension(backend).next_scale_input(
            *(f_hat.data_ptr(), codes.data_ptr(), *codes.stride(), pointer(weight), pointer(bias)),
            out.data_ptr() if following else 0,
            *(*f_hat.shape, *codes.shape[2:], *(following or (0, 0)), ratio),
        )
    return out


def _convolutions(a: Any, scales: int, B: int, height: int, width: int) -> int:
    """Of the convolutions phi of some scales, at full size; a phi_weight of none is the identity."""
    n, Cout, C = a.phi_weight[:3]
    return scales * 2 * B * height * width * Cout * C * 9 if n else 0


@QUANTIZE.flops
def _flops_quantize(a: Any) -> int:
    search = 2 * a.features[0] * positions(a.sizes) * a.codebook[0] * a.codebook[1]
    return search + _convolutions(a, len(a.phi_of_scale), a.features[0], *a.features[2:])


@_BACKWARD.flops
def _flops_backward(a: Any) -> int:
    """Of the map and of the weight."""
    return 2 * _convolutions(a, len(a.phi_of_scale), *a.grad_f_hats[1:2], *a.grad_f_hats[3:])


@DEQUANTIZE.flops
def _flops_dequantize(a: Any) -> int:
    return _convolutions(a, len(a.phi_of_scale), a.indices[0], a.H, a.W)


@TEACHER.flops
def _flops_teacher(a: Any) -> int:
    return _convolutions(a, len(a.phi_of_scale), a.indices[0], *a.sizes[-2:])


@STEP.flops
def _flops_step(a: Any) -> int:
    return 0 if a.phi_weight is None else 2 * a.f_hat[0] * a.f_hat[2] * a.f_hat[3] * 9 * a.f_hat[1] ** 2
