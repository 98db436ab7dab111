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
from varkern.images import check_writable, shown
from varkern.models import VAR, load, load_tokenizer
from varkern.models.find import is_tokenizer, locate
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


def class_names(model: Path, num_classes: int | None = None) -> list[str] | None:
    """The names of a model's classes in their order, where its folder tells them.

    Raises ValueError for anything but a list of names, of ``num_classes`` where that is given.
    """
    path = model / CLASSES
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); repair or remove it") from error
    if not isinstance(names, list) or num_classes not in (None, len(names)):
        count = "" if num_classes is None else f"{num_classes} "
        raise ValueError(
            f"{path} must be a JSON list of {count}names, in the order of the classes; repair or remove it"
        )
    return [str(name) for name in names]


def check_classes(classes: list[str], trained: list[str] | None, number: int | None, config: EvaluateConfig) -> None:
    """Refuse images whose classes the model does not have, or of which nothing tells the numbers."""
    if trained is not None:
        others = [name for name in classes if name not in set(trained)]
        check(
            not others,
            f"{config.model} was not trained on the classes {shortened(others)} of {config.data}, but on "
            f"{shortened(trained)}; give a folder whose classes are among them",
        )
    else:
        check(
            number in (None, len(classes)),
            f"{config.data} has {len(classes)} classes, not {number} as the model; to measure on some of them, "
            f"list the names of all in their order in {CLASSES} in the model's folder",
        )


def stacked(part: Part) -> torch.Tensor:
    return torch.cat([images for images, _ in batches(part, range(len(part)), 256)])


@torch.no_grad()
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Reconstruction PSNR (dB), codebook usage (%), token loss and accuracy and, on request, quality of digits.

    The images may be of some of the model's classes, which ``classes.json`` beside it names.
    Token metrics keep every class label (no conditional dropout). Writes ``config.out`` when given.
    """
    config.validate()
    if config.out is not None:
        check(not Path(config.out).is_dir(), f"out is {shown(config.out)}, a folder; name a file")
        check_writable(Path(config.out).parent)
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
    trained = class_names(locate(config.model), None if var is None else var.num_classes)
    train, held_out = load_split(replace(config, augment=False, flip=False), classes=trained)
    part = held_out if config.part == "held_out" else train
    check(len(part) > 0, f"the {config.part} part of {config.data} is empty; change held_out")
    check_classes(part.classes, trained, None if var is None else var.num_classes, config)
    present = len(np.unique(part.labels))
    if present < len(part.classes):
        print(f"images of {present} of the {len(part.classes)} classes are measured", file=sys.stderr)
    for note in part.whole.notes:
        print(note, file=sys.stderr)

    result: dict[str, Any] = {"part": config.part, "images": len(part), "classes": present}
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
