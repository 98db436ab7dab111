"""conv3x3: value, error, memory formats, operator checks, compilation, bad input; on every backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_order import assert_as_accurate, plain
from torch import Tensor

import varkern
from varkern.ops import backends, conv3x3, conv3x3_reference, use_backend
from varkern.ops import conv as module
from varkern.ops.conv import Norm

OPS = ("conv3x3",)


@dataclass(frozen=True)
class Case:
    """Sizes of x and of the result's channels; and which of the options are on."""

    B: int = 1
    C: int = 16
    outputs: int = 16
    H: int = 8
    W: int = 8
    bias: bool = True
    norm: int = 0  # groups
    residual: bool = False
    upsample: bool = False


CASES = {
    "plain": Case(),
    "one_of_everything": Case(1, 1, 1, 1, 2, norm=1, residual=True, upsample=True),
    "one_pixel": Case(2, 8, 24, 1, 1, norm=2),
    "smaller_than_a_tile": Case(1, 20, 5, 3, 2, residual=True),
    "beyond_a_tile": Case(3, 16, 33, 5, 9, norm=4, residual=True),
    "odd_channels": Case(2, 7, 9, 13, 6, norm=7),
    "without_bias": Case(1, 12, 16, 8, 8, bias=False),
    "upsample": Case(2, 12, 20, 5, 7, upsample=True, residual=True),
    "norm_and_upsample": Case(1, 24, 8, 9, 4, norm=3, upsample=True),
    "many_blocks": Case(1, 32, 16, 41, 70, norm=32, residual=True),
    "image": Case(2, 64, 3, 36, 20, norm=32),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def arguments(case: Case, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
    """What conv3x3 takes: x, as a model has it, channels last and a batch of a larger tensor."""
    B, C = case.B, case.C
    x = torch.randn(B + 1, C, case.H, case.W).contiguous(memory_format=torch.channels_last)[1:].to(device, dtype)
    weight = (torch.randn(case.outputs, C, 3, 3) / (3 * C**0.5)).to(device, dtype)
    bias = torch.randn(case.outputs).to(device, dtype) if case.bias else None
    norm = None
    if case.norm:
        norm = Norm(torch.randn(C).to(device, dtype), torch.randn(C).to(device, dtype), case.norm, 1e-6)
    factor = 2 if case.upsample else 1
    residual = None
    if case.residual:
        residual = torch.randn(B, case.outputs, factor * case.H, factor * case.W).to(device, dtype)
    return x, weight, bias, norm, residual, case.upsample


def double(inputs: tuple) -> tuple:
    x, weight, bias, norm, residual, upsample = inputs
    if norm is not None:
        norm = Norm(norm.weight.double(), norm.bias.double(), norm.groups, norm.eps)
    optional = [None if t is None else t.double() for t in (bias, residual)]
    return x.double(), weight.double(), optional[0], norm, optional[1], upsample


# Winograd's transforms for the points 0, +-5/8, +-5/4 and infinity, from their definition: column j of A holds the
# powers of point j, row j of G the same divided by the product of its distances to the others, row j of B^T the
# coefficients of the polynomial that vanishes at the others.
POINTS = np.array([0.0, 0.625, -0.625, 1.25, -1.25])


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    A, G, B = np.zeros((4, 6)), np.zeros((6, 3)), np.zeros((6, 6))
    for j, point in enumerate(POINTS):
        others = np.delete(POINTS, j)
        A[:, j] = point ** np.arange(4)
        G[j] = point ** np.arange(3) / np.prod(point - others)
        B[j, :5] = np.poly(others)[::-1]
    A[3, 5], G[5, 2], B[5] = 1, 1, np.poly(POINTS)[::-1]
    return tuple(torch.from_numpy(np.ascontiguousarray(m)) for m in (A, G, B))


def test_the_transforms_are_a_convolution() -> None:
    A, G, B = matrices()
    d, g = torch.randn(6, 6).double(), torch.randn(3, 3).double()
    want = F.conv2d(d[None, None], g[None, None])[0, 0]
    torch.testing.assert_close(A @ ((G @ g @ G.T) * (B @ d @ B.T)) @ A.T, want)


def winograd_bound(z: Tensor, weight: Tensor) -> Tensor:
    """Of the float32 rounding errors of a convolution of z (after norm and upsampling), a bound for each element.

    Every product passes at most 6 + 6 roundings in the transforms of data, 5 + 5 in those of weights, C in the sum,
    which has them in order, and 5 + 5 in the transform back; the bound adds the absolute values up.
    """
    A, G, B = (m.abs() for m in matrices())
    height, width = z.shape[2:]
    padded = F.pad(z.abs(), (1, 5, 1, 5))
    tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # (B, C, rows, columns, 6, 6)
    data, filters = B @ tiles @ B.T, G @ weight.abs() @ G.T
    sums = torch.einsum("bcyxij,ocij->boyxij", data, filters)
    out = (A @ sums @ A.T).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return (32 + z.size(1)) * 2.0**-24 * out[:, :, :height, :width]


def norm_bound(x: Tensor, norm: Norm, z: Tensor) -> Tensor:
    """Of the float32 rounding errors of z, group norm of x and SiLU, a bound for each element.

    Mean and deviation are sums of n terms, off by 4 sqrt(n) roundings; four more are in a * x, a * mean and the bias,
    eight in SiLU, whose slope is at most 1.1.
    """
    groups = x.reshape(len(x), norm.groups, -1)
    mean = groups.mean(-1, keepdim=True)
    a = norm.weight.double().view(1, -1, 1, 1) * (groups.var(-1, correction=0) + norm.eps).rsqrt().repeat_interleave(
        x.size(1) // norm.groups, 1
    ).view(len(x), -1, 1, 1)
    sums = (groups.abs().mean(-1, keepdim=True) + (groups - mean).abs()).view_as(x)
    terms = (groups.abs() + mean.abs()).view_as(x) * a.abs() + norm.bias.double().abs().view(1, -1, 1, 1)
    return 2.0**-24 * (1.1 * (4 * groups.size(-1) ** 0.5 * a.abs() * sums + 4 * terms) + 8 * z.abs())


def check(inputs: tuple) -> Tensor:
    """Against float64: within the bound of the algorithm in float32, twice plain arithmetic's error in 16 bits."""
    x, weight, bias, norm, residual, upsample = inputs
    got, exact = conv3x3(*inputs), conv3x3_reference(*double(inputs))
    assert (got.shape, got.dtype) == (exact.shape, x.dtype)
    error = (got.double() - exact).abs()
    if x.dtype != torch.float32:
        assert_as_accurate("conv3x3", got, plain(conv3x3_reference, *inputs), exact)
        return got
    z, rounded = x.double(), torch.zeros_like(x, dtype=torch.float64)
    if norm is not None:
        z = F.silu(F.group_norm(z, norm.groups, norm.weight.double(), norm.bias.double(), norm.eps))
        rounded = norm_bound(x.double(), norm, z)
    if upsample:
        z, rounded = (F.interpolate(t, scale_factor=2.0, mode="nearest") for t in (z, rounded))
    bound = winograd_bound(z, weight.double()) + F.conv2d(rounded, weight.double().abs(), padding=1)
    for addend in (bias, residual):
        if addend is not None:
            bound = bound + 2.0**-22 * addend.double().abs().amax()
    assert (error <= bound + 2.0**-23 * exact.abs()).all(), float((error / bound).max())
    return got


@cases
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.levels
def test_value(device: torch.device, case: Case) -> None:
    with torch.inference_mode():
        check(arguments(case, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_run_pytorchs_convolution(device: torch.device, dtype: torch.dtype) -> None:
    if backends.current_backend() == "cpu":
        with pytest.raises(RuntimeError, match=f"'cpu' cannot run conv3x3: {dtype} is not float32"):
            conv3x3(*arguments(CASES["plain"], device, dtype))
        return
    check(arguments(Case(2, 64, 32, 9, 8, norm=32, residual=True), device, dtype))


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean()) ** 0.5


@pytest.mark.parametrize("upsample", [False, True], ids=["same_size", "upsample"])
def test_error_of_a_decoders_layer(upsample: bool) -> None:
    """Where sums are as long as in the model: in the mean at most twice that of sums in order.

    Three times behind an upsampling, whose equal neighbours cancel in the transforms.
    """
    inputs = arguments(Case(1, 160, 96, 24, 24, norm=0 if upsample else 32, upsample=upsample))
    exact = conv3x3_reference(*double(inputs))
    with use_backend("cpu"):
        got = conv3x3(*inputs)
    plainly = plain(conv3x3_reference, *inputs)
    assert rms(got - exact) <= (3 if upsample else 2) * rms(plainly - exact)


def test_error_of_a_decoded_image() -> None:
    """Through a whole decoder: at most twice that of convolutions whose sums are taken in order."""
    vae = varkern.VQVAE(ch=32, v_patch_nums=(1, 2, 4, 8), ch_mult=(1, 2, 2), num_res_blocks=1)
    f_hat = torch.randn(2, 32, 8, 8)
    got = vae.decoder(f_hat)
    with use_backend("reference"):
        plainly, exact = plain(vae.decoder, f_hat), vae.double().decoder(f_hat.double())
    assert not torch.equal(got, plainly)
    assert (got - exact).abs().max() <= 2 * (plainly - exact).abs().max()


def test_few_tiles_are_convolved_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    extension = module.extension("cpu")

    class Spy:
        def conv3x3(self, *args: object) -> None:
            calls.append(args)
            extension.conv3x3(*args)

    monkeypatch.setattr(module, "extension", lambda _: Spy())
    conv3x3(*arguments(Case(H=16, W=16)))
    assert not calls
    conv3x3(*arguments(Case(B=2, H=16, W=16)))
    conv3x3(*arguments(Case(H=16, W=8, upsample=True)))
    assert len(calls) == 2
    with use_backend("cpu"):
        conv3x3(*arguments(Case(H=4, W=4)))
    assert len(calls) == 3


def test_memory_formats_give_the_same_bits(device: torch.device) -> None:
    x, weight, bias, norm, residual, upsample = arguments(Case(2, 16, 24, 12, 11, norm=4, residual=True), device)
    want = conv3x3(x, weight, bias, norm, residual, upsample)
    strided = weight.new_empty(24, 16, 3, 6)[..., ::2].copy_(weight)
    other = conv3x3(x, strided, bias.expand(2, -1)[1], norm, residual.contiguous(), upsample)
    torch.testing.assert_close(other, want, rtol=1e-6, atol=1e-6)
    for same in (weight.contiguous(memory_format=torch.channels_last), strided):
        if backends.current_backend() == "cpu":
            assert torch.equal(conv3x3(x, same, bias, norm, residual, upsample), want)
    for same in (x.contiguous(), x.contiguous().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        torch.testing.assert_close(conv3x3(same, weight, bias, norm, residual), want, rtol=1e-5, atol=1e-5)
    assert torch.ops.varkern.conv3x3(
        x.contiguous(), weight, bias, None, None, 1, 0.0, None, False, backends.current_backend()
    ).is_contiguous(memory_format=torch.channels_last)


def test_what_is_not_a_number_stays_near() -> None:
    x, weight, bias, *_ = arguments(Case(1, 16, 8, 24, 24))
    x[0, 3, 2, 2] = torch.nan
    with use_backend("cpu"):
        out = conv3x3(x, weight, bias)
    assert out[0, :, 1:4, 1:4].isnan().all()
    assert out[0, :, 5:].isfinite().all()  # a tile and its neighbours: the sums of a tile share their data
    assert out[0, :, :, 5:].isfinite().all()


@pytest.mark.parametrize("x", [-1e4, -90.0, 90.0, 1e4, -torch.inf])
def test_silu_at_the_ends(x: float) -> None:
    """A constant map normalises to its bias, which SiLU then sees."""
    ones = torch.ones(1, 8, 12, 12).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 8, 3, 3)
    weight[range(8), range(8), 1, 1] = 1
    norm = Norm(torch.ones(8), torch.full((8,), x), 2, 1e-6)
    with use_backend("cpu"):
        got = conv3x3(ones, weight, None, norm)
    if x == -torch.inf:
        assert not got.isfinite().any()
        return
    torch.testing.assert_close(got, F.silu(torch.full_like(got, x)), rtol=1e-5, atol=1e-30)


def test_many_outputs_are_computed_in_groups() -> None:
    """So many transformed weights are not in memory at a time."""
    inputs = arguments(Case(1, 640, 640, 4, 4))
    with use_backend("cpu"):
        got = conv3x3(*inputs)
    torch.testing.assert_close(got, conv3x3_reference(*inputs), rtol=1e-4, atol=1e-5)
