"""Settings of tokenizer and transformer training as flat dataclasses, one documented field an option."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import torch

__all__ = ["DataConfig", "LoopConfig", "TokenizerConfig", "TransformerConfig", "resolve_device"]

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        check(not several or len(value) > 0, f"{item.name} is empty; it needs a number or more")
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
        raise ValueError(f"device {name!r} is no device of torch; use 'cpu', 'cuda' or 'cuda:0'") from None
    if device.type == "cuda":
        check(torch.cuda.is_available(), f"device {name!r} was asked for, but torch finds no CUDA device; use 'cpu'")
        count = torch.cuda.device_count()
        check((device.index or 0) < count, f"device {name!r} was asked for, but torch finds {count} CUDA devices")
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


@dataclass(kw_only=True)
class LoopConfig(DataConfig):
    """What both training stages share."""

    out: str = required("folder of the run: checkpoint, metrics log and, at the end, the model")
    epochs: int = option(200, "passes over the training images", "(0, inf)")
    batch_size: int = option(768, "images an optimizer step (the global batch)", "(0, inf)")
    accumulate: int = option(1, "equal parts the batch is computed in, to fit memory", "(0, inf)")
    base_lr: float = option(1e-4, "peak learning rate for a batch of 256; scaled linearly with batch_size", "(0, inf)")
    warmup_epochs: float = option(4.0, "epochs of linear warm-up from 0.005 of the peak learning rate", "[0, inf)")
    lr_schedule: str = option("lin0", "after warm-up: 'lin0' (flat for 5 %, then linear to lr_end) or 'constant'")
    lr_end: float = option(0.01, "last learning rate as a fraction of the peak", "[0, 1]")
    weight_decay: float = option(0.05, "AdamW weight decay of matrices and convolutions", "[0, inf)")
    weight_decay_end: float | None = option(
        None, "last weight decay of a half cosine; none keeps it constant", "[0, inf)"
    )
    clip: float = option(2.0, "largest gradient norm; 0 does not clip", "[0, inf)")
    precision: str = option("float32", "autocast type: 'float32' (off), 'bfloat16' or 'float16' (CUDA only)")
    ema_decay: float = option(0.0, "decay of the weight average that is validated and exported; 0 is off", "[0, 1)")
    seed: int = option(0, "seed of initial weights, order, augmentation and dropout", "[0, 9e18]")
    device: str = option("auto", "device to train on; 'auto' takes CUDA when there is one")
    log_every: int = option(10, "steps between lines of metrics.jsonl", "(0, inf)")
    validate_every: int = option(1, "epochs between validations on the held-out images; 0 never validates", "[0, inf)")
    checkpoint_every: int = option(200, "steps between checkpoints, beside the one after each validation", "(0, inf)")
    resume: bool = option(False, "continue from the checkpoint in `out` (starts afresh when there is none)")

    def validate_loop(self) -> None:
        self.validate_data()
        check(
            self.batch_size % self.accumulate == 0,
            f"accumulate is {self.accumulate}; it must divide batch_size, {self.batch_size}",
        )
        check(
            self.lr_schedule in ("lin0", "constant"), f"lr_schedule is {self.lr_schedule!r}; use 'lin0' or 'constant'"
        )
        check(
            self.precision in PRECISIONS,
            f"precision is {self.precision!r}; use one of {', '.join(map(repr, PRECISIONS))}",
        )
        check(
            self.precision != "float16" or resolve_device(self.device).type == "cuda",
            "precision 'float16' needs a CUDA device for its loss scaling; use 'bfloat16' or 'float32' here",
        )


@dataclass(kw_only=True)
class TokenizerConfig(LoopConfig):
    """Training of the multi-scale VQVAE. The defaults build the published 256 px tokenizer."""

    vocab_size: int = option(4096, "codes in the codebook", "[2, inf)")
    z_channels: int = option(32, "width of a code", "(0, inf)")
    ch: int = option(160, "base channels of encoder and decoder; a multiple of 32", "(0, inf)")
    ch_mult: tuple[int, ...] = option(
        (1, 1, 2, 2, 4), "channel multiplier a level; each level but the last halves", "(0, inf)"
    )
    num_res_blocks: int = option(2, "residual blocks a level of the encoder (the decoder has one more)", "(0, inf)")
    patch_nums: tuple[int, ...] = option(PATCH_NUMS_256, "sides of the token maps, coarse to fine", "(0, inf)")
    quant_resi: float = option(0.5, "share of the convolution in the residual mapping phi", "(-inf, inf)")
    share_quant_resi: int = option(
        4, "number of phi convolutions shared by the scales; 0 gives each its own", "[0, inf)"
    )
    beta: float = option(0.25, "weight of the commitment loss", "[0, inf)")
    dropout: float = option(0.0, "dropout in residual blocks", "[0, 1)")
    l1_weight: float = option(0.0, "weight of the mean absolute error added to the mean squared error", "[0, inf)")
    gradient_weight: float = option(
        0.0, "weight of the squared error between image gradients (keeps edges sharp)", "[0, inf)"
    )
    restart_every: int = option(200, "steps between restarts of unused codes; 0 never restarts", "[0, inf)")
    restart_images: int = option(512, "training images in which a code must appear to count as used", "(0, inf)")
    restart_until: float = option(0.8, "fraction of training after which codes are left alone", "[0, 1]")

    def validate(self) -> None:
        """Raise ``ValueError`` with one sentence for the first setting that cannot work."""
        self.validate_loop()
        check(self.ch % 32 == 0, f"ch is {self.ch}; group normalisation needs a multiple of 32")
        downsample = 2 ** (len(self.ch_mult) - 1)
        check(
            self.image_size == self.patch_nums[-1] * downsample,
            f"image_size is {self.image_size}; {len(self.ch_mult)} levels and a last token map of "
            f"{self.patch_nums[-1]} need {self.patch_nums[-1] * downsample}",
        )

    def vae_kwargs(self) -> dict[str, Any]:
        """Constructor arguments of the ``VQVAE`` that is trained, all JSON-serialisable."""
        return {
            "vocab_size": self.vocab_size,
            "z_channels": self.z_channels,
            "ch": self.ch,
            "ch_mult": list(self.ch_mult),
            "num_res_blocks": self.num_res_blocks,
            "in_channels": self.channels,
            "dropout": self.dropout,
            "beta": self.beta,
            "quant_resi": self.quant_resi,
            "share_quant_resi": self.share_quant_resi,
            "v_patch_nums": list(self.patch_nums),
        }


@dataclass(kw_only=True)
class TransformerConfig(LoopConfig):
    """Training of the class-conditional VAR transformer on a frozen tokenizer. The defaults build VAR-d16."""

    from_model = True

    image_size: int = option(0, "side of the square images in pixels; 0 takes the tokenizer's", "[0, inf)")
    channels: int = option(0, "image channels: 3 for RGB, 1 for grey; 0 takes the tokenizer's")
    tokenizer: str = required("folder of tokenizer training or of a model, Hub repository, or weights file")
    patch_nums: tuple[int, ...] | None = option(
        None, "sides of the token maps, where the tokenizer does not tell them", "(0, inf)"
    )
    depth: int = option(16, "transformer blocks", "(0, inf)")
    width: int = option(0, "channels of a token; 0 takes 64 x depth", "[0, inf)")
    heads: int = option(0, "attention heads; 0 takes width / 64", "[0, inf)")
    shared_aln: bool = option(False, "one AdaLN projection for all blocks")
    attn_l2_norm: bool = option(True, "unit-length queries and keys with a learned scale a head")
    drop_rate: float = option(0.0, "dropout of attention and feed-forward outputs", "[0, 1)")
    attn_drop_rate: float = option(0.0, "dropout of attention weights", "[0, 1)")
    drop_path_rate: float = option(
        -1.0, "stochastic depth of the last block; negative takes 0.1 x depth / 24", "(-inf, 1)"
    )
    cond_drop_rate: float = option(
        0.1, "probability of training without the class, for classifier-free guidance", "[0, 1]"
    )
    label_smoothing: float = option(0.0, "label smoothing of the token cross-entropy", "[0, 1]")
    code_temperature: float = option(
        0.0,
        "draw training codes by distance instead of taking the nearest; 0 is off, 0.1 to 0.5 helps small data",
        "[0, inf)",
    )

    def validate(self) -> None:
        """Raise ``ValueError`` with one sentence for the first setting that cannot work."""
        self.validate_loop()
        width, heads = self.dims()
        check(heads > 0 and width % heads == 0, f"width {width} does not divide into {heads} heads")

    def dims(self) -> tuple[int, int]:
        """Width and number of heads."""
        width = self.width or 64 * self.depth
        return width, self.heads or width // 64

    def var_kwargs(self, num_classes: int, patch_nums: tuple[int, ...]) -> dict[str, Any]:
        """Constructor arguments of the ``VAR`` that is trained, all JSON-serialisable."""
        width, heads = self.dims()
        return {
            "num_classes": num_classes,
            "depth": self.depth,
            "embed_dim": width,
            "num_heads": heads,
            "drop_rate": self.drop_rate,
            "attn_drop_rate": self.attn_drop_rate,
            "drop_path_rate": self.drop_path_rate if self.drop_path_rate >= 0 else 0.1 * self.depth / 24,
            "shared_aln": self.shared_aln,
            "cond_drop_rate": self.cond_drop_rate,
            "attn_l2_norm": self.attn_l2_norm,
            "patch_nums": list(patch_nums),
        }
