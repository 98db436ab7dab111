"""modulated_layer_norm: value, gradient, operator checks, compilation, strides, bad input; on every backend."""

from __future__ import annotations

import threading

import pytest
import torch
from in_order import assert_as_accurate, plain
from torch import Tensor

from varkern.ops import backends, modulated_layer_norm, modulated_layer_norm_reference, use_backend

OPS = ("modulated_layer_norm",)

SHAPES = {
    "one_channel": (2, 3, 1),
    "odd_channels": (2, 5, 33),
    "one_row": (1, 1, 8),
    "one_token_d16": (2, 1, 1024),
    "two_chunks_of_rows": (1, 19, 48),
    "many_chunks_of_rows": (3, 37, 24),
    "no_batch": (0, 4, 16),
    "no_rows": (2, 0, 16),
    "no_channels": (2, 3, 0),
}
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "f16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f32_f16": (torch.float32, torch.float16),
    "bf16_f32": (torch.bfloat16, torch.float32),
    "f16_bf16": (torch.float16, torch.bfloat16),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)


def arguments(
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    x_dtype: torch.dtype = torch.float32,
    condition_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, scale and shift as a model has them: x a slice of a wider tensor, scale and shift out of one projection."""
    B, L, C = shape
    wide = torch.randn(B, L + 2, C + 3).to(device, x_dtype)
    condition = torch.randn(B, 6, C).to(device, condition_dtype)
    scale, shift = condition.unsqueeze(1).unbind(2)[2::2]
    return wide[:, 1 : L + 1, :C], scale, shift


def value_and_gradients(function, inputs: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def largest_terms(inputs: tuple[Tensor, ...], grad_out: Tensor, eps: float) -> list[Tensor]:
    """Of the float64 formulas of the value and the gradients, the largest term that cancellation can leave rounded."""
    x, scale, shift = inputs
    if not x.numel():
        return [x.new_zeros(())] * 4
    scale = scale.reshape(x.size(0), 1, x.size(2))
    rstd = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    terms = [t.abs().amax() for t in (shift, rstd * grad_out * (1 + scale), grad_out, grad_out)]
    if backends.reference_forced():  # whose library may take the mean off after the multiplication
        of_the_mean = (x.mean(-1, keepdim=True) * rstd).abs()
        terms[0] += (of_the_mean * (1 + scale).abs()).amax()
        terms[2] += (of_the_mean * grad_out.abs()).sum(1).amax()
    return terms


def check(inputs: tuple[Tensor, Tensor, Tensor], eps: float = 1e-6) -> None:
    grad_out = torch.randn(inputs[0].shape, device=inputs[0].device)
    grad_out = grad_out.to(torch.promote_types(inputs[0].dtype, inputs[1].dtype))
    doubles = tuple(tensor.double() for tensor in inputs)
    got = value_and_gradients(lambda *args: modulated_layer_norm(*args, eps), inputs, grad_out)
    plainly = plain(value_and_gradients, lambda *args: modulated_layer_norm_reference(*args, eps), inputs, grad_out)
    exact = value_and_gradients(lambda *args: modulated_layer_norm_reference(*args, eps), doubles, grad_out)
    names = ("value", "gradient of x", "gradient of scale", "gradient of shift")
    for tensors in zip(names, got, plainly, exact, largest_terms(doubles, grad_out.double(), eps), strict=True):
        assert_as_accurate(*tensors)
    with torch.no_grad():  # without statistics the kernels take another path
        assert torch.equal(modulated_layer_norm(*inputs, eps), got[0])


def test_reference_is_the_formula() -> None:
    x, scale, shift = (tensor.double() for tensor in arguments((2, 3, 5)))
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(modulated_layer_norm_reference(x, scale, shift), normed * (1 + scale) + shift)


@shapes
@dtypes
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.levels
def test_value_and_gradient(device: torch.device, shape: tuple[int, int, int], dtypes: tuple) -> None:
    check(arguments(shape, device, *dtypes))


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_large_mean_and_eps(device: torch.device, eps: float, offset: float) -> None:
    x, scale, shift = arguments((2, 4, 96), device)
    check((x + offset, scale, shift), eps)


def test_constant_rows_have_zero_variance(device: torch.device) -> None:
    x, scale, shift = arguments((2, 4, 96), device)
    check((torch.full_like(x, 3.0), scale, shift))


def test_two_dimensional_condition(device: torch.device) -> None:
    x, scale, shift = arguments((2, 4, 33), device)
    got = modulated_layer_norm(x, scale.squeeze(1), shift.squeeze(1))
    assert torch.equal(got, modulated_layer_norm(x, scale, shift))
    check((x, scale.squeeze(1), shift.squeeze(1)))


def test_autocast(device: torch.device) -> None:
    with torch.autocast(device.type, torch.bfloat16):
        check(arguments((2, 5, 33), device, torch.float32, torch.bfloat16))


def test_float64_is_the_reference_and_twice_differentiable() -> None:
    inputs = [tensor.double().detach().requires_grad_() for tensor in arguments((2, 3, 5))]
    assert torch.equal(modulated_layer_norm(*inputs), modulated_layer_norm_reference(*inputs))
    assert torch.autograd.gradcheck(modulated_layer_norm, inputs)
    assert torch.autograd.gradgradcheck(modulated_layer_norm, inputs)
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' cannot run .*: torch.float64 is none of"):
        modulated_layer_norm(*inputs)


def test_backward_stays_on_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    # The backward of a CUDA tensor runs in a thread of autograd's own, where no context manager is in force.
    calls = []
    module = pytest.importorskip("varkern.kernels.norm")
    launch = module.modulated_layer_norm_backward
    monkeypatch.setattr(module, "modulated_layer_norm_backward", lambda *args: (calls.append(1), launch(*args)))
    device = "cpu" if backends.interpreting() else "cuda"
    x, scale, shift = arguments((2, 3, 5), device)
    x = x.detach().requires_grad_()
    with use_backend("triton"):
        out = modulated_layer_norm(x, scale, shift)
    thread = threading.Thread(target=lambda: out.sum().backward())
    thread.start()
    thread.join()
    assert len(calls) == 1
    assert x.grad is not None


def test_reference_runs_the_eager_function(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = arguments((2, 3, 5))
    leaf = inputs[0].detach().requires_grad_()
    with use_backend("reference"):
        out = modulated_layer_norm(leaf, *inputs[1:])
    assert torch.equal(out, modulated_layer_norm_reference(*inputs))
    assert "ModulatedLayerNorm" not in type(out.grad_fn).__name__


def test_rows_too_wide_for_triton() -> None:
    kernels = pytest.importorskip("varkern.kernels.norm")
    device = "cpu" if backends.interpreting() else "cuda"
    x, scale, shift = arguments((1, 1, kernels.MAX_C + 1), device)
    with use_backend("triton"), pytest.raises(RuntimeError, match=f"C is {kernels.MAX_C + 1} and its kernels hold"):
        modulated_layer_norm(x, scale, shift)
    check((x, scale, shift))  # left to choose, another backend serves
