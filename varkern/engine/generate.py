"""Whole-image generation: all scales, sampling and the decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.engine.arguments import check_labels, check_model, check_sampling, draw_labels
from varkern.models.blocks import AdaLNSelfAttn
from varkern.models.var import VAR
from varkern.ops import current_backend, use_backend
from varkern.ops import sampling as ops


@dataclass(frozen=True)
class Keep:
    """What zero-shot editing keeps of an image.

    tokens: the image's indices (B, n_k) of each scale. mask: (p_K, p_K) or (B, p_K, p_K), 1 where it is kept.
    """

    tokens: Sequence[Tensor]
    mask: Tensor

    def embeddings(self, k: int, h_BChw: Tensor, codebook: Tensor) -> Tensor:
        """The drawn embeddings (B, Cv, p, p) of scale k, replaced by the image's where the resized mask > 0.5.

        Up to three tokens a map (the first scales) are always the image's: they set its overall look.
        """
        p = h_BChw.shape[-1]
        image = F.embedding(self.tokens[k], codebook).transpose(1, 2).reshape(h_BChw.shape)
        if p * p <= 3:
            return image
        mask = self.mask.to(h_BChw.dtype).expand(h_BChw.shape[0], *self.mask.shape[-2:]).unsqueeze(1)
        keep = F.interpolate(mask, size=(p, p), mode="bilinear", align_corners=False) > 0.5
        return torch.where(keep, image, h_BChw)


@dataclass(frozen=True)
class Generation:
    """images: (B, in_channels, H, W) in [0, 1]. tokens: the drawn indices (B, n_k) int64 of each scale."""

    images: Tensor
    tokens: list[Tensor]


def generate(
    var: VAR,
    batch: int,
    labels: int | Sequence[int] | Tensor | None,
    seed: int | None = None,
    *,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
    keep: Keep | None = None,
) -> Generation:
    """Generate a batch of images; see `VAR.autoregressive_infer_cfg` for the arguments and errors.

    ``keep`` holds fixed a part of given images (zero-shot editing, arXiv 2404.02905 section 5.3). With it, or with
    ``more_smooth``, the image is not made of the drawn tokens alone. ``more_smooth`` in float32 runs the reference ops
    unless a backend is asked for.
    """
    check_model(var)
    check_sampling(var.V, cfg, top_k, top_p)
    label_B = check_labels(var, batch, labels)
    generator: torch.Generator | None = None
    if seed is not None:
        generator = var.rng
        generator.manual_seed(seed)
    backend = current_backend()
    if more_smooth and backend is None and var.head.weight.dtype == torch.float32:
        # The mixture of codes amplifies every rounding by up to 1 / tau = 74, over all scales: only the published
        # order of operations gives the published image within 1e-3.
        backend = "reference"
    with torch.no_grad(), use_backend(backend):
        if label_B is None:
            label_B = draw_labels(var, batch, generator)
        f_hat, tokens = _generate_reference(var, label_B, generator, cfg, top_k, top_p, more_smooth, keep)
        images = var.vae_proxy[0].fhat_to_img(f_hat).add_(1).mul_(0.5)
    return Generation(images, tokens)


def _generate_reference(
    var: VAR,
    label_B: Tensor,
    generator: torch.Generator | None,
    cfg: float,
    top_k: int,
    top_p: float,
    more_smooth: bool,
    keep: Keep | None,
) -> tuple[Tensor, list[Tensor]]:
    """The published algorithm step for step: f_hat (B, Cv, p_K, p_K) float32 and the tokens of each scale.

    The batch is doubled (conditional rows, then "no class"), AdaLN is recomputed at each scale, caches grow by
    concatenation. It is the oracle and the baseline of every faster path, and must not become faster itself.
    """
    B, quantize = label_B.shape[0], var.vae_quant_proxy[0]
    codebook = quantize.embedding.weight.float()
    cond_BD = var.class_emb(torch.cat((label_B, torch.full_like(label_B, var.num_classes))))
    lvl_pos = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    x = (
        cond_BD.unsqueeze(1).expand(2 * B, var.first_l, -1)
        + var.pos_start.expand(2 * B, var.first_l, -1)
        + lvl_pos[:, : var.first_l]
    )
    f_hat = torch.zeros(B, var.Cvae, var.patch_nums[-1], var.patch_nums[-1], device=x.device)
    blocks = cast("list[AdaLNSelfAttn]", list(var.blocks))
    tokens: list[Tensor] = []
    try:
        for block in blocks:
            block.attn.kv_caching(True)
        for k, p in enumerate(var.patch_nums):
            ratio = k / var.num_stages_minus_1
            cond_BD_or_gss = var.shared_ada_lin(cond_BD)
            for block in blocks:
                x = block(x=x, cond_BD=cond_BD_or_gss, attn_bias=None)
            logits = ops.guided_logits_reference(var.get_logits(x, cond_BD), cfg * ratio)
            logits = ops.filter_logits_reference_(logits, top_k, top_p)
            tokens.append(ops.sample_tokens_reference(logits, generator))
            if more_smooth:
                h = ops.smooth_codes_reference(logits, codebook, ratio, generator)
            else:
                h = F.embedding(tokens[-1], codebook)
            h = h.transpose(1, 2).reshape(B, var.Cvae, p, p)
            if keep is not None:
                h = keep.embeddings(k, h, codebook)
            f_hat, following = quantize.get_next_autoregressive_input(k, len(var.patch_nums), f_hat, h)
            if k != var.num_stages_minus_1:
                begin, end = var.begin_ends[k + 1]
                words = following.flatten(2).transpose(1, 2).to(var.word_embed.weight.dtype)
                x = (var.word_embed(words) + lvl_pos[:, begin:end]).repeat(2, 1, 1)
    finally:
        for block in blocks:
            block.attn.kv_caching(False)
    return f_hat, tokens
