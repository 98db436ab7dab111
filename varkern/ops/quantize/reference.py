"""Multi-scale residual quantization in plain PyTorch, as VAR's tokenizer defines it (arXiv 2404.02905).

A feature map is written as a sum over K scales. At scale k the residual is area-downsampled to p_k x p_k, each
position is replaced by its nearest code, the codes are bicubically upsampled to the full size, passed through the
3x3 convolution phi_k, added to the running sum ``f_hat`` and subtracted from the residual.

Everything here is float32: the choice of a code must not depend on the precision a model runs in.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.ops._precision import full_float32_of

Size = tuple[int, int]


class Phi(NamedTuple):
    """The residual convolution of one scale: ``phi(h) = (1 - ratio) * h + ratio * conv(h)``."""

    weight: Tensor | None  # (Cv, Cv, 3, 3); None is the identity
    bias: Tensor | None  # (Cv,)
    ratio: float


AnyPhi = Phi | Callable[[Tensor], Tensor]  # a function: what must be called, not computed from weights


def phi_reference(h: Tensor, phi: AnyPhi) -> Tensor:
    """phi of a (B, Cv, H, W) map, without TF32: a backward pass that runs later has the flags that are set then."""
    if not isinstance(phi, Phi):
        return phi(h)
    if phi.weight is None:
        return h
    with full_float32_of(h):
        out = F.conv2d(h, phi.weight, phi.bias, padding=phi.weight.shape[-1] // 2)
    return h.mul(1 - phi.ratio) + out.mul_(phi.ratio)


def nearest_code_reference(z: Tensor, codebook: Tensor, cosine: bool = False) -> Tensor:
    """Index of the nearest code of each row: z (N, Cv), codebook (V, Cv) -> (N,) int64; the first one on a tie.

    The squared distance is expanded to ``|z|^2 + |e|^2 - 2 z.e``; with ``cosine`` the largest cosine wins.
    """
    if cosine:
        return torch.argmax(F.normalize(z, dim=-1) @ F.normalize(codebook.T, dim=0), dim=1)
    distance = z.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
    return torch.argmin(distance.addmm_(z, codebook.T, alpha=-2, beta=1), dim=1)


def _scale_codes(rest: Tensor, codebook: Tensor, size: Size, last: bool, cosine: bool) -> Tensor:
    """Code indices (B, h, w) of the residual (B, Cv, H, W) at one scale."""
    z = rest if last else F.interpolate(rest, size=size, mode="area")
    B, C, h, w = z.shape
    return nearest_code_reference(z.permute(0, 2, 3, 1).reshape(-1, C), codebook, cosine).view(B, h, w)


def _scale_map(codes: Tensor, phi: AnyPhi, size: Size, last: bool) -> Tensor:
    """What one scale adds to f_hat: code embeddings (B, Cv, h, w) -> (B, Cv, H, W)."""
    return phi_reference(codes.contiguous() if last else F.interpolate(codes, size=size, mode="bicubic"), phi)


def residual_quantize_reference(
    features: Tensor,
    codebook: Tensor,
    phis: Sequence[AnyPhi],
    sizes: Sequence[Size],
    cosine: bool = False,
    all_f_hats: bool = True,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Encode features (B, Cv, H, W) float32 against a codebook (V, Cv); ``embed`` gives the codes (..., Cv) of indices.

    ``phis`` and ``sizes`` hold one entry a scale that is to run; the map's own size ends the schedule.
    Returns the indices of each scale, (B, h_k * w_k) int64, and f_hat after each scale, (B, Cv, H, W), or with
    ``all_f_hats=False`` after the last one alone.
    """
    full = (features.shape[-2], features.shape[-1])
    rest, f_hat = features.detach(), torch.zeros_like(features)
    indices: list[Tensor] = []
    f_hats: list[Tensor] = []
    for phi, size in zip(phis, sizes, strict=True):
        last = size == full
        codes = _scale_codes(rest, codebook, size, last, cosine)
        vectors = F.embedding(codes, codebook) if embed is None else embed(codes)
        h = _scale_map(vectors.permute(0, 3, 1, 2), phi, full, last)
        f_hat, rest = f_hat + h, rest - h
        indices.append(codes.flatten(1))
        f_hats = [*f_hats, f_hat] if all_f_hats else [f_hat]
    return indices, f_hats


