"""sample_tokens and filter_logits: what eager PyTorch gives, for every setting; noise, errors; on every backend."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from ties import justified
from torch import Tensor

from varkern.ops import sampling, use_backend
from varkern.ops.sampling import (
    draw_noise,
    filter_logits,
    filter_logits_reference_,
    guided_logits_reference,
    sample_tokens,
    sample_tokens_reference,
    smooth_codes_reference,
)

OPS = ("sample_tokens", "filter_logits")

SHAPES = {
    "one_code": (1, 2, 1),
    "two_codes": (2, 3, 2),
    "odd_codes": (2, 5, 33),
    "one_row": (1, 1, 512),
    "first_scale": (3, 1, 4096),
    "longer_than_registers": (1, 2, 5003),
    "largest": (1, 2, 65536),
    "no_batch": (0, 4, 16),
    "no_positions": (2, 0, 16),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SETTINGS = {
    "plain": (None, 0, 0.0),
    "top_k": (None, 0.2, 0.0),
    "top_p": (None, 0, 0.9),
    "paper": (1.5, 0.2, 0.96),
    "greedy": (4.0, 0, 1e-9),
    "all": (0.0, 1.0, 1.0),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
Setting = tuple[float | None, int, float]


def arguments(
    shape: tuple[int, int, int], setting: tuple[float | None, float, float], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Setting]:
    """Logits as a slice of a wider tensor, and the setting with top_k as a number of codes."""
    B, n, V = shape
    guidance, share, top_p = setting
    wide = 3 * torch.randn(B if guidance is None else 2 * B, n + 2, V + 3)
    return wide.to(dtype)[:, 1 : n + 1, 1 : V + 1], (guidance, max(1, int(share * V)) if share else 0, top_p)


def filtered(logits: Tensor, guidance: float | None, top_k: int, top_p: float) -> Tensor:
    """What the reference engine draws from, for logits of any dtype."""
    logits = logits.float().clone()
    if guidance is not None:
        logits = guided_logits_reference(logits, guidance)
    return filter_logits_reference_(logits, top_k, top_p)


def eager_from_noise(logits: Tensor, noise: Tensor, *setting: Any) -> Tensor:
    """What torch.multinomial does, with noise that has been drawn."""
    p = filtered(logits, *setting).softmax(-1)
    return (p / noise.reshape(p.shape)).argmax(-1)


def assert_justified(tokens: Tensor, logits: Tensor, noise: Tensor, setting: Setting) -> None:
    """Each token is the draw in exact arithmetic, but for codes whose place is within rounding of another's."""
    guidance, top_k, top_p = setting
    x = logits.float()
    if guidance is not None:
        x = guided_logits_reference(x, guidance)
    assert justified(tokens.reshape(-1), x.double().reshape(noise.shape), noise, top_k, top_p).all()


def check(device: torch.device, logits: Tensor, noise: Tensor, setting: Setting) -> None:
    kept = filter_logits(logits.to(device), *setting)
    assert kept.device == device
    assert torch.equal(kept, filtered(logits.to(device), *setting))
    got = sample_tokens(logits.to(device), noise.to(device), *setting)
    assert got.device == device
    assert got.dtype == torch.int64
    if device.type == "cpu":
        assert torch.equal(got, eager_from_noise(logits, noise, *setting))
    if got.numel():
        assert_justified(got.cpu(), logits, noise, setting)


@shapes
@dtypes
@settings
@pytest.mark.levels
def test_tokens(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, setting: tuple) -> None:
    logits, setting = arguments(shape, setting, dtype)
    check(device, logits, draw_noise(shape[0] * shape[1], shape[2], "cpu"), setting)


@settings
def test_a_seed_gives_the_tokens_of_torch_multinomial(setting: tuple) -> None:
    logits, setting = arguments((2, 30, 1000), setting)
    a, b = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    want = sample_tokens_reference(filtered(logits, *setting), a)
    for backend in ("cpu", "reference"):
        b.manual_seed(7)
        with use_backend(backend):
            assert torch.equal(sample_tokens(logits, b, *setting), want)
        assert torch.equal(a.get_state(), b.get_state())
    torch.manual_seed(7)
    assert torch.equal(sample_tokens(logits, None, *setting), want)


