"""Triton kernels, installed as ``varkern.kernels``: a leaf that knows nothing else of the package but ``_kept``.

Importing this package does not import triton; its modules do, so ask ``unavailable()`` first or import them where a
call has been found to need them. Each module has its kernels, one Python function an op that launches them, and
``CASES``: every kernel with the arguments it is compiled for ahead of time by the tests.

Vocabulary: capital dimensions (``B, L, C``), ``p_`` pointers, ``b_`` blocks held in registers, ``m_`` masks, ``i_``
indices; indices are int64 before they are multiplied, and values float32 before any arithmetic.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Case", "unavailable"]


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
