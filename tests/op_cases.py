"""One valid call of every registered op, small, of sizes that every backend takes. Imports nothing of pytest.

All inputs are float32 or int64 on the CPU by name, whatever the defaults are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varkern import ops
from varkern.ops.conv import Norm
from varkern.ops.quantize.reference import Phi

SIZES = [(1, 1), (2, 2), (4, 4)]
LENGTHS = (1, 4)


@dataclass(frozen=True)
class OpCase:
    """A function of tensors alone; those at ``differentiable`` may need gradients. ``fresh`` makes its arguments.

    ``writes``: the position of the argument that is changed in place.
    """

    function: Callable[..., Any]
    fresh: Callable[[], list[Tensor]]
    differentiable: Sequence[int] = ()
    writes: int | None = None


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def indices(positions: int, V: int = 16) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(9)
    return torch.randint(0, V, (2, positions), generator=generator, dtype=torch.int64, device="cpu")


def norm_inputs() -> list[Tensor]:
    return [random(0, 2, 3, 16), random(1, 2, 1, 16), random(2, 2, 1, 16)]


def gated_inputs() -> list[Tensor]:
    return [random(0, 2, 3, 16), random(1, 2, 3, 16), *(random(i, 2, 1, 16) for i in (2, 3, 4))]


def projection_inputs() -> list[Tensor]:
    return [random(0, 2, 5, 3, 2, 32), random(1, 64), random(2, 64), random(3, 2, 1, 1)]


def cached_inputs() -> list[Tensor]:
    return [random(0, 2, 3, 3, 2, 32), random(4, 2, 2, 2, 7, 32), random(1, 64), random(2, 64), random(3, 2, 1, 1)]


def map_inputs() -> list[Tensor]:
    return [random(0, 2, 4, 5, 6), random(1, 4), random(2, 4)]


def conv_inputs() -> list[Tensor]:
    # Enough tiles that the CPU kernel takes it by itself: 2 * 4 * 4 of 4 x 4.
    return [random(0, 2, 4, 16, 16), random(1, 6, 4, 3, 3), random(2, 6), random(3, 4), random(4, 4)]


def code_inputs() -> list[Tensor]:
    """The codebook, then two phis."""
    return [random(1, 16, 4), random(2, 4, 4, 3, 3) / 3, random(3, 4), random(4, 4, 4, 3, 3) / 3, random(5, 4)]


def phis(tensors: Sequence[Tensor], count: int = 3) -> list[Phi]:
    two = [Phi(tensors[0], tensors[1], 0.5), Phi(tensors[2], tensors[3], 0.5)]
    return [two[0], two[1], two[1]][:count]


def logits() -> list[Tensor]:
    return [random(0, 4, 3, 64)]


def _quantize(features: Tensor, codebook: Tensor, *bank: Tensor) -> Any:
    return ops.residual_quantize(features, codebook, phis(bank), SIZES)


def _quantize_train(features: Tensor, codebook: Tensor, *bank: Tensor) -> Any:
    return ops.residual_quantize_train(features, codebook, phis(bank), SIZES, 0.25)


def _dequantize(tokens: Tensor, codebook: Tensor, *bank: Tensor) -> Any:
    return ops.residual_dequantize(tokens, codebook, phis(bank), SIZES, (4, 4))


def _teacher(tokens: Tensor, codebook: Tensor, *bank: Tensor) -> Any:
    return ops.teacher_forcing_input(tokens, codebook, phis(bank, 2), SIZES)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Any:
    return ops.conv3x3(x, weight, bias, Norm(norm_weight, norm_bias, 2, 1e-6))


CASES: dict[str, OpCase] = {
    "modulated_layer_norm": OpCase(ops.modulated_layer_norm, norm_inputs, (0, 1, 2)),
    "gated_residual_layer_norm_": OpCase(ops.gated_residual_layer_norm_, gated_inputs, writes=0),
    "group_norm_silu": OpCase(lambda *t: ops.group_norm_silu(*t, 2), map_inputs),
    "group_norm_affine": OpCase(lambda *t: ops.group_norm_affine(*t, 2), map_inputs),
    "conv3x3": OpCase(_conv, conv_inputs),
    "block_causal_attention": OpCase(
        lambda q, k, v: ops.block_causal_attention(q, k, v, lengths=LENGTHS),
        lambda: [random(i, 2, 2, 5, 32) for i in range(3)],
        (0, 1, 2),
    ),
    "block_causal_attention_qkv": OpCase(
        lambda *t: ops.block_causal_attention_qkv(*t, LENGTHS, 0.3), projection_inputs, (0, 1, 2, 3)
    ),
    "cached_attention": OpCase(
        lambda qkv, cache, *rest: ops.cached_attention(qkv, cache, 2, *rest, 0.3), cached_inputs, writes=1
    ),
    "sample_tokens": OpCase(
        lambda x, noise: ops.sample_tokens(x, noise, 1.5, 9, 0.9), lambda: [*logits(), random(1, 6, 64).abs() + 0.1]
    ),
    "filter_logits": OpCase(lambda x: ops.filter_logits(x, 1.5, 9, 0.9), logits),
    "residual_quantize": OpCase(_quantize, lambda: [random(0, 2, 4, 4, 4), *code_inputs()]),
    "residual_quantize_train": OpCase(
        _quantize_train, lambda: [random(0, 2, 4, 4, 4), *code_inputs()], (0, 1, 2, 3, 4, 5)
    ),
    "residual_dequantize": OpCase(_dequantize, lambda: [indices(21), *code_inputs()], (1, 2, 3, 4, 5)),
    "teacher_forcing_input": OpCase(_teacher, lambda: [indices(5), *code_inputs()]),
    "next_scale_input": OpCase(
        lambda f_hat, codes, weight, bias: ops.next_scale_input(f_hat, codes, Phi(weight, bias, 0.5), (3, 3)),
        lambda: [random(0, 2, 4, 4, 4), random(1, 2, 4, 2, 2), random(2, 4, 4, 3, 3), random(3, 4)],
        (0, 1, 2, 3),
        writes=0,
    ),
}


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def summed(result: Any) -> Tensor:
    """A scalar that every floating-point element of a result has its own weight in."""
    total = None
    for i, tensor in enumerate(t for t in tensors_of(result) if t.is_floating_point()):
        weights = torch.linspace(1 + i, 2 + i, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        part = (tensor.flatten() * weights).sum()
        total = part if total is None else total + part
    assert total is not None
    return total
