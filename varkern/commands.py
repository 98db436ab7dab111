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
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from varkern import edit, images, sampling
from varkern.data.datasets import held_out_digits
from varkern.engine import generate
from varkern.engine.arguments import check_options
from varkern.engine.options import Options
from varkern.models import VAR, VQVAE, CheckpointWarning, load
from varkern.models.find import load_tokenizer, locate
from varkern.ops import reference_forced
from varkern.photograph import Photograph, faded

__all__ = ["bench", "edit_image", "evaluate", "info", "reconstruct", "sample", "train", "train_tokenizer"]

LARGEST_SHEET = 2**26  # pixels of several photographs in one picture
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
    from varkern.eval.evaluate import class_names

    known = class_names(Path(checkpoint), num_classes) or []
    numbers = {name.lower(): number for number, name in enumerate(known)}
    labels = []
    for name in names:
        label = num_classes if name.lower() == "none" else numbers.get(name.lower(), -1)
        if label < 0 and name.isdecimal():
            label = int(name)
        if not 0 <= label <= num_classes or (label == num_classes and name.lower() != "none"):
            also = f", a name in {Path(checkpoint) / 'classes.json'}" if known else ""
            raise ValueError(f"--class {name} is not a class: give a number in 0..{num_classes - 1}{also}, or none")
        labels.append(label)
    return labels


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
    images.check_writable(out.parent if out.suffix.lower() == ".png" else out)


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
    settings = _settings(options, var) | {"command": "sample", "classes": classes}
    new = functools.partial(secrets.randbelow, 2**31)
    seed, made = sampling.run(options.out, settings, options.seed, new, names, options.batch_size, make, "sampling")
    print(f"{made} images, seed {seed}, {device}, {options.dtype}: {time.perf_counter() - begin:.2f} s")


def _settings(options: argparse.Namespace, var: VAR) -> dict[str, Any]:
    """What decides images beside the seed, as JSON values."""
    return _sampling(options) | _source(options, var, var.vae_proxy[0])


