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
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch

__all__ = ["FORMULAS", "register_formulas", "visible_pairs"]

Shape = Sequence[int]

_COUNTER = "torch.utils.flop_counter"


def visible_pairs(lengths: Sequence[int]) -> int:
    """How many pairs of a position and one that it sees block-causal attention has."""
    return sum(n * end for n, end in zip(lengths, accumulate(lengths), strict=True))


def _attention(q: Shape, k: Shape, v: Shape, lengths: Sequence[int], *_: Any, **__: Any) -> int:
    B, H, _L, D = q
    return 4 * B * H * D * visible_pairs(lengths)


def _attention_backward(
    grad_out: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    out: Shape,
    statistics: Shape,
    lengths: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return _attention(q, k, v, lengths) * 5 // 2


def _attention_qkv(
    qkv: Shape, q_bias: Any, v_bias: Any, log_scale: Any, lengths: Sequence[int], *_: Any, **__: Any
) -> int:
    B, _L, _3, H, D = qkv
    return 4 * B * H * D * visible_pairs(lengths)


def _attention_qkv_backward(
    grad_out: Shape,
    qkv: Shape,
    q_bias: Any,
    v_bias: Any,
    log_scale: Any,
    out: Shape,
    statistics: Shape,
    lengths: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return _attention_qkv(qkv, q_bias, v_bias, log_scale, lengths) * 5 // 2


def _cached_attention(qkv: Shape, cache: Shape, position: int, *_: Any, **__: Any) -> int:
    B, n, _3, H, D = qkv
    return 4 * B * H * D * n * (position + n)


def _convolution(B: int, height: int, width: int, weight: Shape) -> int:
    """3x3, padded, with weight (Cout, C, 3, 3)."""
    return 2 * B * height * width * weight[0] * weight[1] * 9


def _conv3x3(
    x: Shape,
    weight: Shape,
    bias: Any,
    norm_weight: Any,
    norm_bias: Any,
    groups: int,
    eps: float,
    residual: Any,
    upsample: bool,
    *_: Any,
    **__: Any,
) -> int:
    return _convolution(x[0], x[2] << upsample, x[3] << upsample, weight)


def _phis(bank: Shape, scales: int, B: int, height: int, width: int) -> int:
    """The convolutions phi of some scales, at full size, bank (n, Cv, Cv, 3, 3); n = 0 is the identity."""
    return scales * _convolution(B, height, width, bank[1:]) if bank[0] else 0


def _quantize(
    features: Shape,
    codebook: Shape,
    phi_weight: Shape,
    phi_bias: Shape,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    B, _Cv, height, width = features
    searched = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    search = 2 * B * searched * codebook[0] * codebook[1]
    return search + _phis(phi_weight, len(phi_of_scale), B, height, width)


def _quantize_backward(
    grad_f_hats: Shape,
    indices: Shape,
    codebook: Shape,
    phi_weight: Shape,
    phi_bias: Shape,
    ratio: float,
    phi_of_scale: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    K, B, _Cv, height, width = grad_f_hats
    return 2 * _phis(phi_weight, K, B, height, width)  # of the map and of the weight


def _dequantize(
    indices: Shape,
    codebook: Shape,
    phi_weight: Shape,
    phi_bias: Shape,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    height: int,
    width: int,
    *_: Any,
    **__: Any,
) -> int:
    return _phis(phi_weight, len(phi_of_scale), indices[0], height, width)


def _teacher_forcing_input(
    indices: Shape,
    codebook: Shape,
    phi_weight: Shape,
    phi_bias: Shape,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return _phis(phi_weight, len(phi_of_scale), indices[0], sizes[-2], sizes[-1])


def _next_scale_input(f_hat: Shape, codes: Shape, phi_weight: Shape | None, *_: Any, **__: Any) -> int:
    return 0 if phi_weight is None else _convolution(f_hat[0], f_hat[2], f_hat[3], phi_weight)


FORMULAS: dict[str, Callable[..., int]] = {
    "block_causal_attention": _attention,
    "block_causal_attention_backward": _attention_backward,
    "block_causal_attention_qkv": _attention_qkv,
    "block_causal_attention_qkv_backward": _attention_qkv_backward,
    "cached_attention": _cached_attention,
    "conv3x3": _conv3x3,
    "next_scale_input": _next_scale_input,
    "residual_dequantize": _dequantize,
    "residual_quantize": _quantize,
    "residual_quantize_backward": _quantize_backward,
    "teacher_forcing_input": _teacher_forcing_input,
}


def _register(counter: Any) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.varkern, name))(formula)


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
