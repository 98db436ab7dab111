"""The differentiable form of an op: an autograd function that is read off the schemas of two operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["gradient_function", "once_differentiable"]


def gradient_function(op: Any, forward: Any, backward: Any) -> Callable[..., Any]:
    """``apply`` of the autograd function that computes an ``Op`` by ``forward`` and its gradients by ``backward``.

    ``forward`` has the inputs of ``op``, and outputs that begin with those of ``op``. An argument of ``backward`` is an
    input, an output, or the gradient ``grad_...`` of an output; its outputs are gradients of inputs. What is an output
    of ``op`` and has no such gradient is a constant.
    """
    returned = len(op.outputs)
    inputs = [i for i in op.tensors if op.names[i] in backward.names]
    settings = [i for i, name in enumerate(op.names) if name in backward.names and i not in op.tensors]
    outputs = [i for i, name in enumerate(forward.outputs) if name in backward.names]
    constants = [i for i, name in enumerate(op.outputs) if f"grad_{name}" not in backward.names]
    incoming = [i for i in range(returned) if i not in constants]
    # Where each argument of backward lies in: incoming gradients, saved tensors, settings.
    order = [f"grad_{op.outputs[i]}" for i in incoming] + [op.names[i] for i in inputs]
    order += [forward.outputs[i] for i in outputs] + [op.names[i] for i in settings]
    passed = [order.index(name) for name in backward.names]
    # For each input: its gradient among those of backward, and its own place among the saved tensors, if it is saved.
    gradient = [
        backward.outputs.index(f"grad_{name}") if f"grad_{name}" in backward.outputs else None for name in op.names
    ]
    place = [inputs.index(i) if i in inputs else None for i in range(len(op.names))]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            results = forward.operator(*args)
            results = (results,) if isinstance(results, Tensor) else results
            ctx.save_for_backward(*[args[i] for i in inputs], *[results[i] for i in outputs])
            ctx.settings = [args[i] for i in settings]
            ctx.backend = args[-1]
            if constants:
                ctx.mark_non_differentiable(*[results[i] for i in constants])
            return results[0] if returned == 1 else tuple(results[:returned])

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            given = [*[grad_outputs[i] for i in incoming], *saved, *ctx.settings]
            grads = once_differentiable(
                op.name,
                [tensor for tensor in given if isinstance(tensor, Tensor)],
                lambda: backward.operator(*[given[i] for i in passed], ctx.backend),
            )
            absent = [at is not None and saved[at] is None for at in place]
            each = [None if i is None or gone else grads[i] for i, gone in zip(gradient, absent, strict=True)]
            return (*each, None)

    return Function.apply


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
