"""What each command of ``varkern`` does with its parsed options (`varkern.cli` describes them)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkern import edit, images, sampling
from varkern.data.datasets import held_out_digits
from varkern.engine import generate
from varkern.engine.arguments import check_options
from varkern.engine.options import Options
from varkern.models import VAR, VQVAE, CheckpointWarning, load
from varkern.models.find import load_tokenizer, locate
from varkern.ops import reference_forced

__all__ = ["bench", "edit_image", "evaluate", "info", "reconstruct", "sample", "train", "train_tokenizer"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _config(config: type, options: argparse.Namespace, **defaults: Any) -> Any:
    names = {field.name for field in dataclasses.fields(config)}
    return config(**defaults | {name: value for name, value in vars(options).items() if name in names})


def _device(options: argparse.Namespace) -> torch.device:
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device of torch; use cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} was asked for, but torch finds no CUDA device; use cpu")
    return device


def _checkpoint(options: argparse.Namespace) -> str:
    if options.checkpoint is None:
        from varkern.assets import bundled_model

        return str(bundled_model())
    options.checkpoint = str(locate(options.checkpoint))  # a Hub repository is asked once
    return options.checkpoint


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """What loading has to say, as lines on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CheckpointWarning)
        show = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, CheckpointWarning):
                print(f"varkern: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = tell
        yield


def _load(options: argparse.Namespace) -> VAR:
    if options.vae is not None and options.checkpoint is None:
        raise ValueError(f"--vae {options.vae} names a tokenizer; name the transformer too (--checkpoint)")
    device, checkpoint = _device(options), _checkpoint(options)
    with _notes():
        return load(checkpoint, options.vae, device, DTYPES[options.dtype], options.patch_nums)


def _image_size(vae: VQVAE) -> int:
    return vae.downsample * int(vae.quantize.v_patch_nums[-1])


def _labels(names: Sequence[str], num_classes: int, checkpoint: str) -> list[int]:
    """Class numbers of what ``--class`` names; a name of ``classes.json`` goes before a number."""
    path = Path(checkpoint) / "classes.json"
    known = _class_names(path, num_classes) if path.is_file() else []
    numbers = {name.lower(): number for number, name in enumerate(known)}
    labels = []
    for name in names:
        label = num_classes if name.lower() == "none" else numbers.get(name.lower(), -1)
        if label < 0 and name.isdecimal():
            label = int(name)
        if not 0 <= label <= num_classes or (label == num_classes and name.lower() != "none"):
            also = f", a name in {path}" if known else ""
            raise ValueError(f"--class {name} is not a class: give a number in 0..{num_classes - 1}{also}, or none")
        labels.append(label)
    return labels


def _class_names(path: Path, num_classes: int) -> list[str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); repair or remove it") from error
    if not isinstance(names, list) or len(names) != num_classes:
        raise ValueError(
            f"{path} must be a JSON list of {num_classes} names, in the order of the classes; repair or remove it"
        )
    return [str(name) for name in names]


def _check_out(out: Path) -> None:
    """Refuse an unusable ``--out`` before anything is computed."""
    if out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ValueError(f"--out {out}: pictures are written as PNG; name a .png file or a folder")
    if out.suffix.lower() == ".png" and out.is_dir():
        raise ValueError(
            f"--out {out} is a folder whose name ends in .png; name another file, or a folder of another name"
        )
    if out.suffix.lower() != ".png" and out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a .png file or a folder")


def _write(out: Path, results: Tensor, names: Sequence[str], rows: Sequence[Tensor] | None = None) -> None:
    """Results (B, C, H, W) in [0, 1] as files of a folder, or as one picture; says what was written where."""
    if out.suffix.lower() == ".png":
        replaced = out.exists()
        if rows is None and len(results) == 1:
            images.write_png(images.to_pil(results[0]), out)
        else:
            columns = math.ceil(math.sqrt(len(results)))
            images.write_png(images.sheet(rows or results.split(columns)), out)
        print(f"{'replaced' if replaced else 'wrote'} {out}")
        return
    taken = [int(found[1]) for path in out.glob("*.png") if (found := re.match(r"(\d{5,})_", path.name))]
    first = max(taken, default=-1) + 1
    for number, (image, name) in enumerate(zip(results, names, strict=True), first):
        images.write_png(images.to_pil(image), out / f"{number:05d}_{name}.png")
    kept = f", beside {len(taken)} that were there" if taken else ""
    print(f"wrote {len(results)} images to {out}{os.sep}{first:05d}_*.png .. {number:05d}_*.png{kept}")


def _batches(count: int, size: int, what: str) -> Iterator[tuple[int, slice]]:
    """(batch number, its items) with a progress bar where there are several."""
    from tqdm import tqdm

    for batch in tqdm(range(math.ceil(count / size)), desc=what, unit="batch", disable=count <= size):
        yield batch, slice(batch * size, (batch + 1) * size)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("cfg", "top_k", "top_p", "more_smooth")}


