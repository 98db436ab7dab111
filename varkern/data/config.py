"""Settings as flat dataclasses, one documented field an option, and those of the images."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch

__all__ = ["DataConfig", "check", "check_numbers", "option", "required", "resolve_device"]


def option(default: Any, text: str, bounds: str = "") -> Any:
    """A dataclass field whose ``metadata["help"]`` is ``text``; the command line reads both.

    ``bounds`` is an interval such as "[0, 1)" that `check_numbers` holds a number, or each of several, to.
    """
    return field(default=default, metadata={"help": text, "bounds": bounds})


def required(text: str) -> Any:
    """A dataclass field without a default, documented as by `option`."""
    return field(metadata={"help": text})


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_numbers(config: Any) -> None:
    """Raise ``ValueError`` for the first number that is not finite, not of its field's type, or out of its bounds."""
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value, bounds = getattr(config, item.name), item.metadata.get("bounds")
        kinds = {
            part
            for hint in (hints[item.name], *typing.get_args(hints[item.name]))
            for part in (hint, *typing.get_args(hint))
        }
        if not kinds & {int, float} or (value is None and type(None) in kinds):
            continue
        several = isinstance(value, (tuple, list))
        check(not several or len(value) > 0, f"{item.name} is empty; it needs at least one number")
        for number in value if several else (value,):
            whole = float not in kinds
            right = isinstance(number, Integral if whole else Real) and not isinstance(number, bool)
            check(right, f"{item.name} is {value!r}; it must be a {'whole ' if whole else ''}number")
            check(math.isfinite(number), f"{item.name} is {value}; it must be finite")
            if bounds:
                low, high = (float(part) for part in bounds[1:-1].split(","))
                above = number > low if bounds[0] == "(" else number >= low
                below = number < high if bounds[-1] == ")" else number <= high
                check(above and below, f"{item.name} is {value}; {in_words(bounds, low, high)}")


def in_words(bounds: str, low: float, high: float) -> str:
    if bounds == "(0, inf)":
        return "it must be positive"
    if bounds == "[0, inf)":
        return "it must not be negative"
    lower = f"{'above' if bounds[0] == '(' else 'at least'} {low:g}"
    if math.isinf(high):
        return f"it must be {lower}"
    upper = f"{'below' if bounds[-1] == ')' else 'at most'} {high:g}"
    return f"it must be {upper}" if math.isinf(low) else f"it must be {lower} and {upper}"


def resolve_device(name: str) -> torch.device:
    """``"auto"`` is CUDA when there is one, else the CPU; any other name is passed to torch."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not a device of torch; use 'cpu', 'cuda' or 'cuda:0'") from None
    if device.type == "cuda":
        check(torch.cuda.is_available(), f"device {name!r} was asked for, but torch finds no CUDA device; use 'cpu'")
        count = torch.cuda.device_count()
        check(
            (device.index or 0) < count,
            f"device {name!r} was asked for, but torch finds {count} CUDA devices, counted from 0",
        )
    return device


@dataclass(kw_only=True)
class DataConfig:
    """Where images come from and how they are cut. The held-out part is never trained on, by either stage."""

    from_model: typing.ClassVar[bool] = False  # size and channels 0 stand for the model's

    data: str = required("folder with one sub-folder of images for each class, or 'digits' (scikit-learn's scans)")
    image_size: int = option(256, "side of the square images in pixels", "(0, inf)")
    channels: int = option(3, "image channels: 3 for RGB, 1 for grey")
    held_out: float = option(1 / 3, "fraction of each class kept from all training, for evaluation", "[0, 1)")
    split_seed: int = option(0, "seed of the split into training and held-out images", "[0, inf)")
    augment: bool = option(False, "random crop while training (centre crop otherwise)")
    flip: bool = option(False, "mirror half of the training images left to right")
    workers: int = option(0, "processes that load images; 0 loads in the main process", "[0, inf)")
    on_bad_image: str = option(
        "error", "files that are no images: 'error' lists them and stops, 'skip' leaves them out"
    )

    def validate_data(self) -> None:
        check_numbers(self)
        check(
            self.channels in (1, 3) or (self.channels == 0 and self.from_model),
            f"channels is {self.channels}; use 1 (grey) or 3 (RGB)",
        )
        check(self.on_bad_image in ("error", "skip"), f"on_bad_image is {self.on_bad_image!r}; use 'error' or 'skip'")
