"""Checks of what a caller asks for, made before anything is drawn or computed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from varkern.models.var import VAR
from varkern.ops.sampling import draw_noise


def check_sampling(vocab_size: int, cfg: float, top_k: int, top_p: float) -> None:
    """Raises ValueError where a sampling parameter is outside its domain."""
    if not (math.isfinite(cfg) and cfg >= 0):
        raise ValueError(f"cfg must be a finite number >= 0 (0: no guidance), got {cfg}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be an integer in [0, {vocab_size}] (0: off), got {top_k}")
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p must be in [0, 1] (0: off), got {top_p}")


def check_batch(name: str, batch: int) -> None:
    """Raises ValueError unless it is a positive integer."""
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"{name} must be a positive integer, got {batch!r}")


def check_seeds(batch: int, seeds: Sequence[int]) -> list[int]:
    """A seed an image; raises ValueError for another number of them, or anything but integers."""
    seeds = list(seeds)
    if len(seeds) != batch or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise ValueError(f"give one integer seed, or one for each of the {batch} images; got {seeds!r}")
    return seeds


def check_labels(var: VAR, batch: int, labels: int | Sequence[int] | Tensor | None) -> Tensor | None:
    """Labels (B,) int64 on the model's device, or None where they are to be drawn.

    An int serves the whole batch, negative meaning "no class". Raises TypeError or ValueError for anything else
    than B integers in [0, num_classes].
    """
    device = var.lvl_1L.device
    check_batch("the batch size B", batch)
    if labels is None:
        return None
    home = device
    if isinstance(labels, int):
        labels = torch.full((batch,), var.num_classes if labels < 0 else labels, device="cpu")
        home = labels.device
    elif not isinstance(labels, Tensor):
        labels = torch.tensor(list(labels), device="cpu")
        home = labels.device
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"label_B must hold B = {batch} labels, got shape {tuple(labels.shape)}")
    if labels.device != home:
        raise ValueError(f"label_B is on {labels.device} but the model is on {device}; move one of them")
    # Values that come from here are read here; only a tensor on an accelerator makes this wait, and once.
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high > var.num_classes:
        raise ValueError(f"labels must be in [0, {var.num_classes}], {var.num_classes} = no class; got {low}..{high}")
    return labels.long().to(device, non_blocking=True)


def draw_labels(var: VAR, batch: int, generator: torch.Generator | None) -> Tensor:
    """Classes (B,) drawn uniformly, as the published model draws them."""
    device = var.lvl_1L.device
    uniform = torch.full((1, var.num_classes), 1.0 / var.num_classes, device=device)
    if batch == 1:  # as torch.multinomial computes it, but that waits for the device to check what it is given
        return (uniform / draw_noise(1, var.num_classes, device, generator)).argmax(dim=-1)
    return torch.multinomial(uniform, num_samples=batch, replacement=True, generator=generator).reshape(batch)


def check_model(var: VAR) -> None:
    """Raises where transformer and tokenizer cannot work together."""
    vae = var.vae_proxy[0]
    ours, theirs = var.pos_start.device, vae.post_quant_conv.weight.device
    if ours != theirs:
        raise ValueError(
            f"the transformer is on {ours} but its tokenizer on {theirs}; move the tokenizer too: it is no "
            f"submodule (var.vae_proxy[0].to({str(ours)!r}))"
        )
    if var.prog_si >= 0:
        raise ValueError(f"prog_si={var.prog_si} is a setting of progressive training; set it to -1 to generate")
