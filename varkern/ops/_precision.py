"""Full float32 on GPUs, whose convolutions PyTorch rounds to TF32's 10 bits of mantissa unless told not to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["full_float32", "full_float32_of"]

_lock = threading.RLock()


def _older_flag() -> bool | None:
    """cuDNN's flag of before PyTorch 2.9, or None where the newer ones have been set to what it cannot say."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Context: no convolution and no matrix product of the process uses TF32. What was set before is set again."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    switches: tuple[Any, ...]
    off: Any
    if hasattr(cudnn, "conv"):
        switches, name, off = (cudnn.conv, cudnn.rnn, matmul), "fp32_precision", "ieee"
    else:
        switches, name, off = (matmul,), "allow_tf32", False
    older, before = _older_flag(), [getattr(switch, name) for switch in switches]
    try:
        if older is not None:  # first: setting it sets the newer ones, and reading it raises where they contradict it
            cudnn.allow_tf32 = False
        for switch in switches:
            setattr(switch, name, off)
        yield
    finally:
        if older is not None:
            cudnn.allow_tf32 = older
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)


def full_float32_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """``full_float32`` for what is launched on a CUDA tensor; on other devices nothing, at no cost.

    One thread at a time, so that none restores what another has set. A graph that ``torch.compile`` makes keeps the
    flags that are set when it runs.
    """
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _one_at_a_time()


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    with _lock, full_float32():
        yield
