"""The backends of the ops: which there are, which is asked for, and why one cannot serve.

Every op is computed by one of its backends:

=============  =====================================================================
``reference``  plain PyTorch, what the eager model runs; always there, on every device
``cpu``        the extension ``varkern._C``, vectorised and threaded
``triton``     the kernels of ``varkern.kernels``, on CUDA devices
``cuda``       the extension ``varkern._C_cuda``
=============  =====================================================================

Left alone, an op takes the first of its backends that can serve the call. ``VARKERN_BACKEND`` (read once, at import)
or ``use_backend`` names one instead: then that backend serves or the call raises and says why. An op that does not
have the named backend at all chooses by itself, so that a whole model runs under ``use_backend("triton")`` although
some of its ops have no Triton kernel; ``explain`` and ``python -m varkern.info`` show who serves what.

Within a transform of ``torch.func`` (``grad``, ``vjp``, ``jvp``, ``vmap``, ``jacrev``, ...) and in forward-mode
differentiation every op is its reference, whatever was asked for: slower than a kernel, but plain PyTorch has the
derivatives of any order and all batching rules. Ops for inference have no gradient there either. (An
``autograd.Function`` that those transforms take, with ``setup_context``, costs every call more, also the ordinary ones:
``apply`` then binds the arguments to a signature.)
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["BACKENDS", "current_backend", "reference_forced", "use_backend"]

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Element types the kernels take, with the codes of csrc/ops/arguments.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and not (isinstance(name, str) and name in BACKENDS):
        raise ValueError(
            f"{source} is {name!r}: name one of {', '.join(BACKENDS)}, or leave it unset to choose freely."
        )
    return name


class _Override(threading.local):
    # Set in __init__, so in the instance of every thread: Dynamo guards on instance attributes of a thread-local, but
    # misses a change that shadows a class attribute, and it cannot trace a ContextVar at all.
    def __init__(self) -> None:
        self.backend = _environment


_func_transforms = torch._C._are_functorch_transforms_active
_environment = _checked(os.environ.get("VARKERN_BACKEND") or None, "The environment variable VARKERN_BACKEND")
_override = _Override()


class use_backend:
    """Context manager: run the ops of this thread on one backend.

    ``name``: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; ``None`` chooses automatically again, whatever
    ``VARKERN_BACKEND`` or an outer context says. Contexts nest; other threads are not affected. A backward pass runs
    on the backend that was in force in its forward pass. Raises ``ValueError`` for any other name.

    >>> with varkern.use_backend("reference"):
    ...     logits = var(labels, x)
    """

    def __init__(self, name: str | None) -> None:
        self.name = _checked(name, "The backend")

    def __enter__(self) -> None:
        self.outer = _override.backend
        _override.backend = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _override.backend = self.outer


def current_backend() -> str | None:
    """The backend in force in this thread, or ``None`` when every op chooses by itself."""
    return _override.backend


def reference_forced() -> bool:
    """Whether every op of this thread must run plain PyTorch: it was asked for, or a transform needs it."""
    return _override.backend == "reference" or transformed()


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is in force, which kernels know nothing of.

    Of what tells, this alone is also seen by ``torch.compile``.
    """
    return _func_transforms() or forward_ad._current_level >= 0


