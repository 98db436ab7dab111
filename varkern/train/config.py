"""Settings of tokenizer and transformer training as flat dataclasses, one documented field an option."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["DataConfig", "LoopConfig", "TokenizerConfig", "TransformerConfig", "resolve_device"]

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def option(default: Any, text: str) -> Any:
    """A dataclass field whose ``metadata["help"]`` is ``text``; the command line reads both."""
    return field(default=default, metadata={"help": text})


def required(text: str) -> Any:
    """A dataclass field without a default, documented as by `option`."""
    return field(metadata={"help": text})


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def resolve_device(name: str) -> torch.device:
    """``"auto"`` is CUDA when there is one, else the CPU; any other name is passed to torch."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


@dataclass(kw_only=True)
class DataConfig:
    """Where images come from and how they are cut. The held-out part is never trained on, by either stage."""

    data: str = required("folder with one sub-folder of images for each class, or 'digits' (scikit-learn's scans)")
    image_size: int = option(256, "side of the square images in pixels")
    channels: int = option(3, "image channels: 3 for RGB, 1 for grey")
    held_out: float = option(1 / 3, "fraction of each class kept from all training, for evaluation")
    split_seed: int = option(0, "seed of the split into training and held-out images")
    augment: bool = option(False, "random crop while training (centre crop otherwise)")
    flip: bool = option(False, "mirror half of the training images left to right")
    workers: int = option(0, "processes that load images; 0 loads in the main process")

    def validate_data(self) -> None:
        check(self.image_size > 0, f"image_size is {self.image_size}; it must be positive")
        check(self.channels in (1, 3), f"channels is {self.channels}; use 1 (grey) or 3 (RGB)")
        check(0 <= self.held_out < 1, f"held_out is {self.held_out}; it must be at least 0 and below 1")
        check(self.workers >= 0, f"workers is {self.workers}; it must not be negative")


