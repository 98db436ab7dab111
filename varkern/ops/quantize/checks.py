"""What the operators of multi-scale residual quantization refuse, each with one sentence."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from varkern.ops.backends import transformed
from varkern.ops.quantize.reference import Size

_MAX_SIDE = 1 << 15  # of a map: its number of positions, times a batch and Cv, is far from overflowing


def _sides(maps: Tensor) -> bool:
    """Whether the height and the width of maps (B, Cv, H, W) are ones that the operators take."""
    return 0 < maps.shape[2] <= _MAX_SIDE and 0 < maps.shape[3] <= _MAX_SIDE


def check_sizes(op: str, sizes: Sequence[int]) -> None:
    if not sizes or len(sizes) % 2:
        raise ValueError(f"{op}: sizes are {list(sizes)}, give a height and a width for each scale.")
    if min(sizes) < 1 or max(sizes) > _MAX_SIDE:
        raise ValueError(
            f"{op}: sizes {tuple(pairs(sizes))} have a side below 1 or above {_MAX_SIDE}, give heights and widths."
        )


def check_codes(
    op: str,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
) -> None:
    if codebook.dim() != 2 or codebook.size(0) == 0 or codebook.size(0) > 2**30:
        raise ValueError(f"{op}: codebook has shape {tuple(codebook.shape)}, give (V, Cv) with 1 to 2^30 codes.")
    n, Cv = phi_weight.shape[0] if phi_weight.dim() else -1, codebook.size(1)
    if phi_weight.shape != (n, Cv, Cv, 3, 3) or phi_bias.shape != (n, Cv):
        raise ValueError(
            f"{op}: phi has weights {tuple(phi_weight.shape[1:])} and biases {tuple(phi_bias.shape[1:])}, "
            f"give {(Cv, Cv, 3, 3)} and {(Cv,)} for a codebook of shape {tuple(codebook.shape)}."
        )
    if Cv == 0:
        raise ValueError(f"{op}: codebook has shape {tuple(codebook.shape)}, give (V, Cv) with Cv > 0.")
    check_sizes(op, sizes)
    if 2 * len(phi_of_scale) != len(sizes) or min(phi_of_scale) < 0 or max(phi_of_scale) >= max(n, 1):
        raise ValueError(
            f"{op}: phi_of_scale is {list(phi_of_scale)}, give the number of a phi, of {n}, for each of "
            f"{len(sizes) // 2} sizes."
        )
    for name, tensor in (("codebook", codebook), ("phi", phi_weight), ("phi's bias", phi_bias)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, give float32.")
        if tensor.device != codebook.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and codebook on {codebook.device}, use one device.")


def check_features(
    op: str,
    features: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
) -> None:
    check_codes(op, codebook, phi_weight, phi_bias, phi_of_scale, sizes)
    if features.dim() != 4 or features.size(1) != codebook.size(1) or not _sides(features):
        raise ValueError(
            f"{op}: features have shape {tuple(features.shape)}, give (B, {codebook.size(1)}, H, W) for a codebook "
            f"of shape {tuple(codebook.shape)}."
        )
    if features.device != codebook.device:
        raise ValueError(f"{op}: features are on {features.device} and codebook on {codebook.device}, use one device.")
    if features.dtype != torch.float32:
        raise ValueError(f"{op}: features are {features.dtype}, give float32.")


def check_indices(
    op: str,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
) -> None:
    check_codes(op, codebook, phi_weight, phi_bias, phi_of_scale, sizes)
    expected = positions(sizes)
    if indices.dim() != 2 or indices.size(1) != expected:
        raise ValueError(f"{op}: indices have shape {tuple(indices.shape)}, give (B, {expected}) for these sizes.")
    if indices.dtype != torch.int64:
        raise ValueError(f"{op}: indices are {indices.dtype}, give int64.")
    if indices.device != codebook.device:
        raise ValueError(f"{op}: indices are on {indices.device} and codebook on {codebook.device}, use one device.")


def check_range(op: str, indices: Tensor, V: int) -> None:
    """Raises ``IndexError`` for indices that are in no codebook; on the CPU alone: elsewhere looking would wait.

    Nor within a graph that is being compiled, which values would break, or where vmap has batched them.
    """
    looks = indices.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()
    if looks and indices.numel():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= V:
            raise IndexError(f"{op}: indices from {low} to {high}, give 0 to {V - 1} for a codebook of {V} codes.")


def check_step(
    f_hat: Tensor, codes: Tensor, weight: Tensor | None, bias: Tensor | None, following: Sequence[int]
) -> None:
    op = "next_scale_input"
    if (weight is None) != (bias is None):
        raise ValueError(f"{op}: phi has a weight or a bias alone, give both, or None for both.")
    if following:
        if len(following) != 2:
            raise ValueError(f"{op}: following is {list(following)}, give (h, w), or nothing after the last scale.")
        check_sizes(op, following)
    if f_hat.dim() != 4 or f_hat.dtype != torch.float32 or not (f_hat.shape[1] and _sides(f_hat)):
        raise ValueError(f"{op}: f_hat is {f_hat.dtype} {tuple(f_hat.shape)}, give (B, Cv, H, W) float32.")
    Cv = f_hat.size(1)
    if codes.dim() != 4 or codes.shape[:2] != f_hat.shape[:2] or not _sides(codes):
        raise ValueError(
            f"{op}: codes have shape {tuple(codes.shape)}, give ({f_hat.size(0)}, {Cv}, h, w) for f_hat of shape "
            f"{tuple(f_hat.shape)}."
        )
    if not f_hat.is_contiguous() and any(
        n > 1 and step == 0 for n, step in zip(f_hat.shape, f_hat.stride(), strict=True)
    ):
        raise ValueError(f"{op}: f_hat has strides {f_hat.stride()}, give one whose elements share no memory.")
    if weight is not None and bias is not None and (weight.shape != (Cv, Cv, 3, 3) or bias.shape != (Cv,)):
        raise ValueError(
            f"{op}: phi has weights {tuple(weight.shape)} and biases {tuple(bias.shape)}, give {(Cv, Cv, 3, 3)} and "
            f"{(Cv,)}."
        )
    for name, tensor in (("codes", codes), ("phi", weight), ("phi's bias", bias)):
        if tensor is not None and (tensor.device != f_hat.device or tensor.dtype != torch.float32):
            raise ValueError(
                f"{op}: {name}: {tensor.dtype} on {tensor.device}, give float32 on f_hat's device {f_hat.device}."
            )


def positions(sizes: Sequence[int]) -> int:
    return sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))


def pairs(sizes: Sequence[int]) -> list[Size]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def flat_sizes(op: str, sizes: Sequence[Size]) -> list[int]:
    """Heights and widths one after another; raises ``TypeError`` for anything but pairs of integers."""
    try:
        flat = [operator.index(side) for h, w in sizes for side in (h, w)]
    except (TypeError, ValueError):
        raise TypeError(f"{op}: sizes are {sizes!r}, give a (height, width) of integers for each scale.") from None
    return flat


def check_backward(
    grad_f_hats: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
) -> None:
    op = "residual_quantize_backward"
    check_indices(op, indices, codebook, phi_weight, phi_bias, phi_of_scale, sizes)
    K, shape = len(phi_of_scale), (indices.size(0), codebook.size(1))
    given = grad_f_hats.dim() == 5 and grad_f_hats.size(0) in (1, K)
    if not given or grad_f_hats.shape[1:3] != shape or 0 in grad_f_hats.shape[3:]:
        raise ValueError(
            f"{op}: grad_f_hats have shape {tuple(grad_f_hats.shape)}, give ({K} or 1, {shape[0]}, {shape[1]}, H, W)."
        )
    if grad_f_hats.dtype != torch.float32 or grad_f_hats.device != codebook.device:
        raise ValueError(
            f"{op}: grad_f_hats are {grad_f_hats.dtype} on {grad_f_hats.device}, give float32 on {codebook.device}."
        )


def check_teacher(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
) -> int:
    """The number of scales whose indices are given."""
    op, given = "teacher_forcing_input", len(phi_of_scale)
    check_sizes(op, sizes)
    if not 0 < given < len(sizes) // 2:
        raise ValueError(
            f"{op}: phi_of_scale has {given} entries for {len(sizes) // 2} sizes, give 1 or more, but fewer."
        )
    check_indices(op, indices, codebook, phi_weight, phi_bias, phi_of_scale, sizes[: 2 * given])
    return given
