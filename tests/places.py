"""Where tests of ops run: on each device that there is, each backend that an op may have there."""

from __future__ import annotations

import pytest
import torch

from varkern.ops._op import Op

PLACES = ("cpu-reference", "cpu-cpu", "cpu-triton")
if torch.cuda.is_available():
    PLACES = ("cpu-reference", "cpu-cpu", "cuda-reference", "cuda-cuda", "cuda-triton")
# Where Triton kernels run: compiled on the device, and where there is none in the interpreter.
TRITON = pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"


def places(*ops: str) -> list[str]:
    """``device-backend`` for the reference and the backends that one of the ops has; all of them without ops."""
    known = {**Op.registry, **Op.inner}
    there = {"reference"}.union(*(known[op].backends for op in ops)) if ops else None
    return [place for place in PLACES if there is None or place.split("-")[1] in there]


def parameter(*values: object) -> object:
    """Of a test, the last value being the place."""
    return pytest.param(*values, marks=[pytest.mark.gpu] * str(values[-1]).startswith("cuda"))
