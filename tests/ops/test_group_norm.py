"""Group norm with SiLU: values, large means, memory formats, operator checks, bad input, and in the tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from in_order import assert_as_accurate, plain
from torch import Tensor

from varkern.models import VQVAE
from varkern.modules import autoencoder
from varkern.ops import (
    backends,
    group_norm_affine,
    group_norm_affine_reference,
    group_norm_silu,
    group_norm_silu_reference,
    use_backend,
)

OPS = ("group_norm_silu", "group_norm_affine")

# (B, C, H, W, groups)
SHAPES = {
    "one_element_a_group": (2, 8, 1, 1, 8),
    "one_pixel": (2, 40, 1, 1, 4),
    "odd_channels": (2, 33, 3, 5, 11),
    "one_group": (1, 5, 7, 3, 1),
    "groups_of_one": (2, 6, 9, 4, 6),
    "groups_across_vectors": (2, 160, 9, 7, 32),
    "chunks_of_channels": (1, 64, 24, 24, 32),
    "chunks_of_pixels": (1, 4, 130, 131, 2),
    "d16_lowest": (1, 640, 16, 16, 32),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
formats = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)


def arguments(
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, int, float]:
    """Channels with means of their own beside offset; float32 weight and bias, as a tokenizer under autocast has."""
    B, C, H, W, groups = shape
    x = torch.randn(B, C, H, W) + 0.5 * torch.randn(B, C, 1, 1) + offset
    weight, bias = 1 + 0.3 * torch.randn(C), 0.3 * torch.randn(C)
    return x.to(device, dtype).contiguous(memory_format=layout), weight.to(device), bias.to(device), groups, 1e-6


def exactly(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True) -> Tensor:
    return group_norm_silu_reference(x.double(), weight.double(), bias.double(), groups, eps, silu)


def exact_coefficients(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """float64, which the reference's result is not."""
    variance, mean = torch.var_mean(x.double().flatten(2).unflatten(1, (groups, -1)), (2, 3), correction=0)
    variance, mean = (t.repeat_interleave(x.size(1) // groups, 1) for t in (variance, mean))
    multiplier = weight.double() / torch.sqrt(variance + eps)
    return multiplier, bias.double() - mean * multiplier


def check(inputs: tuple[Tensor, Tensor, Tensor, int, float]) -> None:
    x, coefficients = inputs[0], exact_coefficients(*inputs)
    # With coefficients in float32 whatever the mean is of is rounded: a multiplier three times, an offset five.
    of_the_mean = float((x.double() * coefficients[0][..., None, None]).abs().max())
    library = 16 * of_the_mean if backends.reference_forced() else 0.0  # which may apply coefficients, too
    for silu in (True, False):
        got = group_norm_silu(*inputs, silu)
        assert got.stride() == x.stride()
        plainly = plain(group_norm_silu_reference, *inputs, silu)
        assert_as_accurate(f"silu {silu}", got, plainly, exactly(*inputs, silu), library)
    got, plainly = group_norm_affine(*inputs), plain(group_norm_affine_reference, *inputs)
    for name, *values in zip(("multiplier", "offset"), got, plainly, coefficients, strict=True):
        assert_as_accurate(name, *values)
    # What a convolution gets that applies the coefficients: one multiply-add in float32, here a rounding or two more.
    applied = (x.double() * got[0].double()[..., None, None] + got[1].double()[..., None, None]).float()
    plainly = plain(group_norm_silu_reference, x.float(), *inputs[1:], False)
    assert_as_accurate("applied", applied, plainly, exactly(*inputs, silu=False), library or 4 * of_the_mean)


def test_reference_is_the_formula() -> None:
    x, weight, bias, groups, eps = arguments((2, 6, 3, 5, 3))
    x, weight, bias = x.double(), weight.double(), bias.double()
    want = torch.empty_like(x)
    for b in range(2):
        for g in range(groups):
            group = x[b, 2 * g : 2 * g + 2]
            centred = group - group.mean()
            for c in range(2 * g, 2 * g + 2):
                z = (centred[c - 2 * g] / torch.sqrt((centred**2).mean() + eps)) * weight[c] + bias[c]
                want[b, c] = z / (1 + torch.exp(-z))
    torch.testing.assert_close(group_norm_silu_reference(x, weight, bias, groups, eps), want)
    a, b = group_norm_affine_reference(x, weight, bias, groups, eps)[..., None, None]
    z = x.float() * a + b
    torch.testing.assert_close(z * torch.sigmoid(z), want.float())


@shapes
@dtypes
@formats
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.levels
def test_value(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    check(arguments(shape, device, dtype, layout))


@formats
@pytest.mark.parametrize("offset", [3.0, -30.0, 1000.0])
@pytest.mark.levels
def test_means_of_many_deviations(device: torch.device, layout: torch.memory_format, offset: float) -> None:
    if backends.reference_forced():
        pytest.skip("PyTorch's own kernels may lose the square of the mean, each in its way")
    inputs = arguments((2, 64, 17, 16, 8), device, layout=layout, offset=offset)
    check(inputs)
    # group_norm_silu loses nothing to the mean. In units of 2^-24 of the largest value: the rounded multiplier,
    # product and offset 3, exp and the division 6, sums of squares over 34 runs the root of what they may lose.
    for silu in (True, False):
        exact = exactly(*inputs, silu)
        error = (group_norm_silu(*inputs, silu).double() - exact).abs().max()
        assert error <= 16 * 2.0**-24 * exact.abs().max(), f"{error:.3g}"


@formats
def test_statistics_of_uneven_images(device: torch.device, layout: torch.memory_format) -> None:
    """What a kernel may take for typical is not: pixels in a grid, the upper half, the border; and constant groups."""
    if backends.reference_forced():
        pytest.skip("PyTorch's own kernels may lose the square of the mean, each in its way")
    x, *others = arguments((4, 16, 40, 32, 4), device, layout=layout)
    x[0, :, :, ::4] += 1000.0
    x[1, :, :20] -= 300.0
    x[2, :, 0] = 1e4
    x[3, :4] = 1e3  # without variance: the bias
    check((x, *others))
    flat = group_norm_silu(x, *others, silu=False)[3, :4]
    torch.testing.assert_close(flat, others[1][:4, None, None].expand_as(flat), rtol=0, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_eps(device: torch.device, eps: float) -> None:
    x, weight, bias, groups, _ = arguments((2, 32, 5, 6, 4), device, layout=torch.channels_last)
    check((x * 1e-2, weight, bias, groups, eps))


def test_large_values_saturate(device: torch.device) -> None:
    x, weight, bias, groups, eps = arguments((1, 32, 8, 8, 4), device)
    got = group_norm_silu(x, weight * 100, bias, groups, eps)
    torch.testing.assert_close(got, group_norm_silu_reference(x, weight * 100, bias, groups, eps), rtol=1e-5, atol=1e-5)
    assert got.max() > 100
    assert got.min() > -0.279  # the least value of silu


@formats
def test_what_is_not_a_number_stays_in_its_group(device: torch.device, layout: torch.memory_format) -> None:
    inputs = arguments((2, 12, 5, 6, 3), device, layout=layout)
    inputs[0][1, 5, 2, 3] = torch.nan
    out, coefficients = group_norm_silu(*inputs), group_norm_affine(*inputs)
    for values in (out.flatten(2)[..., 0], *coefficients):
        assert values.isnan().nonzero().tolist() == [[1, c] for c in (4, 5, 6, 7)]


STRIDES = {
    "slice_of_channels": lambda x: torch.cat((x, x), 1)[:, : x.size(1)],
    "slice_of_channels_last": lambda x: torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)[:, ::2],
    "padded_channels_last": lambda x: torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)[:, :12],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
    "not_aligned": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("change", STRIDES.values(), ids=STRIDES)
def test_strides(device: torch.device, change) -> None:
    x, *others = arguments((2, 12, 5, 6, 3), device)
    x = change(x)
    got = group_norm_silu(x, *others)
    assert got.is_contiguous() or got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, group_norm_silu(x.contiguous(), *others), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        group_norm_affine(x, *others), group_norm_affine(x.contiguous(), *others), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("parameter_dtype", [torch.float16, torch.float64], ids=str)
def test_parameters_of_another_dtype(device: torch.device, parameter_dtype: torch.dtype) -> None:
    x, weight, bias, groups, eps = arguments((2, 12, 5, 6, 3), device, torch.bfloat16)
    weight, bias = weight.to(parameter_dtype), bias.to(parameter_dtype)
    wide = torch.stack((weight, bias), 1)  # strided
    got = group_norm_silu(x, wide[:, 0], wide[:, 1], groups, eps)
    assert torch.equal(got, group_norm_silu(x, weight.float(), bias.float(), groups, eps))


def test_an_image_does_not_depend_on_its_batch(device: torch.device) -> None:
    x, *others = arguments((3, 32, 9, 9, 8), device, layout=torch.channels_last)
    whole = group_norm_silu(x, *others)
    if not backends.reference_forced():
        assert torch.equal(group_norm_silu(x[1:2], *others), whole[1:2])


def test_autocast_rounds_once(device: torch.device) -> None:
    inputs = arguments((2, 12, 5, 6, 3), device, torch.bfloat16)
    plain = group_norm_silu(*inputs)
    with torch.autocast(device.type, torch.bfloat16):
        got = group_norm_silu(*inputs)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, plain)


def test_the_tokenizer_normalises_by_the_op_unless_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VQVAE(32, 8, 32, v_patch_nums=(1, 2), ch_mult=(1, 2), num_res_blocks=1)
    calls: list[bool] = []  # whether SiLU follows: where it does, the convolution normalises
    convolve, normalise = autoencoder.conv3x3, autoencoder.group_norm_silu

    def conv3x3(*args: Any, **options: Any) -> Tensor:
        if any(isinstance(arg, autoencoder.Norm) for arg in args):
            calls.append(True)
        return convolve(*args, **options)

    def group_norm(*args: Any, **options: Any) -> Tensor:
        calls.append(options["silu"])
        return normalise(*args, **options)

    monkeypatch.setattr(autoencoder, "conv3x3", conv3x3)
    monkeypatch.setattr(autoencoder, "group_norm_silu", group_norm)
    f_hat = torch.randn(1, 8, 2, 2)
    blocks = list(vae.decoder.modules())
    activated = 1 + 2 * sum(isinstance(m, autoencoder.ResnetBlock) for m in blocks)
    plain = sum(isinstance(m, autoencoder.AttnBlock) for m in blocks)
    got = vae.fhat_to_img(f_hat)
    assert (calls.count(True), calls.count(False)) == (activated, plain)
    calls.clear()
    with use_backend("reference"):
        want = vae.fhat_to_img(f_hat)
    leaf = f_hat.clone().requires_grad_()
    trained = vae.fhat_to_img(leaf)
    trained.sum().backward()
    vae.requires_grad_(True)
    vae.fhat_to_img(f_hat).sum().backward()
    assert not calls
    assert leaf.grad is not None
    assert all(p.grad is not None for p in vae.decoder.parameters())
    with torch.no_grad():
        vae.fhat_to_img(f_hat)
    assert len(calls) == activated + plain
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.detach(), want, rtol=1e-4, atol=1e-5)
