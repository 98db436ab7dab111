"""Image data sets whose order, crops and flips are pure functions of (seed, epoch, index).

Nothing here draws from torch's global generator, so a run that stops and continues sees exactly the same images.
"""

from __future__ import annotations

import copy
import hashlib
import json
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from varkern.data.config import DataConfig
from varkern.data.folder import bad_images, list_classes, list_images, refusal
from varkern.images import from_uint8, image_suffixes, open_image

__all__ = [
    "Digits",
    "ImageFolder",
    "Labelled",
    "Part",
    "batches",
    "epoch_order",
    "held_out_digits",
    "load_split",
    "shortened",
    "stratified_split",
]

RESIZE_MARGIN = 1.125  # short side before the crop, in units of the target (VAR's recipe)
LONGEST = 16  # times the short side: more of an image is not resized, a crop needs none of it


class Labelled(Dataset):
    """What the loops need of a data set: items ``(tensor, label)``, a length, and the epoch for its random draws."""

    classes: list[str]
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of ``epoch`` from now on."""


def shortened(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    scale = side / min(width, height)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


class Augmented(Labelled):
    """Epoch, seed and the random draws of one item, shared by both data sets."""

    def __init__(self, seed: int, augment: bool, flip: bool) -> None:
        self.seed, self.augment, self.flip, self.epoch = seed, augment, flip, 0
        self.notes: list[str] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def number_as(self, classes: list[str]) -> None:
        """Number the classes as in ``classes``, of which they must be a part; the others have no images then."""
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = np.array([numbers[name] for name in self.classes], dtype=np.int64)[self.labels]
        self.classes = classes

    def draws(self, index: int) -> tuple[float, float, bool]:
        """Crop position (0 to 1 down, 0 to 1 across; the centre without augmentation) and whether to mirror."""
        down, across, mirror = np.random.default_rng((self.seed, self.epoch, index)).random(3)
        if not self.augment:
            down = across = 0.5
        return float(down), float(across), bool(self.flip and mirror < 0.5)


def strip(image: Image.Image, down: float, across: float) -> Image.Image:
    """An image at most ``LONGEST`` times as long as wide; of a longer one the part around a crop's position."""
    longest = LONGEST * min(image.size)
    left, top = (round(at * max(0, side - longest)) for at, side in zip((across, down), image.size, strict=True))
    box = (left, top, left + min(image.width, longest), top + min(image.height, longest))
    return image if box == (0, 0, *image.size) else image.crop(box)


def crop(image: torch.Tensor, size: int, down: float, across: float) -> torch.Tensor:
    """A ``size`` x ``size`` window of ``image`` (c, h, w); positions 0 and 1 are the two ends of the free space."""
    top = min(int(down * (image.shape[1] - size + 1)), image.shape[1] - size)
    left = min(int(across * (image.shape[2] - size + 1)), image.shape[2] - size)
    return image[:, top : top + size, left : left + size]


