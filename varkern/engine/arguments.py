"""Checks of what a caller asks for, made before anything is drawn or computed."""

import contextlib
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from varkern.engine.options import Keep, Options
from varkern.modules.transformer import Transformer
from varkern.ops.sampling import draw_noise

_LARGEST_BATCH = 2**31 - 1
_LARGEST_GUIDANCE = 1e4  # more only overflows: the likeliest token is drawn long before
_SEEDS = range(-(2**63), 2**64)  # what torch.Generator takes


def check_integer(name: str, value: object, low: int, high: int, meaning: str = "") -> int:
    """The value as an int (NumPy's integers are ones, booleans are none); raises ValueError out of its range."""
    if isinstance(value, SupportsIndex) and not isinstance(value, bool | Tensor):
        number = operator.index(value)
        if low <= number <= high:
            return number
    raise ValueError(f"{name} must be an integer in [{low}, {high}]{meaning}, got {value!r}")


def _number(name: str, value: object) -> float:
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    raise ValueError(f"{name} must be a number, got {value!r}")


def check_options(var: Transformer, batch: int, options: Options) -> Options:
    """The options in plain Python numbers; raises ValueError or TypeError where one is outside its domain.

    As in the published model top_k <= 0 and top_p outside (0, 1) are off.
    """
    top_p = _number("top_p", options.top_p)
    cfg = _guidance(var, batch, options.cfg)
    top_k = check_integer("top_k", options.top_k, -(2**63), var.V, " (0 or less: off)")
    if math.isnan(top_p):
        raise ValueError("top_p must be a number (0: off), got nan")
    if options.more_smooth not in (0, 1) or isinstance(options.more_smooth, Tensor):
        raise TypeError(f"more_smooth must be True or False, got {options.more_smooth!r}")
    top_p = top_p if 0.0 < top_p < 1.0 else 0.0
    return replace(options, cfg=cfg, top_k=max(top_k, 0), top_p=top_p, more_smooth=bool(options.more_smooth))


def _guidance(var: Transformer, batch: int, cfg: object) -> float | Tensor:
    """A number, or (batch, 1, 1) float32 on the model's device."""
    if isinstance(cfg, Tensor):
        real = cfg.layout is torch.strided and not cfg.is_complex() and cfg.dtype != torch.bool and not cfg.is_meta
        if not real or tuple(cfg.shape) not in ((), (1,), (batch,), (batch, 1), (batch, 1, 1)):
            raise ValueError(f"cfg must be a number, or one for each of the {batch} images, got {described(cfg)}")
        values = cfg.detach().to(device=var.lvl_1L.device, dtype=torch.float32)
        if not bool(((values >= 0) & (values <= _LARGEST_GUIDANCE)).all()):
            raise ValueError(
                f"cfg must hold finite numbers in [0, {_LARGEST_GUIDANCE:g}] (0: no guidance), "
                f"got {values.flatten().tolist()}"
            )
        return values.expand(batch).view(batch, 1, 1) if cfg.numel() == 1 and cfg.ndim < 2 else values.view(batch, 1, 1)
    number = _number("cfg", cfg)
    if not 0 <= number <= _LARGEST_GUIDANCE:
        raise ValueError(f"cfg must be a finite number in [0, {_LARGEST_GUIDANCE:g}] (0: no guidance), got {cfg}")
    return number


def check_batch(name: str, batch: object) -> int:
    """The batch as an int; raises ValueError unless it is a positive integer."""
    if isinstance(batch, SupportsIndex) and not isinstance(batch, bool | Tensor):
        size = operator.index(batch)
        if 1 <= size <= _LARGEST_BATCH:
            return size
    raise ValueError(f"{name} must be a positive integer, got {batch!r}; the largest is {_LARGEST_BATCH}")


def check_seed(seed: object) -> int:
    """The seed as an int; raises ValueError for anything that a generator does not take."""
    return check_integer("the seed", seed, _SEEDS.start, _SEEDS.stop - 1)


def check_seeds(batch: int, seeds: object) -> list[int]:
    """A seed an image; raises ValueError for another number of them, or anything but integers."""
    entries = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str | bytes) else []
    integers = all(isinstance(seed, SupportsIndex) and not isinstance(seed, bool | Tensor) for seed in entries)
    if len(entries) != batch or not integers:
        raise ValueError(f"give one integer seed, or one for each of the {batch} images; got {entries or seeds!r}")
    return [check_seed(seed) for seed in entries]


