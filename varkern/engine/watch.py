"""Whether a model is still as a CUDA graph was captured with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from varkern.models.blocks import DropPath
from varkern.models.var import VAR

_MISSING = object()
_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Watch:
    """What a captured generation depends on in the modules of a transformer and its tokenizer.

    A graph holds the addresses of parameters and buffers, so their values may change in place, but not their memory,
    dtype or strides; and it holds what the modules' Python chose by their attributes and submodules. Taken once, in
    flat lists, so that `holds` takes little of the time of a generation. It does not keep the model alive, but the
    modules' dictionaries, and with them their tensors: it has to go when the model goes.

    refusal: why the model cannot be captured at all, or None.
    """

    def __init__(self, var: VAR) -> None:
        self.refusal: str | None = None
        self._tensors: list[tuple[dict[str, Any], str, tuple[object, ...]]] = []
        self._values: list[tuple[dict[str, Any], str, object]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._children: list[tuple[dict[str, Any], str, dict[str, Any]]] = []
        self._hooks: list[dict[int, Any]] = [nn.modules.module._global_forward_hooks]
        self._hooks.append(nn.modules.module._global_forward_pre_hooks)
        self._var, self._vae = vars(var), vars(var.vae_proxy[0])
        self._quantizer = vars(var.vae_quant_proxy[0])
        self._add(var)
        self._add(var.vae_proxy[0])
        if any(self._hooks):
            self.refusal = "a forward hook is registered, which a replay would not call"

    def holds(self) -> bool:
        """Whether a replay still gives what the model would."""
        return (
            not any(self._hooks)
            and vars(self._var["vae_proxy"][0]) is self._vae
            and vars(self._var["vae_quant_proxy"][0]) is self._quantizer
            and all(len(entries) == size for entries, size in self._sizes)
            and all(_module_dict(modules.get(name)) is entries for modules, name, entries in self._children)
            and all(_address(tensors.get(name)) == address for tensors, name, address in self._tensors)
            and all(_plain(entries.get(name, _MISSING)) == value for entries, name, value in self._values)
        )

    def _add(self, module: nn.Module) -> None:
        entries = vars(module)
        if isinstance(module, nn.Dropout | DropPath) and module.training:
            self.refusal = "the model is in training mode with dropout; call eval()"
        self._hooks += [entries[name] for name in _HOOKS]
        self._sizes.append((entries, len(entries)))
        # What begins with an underscore is nn.Module's or a setting of training.
        self._values += [(entries, name, _plain(value)) for name, value in entries.items() if name[0] != "_"]
        for tensors in (entries["_parameters"], entries["_buffers"]):
            self._sizes.append((tensors, len(tensors)))
            for name, tensor in tensors.items():
                if type(tensor) not in (Tensor, nn.Parameter, type(None)):
                    self.refusal = f"{name} is a {type(tensor).__name__}, whose memory cannot be watched"
                    continue
                self._tensors.append((tensors, name, _address(tensor)))
        modules = entries["_modules"]
        self._sizes.append((modules, len(modules)))
        for name, child in modules.items():
            if child is not None:
                self._children.append((modules, name, vars(child)))
                self._add(child)


def _module_dict(module: nn.Module | None) -> dict[str, Any] | None:
    return None if module is None else vars(module)


def _address(tensor: Tensor | None) -> tuple[object, ...]:
    # The dtype too: memory that is given back may be given out again for smaller elements.
    return () if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.stride())


def _plain(value: object) -> object:
    """Something to compare that keeps nothing alive."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return _address(value)
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return id(value)
