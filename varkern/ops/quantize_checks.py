"""What the operators of multi-scale residual quantization refuse, each with one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varkern.ops.quantize_reference import Size


def check_codes(op: str, codebook: Tensor, phi_weight: Tensor, phi_bias: Tensor, sizes: Sequence[int]) -> None:
    if codebook.dim() != 2 or codebook.size(0) == 0 or codebook.size(0) > 2**30:
        raise ValueError(f"{op}: codebook has shape {tuple(codebook.shape)}, give (V, Cv) with 1 to 2^30 codes.")
    n, Cv = phi_weight.size(0), codebook.size(1)
    if phi_weight.shape != (n, Cv, Cv, 3, 3) or phi_bias.shape != (n, Cv):
        raise ValueError(
            f"{op}: phi has weights {tuple(phi_weight.shape[1:])} and biases {tuple(phi_bias.shape[1:])}, "
            f"give {(Cv, Cv, 3, 3)} and {(Cv,)} for a codebook of shape {tuple(codebook.shape)}."
        )
    if min(sizes) < 1:
        raise ValueError(f"{op}: sizes {tuple(zip(sizes[::2], sizes[1::2], strict=True))} have a side below 1.")
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
    check_codes(op, codebook, phi_weight, phi_bias, sizes)
    if features.dim() != 4 or features.size(1) != codebook.size(1) or 0 in features.shape[2:]:
        raise ValueError(
            f"{op}: features have shape {tuple(features.shape)}, give (B, {codebook.size(1)}, H, W) for a codebook "
            f"of shape {tuple(codebook.shape)}."
        )
    if features.device != codebook.device:
        raise ValueError(f"{op}: features are on {features.device} and codebook on {codebook.device}, use one device.")
    if features.dtype != torch.float32:
        raise ValueError(f"{op}: features are {features.dtype}, give float32.")


def check_indices(
    op: str, indices: Tensor, codebook: Tensor, phi_weight: Tensor, phi_bias: Tensor, sizes: Sequence[int]
) -> None:
    check_codes(op, codebook, phi_weight, phi_bias, sizes)
    expected = positions(sizes)
    if indices.dim() != 2 or indices.size(1) != expected:
        raise ValueError(f"{op}: indices have shape {tuple(indices.shape)}, give (B, {expected}) for these sizes.")
    if indices.dtype != torch.int64:
        raise ValueError(f"{op}: indices are {indices.dtype}, give int64.")
    if indices.device != codebook.device:
        raise ValueError(f"{op}: indices are on {indices.device} and codebook on {codebook.device}, use one device.")


def check_step(f_hat: Tensor, codes: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
    op = "next_scale_input"
    if f_hat.dim() != 4 or f_hat.dtype != torch.float32:
        raise ValueError(f"{op}: f_hat is {f_hat.dtype} {tuple(f_hat.shape)}, give (B, Cv, H, W) float32.")
    Cv = f_hat.size(1)
    if codes.dim() != 4 or codes.shape[:2] != f_hat.shape[:2] or 0 in codes.shape[2:]:
        raise ValueError(
            f"{op}: codes have shape {tuple(codes.shape)}, give ({f_hat.size(0)}, {Cv}, h, w) for f_hat of shape "
            f"{tuple(f_hat.shape)}."
        )
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