@pytest.mark.parametrize("rows", [1, 2, 3, 257])
@pytest.mark.parametrize("V", [1, 5, 4096])
def test_noise_is_what_torch_multinomial_draws(rows: int, V: int) -> None:
    """Drawn into another tensor by the same generator, with the same state after it."""
    p = torch.rand(rows, V) + 0.01
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    drawn = torch.multinomial(p, num_samples=1, replacement=True, generator=a).view(-1)
    assert torch.equal(drawn, (p / draw_noise(rows, V, "cpu", b)).argmax(-1))
    assert torch.equal(a.get_state(), b.get_state())


def test_a_thousand_random_calls() -> None:
    """Seed, guidance, top-k, top-p, batch, V, dtype and scale at random: tokens and logits are eager PyTorch's."""
    choose = random.Random(0)
    a, b = torch.Generator(), torch.Generator()
    rows = 0
    for seed in range(1000):
        V = choose.choice([choose.randint(1, 64), choose.randint(65, 1500), 4096, choose.randint(4097, 20000)])
        B, n = choose.randint(1, 3), choose.randint(1, 1 + min(12, 20000 // V))
        guidance = choose.choice([None, 0.0, choose.uniform(0, 5)])
        top_k = choose.choice([0, choose.randint(1, V), min(V, 900)])
        top_p = choose.choice([0.0, choose.random(), 0.96, 1.0])
        dtype = choose.choice(list(DTYPES.values()))
        logits = torch.randn(B if guidance is None else 2 * B, n, V) * choose.choice([0.1, 1.0, 3.0, 20.0])
        setting = (guidance, top_k, top_p)
        with use_backend("cpu"):
            got = sample_tokens(logits.to(dtype), a.manual_seed(seed), *setting)
            kept = filter_logits(logits.to(dtype), *setting)
        want = filtered(logits.to(dtype), *setting)
        assert torch.equal(kept, want), f"seed {seed}, {(B, n, V)}, {dtype}, {setting}"
        want = sample_tokens_reference(want, b.manual_seed(seed))
        assert torch.equal(got, want), f"seed {seed}, {(B, n, V)}, {dtype}, {setting}"
        rows += B * n
    assert rows > 5000


def count_rows_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of undecided rows of each call that has any."""
    left, choose_rows = [], sampling._rows

    def counted(logits: Tensor, guidance: float | None, rows: Tensor) -> Tensor:
        left.append(len(rows))
        return choose_rows(logits, guidance, rows)

    monkeypatch.setattr(sampling, "_rows", counted)
    return left


def test_almost_every_row_is_settled_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    left = count_rows_left_to_pytorch(monkeypatch)
    logits = 3 * torch.randn(2, 256, 4096)
    with use_backend("cpu"):
        for _ in range(4):
            sample_tokens(logits, None, 1.5, 900, 0.96)
    assert sum(left) <= 4  # of 1024; 0.03 expected


def test_equal_ratios_are_left_to_the_rounding_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is proportional to p, so the argmax is that of rounding errors."""
    left = count_rows_left_to_pytorch(monkeypatch)
    logits = torch.randn(2, 20, 500)
    noise = logits.double().softmax(-1).float().view(40, 500)
    for setting in ((None, 0, 0.0), (None, 50, 0.0), (None, 50, 0.5)):
        with use_backend("cpu"):
            got = sample_tokens(logits, noise, *setting)
        assert torch.equal(got, eager_from_noise(logits, noise, *setting))
    assert sum(left) > 100


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_the_border_of_top_p_is_left_to_the_rounding_of_pytorch(monkeypatch: pytest.MonkeyPatch, ties: bool) -> None:
    """top_p is put on the cumulated probability of one code, which the noise then makes the draw."""
    left = count_rows_left_to_pytorch(monkeypatch)
    logits = torch.randn(1, 1, 800)
    if ties:
        logits = (logits * 8).round() / 8
    ascending, order = logits[0, 0].sort()
    cumulated = ascending.softmax(-1).cumsum(-1)
    agree = 0
    for rank in range(100, 800, 7):
        noise = torch.full((1, 800), 1e6)
        noise[0, order[rank]] = 1e-3
        for top_p in (1 - cumulated[rank].item() + delta for delta in (-6e-8, 0.0, 6e-8)):
            setting = (None, 0, min(max(top_p, 1e-7), 1.0))
            with use_backend("cpu"):
                got = sample_tokens(logits, noise, *setting)
                kept = filter_logits(logits, *setting)
            want = eager_from_noise(logits, noise, *setting)
            assert torch.equal(got, want)
            assert torch.equal(kept, filtered(logits, *setting))
            agree += int(want.item() == order[rank])
    assert len(left) > 200
    assert 50 < agree < 250  # the border was crossed both ways


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf, 1e-42, 1e35], ids=str)
def test_noise_that_no_generator_draws(value: float) -> None:
    logits, noise = torch.randn(1, 4, 100), draw_noise(4, 100, "cpu")
    noise[1, 50], noise[2], noise[3, :3] = value, value, value
    for setting in ((None, 0, 0.0), (None, 10, 0.5)):
        with use_backend("cpu"):
            assert torch.equal(sample_tokens(logits, noise, *setting), eager_from_noise(logits, noise, *setting))


