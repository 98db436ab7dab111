"""Whether a model is still as a CUDA graph was captured with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from varkern.modules.blocks import DropPath
from varkern.modules.plain import is_plain
from varkern.modules.transformer import Transformer

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

    def __init__(self, var: Transformer) -> None:
        self.refusal: str | None = None
        self._tensors: list[tuple[dict[str, Any], str, tuple[Any, ...] | None]] = []
        self._values: list[
            tuple[dict[str, Any], str, object]
        ] = []  # that are the same object as long as they are equal
        self._others: list[tuple[dict[str, Any], str, object]] = []
        self._children: list[tuple[dict[str, Any], str, dict[str, Any]]] = []
        self._sized: list[dict[str, Any]] = []
        self._hooks: list[dict[int, Any]] = [nn.modules.module._global_forward_hooks]
        self._hooks.append(nn.modules.module._global_forward_pre_hooks)
        self._var, self._vae = vars(var), vars(var.vae_proxy[0])
        self._quantizer = vars(var.vae_quant_proxy[0])
        self._add(var)
        self._add(var.vae_proxy[0])
        self._sizes = list(map(len, self._sized))
        changed = next((name for name, module in var.named_modules() if not is_plain(module)), None)
        if changed is not None:  # what it runs may vary from call to call
            self.refusal = f"{changed or 'the model'} is not as it was built but replaced, wrapped or patched"
        if any(self._hooks):
            self.refusal = "a forward hook is registered, which a replay would not call"

    def holds(self) -> bool:
        """Whether a replay still gives what the model would."""
        # Loops, and comparisons by identity first: a generation waits for this.
        if any(self._hooks) or list(map(len, self._sized)) != self._sizes:
            return False
        if vars(self._var["vae_proxy"][0]) is not self._vae:
            return False
        if vars(self._var["vae_quant_proxy"][0]) is not self._quantizer:
            return False
        for modules, name, entries in self._children:
            child = modules.get(name)
            if child is None or child.__dict__ is not entries:
                return False
        for tensors, name, address in self._tensors:
            tensor = tensors.get(name)
            if tensor is None or address is None:
                if tensor is not address:
                    return False
            elif (tensor.data_ptr(), tensor.dtype, tensor.stride()) != address:
                return False
        for entries, name, value in self._values:
            now = entries.get(name, _MISSING)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        return all(_identity(entries.get(name, _MISSING)) == value for entries, name, value in self._others)

    def _add(self, module: nn.Module) -> None:
        entries = vars(module)
        if isinstance(module, nn.Dropout | DropPath) and module.training:
            self.refusal = "the model is in training mode with dropout; call eval()"
        self._hooks += [entries[name] for name in _HOOKS]
        self._sized += [entries, entries["_parameters"], entries["_buffers"], entries["_modules"]]
        for name, value in entries.items():
            if name[0] == "_":  # nn.Module's own, or a setting of training
                continue
            if _plain(value):
                self._values.append((entries, name, value))
            else:
                self._others.append((entries, name, _identity(value)))
        for tensors in (entries["_parameters"], entries["_buffers"]):
            for name, tensor in tensors.items():
                if type(tensor) not in (Tensor, nn.Parameter, type(None)):
                    self.refusal = f"{name} is a {type(tensor).__name__}, whose memory cannot be watched"
                    continue
                self._tensors.append((tensors, name, None if tensor is None else _address(tensor)))
        for name, child in entries["_modules"].items():
            if child is not None:
                self._children.append((entries["_modules"], name, vars(child)))
                self._add(child)


def _address(tensor: Tensor) -> tuple[Any, ...]:
    # The dtype too: memory that is given back may be given out again for smaller elements.
    return tensor.data_ptr(), tensor.dtype, tensor.stride()


def _plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_plain, value)))


def _identity(value: object) -> object:
    """Of something that may be large, or hold the model, and is therefore not kept."""
    return _address(value) if isinstance(value, Tensor) else id(value)