class ImageFolder(Augmented):
    """Images of ``root/<class>/**``; classes are numbered in natural order (1, 2, 10), files in sorted order.

    Read by `varkern.images.open_image`. The short side is resized to 1.125 x ``size`` (Lanczos), then a random crop
    (``augment``) or the centre is taken. ``notes`` says what was left out: hidden files and folders are without a
    word, classes without images, broken links and unknown types with one.
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
        self.root, self.size, self.channels = Path(root), size, channels
        self.classes: list[str] = []
        self.files: list[Path] = []
        self.sizes: list[int] = []  # bytes
        self.skipped: list[str] = []  # faults of the files that `check` left out
        labels: list[int] = []
        empty, left = [], Counter[str]()
        for name in list_classes(self.root):
            found, others = list_images(self.root / name)
            left += others
            if not found:
                empty.append(name)
                continue
            self.files += [path for path, _ in found]
            self.sizes += [length for _, length in found]
            labels += [len(self.classes)] * len(found)
            self.classes.append(name)
        if not self.files:
            raise ValueError(
                f"the class folders of {self.root} hold no images; "
                f"files with these endings count: {', '.join(sorted(image_suffixes()))}"
            )
        self.labels = np.array(labels, dtype=np.int64)
        if empty:
            self.notes.append(f"{len(empty)} class folders without images are no classes: {shortened(empty)}")
        if left:
            text = ", ".join(f"{count} {reason}" for reason, count in left.most_common())
            self.notes.append(f"files of {self.root} that are no images are left out: {text}")

    def check(self, on_bad_image: str) -> None:
        """Read every file; bad ones raise a ValueError that lists them, or with "skip" are left out."""
        bad = bad_images(self.files)
        if not bad:
            return
        if on_bad_image == "error":
            raise refusal(list(bad.values()))
        good = [i for i in range(len(self.files)) if i not in bad]
        self.skipped = list(bad.values())
        self.notes.append(f"{len(bad)} bad image files are left out, the first: {self.skipped[0]}")
        self.files, self.sizes = [self.files[i] for i in good], [self.sizes[i] for i in good]
        self.labels = self.labels[good]
        if not good:
            raise refusal(self.skipped)
        kept, self.labels = np.unique(self.labels, return_inverse=True)
        gone = [name for label, name in enumerate(self.classes) if label not in kept]
        self.classes = [self.classes[label] for label in kept]
        if gone:
            self.notes.append(f"no readable image is left in {shortened(gone)}, so they are no classes")

    def digest(self) -> str:
        """Hash of the names, sizes and labels of the files."""
        names = [path.relative_to(self.root).as_posix() for path in self.files]
        return digest_of([self.classes, list(zip(names, self.sizes, self.labels.tolist(), strict=True))])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        down, across, mirror = self.draws(index)
        image = strip(open_image(self.files[index], self.channels), down, across)
        image = resize_short_side(image, round(RESIZE_MARGIN * self.size))
        pixels = crop(from_uint8(np.asarray(image)), self.size, down, across)
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
            image = from_uint8(np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC)))
            images.append(image.expand(channels, -1, -1))
        self.images = torch.stack(images)
        self.border = max(1, size // 16)

    def digest(self) -> str:
        """Hash of the labels."""
        return digest_of(self.labels.tolist())

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

    def describe(self) -> str:
        """Lines that tell the numbers of the classes and what was left out."""
        names = [f"{label} {name}" for label, name in enumerate(self.classes)]
        return "\n".join([f"{len(names)} classes: {shortened(names, 20)}", *self.whole.notes])

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


def load_split(config: DataConfig, seed: int = 0, classes: list[str] | None = None) -> tuple[Part, Part]:
    """Training images (augmented as configured, by ``seed``) and held-out images (never augmented).

    classes: of a model; where those of the images are a part of them, they have its numbers, and so its split.
    """
    config.validate_data()
    plain: ImageFolder | Digits
    if config.data == "digits":
        plain = Digits(config.image_size, config.channels, seed=seed)
    else:
        plain = ImageFolder(config.data, config.image_size, config.channels, seed=seed)
        plain.check(config.on_bad_image)
    if classes is not None and set(plain.classes) <= set(classes):
        plain.number_as(classes)
    train, test = stratified_split(plain.labels, config.held_out, config.split_seed)
    augmented = copy.copy(plain)  # shares the list of files or the scans
    augmented.augment, augmented.flip = config.augment, config.flip
    return Part(augmented, train), Part(plain, test)


def held_out_digits(count: int, size: int, channels: int) -> tuple[torch.Tensor, list[int]]:
    """Real digits the bundled model was not trained on, 0 to 9 in turn: (count, channels, size, size) in [-1, 1].

    Raises ImportError without scikit-learn, which carries them, and ValueError where there are too few.
    """
    _, held_out = load_split(DataConfig(data="digits", image_size=size, channels=channels))
    if count > len(held_out):
        raise ValueError(f"there are {len(held_out)} held-out digits and {count} were asked for; ask for fewer")
    # The i-th of each digit comes before the (i + 1)-th of any.
    rank = [(int((held_out.labels[:i] == label).sum()), int(label), i) for i, label in enumerate(held_out.labels)]
    chosen = sorted(rank)[:count]
    return torch.stack([held_out[i][0] for _, _, i in chosen]), [label for _, label, _ in chosen]


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
    """Collated batches of ``dataset`` in ``order``, from batch ``start`` on.

    Raises ValueError with one sentence for an item that cannot be read, in a worker, too.
    """
    groups = [[int(i) for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    if drop_last and groups and len(groups[-1]) < batch_size:
        groups.pop()
    # A loader without its own generator draws its workers' seed from the global one: resuming would not be exact.
    for batch in DataLoader(
        Guarded(dataset),
        batch_sampler=groups[start:],
        num_workers=workers,
        collate_fn=collated,
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(0),
    ):
        if isinstance(batch, str):
            raise ValueError(batch)
        yield batch


class Guarded(Dataset):
    """Items of another data set; the text of the error in place of an item that cannot be read.

    A worker's exception would arrive wrapped in its traceback.
    """

    def __init__(self, whole: Dataset) -> None:
        self.whole = whole

    def __getitem__(self, index: int) -> Any:
        try:
            return self.whole[index]
        except (OSError, ValueError) as error:
            return str(error) or type(error).__name__


def collated(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, str)), None) or default_collate(items)


def start_worker(_: int) -> None:
    """One thread, since a forked OpenMP pool hangs and workers share the cores; signals are the main process's."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
