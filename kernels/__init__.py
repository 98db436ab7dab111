"""Triton kernels, installed as ``varkern.kernels``: a leaf that knows nothing of the rest of the package.

Importing this package does not import triton; its modules do, so ask ``unavailable()`` first or import them where a
call has been found to need them. Each module has its kernels, one Python function an op that launches them, and
``CASES``: every kernel with the arguments it is compiled for ahead of time by the tests.

Vocabulary: capital dimensions (``B, L, C``), ``p_`` pointers, ``b_`` blocks held in registers, ``m_`` masks, ``i_``
indices; indices are int64 before they are multiplied, and values float32 before any arithmetic.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch

__all__ = ["Case", "kept", "passing", "unavailable"]

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


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot be imported here, or ``None``."""
    try:
        importlib.import_module("triton")
    # A broken installation raises anything from OSError to RuntimeError; the reason is kept and shown, never lost.
    except Exception as error:
        return f"triton did not import ({type(error).__name__}: {error})"
    return None


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, as the tests compile it without a GPU.

    ``signature``: the type of each run-time argument in Triton's words (``"*bf16"``, ``"i32"``, ``"fp32"``).
    ``aligned``: the arguments known to be divisible by 16, as they are in the sizes that matter.
    ``num_stages``: how many tiles a loop loads ahead; Triton's own default unless a launch names another.
    ``maxnreg``: the registers that a thread may use, if a launch limits them.
    ``architectures``: those that it is launched on, all of them if none is named.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    aligned: tuple[str, ...] = field(default=())
    num_stages: int = 3
    maxnreg: int | None = None
    architectures: tuple[int, ...] = ()