def _source(options: argparse.Namespace, *models: torch.nn.Module) -> dict[str, Any]:
    """Where the models come from, and of a run in a folder, which goes on, what they are."""
    from varkern.train.transformer import digest_of_weights

    grid = options.out.suffix.lower() == ".png"
    return {
        "checkpoint": options.checkpoint,
        "vae": options.vae,
        "patch_nums": options.patch_nums,
        "dtype": options.dtype,
        "weights": None if grid else [digest_of_weights(model) for model in models],
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
    from varkern.data.datasets import digest_of
    from varkern.data.folder import bad_images
    from varkern.train.losses import psnr

    _check_out(options.out)
    if not options.images and (options.checkpoint or options.vae):
        raise ValueError(
            "there is nothing to reconstruct: name image files (only the bundled model has images of its "
            "own, held-out digits)"
        )
    if faults := bad_images(options.images):
        raise ValueError(next(iter(faults.values())))
    vae = _tokenizer(options)
    size, weight = _image_size(vae), vae.post_quant_conv.weight
    digits, labels = (None, []) if options.images else held_out_digits(options.num, size, vae.in_channels)
    names = [path.name for path in options.images] or [f"digit {digit}" for digit in labels]
    grid = options.out.suffix.lower() == ".png"
    values, originals = list[float](), list[Tensor]()

    def make(indices: list[int], _: list[int]) -> Tensor:
        if digits is None:
            read = [images.read_image(options.images[i], size, vae.in_channels) for i in indices]
        else:
            read = [digits[i] for i in indices]
        batch = torch.stack(read)
        with torch.no_grad():
            made = vae.img_to_reconstructed_img(batch.to(device=weight.device, dtype=weight.dtype), last_one=True)
        assert isinstance(made, Tensor)
        found = psnr(made.float().cpu(), batch).tolist()
        for i, value in zip(indices, found, strict=True):
            print(f"{images.shown(names[i])}: PSNR {value:.2f} dB")
        values.extend(found)
        if grid:
            originals.extend(batch.add(1).div(2).split(1))
        return made.add(1).div(2)

    def rows(made: list[Tensor]) -> list[Tensor]:
        return [torch.cat(part[i : i + 8]) for i in range(0, len(made), 8) for part in (originals, made)]

    stems = [images.file_stem(Path(name).stem) for name in names]
    settings = {"command": "reconstruct", "files": digest_of([_state(path) for path in options.images])}
    settings |= _source(options, vae)
    sampling.run(options.out, settings, None, lambda: 0, stems, options.batch_size, make, "reconstructing", rows=rows)
    print(f"mean of {len(values)}: PSNR {sum(values) / len(values):.2f} dB")


def _state(path: Path) -> tuple[str, int, int]:
    """Name, size and time of change: what one of many files is known by."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def edit_image(options: argparse.Namespace) -> None:
    _check_out(options.out)
    if options.mode == "class" and not options.classes:
        raise ValueError("--mode class needs --class, the class that the region becomes")
    if options.mode != "class" and options.classes:
        raise ValueError(f"--class goes with --mode class; leave it out of {options.mode}ing, which has no class")
    if (options.box is None) == (options.mask is None):
        raise ValueError("name the region by either --box T,L,B,R or --mask FILE, not both")
    if options.seam and not options.paste_back:
        raise ValueError("--seam fades what is pasted back; leave out --no-paste-back")
    photo = Photograph(options.image, options.box, options.mask, outside=options.mode == "outpaint")
    var = _load(options)
    vae, device = var.vae_proxy[0], var.lvl_1L.device
    labels = _labels(options.classes or ["none"], var.num_classes, _checkpoint(options))
    count = options.num or len(labels)
    labels = [labels[i % len(labels)] for i in range(count)]
    check_options(var, 1, Options(**_sampling(options)))  # before the folder is made
    pixels = count * math.prod(photo.shape)
    if options.out.suffix.lower() == ".png" and options.paste_back and count > 1 and pixels > LARGEST_SHEET:
        raise ValueError(
            f"--out {images.shown(options.out)}: {count} photographs of {photo.shape[1]}x{photo.shape[0]} are too "
            f"many pixels for one picture ({pixels}, above {LARGEST_SHEET}); name a folder"
        )
    print(photo.fit(_image_size(vae), vae.in_channels))
    given, cells = (
        photo.given.to(device=device, dtype=DTYPES[options.dtype]),
        photo.cells(var.patch_nums[-1]).to(device),
    )
    alpha = faded(photo.generated, options.seam)

    def edited(part: Tensor, seed: int | list[int]) -> Tensor:
        batch = given.expand(len(part), -1, -1, -1)
        return edit.regenerate(var, batch, cells, part, seed, **_sampling(options)).images

    def make(indices: list[int], seeds: list[int]) -> Tensor:
        part = torch.tensor([labels[i] for i in indices], dtype=torch.int64, device=device)
        if not (options.more_smooth or reference_forced()):  # whose order of operations has one seed a batch
            return edited(part, seeds)
        return torch.cat([edited(label, seed) for label, seed in zip(part.split(1), seeds, strict=True)])

    def finish(image: Tensor) -> Image.Image:
        return photo.pasted(image, alpha) if options.paste_back else images.to_pil(image)

    kind = [_class_name(label, var.num_classes) if options.mode == "class" else options.mode for label in labels]
    files = [path for path in (options.image, options.mask) if path is not None]
    settings = _settings(options, var) | {
        "command": "edit",
        "mode": options.mode,
        "classes": options.classes,
        "box": options.box,
        "paste_back": options.paste_back,
        "seam": options.seam,
        "files": [[str(path), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files],
    }
    begin, new = time.perf_counter(), functools.partial(secrets.randbelow, 2**31)
    seed, made = sampling.run(
        options.out, settings, options.seed, new, kind, options.batch_size, make, "editing", finish
    )
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
