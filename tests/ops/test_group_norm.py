"""Group norm with SiLU: values, large means, memory formats, operator checks, bad input, and in the tokenizer."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
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

X86 = platform.machine().lower() in ("x86_64", "amd64")

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
def test_value(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    check(arguments(shape, device, dtype, layout))


@formats
@pytest.mark.parametrize("offset", [3.0, -30.0, 1000.0])
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


def test_no_batch(device: torch.device) -> None:
    inputs = arguments((0, 8, 3, 3, 2), device)
    assert group_norm_silu(*inputs).shape == (0, 8, 3, 3)
    assert group_norm_affine(*inputs).shape == (2, 0, 8)


def test_an_image_does_not_depend_on_its_batch(device: torch.device) -> None:
    x, *others = arguments((3, 32, 9, 9, 8), device, layout=torch.channels_last)
    whole = group_norm_silu(x, *others)
    if not backends.reference_forced():
        assert torch.equal(group_norm_silu(x[1:2], *others), whole[1:2])


@formats
def test_the_number_of_threads_does_not_change_a_bit(layout: torch.memory_format) -> None:
    inputs = arguments((1, 64, 130, 128, 32), layout=layout)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            with use_backend("cpu"):
                results.append((group_norm_silu(*inputs), group_norm_affine(*inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@formats
def test_opcheck(device: torch.device, layout: torch.memory_format) -> None:
    ops, backend = torch.ops.varkern, backends.current_backend()
    inputs = arguments((2, 12, 3, 5, 3), device, torch.float16, layout)
    torch.library.opcheck(ops.group_norm_silu.default, (*inputs, True, backend))
    torch.library.opcheck(ops.group_norm_affine.default, (*inputs, backend))
    padded = (torch.cat((inputs[0], inputs[0]), 3)[..., :5], *inputs[1:])
    torch.library.opcheck(ops.group_norm_silu.default, (*padded, False, backend))


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=["aot", "inductor"]
)
@formats
def test_compile_fullgraph(device: torch.device, layout: torch.memory_format, compiler: str) -> None:
    if compiler == "inductor" and backends.current_backend() != "cpu":
        pytest.skip("what the compiler makes of it does not depend on the backend")

    def step(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        y = group_norm_silu(x * 2, weight, bias, groups, eps)
        return y.square(), group_norm_affine(y, weight, bias, groups, eps)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for batch in (2, 3):
        inputs = arguments((batch, 12, 3, 5, 3), device, layout=layout)
        for got, want in zip(compiled(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert got.stride() == want.stride()


def test_autocast_rounds_once(device: torch.device) -> None:
    inputs = arguments((2, 12, 5, 6, 3), device, torch.bfloat16)
    plain = group_norm_silu(*inputs)
    with torch.autocast(device.type, torch.bfloat16):
        got = group_norm_silu(*inputs)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, plain)


def test_float64_is_the_reference() -> None:
    x, weight, bias, groups, eps = arguments((2, 12, 5, 6, 3))
    inputs = x.double(), weight.double(), bias.double(), groups, eps
    assert torch.equal(group_norm_silu(*inputs), group_norm_silu_reference(*inputs))
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"torch\.float64 is none of"):
        group_norm_silu(*inputs)


@pytest.mark.parametrize("op", [group_norm_silu, group_norm_affine])
def test_gradients_are_refused(device: torch.device, op) -> None:
    inputs = list(arguments((2, 12, 5, 6, 3), device))
    message = rf"{op.__name__} has no gradient: call it under torch\.no_grad\(\)"
    for i in range(3):
        leaves = [t.detach().requires_grad_() if j == i else t for j, t in enumerate(inputs)]
        with pytest.raises(RuntimeError, match=message):
            op(*leaves)
    direct = getattr(torch.ops.varkern, op.__name__)
    extra = (True,) if op is group_norm_silu else ()
    with pytest.raises(RuntimeError, match=message):
        direct(*leaves, *extra, backends.current_backend())
    want = op(*inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(op(*leaves), want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        with pytest.raises(RuntimeError, match=message):
            op(dual, *inputs[1:])


def test_fake_tensors_reach_no_kernel() -> None:
    x, weight, bias, groups, eps = arguments((2, 12, 5, 6, 3), "cpu", torch.float16, torch.channels_last)
    inputs = x.to("meta"), weight.to("meta"), bias.to("meta"), groups, eps
    out, coefficients = group_norm_silu(*inputs), group_norm_affine(*inputs)
    assert (out.device.type, out.shape, out.dtype, out.stride()) == ("meta", x.shape, x.dtype, x.stride())
    assert (coefficients.device.type, coefficients.shape, coefficients.dtype) == ("meta", (2, 2, 12), torch.float32)


BAD = {
    "three_axes": (lambda a: a | {"x": a["x"][0]}, "x has shape (8, 3, 4), give (B, C, H, W)"),
    "no_pixels": (
        lambda a: a | {"x": a["x"][:, :, :0]},
        "x has shape (2, 8, 0, 4), give (B, C, H, W) with C, H, W > 0",
    ),
    "uneven_groups": (lambda a: a | {"num_groups": 3}, "num_groups is 3, give a divisor of the 8 channels"),
    "no_groups": (lambda a: a | {"num_groups": 0}, "num_groups is 0, give a divisor of the 8 channels"),
    "short_weight": (lambda a: a | {"weight": a["weight"][:5]}, "weight has shape (5,), give (8,) for 8 channels"),
    "bias_of_two_axes": (lambda a: a | {"bias": a["bias"][None]}, "bias has shape (1, 8), give (8,)"),
    "another_device": (lambda a: a | {"bias": a["bias"].to("meta")}, "bias is on meta and x on cpu, use one device"),
    "two_dtypes": (lambda a: a | {"bias": a["bias"].half()}, "weight is torch.float32 and bias torch.float16"),
    "integers": (lambda a: a | {"x": a["x"].int()}, "x is torch.int32"),
}


@pytest.mark.parametrize("op", [group_norm_silu, group_norm_affine])
@pytest.mark.parametrize("backend", ["reference", "cpu", None])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message: str, backend: str | None, op) -> None:
    names = ("x", "weight", "bias", "num_groups", "eps")
    inputs = change(dict(zip(names, arguments((2, 8, 3, 4, 2)), strict=True)))
    with use_backend(backend), pytest.raises(ValueError, match=re.escape(f"{op.__name__}: {message}")):
        op(**inputs)


def test_a_backend_that_cannot_serve_says_why() -> None:
    x, *others = arguments((2, 8, 3, 4, 2), dtype=torch.float64)
    with (
        use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"cannot run group_norm_affine: torch\.float64 is none of"),
    ):
        group_norm_affine(x, *others)


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


LEVELS = """
import torch, test_group_norm as t
from varkern import _C
from varkern.ops import use_backend
torch.manual_seed(0)
with use_backend("cpu"):
    for shape in t.SHAPES.values():
        for dtype in t.DTYPES.values():
            for layout in t.FORMATS.values():
                t.check(t.arguments(shape, "cpu", dtype, layout))
    for layout in t.FORMATS.values():
        t.test_means_of_many_deviations(torch.device("cpu"), layout, 1000.0)
print(_C.simd_level())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"] if X86 else ["baseline"])
def test_simd_levels_and_uninitialised_memory(level: str) -> None:
    """Each level the processor has, on a heap that glibc fills with garbage: the workspace holds nothing by chance."""
    environment = {"VARKERN_SIMD": level, "MALLOC_PERTURB_": "85", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", LEVELS], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != level:
        pytest.skip(f"this processor does not run {level}")