@pytest.mark.parametrize("top_k", [0, 3, 40])
@pytest.mark.parametrize("top_p", [0.0, 0.7])
def test_rows_hard_to_search(device: torch.device, top_k: int, top_p: float) -> None:
    logits = torch.randn(8, 1, 257)
    logits[1] = 2.5
    logits[2] = (logits[2] * 2).round() / 2
    logits[3, 0, 0], logits[3, 0, 1:] = 1e30, -1e30
    logits[4, 0, ::2] = -torch.inf
    logits[5] = torch.linspace(-1e-40, 1e-40, 257)
    logits[6], logits[6, 0, 100] = -torch.inf, 0.0
    logits[7] = torch.linspace(3.0, 3.0 + 257 * 2.0**-22, 257).flip(0)
    check(device, logits, draw_noise(8, 257, "cpu"), (None, top_k, top_p))


def test_noise_that_rejects_every_draw_in_turn(device: torch.device) -> None:
    """The least likely codes win first, and top-p drops them one after the other."""
    logits = torch.linspace(0, 4, 300).view(1, 1, 300)
    noise = (logits.double().softmax(-1) * torch.linspace(1, 3, 300)).float().view(1, 300)
    check(device, logits, noise, (None, 0, 0.1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("setting", [SETTINGS["plain"], SETTINGS["paper"]], ids=["plain", "paper"])
def test_a_row_without_distribution(device: torch.device, bad: float, setting: tuple) -> None:
    logits, setting = arguments((2, 3, 40), setting)
    logits[1, 2, 5] = bad
    if bad == -torch.inf:
        if setting[0] is not None:
            pytest.skip("-inf minus -inf is NaN")
        sample_tokens(logits.to(device), None, *setting)  # one code less is no trouble
        logits[1, 2] = bad
    logits = logits.to(device)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"batch row 1, position 2 have no distribution .*: NaN, \+inf"):
            sample_tokens(logits, None, *setting)
    else:
        tokens = sample_tokens(logits, None, *setting)
        assert ((tokens >= 0) & (tokens < 40)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_filtered_logits_pass_on_what_is_not_finite(device: torch.device, bad: float) -> None:
    logits = torch.randn(1, 4, 40, device=device)
    logits[0, 1, 5], logits[0, 2] = bad, -torch.inf
    for setting in ((None, 0, 0.0), (None, 7, 0.0), (None, 0, 0.5), (None, 7, 0.5)):
        got, want = filter_logits(logits, *setting), filtered(logits, *setting)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
        assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
def test_filtered_logits_keep_what_underflows(device: torch.device, top_p: float) -> None:
    """No probability, but a logit all the same: top-k keeps it."""
    logits = torch.linspace(0, 300, 64, device=device).view(1, 1, 64)
    for top_k in (0, 20, 50):
        assert torch.equal(filter_logits(logits, None, top_k, top_p), filtered(logits, None, top_k, top_p))


def test_smooth_codes_are_the_reference_s_bit_for_bit(device: torch.device) -> None:
    logits, setting = arguments((1, 16, 300), SETTINGS["paper"])
    codebook, logits = torch.randn(300, 8, device=device), logits.to(device)
    a, b = (torch.Generator(device).manual_seed(1) for _ in range(2))
    got = smooth_codes_reference(filter_logits(logits, *setting), codebook, 0.9, a)
    assert torch.equal(got, smooth_codes_reference(filtered(logits, *setting), codebook, 0.9, b))


def test_a_refused_call_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    with pytest.raises(ValueError, match="top_k is 9"):
        sample_tokens(torch.randn(1, 1, 8), generator, None, 9)
    assert torch.equal(generator.get_state(), state)
