"""The engine: generation with everything computed once that is the same for all scales.

Against the published order of operations (`varkern.engine.reference`): AdaLN's projections, a third of all weights, run
once an image instead of once a scale; keys and values go to memory taken once; guidance mixes the hidden states before
the head, which is linear, so that the head runs on one half of the batch; without guidance the unconditional half does
not run at all; sampling is one op. No state is kept in the modules: threads may share a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.engine.options import Options, ScaleStep
from varkern.models.blocks import AdaLNSelfAttn, KVCache
from varkern.models.var import VAR
from varkern.ops import sampling as ops
from varkern.ops.gated_norm import gated_residual_layer_norm_
from varkern.ops.norm import modulated_layer_norm


class Noise(Protocol):
    def noise(self, n: int, V: int) -> Tensor:
        """Exponential noise (B * n, V) float32 for n tokens an image."""


class CachedTransformer:
    """The transformer during one generation: modulations of one condition, and a cache for each block."""

    def __init__(self, var: VAR, cond_BD: Tensor) -> None:
        self.var = var
        self.blocks = cast("list[AdaLNSelfAttn]", list(var.blocks))
        cond_BD_or_gss = var.shared_ada_lin(cond_BD)
        self.modulations = [block.modulation(cond_BD_or_gss) for block in self.blocks]
        self.head_modulation = var.head_nm.modulation(cond_BD)
        self.caches = [KVCache(var.L, var.scale_lengths[-1]) for _ in self.blocks]

    def __call__(self, x: Tensor) -> Tensor:
        """Embeddings (B, n, C) of the next scale -> normalised hidden states (B, n, C) float32, the head's input.

        x is overwritten. What `AdaLNSelfAttn.modulated` does block by block, with every residual joined to the layer
        norm that follows it, be it the next block's or, where x is float32, the head's.
        """
        if any(block.training for block in self.blocks):  # stochastic depth belongs to the blocks
            for block, modulation, cache in zip(self.blocks, self.modulations, self.caches, strict=True):
                x = block.modulated(x, modulation, cache)
            return self.var.head_nm.modulated(x.float(), self.head_modulation).float()
        x, head = x.contiguous(), self.var.head_nm
        gates, norms = self._conditions()
        h = modulated_layer_norm(x, *norms[0])
        for i, (block, cache) in enumerate(zip(self.blocks, self.caches, strict=True)):
            h = block.attn(h, cache)
            h = gated_residual_layer_norm_(x, h, gates[2 * i], *norms[2 * i + 1])
            h = block.ffn(h)
            if i + 1 < len(self.blocks):
                h = gated_residual_layer_norm_(x, h, gates[2 * i + 1], *norms[2 * i + 2])
        head_scale, head_shift = self.head_modulation.unbind(2)
        # The head's norm works on float32, and rounds to nothing else: with 16-bit x or gates it is an operation apart.
        if x.dtype == torch.float32 and gates[-1].dtype == head_scale.dtype:
            return gated_residual_layer_norm_(x, h, gates[-1], head_scale, head_shift, head.norm_eps)
        x = x + h.mul(gates[-1])
        return head.modulated(x.float(), self.head_modulation).float()

    def _conditions(self) -> tuple[list[Tensor], list[tuple[Tensor, Tensor, float]]]:
        """The gates of attention and feed-forward, block by block, and scale, shift and eps of the norm before each."""
        gates, norms = [], []
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
            gates += [gamma1, gamma2]
            norms += [(scale1, shift1, block.norm_eps), (scale2, shift2, block.norm_eps)]
        return gates, norms

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, n, C) float32 -> (B, n, V) float32."""
        return self.var.head(hidden.to(self.var.head.weight.dtype)).float()


def guided(hidden: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance of hidden states (2B, n, C), conditional rows first -> (B, n, C).

    The head is affine and the weights 1 + t and -t sum to one, so that it gives what guided logits would be.
    """
    cond, uncond = hidden.chunk(2)
    return torch.lerp(cond, uncond, -guidance)


def cached_scales(var: VAR, label_B: Tensor, noise: Noise, options: Options) -> Iterator[ScaleStep]:
    """The scales of a batch, each drawn with noise in the published order."""
    B, quantize, last = label_B.shape[0], var.vae_quant_proxy[0], var.num_stages_minus_1
    codebook = quantize.embedding.weight.float()
    halves = 2 if options.cfg > 0 else 1
    labels = torch.cat((label_B, torch.full_like(label_B, var.num_classes))) if halves == 2 else label_B
    cond_BD = var.class_emb(labels)
    lvl_pos = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    x = cond_BD.unsqueeze(1) + var.pos_start + lvl_pos[:, : var.first_l]
    f_hat = torch.zeros(B, var.Cvae, var.patch_nums[-1], var.patch_nums[-1], device=x.device)
    transformer = CachedTransformer(var, cond_BD)
    for k, p in enumerate(var.patch_nums):
        ratio = k / last
        hidden = transformer(x)
        logits = transformer.logits(guided(hidden, options.cfg * ratio) if halves == 2 else hidden)
        if options.more_smooth:
            logits = ops.filter_logits(logits, None, options.top_k, options.top_p)
            tokens = ops.sample_tokens(logits, noise.noise(p * p, var.V))
            h = ops.smooth_codes_reference(logits, codebook, ratio, noise.noise(p * p, var.V))
        else:
            tokens = ops.sample_tokens(logits, noise.noise(p * p, var.V), None, options.top_k, options.top_p)
            h = F.embedding(tokens, codebook)
        h = h.transpose(1, 2).reshape(B, var.Cvae, p, p)
        if options.keep is not None:
            h = options.keep.embeddings(k, h, codebook)
        f_hat, following = quantize.get_next_autoregressive_input(k, last + 1, f_hat, h)
        yield ScaleStep(k, tokens, f_hat)
        if k != last:
            begin, end = var.begin_ends[k + 1]
            words = following.flatten(2).transpose(1, 2).to(var.word_embed.weight.dtype)
            # One addition writes both halves.
            x = var.word_embed(words) + lvl_pos[:, begin:end].expand(halves, 1, -1, -1)
            x = x.flatten(0, 1)
