"""An op, said once: from its schema and six functions follow registration, dispatch, gradients and what is told of it.

    op = Op("scaled_add(Tensor x, Tensor y, float factor) -> Tensor", ("cuda", "cpu"), example)

    @op.check                   # raises for what does not fit, on shapes and dtypes alone
    @op.limits                  # (backend, ...) -> why its kernels cannot serve, or None
    @op.empty                   # uninitialised outputs: what the compiler is told
    @op.reference               # plain PyTorch: the same outputs
    @op.kernels                 # (backend, ...) -> the outputs, computed by kernels
    @op.flops                   # (shapes by name) -> multiplications and additions, if it has any that are counted

    def scaled_add(x, y, factor=1.0):
        return op(x, y, factor)

Every function takes the arguments of the schema. The operator of ``torch.ops.varkern`` has one more at its end, the
backend that was asked for. An op with gradients names another that computes them (``op.gradient``); what that is given
follows from names: ``grad_out`` is the gradient of the output ``out``, ``grad_x`` that of the input ``x``, and any
other argument the forward pass's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from varkern.ops._gradient import gradient_function
from varkern.ops.backends import (
    check_in_place,
    cpu_why_not,
    cuda_why_not,
    current_backend,
    reference_forced,
    transformed,
    triton_why_not,
    warn_where_unbuilt,
)
from varkern.ops.checks import check_floats, check_integer, check_number, check_tensors, check_truth

__all__ = ["Op", "explain"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Example = Callable[[torch.device, torch.dtype], tuple[Any, ...]]

library = torch.library.Library("varkern", "DEF")

# Which backends are tried for tensors of a device, in this order. Interpreted Triton kernels serve CPU tensors too, but
# they are slower than the reference and run only where they are asked for by name.
_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_ABSENT = {"cpu": cpu_why_not, "cuda": cuda_why_not, "triton": triton_why_not}


class Op:
    """One op (module docstring).

    Args:
        schema: as PyTorch writes them, without the backend. What is written to is ``Tensor(a!)``.
        backends: those that have kernels for it.
        example: arguments for a device and a dtype, all of the schema's.
        integers: the tensors that hold integers; all others are floating point.
        no_gradient: for an op of inference, how to train instead: the end of a sentence.
        detached: what it gives depends on no input in a way that has a derivative. It is left to PyTorch within
            transforms alone, where other ops are under the reference backend too.
        written_from: the tensors that what is written depends on, all others unless named.
    """

    registry: ClassVar[dict[str, Op]] = {}
    inner: ClassVar[dict[str, Op]] = {}  # those that serve the gradients of others

    def __init__(
        self,
        schema: str,
        backends: Sequence[str],
        example: _Example,
        *,
        integers: Sequence[str] = (),
        no_gradient: str | None = None,
        detached: bool = False,
        written_from: Sequence[str] | None = None,
    ) -> None:
        arguments, _, returns = schema.rpartition(") -> ")
        library.define(f"{arguments}, str? backend) -> {returns}")
        parsed = torch._C.parse_schema(schema)
        self.name: str = parsed.name
        self.backends, self.example = tuple(backends), example
        self.no_gradient, self.detached = no_gradient, detached
        self.names = tuple(argument.name for argument in parsed.arguments)
        self.outputs = tuple(output.name or "out" for output in parsed.returns)
        kinds = [str(argument.type) for argument in parsed.arguments]
        self.tensors = tuple(i for i, kind in enumerate(kinds) if "Tensor" in kind)
        self._written = [i for i in self.tensors if (info := parsed.arguments[i].alias_info) and info.is_write]
        self._dtypes = [
            (i, _INTEGERS if self.names[i] in integers else _FLOATING, kinds[i].startswith("Optional"))
            for i in self.tensors
        ]
        # Lists of integers are made by the public functions, which have looked at what they are made of.
        self._numbers = [(i, _NUMBERS[kind]) for i, kind in enumerate(kinds) if kind in _NUMBERS]
        self._written_from = written_from
        self._check_values: Callable[..., None] = lambda *_: None
        self._limits: Callable[..., str | None] = lambda *_: None
        self._function: Callable[..., Any] | None = None
        self._worthwhile: Callable[..., bool] | None = None
        self._by_pytorch: Callable[..., bool] | None = None
        self._eager: Callable[..., Any] | None = None
        self.formula: Callable[[Any], int] | None = None
        self.operator = getattr(torch.ops.varkern, self.name).default
        self._register()
        Op.registry[self.name] = self

    def check(self, function: _Function) -> _Function:
        self._check = function
        return function

    def check_values(self, function: _Function) -> _Function:
        """What can only be seen on real tensors."""
        self._check_values = function
        return function

    def limits(self, function: _Function) -> _Function:
        self._limits = function
        return function

    def worthwhile(self, function: _Function) -> _Function:
        """Whether kernels are faster than PyTorch for a call, where no backend was asked for."""
        self._worthwhile = function
        return function

    def empty(self, function: _Function) -> _Function:
        self._empty = function
        return function

    def reference(self, function: _Function) -> _Function:
        self._reference = function
        return function

    def by_pytorch(self, function: _Function) -> _Function:
        """Whether a call is for PyTorch to compute and to differentiate, where no backend was asked for."""
        self._by_pytorch = function
        return function

    def eager(self, function: _Function) -> _Function:
        """What the public function is in plain PyTorch, where that is not the operator's reference itself."""
        self._eager = function
        return function

    def kernels(self, function: _Function) -> _Function:
        self._kernels = function
        return function

    def flops(self, function: Callable[[Any], int]) -> Callable[[Any], int]:
        self.formula = lambda *shapes, **_: function(SimpleNamespace(**dict(zip(self.names, shapes, strict=False))))
        return function

    def gradient(self, backward: Op, forward: Op | None = None) -> None:
        """Differentiate by ``backward``, after ``forward`` if training keeps more outputs than this op has."""
        self._function = gradient_function(self, forward or self, backward)
        for other in (backward, forward):
            if other is not None:
                Op.inner[other.name] = Op.registry.pop(other.name, other)

    def __call__(self, *args: Any) -> Any:
        """What a public function of these arguments does."""
        self.check_types(args)
        if self.detached and (torch.is_grad_enabled() or forward_ad._current_level >= 0):
            args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        by_pytorch = self._by_pytorch is not None and current_backend() is None and self._by_pytorch(*args)
        if transformed() if self.detached else by_pytorch or reference_forced():
            return self.plain(*args)
        if self.needs_gradient(args):
            return self._differentiate(*args, current_backend())
        return self.operator(*args, current_backend())

    def validate(self, *args: Any) -> None:
        """Raises for arguments that the op refuses."""
        self.check_types(args)
        self._check(*args)
        self._check_values(*args)

    def call(self, *args: Any) -> Any:
        """The operator, or its differentiable form where a gradient is needed, whatever is forced."""
        self.check_types(args)
        if self.needs_gradient(args):
            return self._differentiate(*args, current_backend())
        return self.operator(*args, current_backend())

    def plain(self, *args: Any) -> Any:
        """The reference, after the checks, for PyTorch to differentiate."""
        if self.no_gradient is not None and self.needs_gradient(args):
            self._differentiate()
        self._check(*args)
        self._check_values(*args)
        self._check_in_place(args)
        return (self._eager or self._reference)(*args)

    def needs_gradient(self, args: Sequence[Any]) -> bool:
        """Whether a call has to enter autograd: to record a gradient, or to refuse forward-mode differentiation."""
        if forward_ad._current_level >= 0:
            return not self.detached
        if self.detached or not torch.is_grad_enabled():
            return False
        return any(args[i] is not None and args[i].requires_grad for i in self.tensors)

    def why_not(self, backend: str, *args: Any) -> str | None:
        """Why a backend of this op cannot serve a call (a clause without a full stop), or ``None`` when it can."""
        return _ABSENT[backend](args[0]) or self._limits(backend, *args)

    def choose(self, backend: str | None, *args: Any) -> str:
        """The backend that computes a call; ``backend`` is the one that was asked for.

        Raises ``RuntimeError`` where that is a backend of this op and cannot serve.
        """
        if backend == "reference":
            return backend
        if backend in self.backends:
            reason = self.why_not(backend, *args)
            if reason is None:
                return backend
            raise RuntimeError(
                f"The backend {backend!r} cannot run {self.name}: {reason}. "
                f"Leave VARKERN_BACKEND and use_backend unset to choose freely, or name another backend."
            )
        if backend is None and self._worthwhile is not None and not self._worthwhile(*args):
            return "reference"
        device = args[0].device.type
        for name in _AUTOMATIC.get(device, ()):
            if name in self.backends and (_ABSENT[name](args[0]) or self._limits(name, *args)) is None:
                return name
        if device == "cpu" and backend is None and "cpu" in self.backends:
            warn_where_unbuilt()
        return "reference"

    def check_types(self, args: Sequence[Any]) -> None:
        """Raises ``TypeError`` or ``ValueError`` for what is not of the schema's types."""
        self._check_tensors(args)
        for i, check in self._numbers:
            check(self.name, self.names[i], args[i])

    def _check_tensors(self, args: Sequence[Any]) -> None:
        # Quickly what is right, which is what every call pays for.
        for i, dtypes, optional in self._dtypes:
            tensor = args[i]
            if tensor is None and optional:
                continue
            if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes or tensor.layout is not _strided:
                check = check_floats if dtypes is _FLOATING else check_tensors
                check(self.name, self.names[i : i + 1], (tensor,))

    def _check_in_place(self, args: Sequence[Any]) -> None:
        for i in self._written:
            others = (args[j] for j in self.tensors if j != i and self._reaches(self.names[j]))
            check_in_place(self.name, self.names[i], args[i], *others)

    def _reaches(self, name: str) -> bool:
        return self._written_from is None or name in self._written_from

    def _differentiate(self, *args: Any) -> Any:
        if self._function is not None:
            return self._function(*args)
        raise RuntimeError(
            f"{self.name} has no gradient: call it under torch.no_grad() or torch.inference_mode(), or "
            f"{self.no_gradient}."
        )

    def _register(self) -> None:
        def run(*args: Any) -> Any:
            """On real tensors, below autograd, whatever their device."""
            args, backend = args[:-1], args[-1]
            self._check_tensors(args)
            self._check(*args)
            self._check_values(*args)
            backend = self.choose(backend, *args)
            if backend == "reference":
                return self._reference(*args)
            if args[0].is_cuda:
                with torch.cuda.device(args[0].device):  # which launches need
                    return self._kernels(backend, *args)
            return self._kernels(backend, *args)

        def fake(*args: Any) -> Any:
            args = args[:-1]
            self._check_tensors(args)
            self._check(*args)
            return self._empty(*args)

        def autograd(keys: Any, *args: Any) -> Any:
            if self.needs_gradient(args):
                if transformed():
                    raise RuntimeError(
                        f"torch.ops.varkern.{self.name} has no derivative within a transform of torch.func or in "
                        "forward mode: call the function of varkern.ops that it serves, which has, or has a sentence "
                        "why not."
                    )
                return self._differentiate(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return self.operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

        library.impl(self.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"varkern::{self.name}", fake, lib=library)
        if not self.detached:
            library.impl(self.name, autograd, "Autograd", with_keyset=True)


def _optional(check: Callable[..., None]) -> Callable[..., None]:
    def check_present(op: str, name: str, value: object) -> None:
        if value is not None:
            check(op, name, value)

    return check_present


_NUMBERS: dict[str, Callable[..., None]] = {
    "int": check_integer,
    "SymInt": check_integer,
    "float": check_number,
    "Optional[float]": _optional(check_number),
    "bool": check_truth,
}
_strided = torch.strided  # looked up once: every call asks for it
_FLOATING = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
_INTEGERS = frozenset((torch.int64,))


def explain(op: str, *args: object) -> dict[str, str | None]:
    """For each backend of an op, why it cannot serve a call with these arguments, or ``None``: it can.

    >>> explain("modulated_layer_norm", x, scale, shift)
    {'cuda': 'the tensors are on cpu, not on a CUDA device', 'triton': ..., 'cpu': None, 'reference': None}
    """
    if op not in Op.registry:
        raise ValueError(f"There is no op {op!r}: name one of {', '.join(sorted(Op.registry))}.")
    found = Op.registry[op]
    return {name: found.why_not(name, *args) for name in found.backends} | {"reference": None}


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether a call has to enter autograd: to record a gradient, or to refuse forward-mode differentiation."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
