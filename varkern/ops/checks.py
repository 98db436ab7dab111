"""What an argument of any op may be: each check raises one sentence that names the op, the argument and the fix."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_Tensor, _strided = torch.Tensor, torch.strided  # looked up once: every call asks for them
_FLOATING = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
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


def check_device(op: str, name: str, tensor: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises ``ValueError`` for what does not lie on the device of the tensor called name."""
    for other, value in others.items():
        if value is not None and value.device != tensor.device:
            raise ValueError(f"{op}: {other} is on {value.device} and {name} on {tensor.device}, use one device.")