@dataclass(kw_only=True)
class LoopConfig(DataConfig):
    """What both training stages share."""

    out: str = required("folder of the run: checkpoint, metrics log and, at the end, the model")
    epochs: int = option(200, "passes over the training images")
    batch_size: int = option(768, "images an optimizer step (the global batch)")
    accumulate: int = option(1, "equal parts the batch is computed in, to fit memory")
    base_lr: float = option(1e-4, "peak learning rate for a batch of 256; scaled linearly with batch_size")
    warmup_epochs: float = option(4.0, "epochs of linear warm-up from 0.005 of the peak learning rate")
    lr_schedule: str = option("lin0", "after warm-up: 'lin0' (flat for 5 %, then linear to lr_end) or 'constant'")
    lr_end: float = option(0.01, "last learning rate as a fraction of the peak")
    weight_decay: float = option(0.05, "AdamW weight decay of matrices and convolutions")
    weight_decay_end: float | None = option(None, "last weight decay of a half cosine; none keeps it constant")
    clip: float = option(2.0, "largest gradient norm; 0 does not clip")
    precision: str = option("float32", "autocast type: 'float32' (off), 'bfloat16' or 'float16' (CUDA only)")
    ema_decay: float = option(0.0, "decay of the weight average that is validated and exported; 0 is off")
    seed: int = option(0, "seed of initial weights, order, augmentation and dropout")
    device: str = option("auto", "device to train on; 'auto' takes CUDA when there is one")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    validate_every: int = option(1, "epochs between validations on the held-out images; 0 never validates")
    checkpoint_every: int = option(200, "steps between checkpoints, beside the one after each validation")
    resume: bool = option(False, "continue from the checkpoint in `out` (starts afresh when there is none)")

    def validate_loop(self) -> None:
        self.validate_data()
        check(self.epochs > 0, f"epochs is {self.epochs}; it must be positive")
        check(self.batch_size > 0, f"batch_size is {self.batch_size}; it must be positive")
        check(
            self.accumulate > 0 and self.batch_size % self.accumulate == 0,
            f"accumulate is {self.accumulate}; it must divide batch_size, {self.batch_size}",
        )
        check(self.base_lr > 0, f"base_lr is {self.base_lr}; it must be positive")
        check(self.warmup_epochs >= 0, f"warmup_epochs is {self.warmup_epochs}; it must not be negative")
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
        check(0 <= self.ema_decay < 1, f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        for name in ("log_every", "checkpoint_every"):
            check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        check(self.validate_every >= 0, f"validate_every is {self.validate_every}; it must not be negative")


@dataclass(kw_only=True)
class TokenizerConfig(LoopConfig):
    """Training of the multi-scale VQVAE. The defaults build the published 256 px tokenizer."""

    vocab_size: int = option(4096, "codes in the codebook")
    z_channels: int = option(32, "width of a code")
    ch: int = option(160, "base channels of encoder and decoder; a multiple of 32")
    ch_mult: tuple[int, ...] = option((1, 1, 2, 2, 4), "channel multiplier a level; each level but the last halves")
    num_res_blocks: int = option(2, "residual blocks a level of the encoder (the decoder has one more)")
    patch_nums: tuple[int, ...] = option(PATCH_NUMS_256, "sides of the token maps, coarse to fine")
    quant_resi: float = option(0.5, "share of the convolution in the residual mapping phi")
    share_quant_resi: int = option(4, "number of phi convolutions shared by the scales; 0 gives each its own")
    beta: float = option(0.25, "weight of the commitment loss")
    dropout: float = option(0.0, "dropout in residual blocks")
    l1_weight: float = option(0.0, "weight of the mean absolute error added to the mean squared error")
    gradient_weight: float = option(0.0, "weight of the squared error between image gradients (keeps edges sharp)")
    restart_every: int = option(200, "steps between restarts of unused codes; 0 never restarts")
    restart_images: int = option(512, "training images in which a code must appear to count as used")
    restart_until: float = option(0.8, "fraction of training after which codes are left alone")

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
        check(self.vocab_size > 1, f"vocab_size is {self.vocab_size}; it must be at least 2")
        check(self.restart_every >= 0, f"restart_every is {self.restart_every}; it must not be negative")
        check(self.restart_images > 0, f"restart_images is {self.restart_images}; it must be positive")

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

    tokenizer: str = required("folder of tokenizer training or of a model, Hub repository, or weights file")
    patch_nums: tuple[int, ...] | None = option(None, "sides of the token maps, where the tokenizer does not tell them")
    depth: int = option(16, "transformer blocks")
    width: int = option(0, "channels of a token; 0 takes 64 x depth")
    heads: int = option(0, "attention heads; 0 takes width / 64")
    shared_aln: bool = option(False, "one AdaLN projection for all blocks")
    attn_l2_norm: bool = option(True, "unit-length queries and keys with a learned scale a head")
    drop_rate: float = option(0.0, "dropout of attention and feed-forward outputs")
    attn_drop_rate: float = option(0.0, "dropout of attention weights")
    drop_path_rate: float = option(-1.0, "stochastic depth of the last block; negative takes 0.1 x depth / 24")
    cond_drop_rate: float = option(0.1, "probability of training without the class, for classifier-free guidance")
    label_smoothing: float = option(0.0, "label smoothing of the token cross-entropy")
    code_temperature: float = option(
        0.0, "draw training codes by distance instead of taking the nearest; 0 is off, 0.1 to 0.5 helps small data"
    )

    def validate(self) -> None:
        """Raise ``ValueError`` with one sentence for the first setting that cannot work."""
        self.validate_loop()
        check(self.depth > 0, f"depth is {self.depth}; it must be positive")
        width, heads = self.dims()
        check(heads > 0 and width % heads == 0, f"width {width} does not divide into {heads} heads")
        for name in ("drop_rate", "attn_drop_rate", "cond_drop_rate", "label_smoothing"):
            check(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        check(self.code_temperature >= 0, f"code_temperature is {self.code_temperature}; it must not be negative")
        check(math.isfinite(self.drop_path_rate) and self.drop_path_rate < 1, "drop_path_rate must be below 1")

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
