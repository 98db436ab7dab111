"""The operator library ``varkern``: registration, backends and the override.

Every op is registered in one ``torch.library.Library`` with a schema string, and computed by one of its backends:

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
``autograd.Function`` that those transforms take costs every call more, also the ordinary ones: ``apply`` then binds the
arguments to a signature.)
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch.autograd import forward_ad

__all__ = ["BACKENDS", "Op", "current_backend", "explain", "reference_forced", "use_backend"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Element types the kernels take, with the codes of csrc/ops/arguments.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

library = torch.library.Library("varkern", "DEF")


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
def _warn_where_unbuilt() -> None:
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


# Which backends are tried for tensors of a device, in this order. Interpreted Triton kernels serve CPU tensors too, but
# they are slower than the reference and run only where they are asked for by name.
_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class Op:
    """One op: its name and its fast backends.

    ``why_not`` maps each backend to a function of the op's arguments that says why it cannot serve the call (a clause
    without a full stop), or ``None`` when it can. The reference serves everything, after all others.
    ``example`` gives arguments for a device and a dtype, for ``python -m varkern.info``.
    """

    registry: ClassVar[dict[str, Op]] = {}

    def __init__(
        self,
        name: str,
        why_not: Mapping[str, Callable[..., str | None]],
        example: Callable[[torch.device, torch.dtype], tuple[torch.Tensor, ...]],
    ) -> None:
        self.name = name
        self.why_not = dict(why_not)
        self.example = example
        Op.registry[name] = self

    def choose(self, backend: str | None, device: str, *args: object) -> str:
        """The backend that computes a call on tensors of a device type; ``backend`` is the override in force.

        Raises ``RuntimeError`` where the override names a backend of this op that cannot serve.
        """
        if backend == "reference":
            return backend
        if backend in self.why_not:
            reason = self.why_not[backend](*args)
            if reason is None:
                return backend
            raise RuntimeError(
                f"The backend {backend!r} cannot run {self.name}: {reason}. "
                f"Leave VARKERN_BACKEND and use_backend unset to choose freely, or name another backend."
            )
        for name in _AUTOMATIC.get(device, ()):
            if name in self.why_not and self.why_not[name](*args) is None:
                return name
        if device == "cpu" and backend is None and "cpu" in self.why_not:
            _warn_where_unbuilt()
        return "reference"


def explain(op: str, *args: object) -> dict[str, str | None]:
    """For each backend of an op, why it cannot serve a call with these arguments, or ``None``: it can.

    >>> explain("modulated_layer_norm", x, scale, shift)
    {'cuda': 'the tensors are on cpu, not on a CUDA device', 'triton': ..., 'cpu': None, 'reference': None}
    """
    if op not in Op.registry:
        raise ValueError(f"There is no op {op!r}: name one of {', '.join(sorted(Op.registry))}.")
    return {name: why_not(*args) for name, why_not in Op.registry[op].why_not.items()} | {"reference": None}


def needs_gradient(*tensors: torch.Tensor) -> bool:
    """Whether a call has to enter autograd: to record a gradient, or to refuse forward-mode differentiation."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _OnceDifferentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, differentiable: torch.Tensor, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.op} has no second derivative: compute the first one under varkern.use_backend('reference')."
        )


