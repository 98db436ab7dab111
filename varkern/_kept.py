"""What is made once: the tables of a schedule that kernels read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["kept", "passing"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def passing() -> bool:
    """Whether a tensor made now belongs to a mode or transform that will end, and is perhaps not even a real one."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def kept(function: _Function) -> _Function:
    """Make what a function of hashable arguments returns once, and keep it until the process ends.

    For the tables of a schedule, of at most 8 bytes a position, which are as many as there are schedules and devices.
    Nothing is ever dropped, since CUDA graphs and calls in other threads hold the addresses; of two threads that make
    the same table at once, both get one. No tensor of inference mode is kept, nor a fake one.
    """
    values: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def get(*args: Any) -> Any:
        if passing():
            return function(*args)
        if args not in values:
            with torch.inference_mode(False):
                values.setdefault(args, function(*args))
        return values[args]

    return cast(_Function, get)
