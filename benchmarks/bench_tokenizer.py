"""The tokenizer: images to tokens and f_hat to images, eager and varkern; with 160 channels it is the published one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import shapes
import torch
from measure import results_of, settings

import varkern

# (channels, images)
CPU, CUDA = [(32, 1), (160, 1)], [(160, 1), (160, 16), (160, 64)]
SIZES = [(32, 1)] if settings.smoke else [*CPU, *(size for size in CUDA if size not in CPU)]
sizes = pytest.mark.parametrize(("ch", "batch"), SIZES, ids=[f"ch{ch}-B{batch}" for ch, batch in SIZES])
PATCH_NUMS = shapes.PATCH_NUMS


def tokenizer(ch: int, batch: int, device: torch.device) -> varkern.VQVAE:
    if not settings.smoke and (ch, batch) not in (CPU if device.type == "cpu" else CUDA):
        pytest.skip("a size for another device")
    torch.manual_seed(0)
    return varkern.VQVAE(ch=ch, v_patch_nums=PATCH_NUMS, test_mode=True).to(device)


@pytest.mark.benchmark(group="tokenize images")
@sizes
def test_tokenize(compare: Any, device: torch.device, ch: int, batch: int) -> None:
    vae = tokenizer(ch, batch, device)
    side = PATCH_NUMS[-1] * vae.downsample
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1

    def tokenize(backend: str | None) -> list[torch.Tensor]:
        with torch.inference_mode(), varkern.use_backend(backend):
            return vae.img_to_idxBl(images)

    calls = {"reference": lambda: tokenize("reference"), "varkern": lambda: tokenize(None)}
    results = results_of(calls)
    # Features that differ by rounding may be nearest to another code, and the scales after it follow.
    share = models.same_tokens(results["varkern"], results.get("reference", results["varkern"]))
    assert share > 0.98, f"{share:.1%} of the tokens agree"
    weights = sum(p.nbytes for p in vae.encoder.parameters())
    flop = batch * models.encoder_flop(vae)
    compare(calls, weights + images.nbytes, flop, shape=tuple(images.shape), ch=ch, batch=batch)


@pytest.mark.benchmark(group="decode images")
@sizes
def test_decode(compare: Any, device: torch.device, ch: int, batch: int) -> None:
    vae = tokenizer(ch, batch, device)
    f_hat = torch.randn(batch, vae.Cvae, PATCH_NUMS[-1], PATCH_NUMS[-1], device=device)

    compiled = torch.compile(vae.fhat_to_img, dynamic=False)  # nothing is compiled before it is called

    def decode(backend: str | None, function: Callable[..., torch.Tensor] = vae.fhat_to_img) -> torch.Tensor:
        with torch.inference_mode(), varkern.use_backend(backend), models.as_the_demo_runs(device):
            return function(f_hat)

    calls = {"reference": lambda: decode("reference")}
    if settings.compile:
        calls["torch.compile"] = lambda: decode("reference", compiled)
    calls["varkern"] = lambda: decode(None)
    results, tolerance = results_of(calls), 1e-4 if device.type == "cpu" else 2e-2
    want = results.get("reference", results["varkern"]).float()
    for got in results.values():
        torch.testing.assert_close(got.float(), want, rtol=0, atol=tolerance * float(want.abs().max()))
    weights = sum(p.numel() for p in vae.decoder.parameters())
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    flop = batch * models.decoder_flop(vae)
    compare(calls, weights * dtype.itemsize, flop, shape=tuple(want.shape), dtype=dtype, ch=ch, batch=batch)
