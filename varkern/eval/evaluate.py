"""Evaluation of a whole model, tokenizer and transformer, on a folder of images or on the digits."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from varkern.atomic import atomic_write
from varkern.data.config import DataConfig, check, option, required, resolve_device
from varkern.data.datasets import Part, batches, load_split, shortened
from varkern.eval.digits import DigitMeasures
from varkern.models import VAR, load, load_tokenizer
from varkern.models.find import is_tokenizer
from varkern.train.encode import encode_all
from varkern.train.run import CLASSES
from varkern.train.tokenizer import tokenizer_metrics
from varkern.train.transformer import token_metrics_on

__all__ = ["EvaluateConfig", "evaluate", "generate"]


@dataclass(kw_only=True)
class EvaluateConfig(DataConfig):
    """What to measure. The split must be that of training (same ``held_out`` and ``split_seed``)."""

    model: str = required("folder, Hub repository, or weights file; of a tokenizer alone, only that is measured")
    vae: str | None = option(None, "the tokenizer, where the model has none: the same kinds")
    part: str = option("held_out", "images to measure on: 'held_out' or 'train'")
    batch_size: int = option(128, "images at a time", "(0, inf)")
    generate: bool = option(False, "also generate and measure images (digits only)")
    cfg: float = option(1.5, "classifier-free guidance scale")
    top_k: int = option(0, "sample among the k most likely tokens; 0 does not cut")
    top_p: float = option(0.0, "sample in the smallest set of tokens of this probability; 0 does not cut")
    seed: int = option(0, "seed of generation and of the conditional dropout in the token loss", "[0, 9e18]")
    device: str = option("auto", "device; 'auto' takes CUDA when there is one")
    out: str | None = option(None, "JSON file for the result")

    def validate(self) -> None:
        """Raise ``ValueError`` with one sentence for the first setting that cannot work."""
        self.validate_data()
        check(self.part in ("held_out", "train"), f"part is {self.part!r}; use 'held_out' or 'train'")
        check(
            not self.generate or self.data == "digits",
            "generated images are measured for data 'digits' only; for others write them out and use an FID tool",
        )


def generate(
    var: VAR, labels: np.ndarray, *, cfg: float, top_k: int, top_p: float, seed: int, batch_size: int = 128
) -> torch.Tensor:
    """Images (n, c, s, s) float32 in [-1, 1] on the CPU of the classes ``labels`` (n,).

    Batch b is drawn with seed ``seed + b``, so the result depends on ``batch_size`` as well.
    """
    device = next(var.parameters()).device
    parts = []
    for b, at in enumerate(tqdm(range(0, len(labels), batch_size), desc="generating", leave=False)):
        label_B = torch.from_numpy(labels[at : at + batch_size]).to(device)
        images = var.autoregressive_infer_cfg(len(label_B), label_B, g_seed=seed + b, cfg=cfg, top_k=top_k, top_p=top_p)
        parts.append(images.float().cpu() * 2 - 1)
    return torch.cat(parts)


def stacked(part: Part) -> torch.Tensor:
    return torch.cat([images for images, _ in batches(part, range(len(part)), 256)])


@torch.no_grad()
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Reconstruction PSNR (dB), codebook usage (%), token loss and accuracy and, on request, quality of digits.

    Token metrics keep every class label (no conditional dropout). Writes ``config.out`` when given.
    """
    config.validate()
    device = resolve_device(config.device)
    var = None if config.vae is None and is_tokenizer(config.model) else load(config.model, config.vae, device)
    vae = load_tokenizer(config.model).vae.to(device) if var is None else var.vae_proxy[0]
    check(
        var is not None or not config.generate,
        f"{config.model} is a tokenizer alone; generate needs a transformer: name one, or leave it off",
    )
    size = vae.quantize.v_patch_nums[-1] * vae.downsample
    check(
        config.image_size == size,
        f"image_size is {config.image_size} but the model makes {size} pixels; set it to that",
    )
    check(
        config.channels == vae.in_channels,
        f"channels is {config.channels} but the model has {vae.in_channels}; set it to that",
    )
    train, held_out = load_split(replace(config, augment=False, flip=False))
    part = held_out if config.part == "held_out" else train
    check(len(part) > 0, f"the {config.part} part of {config.data} is empty; change held_out")
    classes = len(part.classes) if var is None else var.num_classes
    check(
        len(part.classes) == classes,
        f"{config.data} has {len(part.classes)} classes and the model {classes}; give a folder with the same classes",
    )

    named = Path(config.model) / CLASSES
    if named.is_file():
        trained = json.loads(named.read_text(encoding="utf-8"))
        check(
            trained == part.classes,
            f"the classes of {config.data} are {shortened(part.classes)}, those of {named} {shortened(trained)}; "
            "give a folder with the same classes",
        )
    for note in part.whole.notes:
        print(note, file=sys.stderr)

    result: dict[str, Any] = {"part": config.part, "images": len(part)}
    result["tokenizer"] = tokenizer_metrics(vae, part, config.batch_size, device)
    if var is not None:
        tokens = encode_all(vae, part, config.batch_size, device, workers=config.workers)
        dropped, var.cond_drop_rate = var.cond_drop_rate, 0.0
        result["transformer"] = token_metrics_on(var, vae, tokens, config.batch_size, device)
        var.cond_drop_rate = dropped
    if var is not None and config.generate:
        measures = DigitMeasures(stacked(train), train.labels, stacked(held_out), held_out.labels)
        settings: dict[str, Any] = {
            "cfg": config.cfg,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "seed": config.seed,
        }
        images = generate(var, part.labels, **settings, batch_size=config.batch_size)
        result["generation"] = {**settings, "batch_size": config.batch_size, **measures.measure(images, part.labels)}
    if config.out is not None:
        text = json.dumps(result, indent=2) + "\n"
        atomic_write(Path(config.out), lambda file: file.write(text.encode()))
    return result
