"""Multi-scale residual quantization (VAR, arXiv 2404.02905, algorithms 1 and 2): encode, train, decode, generate.

A feature map is written as a sum over K scales. At scale k the residual is area-downsampled to (h_k, w_k), each
position is replaced by its nearest code, the codes are bicubically upsampled to the full size, passed through the
3x3 convolution phi_k, added to the running sum ``f_hat`` and subtracted from the residual. ``quantize_reference`` says
the same in PyTorch; each function here is equivalent to the one named after it there.

Everything is float32, whatever precision a model runs in: codes must not depend on it. A code is the first of the
nearest; where two distances are equal to float32 rounding, backends may choose differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.ops._op import needs_gradient
from varkern.ops.backends import check_in_place, reference_forced
from varkern.ops.checks import check_floats, check_number
from varkern.ops.quantize.checks import (
    check_sizes,
    flat_sizes,
)
from varkern.ops.quantize.operators import DEQUANTIZE, QUANTIZE, STEP, TEACHER
from varkern.ops.quantize.reference import (
    Phi,
    Size,
    code_maps_reference,
    next_scale_input_reference,
    residual_dequantize_reference,
    residual_quantize_reference,
    residual_quantize_train_reference,
    teacher_forcing_input_reference,
)

__all__ = [
    "maps_as_codes",
    "next_scale_input",
    "residual_dequantize",
    "residual_quantize",
    "residual_quantize_train",
    "teacher_forcing_input",
]


def residual_quantize(
    features: Tensor,
    codebook: Tensor,
    phis: Sequence[Phi],
    sizes: Sequence[Size],
    cosine: bool = False,
    all_f_hats: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Encode features against a codebook.

    Args:
        features: (B, Cv, H, W), floating point, any strides; computed in float32.
        codebook: (V, Cv).
        phis, sizes: one entry a scale that is to run. A map of the full size (H, W) is neither down- nor upsampled.
            The phis are all the identity, or all have weights and one ratio.
        cosine: choose the largest cosine instead of the smallest distance.
        all_f_hats: give f_hat after each scale, or after the last one alone.

    Returns:
        the indices of each scale, (B, h_k * w_k) int64, and f_hat (B, Cv, H, W) float32 after each scale, or a list of
        the last. No gradients: ``residual_quantize_train`` has them.

    Raises ``ValueError`` for shapes, dtypes or devices that do not fit, ``RuntimeError`` where the backend asked for
    cannot serve.
    """
    with torch.no_grad():
        features, codebook = _float32("residual_quantize", features=features, codebook=codebook)
        bank = _stack("residual_quantize", phis, sizes, codebook)
        arguments = (features, codebook, *bank, cosine, all_f_hats)
        if reference_forced():
            QUANTIZE.validate(*arguments)
            return residual_quantize_reference(features, codebook, phis, sizes, cosine, all_f_hats)
        f_hats, indices = QUANTIZE.call(*arguments)
    return list(indices.split([h * w for h, w in sizes], dim=1)), list(f_hats.unbind(0))


