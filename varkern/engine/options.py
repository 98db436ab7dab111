"""What a generation is asked for, and what it gives at each scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Keep:
    """What zero-shot editing keeps of an image.

    tokens: the image's indices (B, n_k) of each scale. mask: (p_K, p_K) or (B, p_K, p_K), 1 where it is kept.
    """

    tokens: Sequence[Tensor]
    mask: Tensor

    def embeddings(self, k: int, h_BChw: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """The drawn embeddings (B, Cv, p, p) of scale k, replaced by the image's where the resized mask > 0.5.

        Up to three tokens a map (the first scales) are always the image's: they set its overall look. embed: from
        indices to codes, the codebook as a module.
        """
        p = h_BChw.shape[-1]
        image = embed(self.tokens[k]).to(h_BChw.dtype).transpose(1, 2).reshape(h_BChw.shape)
        if p * p <= 3:
            return image
        mask = self.mask.to(h_BChw.dtype).expand(h_BChw.shape[0], *self.mask.shape[-2:]).unsqueeze(1)
        keep = F.interpolate(mask, size=(p, p), mode="bilinear", align_corners=False) > 0.5
        return torch.where(keep, image, h_BChw)

    def part(self, begin: int, end: int) -> Keep:
        """Of images begin to end - 1."""
        mask = self.mask if self.mask.ndim == 2 else self.mask[begin:end]
        return Keep([tokens[begin:end] for tokens in self.tokens], mask)


@dataclass(frozen=True)
class Options:
    """How tokens are drawn; see `VAR.autoregressive_infer_cfg`. cfg: a number, or (B, 1, 1) float32."""

    cfg: float | Tensor = 1.5
    top_k: int = 0
    top_p: float = 0.0
    more_smooth: bool = False
    keep: Keep | None = None

    def guides(self) -> bool:
        """Whether the unconditional half of the batch counts at all."""
        return isinstance(self.cfg, Tensor) or self.cfg > 0

    def guidance(self, ratio: float) -> float | Tensor:
        """t at the scale k of K, ratio = k / (K - 1)."""
        return self.cfg * ratio

    def part(self, begin: int, end: int) -> Options:
        """Of images begin to end - 1."""
        cfg = self.cfg[begin:end] if isinstance(self.cfg, Tensor) else self.cfg
        return replace(self, cfg=cfg, keep=None if self.keep is None else self.keep.part(begin, end))


@dataclass(frozen=True)
class ScaleStep:
    """One scale of a batch: its number from 0, the drawn tokens (B, n_k), and the features so far (B, Cv, p_K, p_K).

    The features are changed in place by the next step.
    """

    scale: int
    tokens: Tensor
    f_hat: Tensor


@dataclass(frozen=True)
class Generation:
    """images: (B, in_channels, H, W) in [0, 1]. tokens: the drawn indices (B, n_k) int64 of each scale."""

    images: Tensor
    tokens: list[Tensor]