def residual_quantize_train_reference(
    features: Tensor,
    codebook: Tensor,
    phis: Sequence[AnyPhi],
    sizes: Sequence[Size],
    beta: float,
    cosine: bool = False,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The training form: straight-through f_hat (B, Cv, H, W), the scalar loss and the indices of each scale.

    loss = mean over scales of ``beta * mse(sg(f_hat_k), f) + mse(f_hat_k, sg(f))``, sg the stopped gradient and
    f_hat_k the running sum after scale k. Gradients reach features, codebook and phis. As in the published
    algorithm the last scale is always the full map.
    """
    full = (features.shape[-2], features.shape[-1])
    target = features.detach()
    rest, f_hat = target, torch.zeros_like(target)
    loss, indices = features.new_zeros(()), []
    for phi, size in zip(phis, sizes, strict=True):
        last = size == full
        codes = _scale_codes(rest, codebook.detach(), size, last, cosine)
        vectors = F.embedding(codes, codebook) if embed is None else embed(codes)
        h = _scale_map(vectors.permute(0, 3, 1, 2), phi, full, last)
        f_hat = f_hat + h
        rest = rest - h.detach()
        indices.append(codes.flatten(1))
        loss = loss + F.mse_loss(f_hat.detach(), features) * beta + F.mse_loss(f_hat, target)
    return (f_hat.detach() - target) + features, loss / len(sizes), indices


def residual_quantize_backward_reference(
    grad_f_hats: Tensor, indices: Tensor, codebook: Tensor, phis: Sequence[Phi], sizes: Sequence[Size]
) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
    """Gradient of f_hat after each scale, (K, B, Cv, H, W), in the codebook and, for each scale, in its phi.

    For use below autograd; the indices (B, sum of h_k * w_k) are given. Returns (V, Cv) and K pairs of a weight's and a
    bias's gradient, None for an identity.
    """
    full, (B, Cv) = grad_f_hats.shape[-2:], grad_f_hats.shape[1:3]
    grad_maps = grad_f_hats.flip(0).cumsum(0).flip(0)  # h_k is in f_hat from scale k on
    grad_codes, grad_phis = [], []
    codes = code_maps_reference(indices, codebook, sizes)
    for code, grad, phi, size in zip(codes, grad_maps, phis, sizes, strict=True):
        same, grad_phi = size == full, None
        up = code.contiguous() if same else F.interpolate(code, size=full, mode="bicubic")
        if phi.weight is not None:
            with full_float32_of(up):
                through, *grad_phi = torch.ops.aten.convolution_backward(
                    grad * phi.ratio, up, phi.weight, [Cv], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
                )
            grad = through + grad * (1 - phi.ratio)
        if not same:
            grad = torch.ops.aten.upsample_bicubic2d_backward(grad.contiguous(), full, [B, Cv, *size], False)
        grad_codes.append(grad.flatten(2).transpose(1, 2))
        grad_phis.append(None if grad_phi is None else (grad_phi[0], grad_phi[1]))
    rows = torch.cat(grad_codes, 1).reshape(-1, Cv)
    return torch.zeros_like(codebook).index_put_((indices.flatten(),), rows, accumulate=True), grad_phis


def code_maps_reference(indices: Tensor, codebook: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """Code embeddings (B, Cv, h_k, w_k) of each scale from the indices (B, sum of h_k * w_k) of all."""
    maps = F.embedding(indices, codebook).transpose(1, 2).split([h * w for h, w in sizes], dim=2)
    return [codes.unflatten(2, size) for codes, size in zip(maps, sizes, strict=True)]


def residual_dequantize_reference(codes: Sequence[Tensor], phis: Sequence[AnyPhi], size: Size) -> list[Tensor]:
    """f_hat (B, Cv, H, W) after each scale, from code embeddings (B, Cv, h_k, w_k) of each scale."""
    f_hat = codes[0].new_zeros(*codes[0].shape[:2], *size, dtype=torch.float32)
    f_hats = []
    for h, phi in zip(codes, phis, strict=True):
        f_hat = f_hat + _scale_map(h, phi, size, h.shape[-2:] == size)
        f_hats.append(f_hat)
    return f_hats


def growing_dequantize_reference(codes: Sequence[Tensor], phis: Sequence[AnyPhi]) -> list[Tensor]:
    """As `residual_dequantize_reference`, but f_hat grows with the scales: its k-th entry is (B, Cv, h_k, w_k)."""
    f_hat = torch.zeros_like(codes[0], dtype=torch.float32)
    f_hats = []
    for h, phi in zip(codes, phis, strict=True):
        f_hat = F.interpolate(f_hat, size=h.shape[-2:], mode="bicubic") + phi_reference(h, phi)
        f_hats.append(f_hat)
    return f_hats


def teacher_forcing_input_reference(codes: Sequence[Tensor], phis: Sequence[AnyPhi], sizes: Sequence[Size]) -> Tensor:
    """Transformer input of scales 2..K from the code embeddings (B, Cv, h_k, w_k) of scales 1..K-1.

    ``sizes`` is the whole schedule (its last entry the full size); only ``len(codes)`` scales are produced.
    Returns (B, sum of h_k * w_k over the produced scales, Cv) float32: f_hat, area-downsampled to the next scale.
    """
    full = sizes[-1]
    f_hat = codes[0].new_zeros(*codes[0].shape[:2], *full, dtype=torch.float32)
    inputs = []
    for h, phi, following in zip(codes, phis, sizes[1:], strict=False):
        f_hat = f_hat + _scale_map(h, phi, full, last=False)
        inputs.append(F.interpolate(f_hat, size=following, mode="area").flatten(2).transpose(1, 2))
    return torch.cat(inputs, dim=1)


def next_scale_input_reference(
    f_hat: Tensor, codes: Tensor, phi: AnyPhi, following: Size | None
) -> tuple[Tensor, Tensor]:
    """One generation step: add the codes (B, Cv, h, w) of a scale to f_hat (B, Cv, H, W) in place.

    Returns f_hat and its area-downsampling to the ``following`` size; after the last scale (None) f_hat twice.
    """
    size = (f_hat.shape[-2], f_hat.shape[-1])
    f_hat.add_(_scale_map(codes, phi, size, codes.shape[-2:] == size))
    return f_hat, f_hat if following is None else F.interpolate(f_hat, size=following, mode="area")