def sample(options: argparse.Namespace) -> None:
    _check_out(options.out)
    var = _load(options)
    classes = _labels(options.classes or [], var.num_classes, _checkpoint(options))
    count = options.num or len(classes) or min(var.num_classes, 10)
    classes = classes or list(range(var.num_classes))
    labels = [classes[i % len(classes)] for i in range(count)]
    device = var.lvl_1L.device
    check_options(var, 1, Options(**_sampling(options)))  # before the folder is made

    def make(indices: list[int], seeds: list[int]) -> Tensor:
        part = torch.tensor([labels[i] for i in indices], dtype=torch.int64, device=device)
        if not (options.more_smooth or reference_forced()):  # whose order of operations has one seed a batch
            return generate(var, len(part), part, seeds, **_sampling(options)).images
        # The reference, which draws soft tokens, takes one seed a call.
        alone = zip(part.split(1), seeds, strict=True)
        return torch.cat([generate(var, 1, label, seed, **_sampling(options)).images for label, seed in alone])

    names = [_class_name(label, var.num_classes) for label in labels]
    begin = time.perf_counter()
    settings = _settings(options) | {"command": "sample", "classes": classes}
    new = functools.partial(secrets.randbelow, 2**31)
    seed, made = sampling.run(options.out, settings, options.seed, new, names, options.batch_size, make, "sampling")
    print(f"{made} images, seed {seed}, {device}, {options.dtype}: {time.perf_counter() - begin:.2f} s")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What decides images beside the seed, as JSON values."""
    return _sampling(options) | {
        "checkpoint": options.checkpoint,
        "vae": options.vae,
        "patch_nums": options.patch_nums,
        "dtype": options.dtype,
    }


def _class_name(label: int, num_classes: int) -> str:
    return "none" if label == num_classes else f"class{label}"


def _tokenizer(options: argparse.Namespace) -> VQVAE:
    if options.vae is not None and options.checkpoint is not None:
        return _load(options).vae_proxy[0]
    device = _device(options)
    with _notes():
        vae = load_tokenizer(options.vae or _checkpoint(options), options.patch_nums).vae
    return vae.to(device=device, dtype=DTYPES[options.dtype])


def reconstruct(options: argparse.Namespace) -> None:
    from varkern.train.losses import psnr

    _check_out(options.out)
    if not options.images and (options.checkpoint or options.vae):
        raise ValueError(
            "there is nothing to reconstruct: name image files (only the bundled model has images of its "
            "own, held-out digits)"
        )
    vae = _tokenizer(options)
    size, weight = _image_size(vae), vae.post_quant_conv.weight
    if options.images:
        names = [path.name for path in options.images]
        originals = torch.stack([images.read_image(path, size, vae.in_channels) for path in options.images])
    else:
        originals, digits = held_out_digits(options.num, size, vae.in_channels)
        names = [f"digit {digit}" for digit in digits]
    made = []
    with torch.no_grad():
        for _, items in _batches(len(originals), options.batch_size, "reconstructing"):
            batch = originals[items].to(device=weight.device, dtype=weight.dtype)
            result = vae.img_to_reconstructed_img(batch, last_one=True)
            assert isinstance(result, Tensor)
            made.append(result.float().cpu())
    results = torch.cat(made)
    values = psnr(results, originals).tolist()
    for name, value in zip(names, values, strict=True):
        print(f"{name}: PSNR {value:.2f} dB")
    print(f"mean of {len(values)}: PSNR {sum(values) / len(values):.2f} dB")
    both = [part.add(1).div(2) for pair in zip(originals.split(8), results.split(8), strict=True) for part in pair]
    stems = [Path(name).stem.replace(" ", "") for name in names]
    _write(options.out, results.add(1).div(2), stems, rows=both)


def edit_image(options: argparse.Namespace) -> None:
    _check_out(options.out)
    if options.mode == "class" and not options.classes:
        raise ValueError("--mode class needs --class, the class that the region becomes")
    if options.mode != "class" and options.classes:
        raise ValueError(f"--class goes with --mode class; leave it out of {options.mode}ing, which has no class")
    if (options.box is None) == (options.mask is None):
        raise ValueError("name the region by either --box T,L,B,R or --mask FILE, not both")
    var = _load(options)
    vae, device = var.vae_proxy[0], var.lvl_1L.device
    image = images.read_image(options.image, _image_size(vae), vae.in_channels)
    mask = None if options.mask is None else images.read_mask(options.mask)
    labels = _labels(options.classes or ["none"], var.num_classes, _checkpoint(options))
    count = options.num or len(labels)
    labels = [labels[i % len(labels)] for i in range(count)]
    check_options(var, 1, Options(**_sampling(options)))  # before the folder is made
    edit.regions_of(var, options.box, mask, outside=options.mode == "outpaint")
    width, height = images.open_image(options.image, vae.in_channels).size
    if width != height:
        print(f"{options.image} is {width}x{height}: its central square is edited, and the rest is left out")
    region: dict[str, Any] = {"box": options.box, "mask": mask, "paste_back": options.paste_back}

    def edited(part: Tensor, seed: int | list[int]) -> Tensor:
        given = image.to(device=device, dtype=DTYPES[options.dtype]).expand(len(part), -1, -1, -1)
        if options.mode == "class":
            return edit.class_edit(var, given, part, seed=seed, **region, **_sampling(options)).images
        paint = edit.inpaint if options.mode == "inpaint" else edit.outpaint
        return paint(var, given, seed=seed, **region, **_sampling(options)).images

    def make(indices: list[int], seeds: list[int]) -> Tensor:
        part = torch.tensor([labels[i] for i in indices], dtype=torch.int64, device=device)
        if not (options.more_smooth or reference_forced()):  # whose order of operations has one seed a batch
            return edited(part, seeds)
        return torch.cat([edited(label, seed) for label, seed in zip(part.split(1), seeds, strict=True)])

    kind = [_class_name(label, var.num_classes) if options.mode == "class" else options.mode for label in labels]
    files = [path for path in (options.image, options.mask) if path is not None]
    settings = _settings(options) | {
        "command": "edit",
        "mode": options.mode,
        "classes": options.classes,
        "box": options.box,
        "paste_back": options.paste_back,
        "files": [[str(path), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files],
    }
    begin, new = time.perf_counter(), functools.partial(secrets.randbelow, 2**31)
    seed, made = sampling.run(options.out, settings, options.seed, new, kind, options.batch_size, make, "editing")
    print(f"{made} edits, seed {seed}, {device}, {options.dtype}: {time.perf_counter() - begin:.2f} s")


def train_tokenizer(options: argparse.Namespace) -> None:
    from varkern import train as training

    folder = training.train_tokenizer(_config(training.TokenizerConfig, options))
    print(f"wrote the tokenizer to {folder}")


def train(options: argparse.Namespace) -> None:
    from varkern import train as training

    with _notes():
        folder = training.train_transformer(_config(training.TransformerConfig, options))
    print(f"wrote the model to {folder}")


def evaluate(options: argparse.Namespace) -> None:
    from varkern import eval as measures

    defaults: dict[str, Any] = {}
    if "model" not in options:
        from varkern.assets import bundled_model

        defaults = {"model": str(bundled_model()), "data": "digits", "image_size": 32, "channels": 1}
    elif "data" not in options:
        raise ValueError("there is nothing to measure on: name a folder of images (--data FOLDER)")
    with _notes():
        print(json.dumps(measures.evaluate(_config(measures.EvaluateConfig, options, **defaults)), indent=2))


def bench(options: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    if not (folder / "suite.py").is_file():
        raise ValueError(
            "there are no benchmarks beside this installation; they come with a checkout: run `pip install -e .` in one"
        )
    for module in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"the benchmarks need {module}: install it by `pip install -e '.[test]'`")
    sys.path.insert(0, str(folder))
    try:
        suite = importlib.import_module("suite")
    finally:
        sys.path.remove(str(folder))
    status: int = suite.run(options)
    return status


def info(options: argparse.Namespace) -> None:
    from varkern import info as installation

    installation.show(options.json)
