"""sample_tokens and filter_logits: eager PyTorch and varkern; with noise drawn beforehand, and with drawing it."""

from __future__ import annotations

from typing import Any

import pytest
import shapes
import torch
import torch.nn.functional as F
from measure import settings
from torch import Tensor

from varkern.ops import sampling as ops

V = 4096
PAPER = (1.5, 900, 0.96)  # guidance, top_k, top_p
SETTINGS = {
    "paper": PAPER,
    "top_k": (1.5, 900, 0.0),
    "top_p": (1.5, 0, 0.96),
    "plain": (1.5, 0, 0.0),
}
# (images, tokens): the first, a middle and the last scale of one image, and the last scale of a batch.
ROWS = shapes.some({f"B{B}-{p}x{p}": (B, p * p) for B, p in ((1, 1), (1, 6), (1, 16), (8, 16))})
DTYPES = shapes.some({"f32": torch.float32, "bf16": torch.bfloat16})
LAST = (1, 16 if settings.smoke else 256)


def reference(logits: Tensor, noise: Tensor | torch.Generator, guidance: float, top_k: int, top_p: float) -> Tensor:
    """The reference engine's ops; given noise, with the draw written out."""
    logits = ops.guided_logits_reference(logits.float(), guidance)
    logits = ops.filter_logits_reference_(logits, top_k, top_p)
    if isinstance(noise, torch.Generator):
        return ops.sample_tokens_reference(logits, noise)
    p = logits.softmax(dim=-1)
    return (p / noise.view(p.shape)).argmax(dim=-1)


def problem(device: torch.device, rows: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2 * rows[0], rows[1], V, device=device)
    return logits.to(dtype), ops.draw_noise(rows[0] * rows[1], V, device)


