"""Codebook usage a scale, and restart of unused codes.

A code that no residual is nearest to receives no gradient and stays unused for ever; with a residual quantizer small
codebooks collapse that way within a few hundred steps. Such codes are moved onto residual features of training
images, drawn where the quantization error is large (the D^2 sampling of k-means++, Arthur & Vassilvitskii 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from varkern.models import VQVAE

__all__ = ["Usage", "count_codes", "residual_features", "restart_unused_codes", "usage_of", "used_codes"]

USED_SHARE = 0.08  # of an even share of a scale's tokens: the margin that VAR's quantizer itself counts with


@dataclass(frozen=True)
class Usage:
    """Codebook usage in percent. A scale uses a code that has 8 % of an even share of its tokens, or more."""

    overall: float  # codes that at least one scale uses
    touched: float  # codes that occur at all
    scales: list[float]  # codes that each scale uses
    perplexity: float  # exponential of the entropy of the code distribution, in codes


def count_codes(tokens: Sequence[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """Hits (K, V) int64 from the indices (B, n_k) of each scale."""
    return torch.stack([scale.flatten().bincount(minlength=vocab_size) for scale in tokens])


def used_codes(hits: torch.Tensor) -> torch.Tensor:
    """Which codes each scale uses, (K, V) bool, from hit counts (K, V)."""
    even_share = hits.sum(1, keepdim=True) / hits.shape[1]
    return (hits > 0) & (hits >= USED_SHARE * even_share)


def usage_of(hits: torch.Tensor) -> Usage:
    """Usage from hit counts (K, V)."""
    used, total = used_codes(hits), hits.sum(0)
    p = total[total > 0].double() / total.sum()
    return Usage(
        overall=used.any(0).float().mean().item() * 100,
        touched=(total > 0).float().mean().item() * 100,
        scales=(used.float().mean(1) * 100).tolist(),
        perplexity=torch.exp(-(p * p.log()).sum()).item(),
    )


@torch.no_grad()
def residual_features(vae: VQVAE, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What each scale quantizes: residuals (B, n_k, Cv) float32, and the indices (B, n_k) chosen for them."""
    f = vae.quant_conv(vae.encoder(images)).float()
    indices = vae.quantize.f_to_idxBl_or_fhat(f, to_fhat=False)
    f_hats = vae.quantize.f_to_idxBl_or_fhat(f, to_fhat=True)
    residuals, rest = [], f
    for index, f_hat in zip(indices, f_hats, strict=True):
        side = round(index.shape[1] ** 0.5)
        residuals.append(F.interpolate(rest, size=(side, side), mode="area").flatten(2).transpose(1, 2))
        rest = f - f_hat
    return residuals, indices


@torch.no_grad()
def restart_unused_codes(
    vae: VQVAE,
    images: torch.Tensor,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[Usage, int]:
    """Move the codes that no scale uses on ``images`` (B, c, h, w) onto badly quantized residuals, in place.

    A residual of scale k stands for (p_K / p_k)^2 positions of the feature map, so its squared error counts that
    often in the draw. ``generator`` (CPU) makes the draw; the codes' state in ``optimizer`` is cleared. Returns the
    usage before the restart and the number of codes moved.
    """
    training = vae.training
    vae.eval()
    residuals, indices = residual_features(vae, images)
    vae.train(training)
    codebook = vae.quantize.embedding.weight
    hits = count_codes(indices, codebook.shape[0])
    dead = (~used_codes(hits).any(0)).nonzero().flatten()
    if len(dead):
        finest = residuals[-1].shape[1]
        errors = [
            (z - codebook[i].float()).square().sum(-1).flatten() * (finest / z.shape[1])
            for z, i in zip(residuals, indices, strict=True)
        ]
        candidates = torch.cat([z.flatten(0, 1) for z in residuals])
        # A zero weight is never drawn; the floor keeps the draw possible when the codebook is already exact.
        weights = torch.cat(errors).double().cpu().add_(1e-12)
        count = min(len(dead), len(weights))
        # Inverse-free weighted draw without replacement (exponential races): no limit on the number of candidates.
        race = torch.empty_like(weights).exponential_(generator=generator) / weights
        drawn = race.topk(count, largest=False).indices.to(codebook.device)
        codebook[dead[:count]] = candidates[drawn].to(codebook.dtype)
        state = optimizer.state.get(codebook, {}) if optimizer is not None else {}
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name][dead[:count]] = 0
    return usage_of(hits.cpu()), len(dead)
