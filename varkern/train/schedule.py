"""Learning-rate and weight-decay schedules and the parameter groups of the VAR recipe (arXiv 2404.02905)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

__all__ = ["lr_factor", "parameter_groups", "peak_lr", "weight_decay_at"]

WARMUP_START = 0.005
FLAT_FRACTION = 0.05  # "lin0": share of the steps after warm-up that stay at the peak
NO_DECAY_NAMES = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul")


def peak_lr(base_lr: float, batch_size: int) -> float:
    """``base_lr`` for a batch of 256 images, scaled linearly."""
    return base_lr * batch_size / 256


def lr_factor(step: int, total_steps: int, warmup_steps: int, end: float = 0.01, kind: str = "lin0") -> float:
    """Factor on the peak rate at ``step`` (0-based): linear warm-up, flat, then linear to ``end`` at the last step."""
    if step < warmup_steps:
        return WARMUP_START + (1 - WARMUP_START) * step / warmup_steps
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    if progress <= FLAT_FRACTION:
        return 1.0
    return end + (1 - end) * (1 - progress) / (1 - FLAT_FRACTION)


def weight_decay_at(step: int, total_steps: int, start: float, end: float | None) -> float:
    """Half cosine from ``start`` to ``end`` over the whole run; constant when ``end`` is None."""
    if end is None:
        return start
    progress = min(1.0, step / max(1, total_steps - 1))
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * progress))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters: ``decay_scale`` 1 or 0 times the scheduled weight decay.

    No decay on biases, one-dimensional parameters, position and level embeddings, AdaLN gains and attention scales.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim == 1 or name.endswith("bias") or any(key in name for key in NO_DECAY_NAMES)
        (kept if plain else decayed).append(parameter)
    groups = [{"params": decayed, "decay_scale": 1.0}, {"params": kept, "decay_scale": 0.0}]
    return [group for group in groups if group["params"]]