def filtered(x: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Of guided logits (rows, V): which the filters keep, and of which rounding and ties decide that, in float64.

    A float32 sum of V probabilities is off by V roundings at most, and equal logits are cumulated in any order.
    """
    x, slack = x.double(), 4 * 2.0**-23 * x.abs().amax(-1, keepdim=True)
    kth = x.topk(top_k, dim=-1).values[:, -1:] if top_k else x.amin(-1, keepdim=True)
    kept, undecided = x >= kth, ((x - kth).abs() <= slack) & bool(top_k)
    if top_p:
        p = x.masked_fill(~kept, -torch.inf).softmax(-1)
        ascending, order = x.sort(dim=-1)
        cumulated = F.pad(p.gather(-1, order).cumsum(-1), (1, 0))
        below, up_to = (cumulated.gather(-1, torch.searchsorted(ascending, x, right=right)) for right in (False, True))
        excluded, rounding = 1 - top_p, x.size(-1) * 2.0**-24
        undecided |= (below + p <= excluded + rounding) & (up_to > excluded - rounding)
        kept &= up_to > excluded
    return kept, undecided


def check_filtered(got: Tensor, want: Tensor, x: Tensor, top_k: int, top_p: float) -> None:
    """What is kept of guided logits x; elsewhere than on a CPU up to rounding and ties."""
    _, undecided = filtered(x.flatten(0, -2), top_k, top_p)
    differ = (got.isfinite() != want.isfinite()).flatten(0, -2)
    assert (undecided | ~differ).all(), f"{int((differ & ~undecided).sum())} logits are kept wrongly or not"
    both = got.isfinite() & want.isfinite()
    torch.testing.assert_close(got[both], want[both], rtol=0, atol=4 * 2.0**-23 * float(x.abs().max()))


def check_drawn(got: Tensor, want: Tensor, x: Tensor, noise: Tensor, top_k: int, top_p: float) -> None:
    """Tokens drawn from guided logits x; elsewhere than on a CPU one may differ where p / q of two codes, or what the
    filters keep, is equal up to rounding."""
    x, (got, want) = x.flatten(0, -2), (tokens.flatten() for tokens in (got, want))
    rows = (got != want).nonzero().flatten()
    if not rows.numel():
        return
    x, got, want, noise = (tensor[rows] for tensor in (x, got.view(-1, 1), want.view(-1, 1), noise))
    kept, undecided = filtered(x, top_k, top_p)
    score, largest = x.double() - noise.double().log(), x.abs().amax(-1, keepdim=True)
    # Of guidance and the difference that exp takes, relative to the logits; of exp, softmax and the quotient.
    rounding = (8 * largest + 16) * 2.0**-24
    tie = (score.gather(-1, got) - score.gather(-1, want)).abs() <= rounding
    possible = (kept | undecided).gather(-1, got)
    border = undecided.gather(-1, got) | undecided.gather(-1, want)
    wrong = ~(possible & (tie | border))
    assert not wrong.any(), f"{int(wrong.sum())} of the tokens differ where no rounding decides"


def run(
    compare: Any, device: torch.device, rows: tuple[int, int], dtype: torch.dtype, setting: tuple[float, int, float]
) -> None:
    logits, noise = problem(device, rows, dtype)
    with torch.inference_mode():
        tokens = [function(logits, noise, *setting) for function in (ops.sample_tokens, reference)]
        guided = ops.guided_logits_reference(logits.float(), setting[0])
        if device.type == "cpu":
            assert torch.equal(*tokens)
        check_drawn(*tokens, guided, noise, *setting[1:])
        calls = {"reference": lambda: reference(logits, noise, *setting)}
        if settings.compile:
            compiled = torch.compile(reference, dynamic=False)
            calls["torch.compile"] = lambda: compiled(logits, noise, *setting)
            check_drawn(calls["torch.compile"](), tokens[1], guided, noise, *setting[1:])
        calls["varkern"] = lambda: ops.sample_tokens(logits, noise, *setting)
        moved = logits.nbytes + noise.nbytes + tokens[0].nbytes
        compare(calls, moved=moved, shape=tuple(logits.shape), dtype=str(dtype), setting=setting)


@pytest.mark.benchmark(group="sample_tokens, noise drawn beforehand")
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows(compare: Any, device: torch.device, rows: tuple[int, int]) -> None:
    run(compare, device, rows, torch.float32, PAPER)


@pytest.mark.benchmark(group="sample_tokens, noise drawn beforehand")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_settings(compare: Any, device: torch.device, setting: tuple[float, int, float], dtype: torch.dtype) -> None:
    run(compare, device, LAST, dtype, setting)


@pytest.mark.benchmark(group="sample_tokens, with drawing the noise")
def test_with_noise(compare: Any, device: torch.device) -> None:
    logits, noise = problem(device, LAST, torch.float32)
    generators = [torch.Generator(device).manual_seed(0) for _ in range(3)]
    setting = PAPER
    with torch.inference_mode():
        got, want = (
            function(logits, generator, *setting)
            for function, generator in zip((ops.sample_tokens, reference), generators, strict=False)
        )
        if device.type == "cpu":
            assert torch.equal(got, want)
        # The same noise as both drew.
        drawn = ops.draw_noise(*noise.shape, device, torch.Generator(device).manual_seed(0))
        check_drawn(got, want, ops.guided_logits_reference(logits, setting[0]), drawn, *setting[1:])
        calls = {
            "reference": lambda: reference(logits, generators[0], *setting),
            "noise alone": lambda: noise.exponential_(generator=generators[1]),
            "varkern": lambda: ops.sample_tokens(logits, generators[2], *setting),
        }
        compare(calls, moved=logits.nbytes + 3 * noise.nbytes, shape=tuple(logits.shape), setting=setting)


@pytest.mark.benchmark(group="filter_logits")
def test_filter(compare: Any, device: torch.device) -> None:
    logits, _ = problem(device, LAST, torch.float32)
    guidance, top_k, top_p = PAPER

    def eager() -> Tensor:
        return ops.filter_logits_reference_(ops.guided_logits_reference(logits, guidance), top_k, top_p)

    with torch.inference_mode():
        got, want = ops.filter_logits(logits, guidance, top_k, top_p), eager()
        if device.type == "cpu":
            assert torch.equal(got, want)
        check_filtered(got, want, ops.guided_logits_reference(logits, guidance), top_k, top_p)
        calls = {"reference": eager, "varkern": lambda: ops.filter_logits(logits, guidance, top_k, top_p)}
        compare(calls, moved=3 * logits.nbytes // 2, shape=tuple(logits.shape), setting=PAPER)
