"""Editing photographs of any size and shape: the square around the region that a model gets, and pasting it back."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varkern import images
from varkern.edit import Box, box_cells, box_mask, touched

__all__ = [
    "LARGEST_SIDE",
    "LONGEST_SEAM",
    "Photograph",
    "Square",
    "box_region",
    "faded",
    "mask_region",
    "square_around",
]

LARGEST_SIDE = 12_000  # pixels of a square: 430 MB as colour
LONGEST_SEAM = 254  # pixels


@dataclass(frozen=True)
class Square:
    """Rows ``top`` to ``top + side - 1`` and columns ``left`` to ``left + side - 1``; they may leave the photograph."""

    top: int
    left: int
    side: int

    def cut(self, plane: np.ndarray) -> np.ndarray:
        """The square of (H, W) or (H, W, C); what lies outside is mirrored."""
        rows, columns = self._within(plane)
        inside = plane[rows, columns]
        margins = [
            (within.start - start, start + self.side - within.stop)
            for within, start in ((rows, self.top), (columns, self.left))
        ]
        return np.pad(inside, [*margins, *[(0, 0)] * (plane.ndim - 2)], mode="symmetric")

    def put(self, plane: np.ndarray, square: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """A copy of (H, W, C) uint8 with the part within it of a square (side, side, c), as far as alpha (H, W)."""
        rows, columns = self._within(plane)
        own, part = plane[rows, columns], alpha[rows, columns, None].astype(np.float32)
        new = square[rows.start - self.top : rows.stop - self.top, columns.start - self.left : columns.stop - self.left]
        result = plane.copy()
        result[rows, columns] = (own + part * (new.astype(np.float32) - own)).round()  # own where part is 0
        return result

    def _within(self, plane: np.ndarray) -> tuple[slice, slice]:
        H, W = plane.shape[:2]
        return (
            slice(max(0, self.top), min(H, self.top + self.side)),
            slice(max(0, self.left), min(W, self.left + self.side)),
        )

    def is_all_of(self, shape: tuple[int, int]) -> bool:
        return (self.top, self.left) == (0, 0) and shape == (self.side, self.side)

    def described(self, path: str | os.PathLike[str], shape: tuple[int, int], size: int) -> str:
        """The line that says what is edited."""
        H, W = shape
        scaled = f", as {size}x{size}" if self.side != size else ""
        if self.is_all_of(shape):
            return f"editing all of {images.shown(path)}, {W}x{H}{scaled}"
        beyond = ", mirrored where it leaves the photograph" if self.side > min(shape) else ""
        rows, columns = (f"{start} to {start + self.side - 1}" for start in (self.top, self.left))
        return f"editing a square of {images.shown(path)}, {W}x{H}: rows {rows}, columns {columns}{scaled}{beyond}"


def square_around(region: np.ndarray, size: int) -> Square:
    """The square in which the region (H, W) bool is edited by a model of ``size`` pixels.

    Its side is twice the region's longer side, for context, but at least ``size``, and at most the photograph's shorter
    side. A region too long for that gets half its length as context if the longer side has it: then the square leaves
    the photograph. It is as central around the region as the photograph lets it. Raises ValueError where it would be
    longer than ``LARGEST_SIDE``.
    """
    H, W = region.shape
    rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    extent = int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1
    side = max(min(max(2 * extent, size), min(H, W)), min(max(H, W), math.ceil(1.5 * extent)))
    if side > LARGEST_SIDE:
        raise ValueError(
            f"what is generated anew is {extent} pixels long in a photograph of {W}x{H}, and is edited in a square of "
            f"{side} pixels, above the limit of {LARGEST_SIDE}; scale the photograph down, or mark less"
        )

    def start(indices: np.ndarray, length: int) -> int:
        if side >= length:
            return -((side - length) // 2)
        return int(min(max(0, (indices[0] + indices[-1] + 1 - side) // 2), length - side))

    return Square(start(rows, H), start(columns, W), side)


def box_region(shape: tuple[int, int], box: Box) -> np.ndarray:
    """(H, W) bool, True inside the box, in fractions of the photograph, rounded to pixels, of which it has one."""
    region = np.zeros(shape, bool)
    region[box_cells(*shape, box)] = True
    return region


def mask_region(shape: tuple[int, int], path: str | os.PathLike[str]) -> np.ndarray:
    """(H, W) bool, True where a picture is at least half white.

    A picture of another size, but the same shape, is rescaled: a pixel is inside that any white pixel touches. Raises
    ValueError for another shape.
    """
    H, W = shape
    mask = np.asarray(images.open_image(path, 1)) >= 128
    h, w = mask.shape
    if 2 * abs(h * W - w * H) > max(H + W, h + w):  # as far as rounding to pixels moves a resized picture's shape
        raise ValueError(
            f"{images.shown(path)} is {w}x{h} but the photograph {W}x{H}, of another shape; make the mask on the "
            "photograph"
        )
    return mask if (h, w) == (H, W) else touched(torch.from_numpy(mask).to(torch.float32), (H, W)).numpy() > 0


def faded(region: np.ndarray, seam: int) -> np.ndarray:
    """(H, W) float32: 0 outside the region (H, W) bool, rising inside, to 1 at ``seam`` pixels from its edge.

    The photograph's own edge is none of the region. seam: up to ``LONGEST_SEAM``.
    """
    rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    part = slice(max(0, rows[0] - 1), rows[-1] + 2), slice(max(0, columns[0] - 1), columns[-1] + 2)
    # The larger of rows and columns to the nearest pixel outside, which is found along one and then the other.
    distance = np.where(region[part], seam + 1, 0).astype(np.uint8)
    for plane in (distance, distance.T):
        given = plane.copy()
        for k in range(1, seam + 1):
            near = np.maximum(given, k)
            np.minimum(plane[k:], near[:-k], out=plane[k:])
            np.minimum(plane[:-k], near[k:], out=plane[:-k])
    alpha = np.zeros(region.shape, np.float32)
    alpha[part] = distance / np.float32(seam + 1)
    return alpha


class Photograph:
    """A photograph, what of it is generated anew, and the square of it that a model edits.

    Args:
        path: an image file of any size and shape.
        box, mask: the region, as fractions of the photograph or as a picture that is white inside; one of them.
        outside: everything but the region is generated.

    Raises FileNotFoundError or ValueError where a file cannot be read, or nothing is generated or kept.
    """

    def __init__(
        self, path: str | os.PathLike[str], box: Box | None, mask: str | os.PathLike[str] | None, outside: bool
    ) -> None:
        self.path, self.box, self.outside = path, box, outside
        self.pixels = np.asarray(images.open_image(path, 3))  # (H, W, 3), or (H, W, 1) once it is known to stay grey
        self.shape: tuple[int, int] = self.pixels.shape[:2]
        if mask is None:
            assert box is not None
            region = box_region(self.shape, box)
        else:
            region = mask_region(self.shape, mask)
        self.generated = ~region if outside else region
        if self.generated.all() or not self.generated.any():
            lack = "nothing would be kept" if self.generated.all() else "nothing would be generated"
            extent = "all of the photograph" if region.all() else "none of it"
            raise ValueError(
                f"{lack} of {images.shown(path)}: the region is {extent}; inside a mask is white, a box is smaller"
            )

    def fit(self, size: int, channels: int) -> str:
        """Choose the square for a model of ``size`` pixels; returns the line that says so."""
        self.square, grey = square_around(self.generated, size), channels == 1
        part = Image.fromarray(self.square.cut(self.pixels)).convert("L" if grey else "RGB")
        if part.size != (size, size):
            part = part.resize((size, size), Image.Resampling.LANCZOS)
        self.given = images.from_uint8(np.asarray(part))  # (channels, size, size) in [-1, 1]
        colourless = bool((self.pixels == self.pixels[..., :1]).all())
        if grey and colourless:
            self.pixels = self.pixels[..., :1]
        note = ", in grey, which is all that the model makes" if grey and not colourless else ""
        return self.square.described(self.path, self.shape, size) + note

    def cells(self, count: int) -> Tensor:
        """(count, count) float32, 1 for the tokens of the square that what is generated touches.

        A box on a photograph that the square is all of rounds to whole tokens, as is published.
        """
        if self.box is not None and self.square.is_all_of(self.shape):
            marked = box_mask(count, self.box)
            marked = 1 - marked if self.outside else marked
            if marked.any():
                return marked
        return touched(torch.from_numpy(self.square.cut(self.generated)).to(torch.float32), (count, count))

    def pasted(self, image: Tensor, alpha: np.ndarray) -> Image.Image:
        """The photograph with a model's square (c, size, size) in [0, 1] as far as alpha (H, W) says."""
        edited = images.to_pil(image)
        if edited.size != (self.square.side, self.square.side):
            edited = edited.resize((self.square.side, self.square.side), Image.Resampling.LANCZOS)
        levels = np.asarray(edited).reshape(self.square.side, self.square.side, -1)
        mixed = self.square.put(self.pixels, levels, alpha)
        return Image.fromarray(mixed[..., 0] if mixed.shape[-1] == 1 else mixed)
