"""Images as files and pictures: reading into a model's size, PNGs written atomically, labelled sheets of images."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from varkern.atomic import atomic_write, unwritable

__all__ = [
    "check_image",
    "check_writable",
    "file_stem",
    "from_uint8",
    "image_suffixes",
    "open_image",
    "read_image",
    "sheet",
    "shown",
    "to_pil",
    "to_uint8",
    "write_png",
]

_INK, _PAPER = "#202020", "#ffffff"


def to_uint8(images: Tensor) -> np.ndarray:
    """(..., C, H, W) in [0, 1] -> (..., H, W, C) uint8, rounded; values outside are clamped."""
    return images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def from_uint8(pixels: np.ndarray) -> Tensor:
    """(H, W) or (H, W, C) uint8 -> (C, H, W) float32 in [-1, 1]."""
    tensor = torch.from_numpy(pixels.copy()).float().div_(127.5).sub_(1)
    return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.movedim(-1, 0).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) in [0, 1], C = 1 (grey) or 3 (RGB) -> a Pillow image."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image must be (1, H, W) or (3, H, W), got {tuple(image.shape)}")
    pixels = to_uint8(image)
    return Image.fromarray(pixels[..., 0] if image.shape[0] == 1 else pixels)


# Formats that Pillow only identifies, or that run another program (EPS runs Ghostscript).
_UNREADABLE = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _UNREADABLE))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes, with the dot, of the files that this Pillow reads."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image whose header has been read; any error names the file in one sentence."""
    if not path.exists():
        raise FileNotFoundError(f"there is no image file {shown(path)}")
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise ValueError("it is not a regular file")
        # By its name, Pillow would map a TIFF into memory, which garbles those that are to be turned.
        with open(path, "rb") as file, Image.open(file, formats=_formats()) as image:
            if 0 in image.size:
                raise ValueError(f"it is {image.width} x {image.height} pixels")
            yield image
    except Exception as error:  # whatever a parser stumbles over is the file's fault
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "of no kind that Pillow knows"
        raise ValueError(f"{shown(path)} cannot be read as an image ({reason}); convert it to PNG or JPEG") from error


def shown(path: str | os.PathLike[str]) -> str:
    """A path on one line: as it is, or quoted where it holds line breaks, other controls or undecodable bytes."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def check_image(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError or ValueError naming the file unless `open_image` can read it.

    All of it is decoded, JPEG at an eighth of the size.
    """
    with _opened(Path(path)) as image:
        image.draft("L", (1, 1))
        _converted(image, "L")


_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO, _ORIENTATION = 258, 262, 0, 274  # tags of TIFF and EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; as it is stored where they cannot be read."""
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged data about the image do not make the image unreadable
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image, bits: int, inverted: bool) -> Image.Image:
    """Grey of more than 8 bits -> "L", or "LA" where one value is named as transparent.

    Integers: 2**bits - 1 is white. Floats: 1 is white where no value exceeds 2 (a little overshoot is clipped), else
    255. inverted: 0 is white and that value black.
    """
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise ValueError("its values are not all finite")
        white = 1.0 if values.max() <= 2 else 255.0
        low, high = -0.05 * white, white if white > 1 else 2.0
    else:
        white = float(2**bits - 1)
        low, high = 0.0, white
    if values.min() < low or values.max() > high:
        raise ValueError(
            f"its values run from {values.min():g} to {values.max():g}; 0 to 1 or 0 to 255 is known for floats, "
            f"0 to {2**bits - 1} for integers"
        )
    levels = white - values if inverted else values
    grey = Image.fromarray((levels * (255 / white)).round().clip(0, 255).astype(np.uint8))
    if isinstance(image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _converted(image: Image.Image, mode: str) -> Image.Image:
    tags = getattr(image, "tag_v2", {})  # of TIFF; turning leaves none
    depths, inverted = tags.get(_BITS, ()), tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    bits = 12 if tuple(depths) == (12,) else 16
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow inverts up to 8 bits itself
        image = _eight_bits(image, bits, inverted)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def open_image(path: str | os.PathLike[str], channels: int) -> Image.Image:
    """The first frame of an image file, upright: "L" (``channels`` 1) or "RGB" (3); transparency is laid on white.

    16-bit grey is scaled so that 65535 is white, 12-bit grey so that 4095 is; float grey so that 1 is, or 255 where a
    value exceeds 2. Raises FileNotFoundError or ValueError naming the file: not an image, cut short, too large
    (`PIL.Image.MAX_IMAGE_PIXELS`), not a regular file, not finite.
    """
    with _opened(Path(path)) as image:
        return _converted(image, "L" if channels == 1 else "RGB")


def read_image(path: str | os.PathLike[str], size: int, channels: int) -> Tensor:
    """An image file of any size -> (channels, size, size) float32 in [-1, 1].

    The short side is resized to ``size`` (Lanczos) and the centre is cropped. channels: 1 (grey) or 3 (RGB).
    Raises FileNotFoundError or ValueError naming the file.
    """
    image = open_image(path, channels)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return from_uint8(np.asarray(image))


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise OSError naming the folder unless files can be written there, or it can be made."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{shown(folder)} cannot be written: {shown(there)} is a file; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{shown(folder)} cannot be written: {shown(there)} is read-only; choose another folder")


