"""Group norm, SiLU, 3x3 convolution and residual at the sizes of the published decoder: eager and varkern.

Rows count the arithmetic of the published form; Winograd's does a quarter of the multiplications.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import settings
from torch import Tensor

import varkern
from varkern.ops.conv import Norm, conv3x3

# name: channels, outputs, side of the result, whether it is upsampled to that (then without norm and residual)
LAYERS = {
    "640-16px": (640, 640, 16, False),
    "640-32px-upsampled": (640, 640, 32, True),
    "320-32px": (320, 320, 32, False),
    "320-64px": (320, 320, 64, False),
    "320-128px-upsampled": (320, 320, 128, True),
    "160-128px": (160, 160, 128, False),
    "160-256px": (160, 160, 256, False),
    "160-256px-upsampled": (160, 160, 256, True),
}
if settings.smoke:
    LAYERS = {"32-8px": (32, 32, 8, False), "32-16px-upsampled": (32, 32, 16, True)}


@pytest.mark.benchmark(group="3x3 convolution of the decoder")
@pytest.mark.parametrize("layer", LAYERS)
def test_conv(compare: Any, device: torch.device, layer: str) -> None:
    C, outputs, side, upsample = LAYERS[layer]
    batch, dtype = (1, torch.float32) if device.type == "cpu" else (16, torch.float16)
    torch.manual_seed(0)
    options = {"device": device, "dtype": dtype}
    x = torch.randn(batch, C, side >> upsample, side >> upsample, **options)
    last = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, C, 3, 3, **options) / (3 * C**0.5), torch.randn(outputs, **options)
    norm = None if upsample else Norm(torch.rand(C, **options), torch.randn(C, **options), 32, 1e-6)
    residual = None if upsample else torch.randn(batch, outputs, side, side, **options)
    residual_last = None if residual is None else residual.contiguous(memory_format=torch.channels_last)

    def run(backend: str | None, x: Tensor, residual: Tensor | None) -> Tensor:
        with torch.inference_mode(), varkern.use_backend(backend):
            return conv3x3(x, weight, bias, norm, residual, upsample)

    # Each in the memory format in which its decoder runs; channels last alone is what a user could do.
    calls = {
        "reference": lambda: run("reference", x, residual),
        "channels last": lambda: run("reference", last, residual_last),
        "varkern": lambda: run(None, last, residual_last),
    }
    want, *results = (call().float() for call in calls.values())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for got in results:
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))
    maps = x.numel() + want.numel() * (1 if upsample else 2)
    moved = (maps + weight.numel()) * dtype.itemsize
    flop = 2 * 9 * C * outputs * batch * side * side
    compare(calls, moved=moved, flop=flop, shape=tuple(x.shape), dtype=dtype, outputs=outputs)
