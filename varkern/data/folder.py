"""Which files and classes a folder of images holds, and whether every file can be read."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from varkern.images import check_image, image_suffixes

__all__ = ["bad_images", "list_classes", "list_images", "natural_order", "refusal"]

SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "lost+found"})
PARTS = ("train", "training", "val", "valid", "validation", "test")  # of a data set, not classes
SHOWN = 5  # files named in a sentence
FEW = 16  # files are checked in no time


def natural_order(name: str) -> tuple[list[int | str], str]:
    """Sort key that counts digits as numbers: 1, 2, 10; a2, a10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], name


def hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def subfolders(folder: Path) -> list[str]:
    names = (entry.name for entry in os.scandir(folder) if entry.is_dir() and not hidden(entry.name))
    return sorted(names, key=natural_order)


def list_classes(root: Path) -> list[str]:
    """Names of the class sub-folders in natural order.

    Raises FileNotFoundError without ``root``, NotADirectoryError for a file, and ValueError without classes or where
    the sub-folders are parts of a data set.
    """
    if not root.exists():
        raise FileNotFoundError(
            f"image folder {root} does not exist; name a folder with one sub-folder of images for each class"
        )
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; name a folder with one sub-folder of images for each class")
    classes = subfolders(root)
    if not classes:
        raise ValueError(f"image folder {root} has no class sub-folders; expected {root}/<class>/<image>")
    for parent in (root, *(root / name for name in classes)):
        parts = [name for name in subfolders(parent) if name.lower() in PARTS]
        nested = [name for name in parts if subfolders(parent / name)]
        if nested and (len(parts) == len(subfolders(parent)) or nested[0].lower().startswith("train")):
            chosen = min(nested, key=lambda name: PARTS.index(name.lower()))
            raise ValueError(
                f"{parent} holds the parts {', '.join(parts)} of a data set, not classes; give {parent / chosen}"
            )
    return classes


def list_images(folder: Path) -> tuple[list[tuple[Path, int]], Counter[str]]:
    """Images below ``folder`` with their sizes in bytes, sorted by path, and how many others are left out and why.

    Links are followed; hidden files and folders are not counted.
    """
    found: list[tuple[Path, int]] = []
    left: Counter[str] = Counter()
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = [] if real in seen else [name for name in folders if not hidden(name)]
        if real in seen:  # a link to a folder above
            continue
        seen.add(real)
        for name in names:
            if hidden(name):
                continue
            path = Path(where) / name
            if path.suffix.lower() not in image_suffixes():
                left[f"of type {path.suffix.lower() or 'unknown'}"] += 1
                continue
            try:
                status = path.stat()
            except OSError:
                left["broken links"] += 1
                continue
            if stat.S_ISREG(status.st_mode):
                found.append((path, status.st_size))
            else:
                left["pipes or devices"] += 1
    return sorted(found), left


def bad_images(files: list[Path]) -> dict[int, str]:
    """Number and fault of the ``files`` that cannot be read as images, with a progress bar."""

    def fault(path: Path) -> str:
        try:
            check_image(path)
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    # Pillow lets go of the interpreter while it reads and decodes, so threads help.
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        settings: dict[str, Any] = {"desc": "checking images", "unit": "file", "leave": False}
        faults = tqdm(pool.map(fault, files), total=len(files), disable=len(files) <= FEW, **settings)
        return {number: text for number, text in enumerate(faults) if text}


def refusal(faults: list[str]) -> ValueError:
    """The error for files that cannot be read."""
    shown = "; ".join(text.removesuffix("; convert it to PNG or JPEG") for text in faults[:SHOWN])
    more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    files = "1 image file is" if len(faults) == 1 else f"{len(faults)} image files are"
    return ValueError(f"{files} bad: {shown}{more}; repair or remove them, or leave them out (on_bad_image 'skip')")
