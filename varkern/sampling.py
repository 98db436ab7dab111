"""Long runs of ``varkern sample``, ``edit`` and ``reconstruct``.

Every image has a seed and is written as it is made; a run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varkern import images
from varkern.atomic import atomic_write, unwritable
from varkern.train.run import lock

__all__ = ["LARGEST_GRID", "MANIFEST", "image_seed", "run"]

LARGEST_GRID = 1024  # images of one .png, which is kept in memory
MANIFEST = "varkern-runs.json"
LOCK = f".{MANIFEST}.lock"
_GOLDEN = 0x9E3779B1  # 2**32 divided by the golden ratio: its multiples are as far apart as can be


def image_seed(seed: int, index: int) -> int:
    """The seed in [0, 2**63) of image ``index`` of a run, a function of both numbers alone.

    Of a seed, torch's generator on the CPU reads the low 32 bits only: hashed, two of 50,000 images would meet there
    one time in four. So they count upwards within a run, and runs of neighbouring seeds begin far from each other.
    """
    low = (_folded(seed) * _GOLDEN + index) % 2**32
    high = int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1, np.uint32)[0]) >> 1
    return high << 32 | low


def _folded(seed: int) -> int:
    """Of 32 bits: a smaller seed itself, and a mix of a larger one."""
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])


def run(
    out: Path,
    settings: dict[str, Any],
    seed: int | None,
    new_seed: Callable[[], int],
    names: Sequence[str],
    batch_size: int,
    make: Callable[[list[int], list[int]], Tensor],
    what: str,
    finish: Callable[[Tensor], Image.Image] = images.to_pil,
    rows: Callable[[list[Tensor]], Sequence[Tensor]] | None = None,
) -> tuple[int, int]:
    """Make and write ``len(names)`` images; returns the run's seed and the number of images made now.

    Args:
        out: a folder, where a run of the same settings goes on, or a .png file.
        settings: JSON values that decide the images together with the seed.
        make: (indices, seeds of these images) -> (n, C, H, W) in [0, 1].
        finish: the picture of one of them.
        rows: of a .png, from all of its images, each (1, C, H, W); None is a square grid, and a single image alone.

    Raises ValueError for a grid of too many images or a broken manifest, FileExistsError where another process makes
    the run, OSError where nothing can be written.
    """
    grid = out.suffix.lower() == ".png"
    if grid and len(names) > LARGEST_GRID:
        raise ValueError(
            f"--out {images.shown(out)}: a picture holds at most {LARGEST_GRID} images, not {len(names)}; name a folder"
        )
    if grid:
        drawn, made = new_seed() if seed is None else seed, list[Tensor]()
        for _, image in _images(list(range(len(names))), drawn, batch_size, make, what):
            made.append(images.from_uint8(np.asarray(finish(image))).add(1).div(2).unsqueeze(0))
        _write_grid(out, made, rows, {"varkern": json.dumps(settings | {"seed": drawn})})
        return drawn, len(names)
    with _entry(out, settings, seed, new_seed, names) as entry:
        drawn, first = int(entry["seed"]), int(entry["first"])
        missing = [i for i, name in enumerate(names) if not _path(out, first + i, name).exists()]
        for i, image in _images(missing, drawn, batch_size, make, what):
            text = settings | {"seed": drawn, "index": i, "image_seed": image_seed(drawn, i)}
            images.write_png(finish(image), _path(out, first + i, names[i]), {"varkern": json.dumps(text)})
    there = len(list(out.glob("*.png"))) - len(missing)
    beside = f", beside {there} that were there" if there else ""
    numbers = f"{first:05d}_*.png .. {first + len(names) - 1:05d}_*.png"
    print(f"wrote {len(missing)} images to {images.shown(out)}{os.sep}{numbers}{beside}")
    return drawn, len(missing)


def _images(
    missing: list[int], seed: int, batch_size: int, make: Callable[[list[int], list[int]], Tensor], what: str
) -> Iterator[tuple[int, Tensor]]:
    """(index, image) of each of the ``missing`` as it is made, with a progress bar where there are several batches."""
    from tqdm import tqdm

    batches: Iterable[int] = range(0, len(missing), batch_size)
    for begin in tqdm(batches, desc=what, unit="batch", disable=len(missing) <= batch_size):
        indices = missing[begin : begin + batch_size]
        yield from zip(indices, make(indices, [image_seed(seed, i) for i in indices]).float().cpu(), strict=True)


def _write_grid(
    out: Path, made: list[Tensor], rows: Callable[[list[Tensor]], Sequence[Tensor]] | None, text: dict[str, str]
) -> None:
    replaced = out.exists()
    if rows is None and len(made) == 1:
        picture = images.to_pil(made[0][0])
    else:
        columns = math.ceil(math.sqrt(len(made)))
        picture = images.sheet(torch.cat(made).split(columns) if rows is None else rows(made))
    images.write_png(picture, out, text)
    print(f"{'replaced' if replaced else 'wrote'} {images.shown(out)}")


def _path(out: Path, number: int, name: str) -> Path:
    return out / f"{number:05d}_{name}.png"


def _manifest(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        if all(isinstance(entry[key], int) for entry in runs for key in ("seed", "first", "count")):
            return list(runs)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{images.shown(path)} is no list of runs ({error}); remove it, or name another folder"
        ) from error
    raise ValueError(f"{images.shown(path)} is no list of runs; remove it, or name another folder")


@contextlib.contextmanager
def _entry(
    out: Path, settings: dict[str, Any], seed: int | None, new_seed: Callable[[], int], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The run of these settings that the folder knows (without a seed: one that is unfinished), or a new one.

    The list of runs is locked while it is read and written, the run itself as long as it is made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock(out, LOCK, wait=True):
            entry, held = _choose(out, json.loads(json.dumps(settings)), seed, new_seed, names)
    except FileExistsError:
        raise
    except OSError as error:
        raise unwritable(out, error) from error
    try:
        yield entry
    finally:
        with held, contextlib.suppress(OSError), lock(out, LOCK, wait=True):  # nobody opens it meanwhile
            os.unlink(held.name)


def _choose(
    out: Path, settings: dict[str, Any], seed: int | None, new_seed: Callable[[], int], names: Sequence[str]
) -> tuple[dict[str, Any], BinaryIO]:
    def held(entry: dict[str, Any]) -> BinaryIO:
        return lock(out, f".{MANIFEST}.{entry['first']}.lock")

    runs, plain = _manifest(out / MANIFEST), settings | {"weights": None}
    for entry in reversed(runs):
        if entry.get("settings") != settings or entry["count"] != len(names) or seed not in (None, entry["seed"]):
            continue
        if seed is not None:
            return entry, held(entry)
        if not all(_path(out, entry["first"] + i, name).exists() for i, name in enumerate(names)):
            with contextlib.suppress(FileExistsError):  # another process makes it
                return entry, held(entry)
    alike = [
        old
        for old in (entry.get("settings") for entry in runs)
        if isinstance(old, dict) and old | {"weights": None} == plain
    ]
    if alike and all(old.get("weights") != settings.get("weights") for old in alike):
        print(
            f"varkern: the weights have changed since the runs of these settings in {images.shown(out)}: a new run",
            file=sys.stderr,
        )
    taken = [int(found[1]) + 1 for path in out.glob("*.png") if (found := re.match(r"(\d{5,})_", path.name))]
    first = max([*taken, *(entry["first"] + entry["count"] for entry in runs)], default=0)
    drawn = new_seed() if seed is None else seed
    entry = {"seed": drawn, "first": first, "count": len(names), "settings": settings}
    text = json.dumps({"runs": [*runs, entry]}, indent=1)
    atomic_write(out / MANIFEST, lambda file: file.write(text.encode()))
    return entry, held(entry)