def residual_quantize_train(
    features: Tensor,
    codebook: Tensor,
    phis: Sequence[Phi],
    sizes: Sequence[Size],
    beta: float,
    cosine: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The training form: straight-through f_hat (B, Cv, H, W), the scalar loss and the indices of each scale.

    Arguments as in ``residual_quantize``. loss = mean over scales of ``beta * mse(sg(f_hat_k), f) +
    mse(f_hat_k, sg(f))``, sg the stopped gradient and f_hat_k the running sum after scale k. Gradients reach features,
    codebook and phis, once; they are deterministic.
    """
    check_number("residual_quantize_train", "beta", beta)
    features, codebook = _float32("residual_quantize_train", features=features, codebook=codebook)
    bank = _stack("residual_quantize_train", phis, sizes, codebook)
    target = features.detach()
    arguments = (target, codebook, *bank, cosine, True)
    if reference_forced():
        QUANTIZE.validate(*arguments)
        return residual_quantize_train_reference(features, codebook, phis, sizes, beta, cosine)
    f_hats, indices = QUANTIZE.call(*arguments)
    loss = F.mse_loss(f_hats, target.expand_as(f_hats))
    if beta:
        loss = loss + beta * F.mse_loss(features.expand_as(f_hats), f_hats.detach())
    straight = (f_hats[-1].detach() - target) + features
    return straight, loss, list(indices.split([h * w for h, w in sizes], dim=1))


def residual_dequantize(
    indices: Tensor, codebook: Tensor, phis: Sequence[Phi], sizes: Sequence[Size], size: Size
) -> list[Tensor]:
    """f_hat (B, Cv, H, W) float32 after each scale.

    indices (B, sum of h_k * w_k) int64 into codebook (V, Cv); phis and sizes one entry a scale; size the full (H, W).
    Gradients reach codebook and phis, once. Code vectors that are in no codebook: see ``maps_as_codes``. Indices that
    are out of range raise ``IndexError`` on the CPU.
    """
    (codebook,) = _float32("residual_dequantize", codebook=codebook)
    bank = _stack("residual_dequantize", phis, sizes, codebook)
    check_sizes("residual_dequantize", flat_sizes("residual_dequantize", [size]))
    arguments = (indices, codebook, *bank, *size)
    if reference_forced():
        DEQUANTIZE.validate(*arguments)
        return residual_dequantize_reference(code_maps_reference(indices, codebook, sizes), phis, size)
    return list(DEQUANTIZE.call(*arguments).unbind(0))


def maps_as_codes(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Size]]:
    """Vectors (B, Cv, h_k, w_k) of each scale as a codebook of their own: (indices, codebook, sizes)."""
    B, Cv = maps[0].shape[:2]
    vectors = torch.cat([codes.flatten(2) for codes in maps], 2).transpose(1, 2)
    indices = torch.arange(B * vectors.size(1), dtype=torch.int64, device=vectors.device).view(vectors.shape[:2])
    codebook = vectors.reshape(-1, Cv) if B else vectors.new_zeros(1, Cv)
    return indices, codebook, [(codes.shape[2], codes.shape[3]) for codes in maps]


def teacher_forcing_input(indices: Tensor, codebook: Tensor, phis: Sequence[Phi], sizes: Sequence[Size]) -> Tensor:
    """Transformer input of the scales after the first: f_hat, area-downsampled to each following scale.

    ``sizes`` is the whole schedule, its last entry the full size; ``indices`` (B, sum of h_k * w_k) int64 are those of
    its first scales, and ``phis`` has one entry for each of them: at most K - 1. Returns (B, sum of h_k * w_k over the
    scales after them, Cv) float32. No gradients.
    """
    with torch.no_grad():
        (codebook,) = _float32("teacher_forcing_input", codebook=codebook)
        flat = flat_sizes("teacher_forcing_input", sizes)
        if not isinstance(phis, Sequence):
            raise TypeError(f"teacher_forcing_input: phis are {phis!r}, give a sequence of Phi(weight, bias, ratio).")
        if not 0 < len(phis) < len(sizes):
            raise ValueError(
                f"teacher_forcing_input: {len(phis)} phis for {len(sizes)} sizes, give one for each scale that has "
                f"indices, at least 1 and at most {len(sizes) - 1}."
            )
        bank = _stack("teacher_forcing_input", phis, sizes[: len(phis)], codebook)
        arguments = (indices, codebook, *bank[:4], flat)
        if reference_forced():
            TEACHER.validate(*arguments)
            maps = code_maps_reference(indices, codebook, sizes[: len(phis)])
            return teacher_forcing_input_reference(maps, phis, sizes)
        return TEACHER.call(*arguments)


def next_scale_input(f_hat: Tensor, codes: Tensor, phi: Phi, following: Size | None) -> tuple[Tensor, Tensor]:
    """One generation step: add the code vectors (B, Cv, h, w) of a scale to f_hat (B, Cv, H, W) float32, in place.

    Returns f_hat and its area-downsampling to the ``following`` size; after the last scale (None) f_hat twice.
    A call that needs gradients is computed by ``next_scale_input_reference``.
    """
    if not isinstance(phi, Phi):
        raise TypeError(f"next_scale_input: phi is {phi!r}, give a Phi(weight, bias, ratio).")
    weights = () if phi.weight is None or phi.bias is None else (phi.weight, phi.bias)
    size = [] if following is None else flat_sizes("next_scale_input", [following])
    arguments = (f_hat, codes, phi.weight, phi.bias, phi.ratio, size)
    STEP.validate(*arguments)
    if reference_forced() or needs_gradient(f_hat, codes, *weights):
        check_in_place("next_scale_input", "f_hat", f_hat, codes, *weights)
        if f_hat.requires_grad and f_hat.is_leaf and torch.is_grad_enabled():
            raise RuntimeError(
                "next_scale_input: f_hat is a leaf that requires a gradient and would be changed in place: give "
                "f_hat.clone(), or call it under torch.no_grad()."
            )
        return next_scale_input_reference(f_hat, codes, phi, following)
    out = STEP.call(*arguments)
    return f_hat, f_hat if following is None else out


def _float32(op: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    check_floats(op, tuple(tensors), tuple(tensors.values()))
    return tuple(tensor.float() for tensor in tensors.values())


_Bank = tuple[Tensor, Tensor, float, list[int], list[int]]


def _stack(op: str, phis: Sequence[Phi], sizes: Sequence[Size], codebook: Tensor) -> _Bank:
    """The operators' form: weights (n, Cv, Cv, 3, 3), biases (n, Cv), ratio, the phi of each scale, flat sizes."""
    flat = flat_sizes(op, sizes)
    if not isinstance(phis, Sequence) or not all(isinstance(phi, Phi) for phi in phis):
        raise TypeError(f"{op}: phis are {phis!r}, give a sequence of Phi(weight, bias, ratio).")
    if len(phis) != len(sizes) or not sizes:
        raise ValueError(f"{op}: {len(phis)} phis for {len(sizes)} sizes, give one of each for every scale.")
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    phi_of_scale: list[int] = []
    for phi in phis:
        if phi.weight is None or phi.bias is None:
            continue
        found = next((i for i, weight in enumerate(weights) if weight is phi.weight), len(weights))
        if found == len(weights):
            weights.append(phi.weight)
            biases.append(phi.bias)
        phi_of_scale.append(found)
    ratios = {phi.ratio for phi in phis}
    if len(phi_of_scale) not in (0, len(phis)) or (weights and len(ratios) > 1):
        raise ValueError(f"{op}: phis with ratios {sorted(ratios)}, give all one ratio and weights, or all no weights.")
    if weights:
        return torch.stack(weights).float(), torch.stack(biases).float(), phis[0].ratio, phi_of_scale, flat
    Cv = codebook.size(-1)
    if Cv > 2**24:  # weights of none would have strides beyond 64 bits
        raise ValueError(f"{op}: codebook has shape {tuple(codebook.shape)}, give (V, Cv) with at most 2^24 channels.")
    return codebook.new_empty(0, Cv, Cv, 3, 3), codebook.new_empty(0, Cv), 0.0, [0] * len(sizes), flat
