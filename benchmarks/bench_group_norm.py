"""group_norm_silu: eager PyTorch and varkern beside x.clone(), by memory format; and its statistics alone.

Rows count x read twice and the result written once, of group_norm_affine x read once.
"""

from __future__ import annotations

from typing import Any

import pytest
import shapes
import torch
from measure import settings
from torch import Tensor

from varkern.ops import (
    group_norm_affine,
    group_norm_affine_reference,
    group_norm_silu,
    group_norm_silu_reference,
)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(2, shape[1], device=device, dtype=dtype).unbind(0)
    return x, weight, bias, 32


def check(got: Tensor, x: Tensor, *others: Any, reference: Any) -> None:
    """Against float64: at 256x256 eager PyTorch's own statistics are hundreds of roundings off."""
    weight, bias, groups = others
    want = reference(x.double(), weight.double(), bias.double(), groups)
    tolerance = 8 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.benchmark(group="group norm and SiLU")
@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes.GROUP_NORM.values(), ids=shapes.GROUP_NORM)
def test_group_norm_silu(
    compare: Any, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    if not settings.full and dtype != torch.float32 and layout == torch.contiguous_format:
        pytest.skip("contiguous in 16 bits: with --full")
    with torch.inference_mode():
        inputs = arguments(shape, dtype, layout, device)
        check(group_norm_silu(*inputs), *inputs, reference=group_norm_silu_reference)
        calls = {
            "reference": lambda: group_norm_silu_reference(*inputs),
            "clone": inputs[0].clone,
            "varkern": lambda: group_norm_silu(*inputs),
        }
        compare(calls, moved=3 * inputs[0].nbytes, shape=shape, dtype=str(dtype), layout=str(layout))


@pytest.mark.benchmark(group="group norm, multiplier and offset")
@pytest.mark.parametrize("shape", shapes.GROUP_NORM.values(), ids=shapes.GROUP_NORM)
def test_group_norm_affine(compare: Any, device: torch.device, shape: tuple[int, ...]) -> None:
    """As the convolution takes it."""
    dtype, layout = torch.float32, torch.channels_last
    with torch.inference_mode():
        inputs = arguments(shape, dtype, layout, device)
        check(group_norm_affine(*inputs), *inputs, reference=group_norm_affine_reference)
        calls = {
            "reference": lambda: group_norm_affine_reference(*inputs),
            "varkern": lambda: group_norm_affine(*inputs),
        }
        compare(calls, moved=inputs[0].nbytes, shape=shape, dtype=str(dtype), layout=str(layout))
