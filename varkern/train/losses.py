"""Losses of both stages and the metrics that are logged with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

__all__ = ["psnr", "reconstruction_loss", "token_loss", "token_metrics"]


def token_loss(logits: torch.Tensor, tokens: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy over all positions with equal weights: ``logits`` (B, L, V), ``tokens`` (B, L) int64."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), label_smoothing=label_smoothing)


@torch.no_grad()
def token_metrics(logits: torch.Tensor, tokens: torch.Tensor, patch_nums: Sequence[int]) -> dict[str, float]:
    """Mean and last-scale loss (``Lm``, ``Lt``, nats) and accuracy (``Accm``, ``Acct``, %), and each scale's.

    ``logits`` (B, L, V), ``tokens`` (B, L); scale k owns ``patch_nums[k]**2`` positions. Labels are not smoothed.
    """
    losses = F.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none").mean(0)
    hits = (logits.argmax(-1) == tokens).float().mean(0) * 100
    sizes = [p * p for p in patch_nums]
    scale_losses = [part.mean().item() for part in losses.split(sizes)]
    scale_hits = [part.mean().item() for part in hits.split(sizes)]
    result = {
        "Lm": losses.mean().item(),
        "Lt": scale_losses[-1],
        "Accm": hits.mean().item(),
        "Acct": scale_hits[-1],
    }
    for p, loss, hit in zip(patch_nums, scale_losses, scale_hits, strict=True):
        result[f"L_{p}"], result[f"Acc_{p}"] = loss, hit
    return result


def reconstruction_loss(
    output: torch.Tensor, target: torch.Tensor, l1_weight: float = 0.0, gradient_weight: float = 0.0
) -> torch.Tensor:
    """Mean squared error, plus optional absolute error and squared error of horizontal and vertical differences."""
    loss = F.mse_loss(output, target)
    if l1_weight:
        loss = loss + l1_weight * F.l1_loss(output, target)
    if gradient_weight:
        error = output - target
        loss = loss + gradient_weight * (error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean())
    return loss


def psnr(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, c, h, w) in [-1, 1]; the peak is their range, 2."""
    if output.shape != target.shape:
        raise ValueError(f"images differ in shape: {tuple(output.shape)} and {tuple(target.shape)}")
    error = (output.double() - target.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error.clamp_min(1e-12))).float()
