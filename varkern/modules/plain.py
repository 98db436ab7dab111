"""Which modules a fused path may stand in for. This is the one place that decides.

A fused path computes what several modules compute, without calling them. That is right only as long as each of them is
exactly what its constructor made: other people's code replaces, wraps, patches, hooks, parametrizes, quantizes and
shards modules, and expects to be called. So every fused path asks `is_plain` about each module that it bypasses, at
each call, and where the answer is no it calls the modules in the published order instead. What a fused path calls
anyway (the linear layers of the transformer) may be anything.

An answer takes about a microsecond: a generation asks once a module, not once a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

__all__ = ["compute_dtype", "fusable", "is_plain", "is_plain_conv", "is_plain_norm", "runs_as_built"]

_Module = TypeVar("_Module", bound=type[nn.Module])

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(nn_module, "_global" + name) for name in _HOOKS)
_PLAIN_TENSORS = frozenset((nn.Parameter, Tensor, type(None)))  # Tensor: what torch.func.functional_call puts there
_CALL = nn.Module.__call__


class _Made:
    """A class as it was when it was registered."""

    def __init__(self, kind: type[nn.Module]) -> None:
        below = kind.__mro__[: kind.__mro__.index(nn.Module)]
        found = {name: value for base in reversed(below) for name, value in vars(base).items()}
        # What an instance may not have of its own: it would shadow a method.
        self.names = frozenset(k for k, value in found.items() if callable(value) or isinstance(value, property))
        self.forward = kind.forward


_LAYERS = nn.Conv2d, nn.Embedding, nn.GroupNorm, nn.LayerNorm, nn.Linear
_OTHERS = nn.Dropout, nn.GELU, nn.Identity, nn.ModuleList, nn.Sequential, nn.SiLU
_MADE: dict[type[nn.Module], _Made] = {kind: _Made(kind) for kind in (*_LAYERS, *_OTHERS)}


def fusable(kind: _Module) -> _Module:
    """Class decorator: instances of exactly this class may be replaced by a fused path while they are plain."""
    _MADE[kind] = _Made(kind)
    return kind


def is_plain(module: nn.Module) -> bool:
    """Whether a module is as its constructor made it, but for the values of its tensors.

    It is not if its type is a subclass, a wrapper or anything that no fused path knows; if it, or every module, has a
    hook; if its ``forward`` or another method was replaced, on the instance or the class, or compiled; if a parameter
    or buffer is a tensor subclass (sharded, quantized). Its submodules and settings are for the caller to ask about.
    """
    kind, entries = type(module), module.__dict__
    if not _untouched(kind, entries) or entries.get("_compiled_call_impl") is not None:
        return False
    for name in _HOOKS:
        if entries[name]:
            return False
    for tensors in (entries["_parameters"], entries["_buffers"]):
        for tensor in tensors.values():
            if type(tensor) not in _PLAIN_TENSORS:
                return False
    return True


def runs_as_built(module: nn.Module) -> bool:
    """Whether a module that is called runs the ``forward`` of its class on the arguments that it is given.

    So may run more than what is plain: a module that is compiled or sharded by ``fully_shard``.
    """
    kind, entries = type(module), module.__dict__
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and kind.__bases__[0] is getattr(fsdp, "FSDPModule", None):
        kind = kind.__bases__[1]
    return _untouched(kind, entries) and not any(map(_foreign, (entries[name].values() for name in _HOOKS)))


def _untouched(kind: type[nn.Module], entries: dict[str, Any]) -> bool:
    made = _MADE.get(kind)
    if made is None or kind.forward is not made.forward or nn.Module.__call__ is not _CALL:
        return False
    for hooks in _GLOBAL_HOOKS:
        if hooks and not all(map(_only_looks, hooks.values())):
            return False
    return not any(name in entries for name in made.names)  # which every compiler in use can trace


def _only_looks(hook: object) -> bool:
    """Whether a hook of every module is FlopCounterMode's, which is to count the products of a fused path."""
    return type(getattr(hook, "__self__", None)).__module__ == "torch.utils.module_tracker"


def _foreign(hooks: Iterable[Any]) -> bool:
    """Whether there are hooks other than those by which ``fully_shard`` gathers parameters."""
    owners = (type(getattr(hook, "__self__", None)).__module__ for hook in hooks)
    return any(not owner.startswith("torch.distributed.fsdp") for owner in owners)


def is_plain_conv(conv: nn.Module, kernel: int) -> bool:
    """Whether it is a plain convolution with a bias that keeps the size of a map: stride 1, zeros around it."""
    return (
        isinstance(conv, nn.Conv2d)
        and is_plain(conv)
        and conv.bias is not None
        and conv.kernel_size == (kernel, kernel)
        and conv.padding == (kernel // 2, kernel // 2)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def is_plain_norm(norm: nn.Module, width: int) -> bool:
    """Whether it is a plain layer norm over the last axis, of this width, without multiplier and offset."""
    return (
        isinstance(norm, nn.LayerNorm) and is_plain(norm) and norm.normalized_shape == (width,) and norm.weight is None
    )


def compute_dtype(module: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """The floating-point type that a module's input should have, be it a linear layer, a wrapper, or quantized.

    That of its weight, or of the first of its parameters and buffers that is floating-point.
    """
    weight: object = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    every: tuple[Callable[[], Any], ...] = (module.parameters, module.buffers)
    return next((t.dtype for tensors in every for t in tensors() if t.is_floating_point()), default)
