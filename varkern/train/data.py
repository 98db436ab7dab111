"""Image data sets whose order, crops and flips are pure functions of (seed, epoch, index).

Nothing here draws from torch's global generator, so a run that stops and continues sees exactly the same images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from varkern.train.config import DataConfig

__all__ = ["Digits", "ImageFolder", "Labelled", "batches", "epoch_order", "load_split", "stratified_split"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
RESIZE_MARGIN = 1.125  # short side before the crop, in units of the target (VAR's recipe)


class Labelled(Dataset):
    """What the loops need of a data set: items ``(tensor, label)``, a length, and the epoch for its random draws."""

    classes: list[str]
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of ``epoch`` from now on."""


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(c, h, w) float32 in [-1, 1] of an "L" or "RGB" image."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return pixels.float().div_(127.5).sub_(1).contiguous()


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    scale = side / min(width, height)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


class Augmented(Labelled):
    """Epoch, seed and the random draws of one item, shared by both data sets."""

    def __init__(self, seed: int, augment: bool, flip: bool) -> None:
        self.seed, self.augment, self.flip, self.epoch = seed, augment, flip, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def draws(self, index: int) -> tuple[float, float, bool]:
        """Crop position (0 to 1 down, 0 to 1 across; the centre without augmentation) and whether to mirror."""
        down, across, mirror = np.random.default_rng((self.seed, self.epoch, index)).random(3)
        if not self.augment:
            down = across = 0.5
        return float(down), float(across), bool(self.flip and mirror < 0.5)


def crop(image: torch.Tensor, size: int, down: float, across: float) -> torch.Tensor:
    """A ``size`` x ``size`` window of ``image`` (c, h, w); positions 0 and 1 are the two ends of the free space."""
    top = min(int(down * (image.shape[1] - size + 1)), image.shape[1] - size)
    left = min(int(across * (image.shape[2] - size + 1)), image.shape[2] - size)
    return image[:, top : top + size, left : left + size]


class ImageFolder(Augmented):
    """Images of ``root/<class>/**``; classes and files are numbered in sorted order.

    The short side is resized to 1.125 x ``size`` (Lanczos), then a random crop (``augment``) or the centre is taken.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,
        channels: int = 3,
        *,
        seed: int = 0,
        augment: bool = False,
        flip: bool = False,
    ) -> None:
        super().__init__(seed, augment, flip)
        self.root, self.size, self.mode = Path(root), size, {1: "L", 3: "RGB"}[channels]
        if not self.root.is_dir():
            raise FileNotFoundError(f"image folder {self.root} does not exist")
        self.classes = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())
        if not self.classes:
            raise ValueError(f"image folder {self.root} has no class sub-folders; expected {self.root}/<class>/<image>")
        self.files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = sorted(p for p in (self.root / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(
                    f"class folder {self.root / name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})"
                )
            self.files += found
            labels += [label] * len(found)
        self.labels = np.array(labels, dtype=np.int64)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path = self.files[index]
        try:
            with Image.open(path) as opened:
                image = resize_short_side(opened.convert(self.mode), round(RESIZE_MARGIN * self.size))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"cannot read image {path}: {error}; repair or remove the file") from error
        down, across, mirror = self.draws(index)
        pixels = crop(to_tensor(image), self.size, down, across)
        return (pixels.flip(2) if mirror else pixels), int(self.labels[index])


class Digits(Augmented):
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 with 17 grey levels, enlarged by a bicubic filter.

    The strokes touch the border, so ``augment`` moves the digit by up to a sixteenth of ``size`` on a background
    border instead of cutting it. Ink is +1, paper -1.
    """

    def __init__(
        self, size: int = 32, channels: int = 1, *, seed: int = 0, augment: bool = False, flip: bool = False
    ) -> None:
        super().__init__(seed, augment, flip)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("the digits need scikit-learn; install it with: pip install 'varkern[train]'") from error
        scans, self.labels = load_digits(return_X_y=True)
        self.labels = self.labels.astype(np.int64)
        self.classes = [str(digit) for digit in range(10)]
        self.size = size
        images = []
        for scan in scans.reshape(-1, 8, 8):
            grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
            image = to_tensor(grey.resize((size, size), Image.Resampling.BICUBIC))
            images.append(image.expand(channels, -1, -1))
        self.images = torch.stack(images)
        self.border = max(1, size // 16)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        down, across, mirror = self.draws(index)
        if self.augment:
            padded = torch.nn.functional.pad(image, [self.border] * 4, value=-1.0)
            image = crop(padded, self.size, down, across)
        return (image.flip(2) if mirror else image), int(self.labels[index])


class Part(Labelled):
    """The items ``indices`` of another data set, keeping its epoch, classes and labels."""

    def __init__(self, whole: ImageFolder | Digits, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, indices
        self.classes, self.labels = whole.classes, whole.labels[indices]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.whole[int(self.indices[index])]

    def set_epoch(self, epoch: int) -> None:
        self.whole.set_epoch(epoch)


def stratified_split(labels: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and held-out items: ``held_out`` of every class, drawn by ``seed``."""
    train, test = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.random.default_rng((seed, int(label))).permutation(len(members))]
        cut = round(len(members) * held_out)
        test.append(members[:cut])
        train.append(members[cut:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def load_split(config: DataConfig, seed: int = 0) -> tuple[Part, Part]:
    """Training images (augmented as configured, by ``seed``) and held-out images (never augmented)."""
    config.validate_data()

    def load(augment: bool, flip: bool) -> ImageFolder | Digits:
        if config.data == "digits":
            return Digits(config.image_size, config.channels, seed=seed, augment=augment, flip=flip)
        return ImageFolder(config.data, config.image_size, config.channels, seed=seed, augment=augment, flip=flip)

    plain = load(False, False)
    train, test = stratified_split(plain.labels, config.held_out, config.split_seed)
    augmented = load(config.augment, config.flip) if config.augment or config.flip else plain
    return Part(augmented, train), Part(plain, test)


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of ``range(length)`` for one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def batches(
    dataset: Dataset,
    order: Sequence[int] | np.ndarray,
    batch_size: int,
    *,
    start: int = 0,
    drop_last: bool = False,
    workers: int = 0,
) -> Iterator[list[torch.Tensor]]:
    """Collated batches of ``dataset`` in ``order``, from batch ``start`` on."""
    groups = [[int(i) for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    if drop_last and groups and len(groups[-1]) < batch_size:
        groups.pop()
    # A loader without its own generator draws its workers' seed from the global one: resuming would not be exact.
    return iter(
        DataLoader(
            dataset, batch_sampler=groups[start:], num_workers=workers, generator=torch.Generator().manual_seed(0)
        )
    )
