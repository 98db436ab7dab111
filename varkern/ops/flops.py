"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of the ops: multiply-adds as two operations each.

Counted are, as PyTorch counts its own, products: matrices, convolutions and attention. Norms, sampling, softmax and
interpolation are not. A generation or a training step has the count of the same call under
``use_backend("reference")``, but for this:

* Block-causal attention counts the visible pairs of positions, ``sum over scales of n_k * (n_1 + ... + n_k)``, 4 D
  operations each forwards and 10 D backwards, where the scores are computed again. The reference's dense mask makes
  PyTorch count the hidden pairs too, L * L in all.
* PyTorch has no formula for its attention on CPUs nor for ``addmm_``, so the reference counts no attention there, and
  nowhere the search for the nearest codes, 2 V Cv operations a position. The ops count both.
* The engine does less than the reference: the products of a block's conditions once an image and not once a scale, and
  the head on half of the rows, after guidance.
* A convolution counts the products of its definition, whatever the algorithm: Winograd's form multiplies less often.
* The backward pass of the quantizer computes all its gradients, also those that nothing asked for.

PyTorch's module is slow to import. So the formulas are registered when somebody imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch

from varkern.ops._op import Op

__all__ = ["register_formulas", "visible_pairs"]

_COUNTER = "torch.utils.flop_counter"


def visible_pairs(lengths: Sequence[int]) -> int:
    """How many pairs of a position and one that it sees block-causal attention has."""
    return sum(n * end for n, end in zip(lengths, accumulate(lengths), strict=True))


def _register(counter: Any) -> None:
    for op in (*Op.registry.values(), *Op.inner.values()):
        if op.formula is not None:
            counter.register_flop_formula(getattr(torch.ops.varkern, op.name))(op.formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas as soon as PyTorch's module has run, and finds nothing else."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec: ModuleSpec | None = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_formulas() -> None:
    """To be called once, when all ops are defined."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