def once_differentiable(
    op: str, inputs: Sequence[torch.Tensor], compute: Callable[[], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """The gradients that ``compute`` gives in a backward pass; differentiating them again raises.

    ``torch.autograd.function.once_differentiable`` lets them pass as constants where the incoming gradient is one.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute()
    with torch.no_grad():
        grads = compute()
    differentiable = next(tensor for tensor in inputs if tensor.requires_grad)
    return _OnceDifferentiable.apply(op, differentiable, *grads)


def dtype_why_not(*tensors: torch.Tensor) -> str | None:
    """Why the kernels cannot take these dtypes, or ``None``."""
    for tensor in tensors:
        if tensor.dtype not in DTYPE_CODES:
            return f"{tensor.dtype} is none of float32, float16 and bfloat16"
    return None


_Tensor, _strided = torch.Tensor, torch.strided  # looked up once: every call asks for them
_FLOATING = frozenset((*DTYPE_CODES, torch.float64))
_INTEGERS = (int, np.integer, torch.SymInt)
_NUMBERS = (*_INTEGERS, float, np.floating, torch.SymFloat)
_LARGEST = sys.float_info.max


def check_tensors(op: str, names: Sequence[str], tensors: Sequence[object], optional: bool = False) -> None:
    """Raises ``TypeError`` for what is no tensor, unless it is optional and None, ``ValueError`` for a sparse one."""
    for name, tensor in zip(names, tensors, strict=True):
        if isinstance(tensor, torch.Tensor):
            if tensor.layout is not torch.strided:
                raise ValueError(f"{op}: {name} is a {tensor.layout} tensor, give a dense one.")
        elif tensor is not None or not optional:
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}, give a tensor.")


def check_floats(op: str, names: Sequence[str], tensors: Sequence[object], optional: bool = False) -> None:
    """As ``check_tensors``, and ``ValueError`` for another dtype than float16, bfloat16, float32 and float64."""
    for name, tensor in zip(names, tensors, strict=True):
        if isinstance(tensor, _Tensor):
            if tensor.dtype not in _FLOATING:
                raise ValueError(f"{op}: {name} is {tensor.dtype}, give a floating-point tensor of 16, 32 or 64 bits.")
            if tensor.layout is not _strided:
                raise ValueError(f"{op}: {name} is a {tensor.layout} tensor, give a dense one.")
        elif tensor is not None or not optional:
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}, give a tensor.")


def check_integer(op: str, name: str, value: object) -> None:
    """Raises ``TypeError`` for what is no integer."""
    if not isinstance(value, _INTEGERS):
        raise TypeError(f"{op}: {name} is {value!r}, give an integer.")


def check_truth(op: str, name: str, value: object) -> None:
    """Raises ``TypeError`` for what is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {name} is {value!r}, give True or False.")


def check_number(op: str, name: str, value: Any, finite: bool = True) -> None:
    """Raises ``TypeError`` for what is no number, ``ValueError`` for NaN, infinity and what no float can hold."""
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{op}: {name} is {value!r}, give a number.")
    if finite and not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{op}: {name} is {value}, give a finite number.")


def dense_last_axis(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last axis is contiguous, as the kernels need it, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's CUDA device current, which launches need; nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def extension(backend: str) -> Any:
    """The compiled module of the ``cpu`` or ``cuda`` backend, after ``choose`` has found it there."""
    return load("varkern._C" if backend == "cpu" else "varkern._C_cuda")[0]


@functools.cache
def kernels(module: str) -> Any:
    """The module ``varkern.kernels.<module>``, after ``choose`` has found triton there."""
    return importlib.import_module(f"varkern.kernels.{module}")


def stream(tensor: torch.Tensor) -> tuple[int, ...]:
    """The last argument of a CUDA launch, the current stream; empty for a CPU tensor."""
    return (torch.cuda.current_stream(tensor.device).cuda_stream,) if tensor.is_cuda else ()


def impl(name: str) -> Callable[[_Function], _Function]:
    """Register the function that computes an op on real tensors, below autograd, whatever their device."""

    def register(function: _Function) -> _Function:
        library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def fake(name: str) -> Callable[[_Function], _Function]:
    """Register the function that says an op's result shapes and dtypes to the compiler."""

    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"varkern::{name}", function, lib=library)
        return function

    return register


def autograd(name: str, differentiable: Callable[..., Any]) -> None:
    """Send direct calls of an op that need a gradient to ``differentiable``, the ``apply`` of its autograd function."""

    def register(keys: Any, *args: Any) -> Any:
        if needs_gradient(*(arg for arg in args if isinstance(arg, torch.Tensor))):
            if transformed():
                raise RuntimeError(
                    f"torch.ops.varkern.{name} has no derivative within a transform of torch.func or in forward mode: "
                    "call the function of varkern.ops that it serves, which has, or has a sentence why not."
                )
            return differentiable(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    op = getattr(torch.ops.varkern, name).default
    library.impl(name, register, "Autograd", with_keyset=True)
