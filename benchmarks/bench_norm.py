"""modulated_layer_norm: eager PyTorch, torch.compile and varkern beside x.clone(), which moves the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shapes
import torch
from measure import settings
from torch import Tensor

from varkern.ops import modulated_layer_norm, modulated_layer_norm_reference

DTYPES = shapes.some({"f32": torch.float32, "bf16": torch.bfloat16})


def providers() -> dict[str, Callable[..., Tensor]]:
    """With torch.compile, which has to compile first, where --compile asks for it."""
    functions: dict[str, Callable[..., Tensor]] = {"reference": modulated_layer_norm_reference}
    if settings.compile:
        functions["torch.compile"] = torch.compile(modulated_layer_norm_reference, fullgraph=True, dynamic=False)
    functions["varkern"] = modulated_layer_norm
    return functions


def arguments(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    B, L, C = shape
    x = torch.randn(B, L, C, device=device, dtype=dtype)
    scale, shift = torch.randn(B, 1, 6, C, device=device, dtype=dtype).unbind(2)[2::2]
    return x, scale, shift


def check(got: Tensor, want: Tensor) -> None:
    tolerance = 8 * torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.benchmark(group="modulated_layer_norm forward")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "shape", (every := shapes.some(shapes.NORM_GENERATION | shapes.NORM_TRAINING)).values(), ids=every
)
def test_forward(compare: Any, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, scale, shift = arguments(shape, dtype, device)
    functions = providers()
    want = modulated_layer_norm_reference(x, scale, shift)
    for function in functions.values():
        check(function(x, scale, shift), want)

    def timed(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(x, scale, shift)

    calls = {name: timed(function) for name, function in functions.items()}
    moved = x.nbytes + want.nbytes + scale.nbytes + shift.nbytes
    varkern = calls.pop("varkern")
    with torch.inference_mode():
        x, scale, shift = x.clone(), scale.clone(), shift.clone()
        compare({**calls, "clone": x.clone, "varkern": varkern}, moved=moved, shape=shape, dtype=str(dtype))


@pytest.mark.benchmark(group="modulated_layer_norm forward and backward")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", shapes.NORM_TRAINING.values(), ids=shapes.NORM_TRAINING)
def test_backward(compare: Any, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs = [tensor.detach().requires_grad_() for tensor in arguments(shape, dtype, device)]
    grad_out = torch.randn(shape, device=device, dtype=dtype)

    def timed(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(*inputs), inputs, grad_out)

    calls = {name: timed(function) for name, function in providers().items()}
    want = calls["reference"]()
    for call in calls.values():
        for got, expected in zip(call(), want, strict=True):
            check(got, expected)
    # x, out and grad_out, x, grad_x: what a forward and a backward pass have to move without caches.
    compare(calls, moved=5 * inputs[0].nbytes, shape=shape, dtype=str(dtype))