def check_in_place(op: str, name: str, target: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Raises ``RuntimeError`` where vmap has batched what is to be written into a tensor, but not the tensor."""
    if not _func_transforms():
        return
    if set().union(*(_batched_levels(tensor) for tensor in others if tensor is not None)) - _batched_levels(target):
        raise RuntimeError(
            f"{op}: {name} is changed in place, and vmap has batched another argument but not it: clone {name} along "
            "that axis too."
        )


def _batched_levels(tensor: torch.Tensor) -> set[int]:
    """The levels of vmap that a tensor has an axis of."""
    functorch, levels = torch._C._functorch, set()
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            levels.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return levels


@functools.cache
def load(module: str) -> tuple[ModuleType | None, str | None]:
    """Import an optional module once: ``(module, None)``, or ``(None, why it is not there)``."""
    try:
        return importlib.import_module(module), None
    # A broken installation raises anything from OSError to RuntimeError; the reason is kept and shown, never lost.
    except Exception as error:
        return None, f"{module} did not import ({type(error).__name__}: {error})"


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for architectures ("80", "90a", "100") runs on a device.

    Machine code runs on its own major version from its minor version up, with a letter only on exactly that version;
    the last architecture also has PTX, which every newer device compiles (unless a letter binds it, too).
    """

    def version(architecture: str) -> tuple[int, int]:
        digits = architecture.rstrip("af")
        return int(digits[:-1]), int(digits[-1])

    exact = any(version(architecture) == capability for architecture in architectures)
    free = [version(architecture) for architecture in architectures if architecture.isdigit()]
    same_major = any(major == capability[0] and minor <= capability[1] for major, minor in free)
    return exact or same_major or (architectures[-1].isdigit() and free[-1] <= capability)


@functools.cache
def warn_where_unbuilt() -> None:
    """Once a process: a checkout that was not built may lie in front of the installation that was."""
    root = Path(__file__).resolve().parents[2]
    reason = load("varkern._C")[1]
    if reason is not None and (root / "setup.py").is_file():
        warnings.warn(
            f"varkern runs on plain PyTorch, slowly: its kernels were not built in {root} ({reason}). Run "
            "`pip install -e .` there, or start elsewhere if varkern is installed",
            RuntimeWarning,
            stacklevel=2,
        )


def cpu_why_not(tensor: torch.Tensor) -> str | None:
    """Why the CPU extension cannot serve a tensor, or ``None``."""
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}, not on the CPU"
    reason = load("varkern._C")[1]
    return reason and f"{reason}; build it with `pip install -e .`"


def cuda_why_not(tensor: torch.Tensor) -> str | None:
    """Why the CUDA extension cannot serve a tensor, or ``None``."""
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}, not on a CUDA device"
    module, reason = load("varkern._C_cuda")
    if module is None:
        return f"{reason}; build it with nvcc on PATH by `VARKERN_CUDA=on pip install -e .`"
    capability = _capability(tensor.device.index)
    if not _runs_on(module.architectures(), capability):
        built = ", ".join(module.architectures())
        return (
            f"varkern._C_cuda is built for {built} and the device is sm_{capability[0]}{capability[1]}; "
            "name its architecture in VARKERN_CUDA_ARCHS and build again"
        )
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter on CPU tensors (``TRITON_INTERPRET=1``: for tests, very slow)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def triton_why_not(tensor: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot serve a tensor, or ``None``."""
    if interpreting():
        if tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device} and Triton's interpreter (TRITON_INTERPRET=1) takes CPU tensors"
    elif tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}, not on a CUDA device"
    reason = load("triton")[1]
    if reason:
        return f"{reason}; install it with `pip install triton`"
    if tensor.is_cuda and _capability(tensor.device.index) < (8, 0):
        return "the device is older than compute capability 8.0"
    return None


def dtype_why_not(*tensors: torch.Tensor) -> str | None:
    """Why the kernels cannot take these dtypes, or ``None``."""
    for tensor in tensors:
        if tensor.dtype not in DTYPE_CODES:
            return f"{tensor.dtype} is none of float32, float16 and bfloat16"
    return None


def dense_last_axis(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last axis is contiguous, as the kernels need it, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def extension(backend: str) -> Any:
    """The compiled module of the ``cpu`` or ``cuda`` backend, after ``choose`` has found it there."""
    return load("varkern._C" if backend == "cpu" else "varkern._C_cuda")[0]


@functools.cache
def triton_kernels(module: str) -> Any:
    """The module ``varkern.kernels.<module>``, after ``choose`` has found triton there."""
    return importlib.import_module(f"varkern.kernels.{module}")


def pointer(tensor: torch.Tensor | None) -> int:
    """Its address; 0 for a tensor that is not there."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(tensor: torch.Tensor) -> tuple[int, ...]:
    """The last argument of a CUDA launch, the current stream; empty for a CPU tensor."""
    return (torch.cuda.current_stream(tensor.device).cuda_stream,) if tensor.is_cuda else ()
