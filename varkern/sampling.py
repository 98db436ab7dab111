"""Long runs of ``varkern sample`` and ``edit``: a seed an image, written as made, continued where they stopped."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from varkern import images
from varkern.atomic import atomic_write

__all__ = ["LARGEST_GRID", "MANIFEST", "image_seed", "run"]

LARGEST_GRID = 1024  # images of one .png, which is kept in memory
MANIFEST = "varkern-runs.json"
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
) -> tuple[int, int]:
    """Make and write ``len(names)`` images; returns the run's seed and the number of images made now.

    Args:
        out: a folder, where a run of the same settings goes on, or a .png file.
        settings: JSON values that decide the images together with the seed.
        make: (indices, seeds of these images) -> (n, C, H, W) in [0, 1].

    Raises ValueError for a grid of too many images or a broken manifest, OSError where nothing can be written.
    """
    from tqdm import tqdm

    grid = out.suffix.lower() == ".png"
    if grid and len(names) > LARGEST_GRID:
        raise ValueError(f"--out {out}: a picture holds at most {LARGEST_GRID} images, not {len(names)}; name a folder")
    if grid:
        runs, entry = [], {"seed": new_seed() if seed is None else seed, "first": 0}
        missing = list(range(len(names)))
    else:
        out.mkdir(parents=True, exist_ok=True)
        runs = _manifest(out / MANIFEST)
        entry = _entry(out, runs, settings, seed, new_seed, names)
        missing = [i for i, name in enumerate(names) if not _path(out, entry["first"] + i, name).exists()]
    drawn, made = int(entry["seed"]), []
    batches: Iterable[int] = range(0, len(missing), batch_size)
    for begin in tqdm(batches, desc=what, unit="batch", disable=len(missing) <= batch_size):
        indices = missing[begin : begin + batch_size]
        seeds = [image_seed(drawn, i) for i in indices]
        results = make(indices, seeds).float().cpu()
        if grid:
            made.append(results)
            continue
        for i, image_drawn, image in zip(indices, seeds, results, strict=True):
            text = {"varkern": json.dumps(settings | {"seed": drawn, "index": i, "image_seed": image_drawn})}
            images.write_png(images.to_pil(image), _path(out, entry["first"] + i, names[i]), text)
    if grid:
        rows = [image for batch in made for image in batch.split(1)]
        text = {"varkern": json.dumps(settings | {"seed": drawn})}
        _write_grid(out, rows, text)
    else:
        first = entry["first"]
        last = first + len(names) - 1
        there = len(list(out.glob("*.png"))) - len(missing)
        beside = f", beside {there} that were there" if there else ""
        print(f"wrote {len(missing)} images to {out}{os.sep}{first:05d}_*.png .. {last:05d}_*.png{beside}")
    return drawn, len(missing)


def _write_grid(out: Path, made: list[Tensor], text: dict[str, str]) -> None:
    import torch

    replaced, results = out.exists(), torch.cat(made)
    picture = images.to_pil(results[0]) if len(made) == 1 else None
    columns = math.ceil(math.sqrt(len(made)))
    images.write_png(picture or images.sheet(results.split(columns)), out, text)
    print(f"{'replaced' if replaced else 'wrote'} {out}")


def _path(out: Path, number: int, name: str) -> Path:
    return out / f"{number:05d}_{name}.png"


def _manifest(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        if all(isinstance(entry[key], int) for entry in runs for key in ("seed", "first", "count")):
            return list(runs)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of runs ({error}); remove it, or name another folder") from error
    raise ValueError(f"{path} is no list of runs; remove it, or name another folder")


def _entry(
    out: Path,
    runs: list[dict[str, Any]],
    settings: dict[str, Any],
    seed: int | None,
    new_seed: Callable[[], int],
    names: Sequence[str],
) -> dict[str, Any]:
    """The run of these settings that the folder knows (without a seed: one that is unfinished), or a new one."""
    settings = json.loads(json.dumps(settings))
    for entry in reversed(runs):
        if entry.get("settings") != settings or entry["count"] != len(names) or seed not in (None, entry["seed"]):
            continue
        if seed is not None or not all(_path(out, entry["first"] + i, n).exists() for i, n in enumerate(names)):
            return entry
    taken = [int(found[1]) + 1 for path in out.glob("*.png") if (found := re.match(r"(\d{5,})_", path.name))]
    first = max([*taken, *(entry["first"] + entry["count"] for entry in runs)], default=0)
    drawn = new_seed() if seed is None else seed
    entry = {"seed": drawn, "first": first, "count": len(names), "settings": settings}
    text = json.dumps({"runs": [*runs, entry]}, indent=1)
    atomic_write(out / MANIFEST, lambda file: file.write(text.encode()))
    return entry
