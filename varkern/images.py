"""Images as files and pictures: reading into a model's size, PNGs written atomically, labelled sheets of images."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from varkern.atomic import atomic_write

__all__ = [
    "check_header",
    "from_uint8",
    "image_suffixes",
    "open_image",
    "read_image",
    "read_mask",
    "sheet",
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


def _header(path: Path) -> Image.Image:
    if not path.exists():
        raise FileNotFoundError(f"there is no image file {path}")
    if not path.is_file():  # opening a named pipe would wait for ever
        raise ValueError("it is not a regular file")
    opened = Image.open(path, formats=_formats())
    if 0 in opened.size:
        opened.close()
        raise ValueError(f"it is {opened.width} x {opened.height} pixels")
    return opened


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path} cannot be read as an image ({reason}); convert it to PNG or JPEG")


def check_header(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError or ValueError naming the file unless its header is that of an image; reads no pixels."""
    path = Path(path)
    try:
        _header(path).close()
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a parser stumbles over is the file's fault
        raise _unreadable(path, error) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits -> "L", or "LA" where one value is named as transparent.

    Integers: 65535 is white. Floats: 1 is white where no value exceeds 2 (a little overshoot is clipped), else 255.
    """
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise ValueError("its values are not all finite")
        white = 1.0 if values.max() <= 2 else 255.0
        low, high = -0.05 * white, white if white > 1 else 2.0
    else:
        white, low, high = 65535.0, 0.0, 65535.0
    if values.min() < low or values.max() > high:
        raise ValueError(
            f"its values run from {values.min():g} to {values.max():g}; 0 to 1 or 0 to 255 is known for floats, "
            "0 to 65535 for integers"
        )
    grey = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
    if isinstance(image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def open_image(path: str | os.PathLike[str], channels: int) -> Image.Image:
    """The first frame of an image file, upright: "L" (``channels`` 1) or "RGB" (3); transparency is laid on white.

    16-bit grey is scaled so that 65535 is white; float grey so that 1 is, or 255 where a value exceeds 2. Raises
    FileNotFoundError or ValueError naming the file: not an image, cut short, too large (`PIL.Image.MAX_IMAGE_PIXELS`),
    not a regular file, not finite.
    """
    path = Path(path)
    try:
        with _header(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F" or image.mode.startswith("I"):
                image = _eight_bits(image)
            if image.mode in ("La", "RGBa"):  # premultiplied
                image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a parser stumbles over is the file's fault
        raise _unreadable(path, error) from error


def read_image(path: str | os.PathLike[str], size: int, channels: int) -> Tensor:
    """An image file of any size -> (channels, size, size) float32 in [-1, 1].

    The short side is resized to ``size`` (Lanczos) and the centre is cropped. channels: 1 (grey) or 3 (RGB).
    Raises FileNotFoundError or ValueError naming the file.
    """
    image = open_image(path, channels)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return from_uint8(np.asarray(image))


def read_mask(path: str | os.PathLike[str]) -> Tensor:
    """A grey picture, white inside the region -> (side, side) float32 in [0, 1], its central square, not resized."""
    image = open_image(path, channels=1)
    side = min(image.size)
    return from_uint8(np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.NEAREST)))[0].add(1).div(2)


def write_png(image: Image.Image, path: str | os.PathLike[str], text: Mapping[str, str] | None = None) -> Path:
    """Write a PNG atomically, making its folder: a reader sees the old file or the whole new one.

    text: kept in the file as text metadata, by keyword.
    """
    info = PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        info.add_text(keyword, value)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Waiting for the disk would make a long run of pictures a quarter slower.
    atomic_write(path, lambda file: image.save(file, format="PNG", optimize=True, pnginfo=info), sync=False)
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
