"""Attention of next-scale generation, scale by scale: growing caches and SDPA, as the reference has it, and varkern.

One image with guidance, so a batch of two; d16. Rows count the arithmetic of the scale, and its bytes: projection,
output, and the keys and values it sees, each once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shapes
import torch
import torch.nn.functional as F
from measure import settings
from torch import Tensor

from varkern.ops import cached_attention
from varkern.ops.attention.reference import normalize_qk_reference

B, H, D = (2, 2, 64) if settings.smoke else (2, 16, 64)
LENGTHS = [p * p for p in shapes.PATCH_NUMS_256]
# The first and last scales are what differs most: one token, and all keys.
SCALES = [0, 9] if settings.smoke else list(range(len(LENGTHS)))


def growing_cache(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor
) -> Tensor:
    """One step of the published model: k and v are concatenated with those of the earlier scales."""
    n = qkv.size(1)
    bias = torch.cat((q_bias, torch.zeros_like(q_bias), v_bias)).to(qkv.dtype)
    q, k, v = (qkv.flatten(2) + bias).view(B, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = normalize_qk_reference(q, k, log_scale.view(H, 1, 1))
    k, v = torch.cat((k_cache, k.to(v.dtype)), 2), torch.cat((v_cache, v), 2)
    return F.scaled_dot_product_attention(q.to(v.dtype), k, v, scale=1.0).transpose(1, 2).contiguous()


def scale_calls(device: torch.device, dtype: torch.dtype, position: int, n: int) -> dict[str, Callable[[], Tensor]]:
    """The same step by both, on equal tensors."""
    qkv = torch.randn(B, n, 3, H, D, device=device, dtype=dtype)
    cache = torch.full((2, B, H, sum(LENGTHS), D), torch.nan, device=device, dtype=dtype)
    cache[:, :, :, :position] = F.normalize(torch.randn(2, B, H, position, D, device=device), dim=-1)
    k_cache, v_cache = cache[:, :, :, :position].clone().unbind(0)
    q_bias, v_bias = torch.randn(2, H * D, device=device).unbind(0)
    log_scale = torch.full((H,), 4.0, device=device).log()
    return {
        "reference": lambda: growing_cache(qkv, k_cache, v_cache, q_bias, v_bias, log_scale),
        "varkern": lambda: cached_attention(qkv, cache, position, q_bias, v_bias, log_scale, 1.0),
    }


def check(calls: dict[str, Callable[[], Tensor]]) -> None:
    want, got = (call() for call in calls.values())
    tolerance = 32 * torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.benchmark(group="cached attention, one scale")
@pytest.mark.parametrize(
    "scale", SCALES, ids=[f"{shapes.PATCH_NUMS_256[i]}x{shapes.PATCH_NUMS_256[i]}" for i in SCALES]
)
def test_scale(compare: Any, device: torch.device, scale: int) -> None:
    n, position = LENGTHS[scale], sum(LENGTHS[:scale])
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.inference_mode():
        calls = scale_calls(device, dtype, position, n)
        check(calls)
        elements = B * H * D * (4 * n + 2 * (position + n))
        flop = 4 * B * H * D * n * (position + n)
        compare(calls, moved=elements * dtype.itemsize, flop=flop, shape=(B, n, 3, H, D), dtype=str(dtype))


@pytest.mark.benchmark(group="cached attention, all scales of a 256 px image")
def test_schedule(compare: Any, device: torch.device) -> None:
    """One block's share of a generation: ten steps."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.inference_mode():
        steps = [scale_calls(device, dtype, sum(LENGTHS[:i]), n) for i, n in enumerate(LENGTHS)]
        for calls in steps:
            check(calls)
        together = {name: lambda name=name: [calls[name]() for calls in steps] for name in steps[0]}
        seen = [sum(LENGTHS[: i + 1]) for i in range(len(LENGTHS))]
        elements = sum(B * H * D * (4 * n + 2 * keys) for n, keys in zip(LENGTHS, seen, strict=True))
        flop = 4 * B * H * D * sum(n * keys for n, keys in zip(LENGTHS, seen, strict=True))
        compare(together, moved=elements * dtype.itemsize, flop=flop, dtype=str(dtype))
