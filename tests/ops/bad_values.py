"""How the arguments of a call are spoiled: for each kind of argument the values that do not belong there.

A spoiler is (kind, value). ``SURELY_BAD`` names the kinds that no function may take; the others may have a meaning, and
then the result must be the reference's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

HUGE = (2**31, 2**62, 2**63, 2**70, -(2**63) - 1)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64, torch.uint16, torch.uint64, torch.complex64)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)

_BAD = (
    ("no tensor", "rank", "meta", "sparse", "other dtype", "8-bit float", "huge axis", "out of range"),
    ("no number", "huge number", "not a finite number", "no list", "empty list", "bad entry", "no name"),
)
SURELY_BAD = frozenset(kind for kinds in _BAD for kind in kinds)


class Subclass(Tensor):
    """A tensor subclass that changes nothing."""


def _resized(rng: random.Random, t: Tensor) -> Tensor:
    axis = rng.randrange(t.dim())
    if rng.random() < 0.5 and t.size(axis) > 1:
        return t.narrow(axis, 0, t.size(axis) - 1).clone()
    return torch.cat((t, t.narrow(axis, 0, 1)), axis)


def _emptied(rng: random.Random, t: Tensor) -> Tensor:
    return t.narrow(rng.randrange(t.dim()), 0, 0).clone()


def _strided(rng: random.Random, t: Tensor) -> Tensor:
    wide = torch.cat((t, t), -1)
    wide[..., ::2] = t
    return wide[..., ::2]


def _permuted(rng: random.Random, t: Tensor) -> Tensor:
    order = rng.sample(range(t.dim()), t.dim())
    inverse = [order.index(axis) for axis in range(t.dim())]
    return t.permute(order).contiguous().permute(inverse)


def _expanded(rng: random.Random, t: Tensor) -> Tensor:
    axis = rng.randrange(t.dim())
    return t.narrow(axis, 0, 1).expand(t.shape) if t.size(axis) else t


def _huge_axis(rng: random.Random, t: Tensor) -> Tensor:
    shape = list(t.shape)
    axis = rng.randrange(t.dim())
    if not all(shape):
        return t.new_zeros(()).expand([2**45] * t.dim() if t.dim() == 1 else [2**45, *shape[1:]])
    shape[axis] = 2**45
    return t.narrow(axis, 0, 1).expand(shape)


def _somewhere(rng: random.Random, t: Tensor) -> tuple[int, ...]:
    return tuple(rng.randrange(n) for n in t.shape)


def _poisoned(rng: random.Random, t: Tensor) -> Tensor:
    poisoned = t.clone()
    if t.numel():
        poisoned[_somewhere(rng, t)] = rng.choice((torch.nan, torch.inf, -torch.inf))
    return poisoned


def _out_of_range(rng: random.Random, t: Tensor) -> Tensor:
    spoiled = t.clone()
    value = rng.choice((-1, 2**20, 2**40, 2**62, -(2**63)))
    limits = torch.iinfo(t.dtype)
    spoiled[_somewhere(rng, t)] = max(limits.min, min(limits.max, value))
    return spoiled


def _tensor_spoilers(rng: random.Random, t: Tensor) -> dict[str, Callable[[], Any]]:
    whole = not t.is_floating_point()
    spoilers: dict[str, Callable[[], Any]] = {
        "no tensor": lambda: rng.choice((None, "tensor", 2.5, t.tolist(), t.numpy(), object())),
        "rank": lambda: rng.choice((t.unsqueeze(0), t.unsqueeze(-1).unsqueeze(0), t[0] if t.dim() else t, t.sum())),
        "size": lambda: _resized(rng, t),
        "zero": lambda: _emptied(rng, t),
        "strides": lambda: rng.choice((_strided, _permuted, _expanded))(rng, t),
        "huge axis": lambda: _huge_axis(rng, t),
        "meta": lambda: t.to("meta"),
        "sparse": lambda: t.to_sparse(),
        "subclass": lambda: t.clone().as_subclass(Subclass),
    }
    if whole:
        spoilers["other dtype"] = lambda: t.to(rng.choice((*FLOATS, torch.bool, torch.complex64)))
        spoilers["other integer"] = lambda: t.to(rng.choice((torch.int8, torch.uint8, torch.int16, torch.int32)))
        spoilers["out of range"] = lambda: _out_of_range(rng, t)
    else:
        spoilers["other dtype"] = lambda: t.to(rng.choice(OTHERS))
        spoilers["8-bit float"] = lambda: t.to(rng.choice(EIGHT_BITS))
        spoilers["other float"] = lambda: t.to(rng.choice(FLOATS))
        spoilers["no finite values"] = lambda: _poisoned(rng, t)
        spoilers["gradient"] = lambda: t.clone().requires_grad_()
    return spoilers


def _number_spoilers(rng: random.Random, value: Any) -> dict[str, Callable[[], Any]]:
    whole = isinstance(value, int) and not isinstance(value, bool)
    spoilers: dict[str, Callable[[], Any]] = {
        "no number": lambda: rng.choice((None, "3", [value], (value,), {}, object(), 1 + 2j, b"1")),
        "negative": lambda: -abs(value) - 1,
        "nothing": lambda: 0,
        "numpy": lambda: (np.int64 if whole else np.float32)(value),
        "tensor": lambda: torch.tensor(value),
        "many": lambda: torch.tensor([value, value]),
    }
    if whole:
        spoilers["huge number"] = lambda: rng.choice(HUGE)
        spoilers["fraction"] = lambda: value + 0.5
        spoilers["not a finite number"] = lambda: rng.choice((float("nan"), float("inf"), -float("inf")))
    else:
        spoilers["huge number"] = lambda: rng.choice((10**400, -(10**400)))
        spoilers["not finite"] = lambda: rng.choice((float("nan"), float("inf"), -float("inf")))
        spoilers["large"] = lambda: rng.choice((1e308, 2.0, -1e308))
    return spoilers


def _list_spoilers(rng: random.Random, values: list[Any] | tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    def change(entry: Any) -> list[Any]:
        changed = list(values)
        changed[rng.randrange(len(changed))] = entry
        return changed

    def spoil_one() -> list[Any]:
        changed, i = list(values), rng.randrange(len(values))
        changed[i] = spoiled(rng, changed[i])[1]
        return changed

    if not values:
        return {"no list": lambda: rng.choice((2.5, object())), "bad entry": lambda: ["x"]}
    return {
        "no list": lambda: rng.choice((None, 2.5, object())),
        "empty list": lambda: [],
        "bad entry": lambda: change(rng.choice((None, "x", object(), {}, 1j))),
        "fewer": lambda: list(values)[:-1],
        "more": lambda: [*values, values[-1]],
        "reversed": lambda: list(values)[::-1],
        "one spoiled": spoil_one,
    }


def spoiled(rng: random.Random, value: Any) -> tuple[str, Any]:
    """(kind, value): another value in the place of a valid one."""
    if isinstance(value, Tensor):
        spoilers = _tensor_spoilers(rng, value)
        if value.dim() == 0 or value.numel() == 0:
            spoilers = {kind: spoilers[kind] for kind in ("no tensor", "meta", "other dtype", "sparse")}
    elif isinstance(value, bool):
        spoilers = {"no truth value": lambda: rng.choice(("yes", None, object(), [True]))}
    elif isinstance(value, int | float):
        spoilers = _number_spoilers(rng, value)
    elif isinstance(value, str):
        spoilers = {"no name": lambda: rng.choice(("", "tpu", 3, object(), "Reference", ["cpu"]))}
    elif isinstance(value, list | tuple):
        spoilers = _list_spoilers(rng, value)
    else:
        spoilers = {"no tensor": lambda: rng.choice(("x", object(), [1], 1j, {}))}
    kind = rng.choice(sorted(spoilers))
    return kind, spoilers[kind]()


def describe(value: Any) -> str:
    """A short line for a report."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        gradient = " requires_grad" if value.requires_grad else ""
        strides = f" strides {value.stride()}" if not layout and not value.is_contiguous() else ""
        text = f"{type(value).__name__}[{value.dtype} {tuple(value.shape)} {value.device}{layout}{strides}{gradient}]"
        if not layout and value.device.type == "cpu" and value.dtype == torch.int64 and value.numel() < 20:
            text += str(value.tolist())
        return text
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(describe, value)) + "]"
    if isinstance(value, np.ndarray):
        return f"ndarray{value.shape}"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
