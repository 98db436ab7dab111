"""gated_residual_layer_norm_: eager PyTorch, the two operations by varkern, and joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shapes
import torch
from torch import Tensor

from varkern.ops import gated_residual_layer_norm_, modulated_layer_norm, modulated_layer_norm_reference

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def two_operations(norm: Callable[..., Tensor], x: Tensor, h: Tensor, gate: Tensor, *condition: Tensor) -> Tensor:
    return norm(x + h.mul(gate), *condition)


@pytest.mark.benchmark(group="gated residual and layer norm")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes.NORM_GENERATION.values(), ids=shapes.NORM_GENERATION)
def test_gated_norm(compare: Any, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    B, L, C = shape
    with torch.inference_mode():
        x, h = torch.randn(2, B, L, C, device=device, dtype=dtype).unbind(0)
        gate, scale, shift = torch.randn(B, 1, 6, C, device=device, dtype=dtype).unbind(2)[1:4]
        want = two_operations(modulated_layer_norm_reference, x, h, gate, scale, shift)
        got = gated_residual_layer_norm_(x.clone(), h, gate, scale, shift)
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
        calls = {
            "reference": lambda: two_operations(modulated_layer_norm_reference, x, h, gate, scale, shift),
            "two operations": lambda: two_operations(modulated_layer_norm, x, h, gate, scale, shift),
            "varkern": lambda: gated_residual_layer_norm_(x, h, gate, scale, shift),
        }
        compare(calls, moved=4 * x.nbytes, shape=shape, dtype=str(dtype))
