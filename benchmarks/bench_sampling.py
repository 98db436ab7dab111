"""sample_tokens and filter_logits: eager PyTorch and varkern; with noise drawn beforehand, and with drawing it."""

from __future__ import annotations

from typing import Any

import pytest
import shapes
import torch
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


def run(
    compare: Any, device: torch.device, rows: tuple[int, int], dtype: torch.dtype, setting: tuple[float, int, float]
) -> None:
    logits, noise = problem(device, rows, dtype)
    with torch.inference_mode():
        tokens = [function(logits, noise, *setting) for function in (reference, ops.sample_tokens)]
        if device.type == "cpu":
            assert torch.equal(*tokens)
        else:  # another order of summation: a code in a thousand may be another
            assert (tokens[0] == tokens[1]).float().mean() > 0.999
        calls = {"reference": lambda: reference(logits, noise, *setting)}
        if settings.compile:
            compiled = torch.compile(reference, dynamic=False)
            calls["torch.compile"] = lambda: compiled(logits, noise, *setting)
            assert (calls["torch.compile"]() == tokens[0]).float().mean() > 0.999
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
        assert torch.equal(got, want) or device.type == "cuda"
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
        assert torch.equal(ops.filter_logits(logits, guidance, top_k, top_p), eager())
        calls = {"reference": eager, "varkern": lambda: ops.filter_logits(logits, guidance, top_k, top_p)}
        compare(calls, moved=3 * logits.nbytes // 2, shape=tuple(logits.shape), setting=PAPER)
