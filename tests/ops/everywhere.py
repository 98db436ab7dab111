"""Which samples run where, and the layouts in memory that all ops take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import CASES, op_of
from places import parameter, places
from torch import Tensor

from varkern.ops import backends

INTERPRETED = {"cpu-triton"} if backends.interpreting() else set()


def everywhere(
    samples: Iterable[str], in_the_interpreter: Callable[[str], bool] = lambda _: True, kernels: bool = False
) -> Any:
    """Each sample in each place of its op; in Triton's interpreter, which takes seconds for some, not all of them.

    ``kernels``: not by the reference.
    """
    grid = [(name, place) for name in samples for place in places(op_of(name).name)]
    grid = [(name, place) for name, place in grid if not (kernels and place.endswith("reference"))]
    grid = [(name, place) for name, place in grid if place not in INTERPRETED or in_the_interpreter(name)]
    return pytest.mark.parametrize(("name", "device"), [parameter(*case) for case in grid], indirect=["device"])


def quick(name: str) -> bool:
    """In the interpreter."""
    return name in CASES and "triton" in op_of(name).backends and not name.startswith(("residual", "teacher"))


def spread(tensor: Tensor) -> Tensor:
    """With gaps between the elements of the last axis."""
    return tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor


def turned(tensor: Tensor) -> Tensor:
    """With its first two axes in the other order in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


def cut(tensor: Tensor) -> Tensor:
    """Out of a wider tensor, not at its begin."""
    return torch.cat((tensor[..., :1], tensor, tensor[..., :2]), -1)[..., 1 : tensor.size(-1) + 1]


def expanded(tensor: Tensor) -> Tensor:
    """One row for all."""
    return tensor[:1].expand_as(tensor) if tensor.dim() else tensor


LAYOUTS = {"spread": spread, "turned": turned, "cut": cut, "expanded": expanded}
