"""Settings of tokenizer and transformer training as flat dataclasses, one documented field an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from varkern.data.config import DataConfig, check, option, required, resolve_device
from varkern.modules.schedule import PATCH_NUMS_256

__all__ = ["LoopConfig", "TokenizerConfig", "TransformerConfig"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(kw_only=True)
class LoopConfig(DataConfig):
    """What both training stages share."""

    out: str = required("folder of the run: checkpoint, metrics log and, at the end, the model")
    epochs: int = option(200, "passes over the training images", "(0, inf)")
    batch_size: int = option(768, "images in one optimizer step (the global batch)", "(0, inf)")
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
        (1, 1, 2, 2, 4), "channel multiplier of each level; all but the last halve the image", "(0, inf)"
    )
    num_res_blocks: int = option(
        2, "residual blocks in each level of the encoder (the decoder has one more)", "(0, inf)"
    )
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
    attn_l2_norm: bool = option(True, "unit-length queries and keys, with a learned scale for each head")
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
        check(
            heads > 0 and width % heads == 0,
            f"width is {width} and does not divide into {heads} heads; choose a multiple",
        )

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