def file_stem(name: str) -> str:
    """A name as a part of a file name: letters, digits and ``_ . -``, others dropped, of at most 150 bytes."""
    kept = re.sub(r"[^\w.-]+", "", name)
    return kept.encode()[:150].decode(errors="ignore") or "image"


def write_png(image: Image.Image, path: str | os.PathLike[str], text: Mapping[str, str] | None = None) -> Path:
    """Write a PNG atomically, making its folder: a reader sees the old file or the whole new one.

    text: kept in the file as text metadata, by keyword. Raises OSError naming the file where it cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        info.add_text(keyword, value)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    # Of photographs the smallest file takes several times as long to find.
    optimize = image.width * image.height <= 2**20
    # Waiting for the disk would make a long run of pictures a quarter slower.
    atomic_write(path, lambda file: image.save(file, format="PNG", optimize=optimize, pnginfo=info), sync=False)
    return path


def sheet(
    rows: Sequence[Tensor],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    enlarge: int = 1,
    gap: int = 4,
) -> Image.Image:
    """Rows of images on white paper, with labels at the left and above; grey where every image is.

    Labels are in Pillow's built-in font.

    Args:
        rows: each (n, C, H, W) in [0, 1], all images of one size; n may differ from row to row.
        row_labels, column_labels: one a row or column, or none.
        title: a line above everything.
        enlarge: whole factor of magnification; each pixel becomes a square.
        gap: pixels between images.

    Raises ValueError where sizes or the number of labels do not fit.
    """
    sizes = {tuple(row.shape[-2:]) for row in rows}
    if len(sizes) != 1 or any(row.ndim != 4 or not len(row) for row in rows):
        raise ValueError(f"rows must be (n, C, H, W) images of one size, got {[tuple(row.shape) for row in rows]}")
    columns = max(len(row) for row in rows)
    if len(row_labels) not in (0, len(rows)) or len(column_labels) not in (0, columns):
        raise ValueError(
            f"{len(rows)} rows of {columns} images have {len(row_labels)} row and {len(column_labels)} column labels; "
            "give one for each, or none"
        )
    height, width = (side * enlarge for side in sizes.pop())
    font = ImageFont.load_default(size=14)
    line = 20
    left = gap + (max(round(font.getlength(text)) for text in row_labels) + 8 if row_labels else 0)
    top = gap + (line if title else 0) + (line if column_labels else 0)
    step_x, step_y = width + gap, height + gap
    if column_labels:
        step_x = max(step_x, *(round(font.getlength(text)) + 8 for text in column_labels))
    indent = (step_x - gap - width) // 2  # images stand in the middle of columns that a long label widens
    across = max(left + columns * step_x, round(font.getlength(title)) + 2 * gap)
    grey = all(row.shape[1] == 1 for row in rows)
    canvas = Image.new("L" if grey else "RGB", (across, top + len(rows) * step_y), _PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, gap + line // 2), title, _INK, font, anchor="lm")
    for x, text in enumerate(column_labels):
        draw.text((left + x * step_x + width // 2 + indent, top - line // 2 - 2), text, _INK, font, anchor="mm")
    for y, row in enumerate(rows):
        if row_labels:
            draw.text((left - 8, top + y * step_y + height // 2), row_labels[y], _INK, font, anchor="rm")
        for x, image in enumerate(row):
            cell = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (left + x * step_x + indent, top + y * step_y))
    return canvas