def check_labels(var: Transformer, batch: int, labels: object) -> Tensor | None:
    """Labels (B,) int64 on the model's device, or None where they are to be drawn.

    An int serves the whole batch, negative meaning "no class". Raises TypeError or ValueError for anything else
    than B integers in [0, num_classes]; the values of a tensor on an accelerator are not read.
    """
    device = var.lvl_1L.device
    if labels is None:
        return None
    home = device if isinstance(labels, Tensor) else torch.device("cpu")
    if not isinstance(labels, Tensor):
        labels = _label_tensor(var, batch, labels)
    if labels.dtype not in _INTEGERS or labels.layout is not torch.strided:
        raise TypeError(f"labels must be integers, got a {labels.dtype} {labels.layout} tensor")
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"label_B must hold B = {batch} labels, got shape {tuple(labels.shape)}")
    if labels.device != home:
        raise ValueError(f"label_B is on {labels.device} but the model is on {device}; move one of them")
    if not labels.is_cpu:  # reading values would wait for the device
        return labels.long()
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high > var.num_classes:
        raise ValueError(f"labels must be in [0, {var.num_classes}], {var.num_classes} = no class; got {low}..{high}")
    return labels.long().to(device, non_blocking=True)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _label_tensor(var: Transformer, batch: int, labels: object) -> Tensor:
    """Labels that are given as one integer, or as a sequence of them, on the CPU."""
    wrong = TypeError(f"labels must be an integer, {batch} integers or a tensor of them, got {labels!r}")
    if isinstance(labels, SupportsIndex) and not isinstance(labels, bool | Tensor | np.ndarray):
        label = operator.index(labels)
        if label > var.num_classes:
            raise ValueError(f"labels must be in [0, {var.num_classes}], {var.num_classes} = no class; got {label}")
        return torch.full((batch,), var.num_classes if label < 0 else label, dtype=torch.int64, device="cpu")
    if not isinstance(labels, Iterable) or isinstance(labels, str | bytes):
        raise wrong
    try:
        return torch.from_numpy(np.array(list(labels)))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise wrong from None


def check_keep(var: Transformer, batch: int, keep: object) -> None:
    """Raises TypeError or ValueError where what editing keeps does not fit the model and the batch."""
    if keep is None:
        return
    if not isinstance(keep, Keep):
        raise TypeError(f"keep must be a varkern.engine.Keep, got {type(keep).__name__}")
    device, side, scales = var.lvl_1L.device, var.patch_nums[-1], len(var.patch_nums)
    if not isinstance(keep.tokens, Sequence) or len(keep.tokens) != scales:
        count = len(keep.tokens) if isinstance(keep.tokens, Sequence) else type(keep.tokens).__name__
        raise ValueError(f"keep.tokens must be the token maps of all {scales} scales, got {count}")
    for tokens, p in zip(keep.tokens, var.patch_nums, strict=True):
        if not isinstance(tokens, Tensor) or tokens.layout is not torch.strided or tokens.device != device:
            raise TypeError(f"keep.tokens must be dense tensors on {device}, got {described(tokens)}")
        if tokens.dtype not in (torch.int64, torch.int32) or tuple(tokens.shape) != (batch, p * p):
            raise ValueError(f"keep.tokens must be int64 {(batch, p * p)} at {p}x{p}, got {described(tokens)}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= var.V:
            raise ValueError(f"keep.tokens must be in [0, {var.V - 1}], got {low}..{high} at {p}x{p}")
    mask = keep.mask
    if not isinstance(mask, Tensor) or mask.layout is not torch.strided or mask.is_complex() or mask.device != device:
        raise TypeError(f"keep.mask must be a dense real tensor on {device}, got {described(mask)}")
    if tuple(mask.shape) not in ((side, side), (batch, side, side)):
        raise ValueError(
            f"keep.mask must be {(side, side)}, or {(batch, side, side)} for each image, got {tuple(mask.shape)}"
        )


def described(value: object) -> str:
    """What a message says of a value that is not the tensor it should be."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device} ({value.layout})"
    return type(value).__name__


def draw_labels(var: Transformer, batch: int, generator: torch.Generator | None) -> Tensor:
    """Classes (B,) drawn uniformly, as the published model draws them."""
    if batch == 1:  # as torch.multinomial computes it, which in some versions of torch waits for a check of its input
        return (var.uniform_prob / draw_noise(1, var.num_classes, var.lvl_1L.device, generator)).argmax(dim=-1)
    return torch.multinomial(var.uniform_prob, num_samples=batch, replacement=True, generator=generator).reshape(batch)


def check_model(var: Transformer) -> None:
    """Raises where transformer and tokenizer cannot work together."""
    # By what it has and not by its type: torch.compile and other wrappers pass the attributes on.
    if not hasattr(var, "vae_proxy"):
        raise TypeError(f"var must be a varkern.VAR, got {type(var).__name__}")
    vae = var.vae_proxy[0]
    ours = var.lvl_1L.device
    theirs = next(vae.parameters(), var.lvl_1L).device
    if ours != theirs:
        raise ValueError(
            f"the transformer is on {ours} but its tokenizer on {theirs}; move the tokenizer too: it is no "
            f"submodule (var.vae_proxy[0].to({str(ours)!r}))"
        )
    if var.prog_si >= 0:
        raise ValueError(f"prog_si={var.prog_si} is a setting of progressive training; set it to -1 to generate")
