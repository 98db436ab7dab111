"""The engine: generation with everything computed once that is the same for all scales.

Against the published order of operations (`varkern.engine.reference`): AdaLN's projections, a third of all weights, run
once an image instead of once a scale; keys and values go to memory taken once; guidance mixes the hidden states before
the head, which is linear, so that the head runs on one half of the batch; without guidance the unconditional half does
not run at all; sampling is one op.

Each of these holds for modules that are as built (`varkern.modules.plain`). A block that is not is called as published,
with a cache in its attention, while the others stay fast; so are a changed head, ``get_logits`` and projections of the
condition. Only such blocks keep state in the modules: threads may share a model without them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkern.engine.noise import NoiseSource
from varkern.engine.options import Options, ScaleStep
from varkern.modules.blocks import AdaLNSelfAttn, DropPath, KVCache
from varkern.modules.plain import compute_dtype, is_plain, is_plain_norm
from varkern.modules.transformer import Transformer
from varkern.ops import sampling as ops
from varkern.ops.gated_norm import gated_residual_layer_norm_
from varkern.ops.norm import modulated_layer_norm


def may_fuse(block: nn.Module) -> bool:
    """Whether the engine may compute a block without calling it, its attention, its norm and its drop path."""
    return (
        isinstance(block, AdaLNSelfAttn)
        and is_plain(block)
        and is_plain(block.attn)
        and is_plain_norm(block.ln_wo_grad, block.C)
        and is_plain(block.drop_path)
        # Stochastic depth belongs to the block.
        and isinstance(block.drop_path, nn.Identity if block.drop_path.training else nn.Identity | DropPath)
        and block.attn.dropout == 0.0
    )


def may_fuse_head(var: Transformer) -> bool:
    """Whether the engine may do without `VAR.get_logits`: the head is affine, its norm the one that was built."""
    norm = var.head_nm
    return (
        getattr(var.get_logits, "__func__", None) is Transformer.get_logits
        and isinstance(var.head, nn.Linear)
        and is_plain(var.head)
        and is_plain(norm)
        and is_plain_norm(norm.ln_wo_grad, norm.C)
        and _is_plain_projection(norm.ada_lin)
    )


def _is_plain_projection(module: nn.Module) -> bool:
    """Whether what it gives for a condition may be kept: it is plain, and so is all that is in it."""
    return all(map(is_plain, module.modules()))


class CachedTransformer:
    """The transformer during one generation: modulations of one condition, and a cache for each block.

    The condition may stand for both halves of a guided batch, conditional rows first.
    """

    def __init__(self, var: Transformer, cond_BD: Tensor) -> None:
        self.var, self.cond_BD = var, cond_BD
        self.blocks = cast("list[AdaLNSelfAttn]", list(var.blocks))
        self.fused = [may_fuse(block) for block in self.blocks]
        self.caches = [KVCache(var.L, var.scale_lengths[-1]) if fused else None for fused in self.fused]
        self.fused_head = may_fuse_head(var)
        # What the condition gives, once; None where it has to be computed at each scale, as published.
        fixed = _is_plain_projection(var.shared_ada_lin)
        self.shared = var.shared_ada_lin(cond_BD) if fixed else None
        self.modulations = [
            block.modulation(self.shared)
            if fused and self.shared is not None and (block.shared_aln or _is_plain_projection(block.ada_lin))
            else None
            for block, fused in zip(self.blocks, self.fused, strict=True)
        ]
        self.head_modulation = var.head_nm.modulation(cond_BD) if self.fused_head else None

    @contextlib.contextmanager
    def caching(self) -> Iterator[None]:
        """While it generates: the blocks that are called keep their own caches."""
        called = [block for block, fused in zip(self.blocks, self.fused, strict=True) if not fused]
        switches = [block.attn.kv_caching for block in called if hasattr(block, "attn")]
        try:
            for switch in switches:
                switch(True)
            yield
        finally:
            for switch in switches:
                switch(False)

    def __call__(self, x: Tensor) -> Tensor:
        """Embeddings (B, n, C) of the next scale -> hidden states (B, n, C): the head's input, normalised and float32,
        where the head is fused, else what `VAR.get_logits` takes. x is overwritten.

        What the blocks do one after another, with every residual joined to the layer norm that follows it, be it the
        next block's or, where x is float32, the head's.
        """
        x = x.contiguous()
        shared = self.var.shared_ada_lin(self.cond_BD) if self.shared is None else self.shared
        due: tuple[Tensor, Tensor] | None = None  # h and its gate, still to be added to x
        owned = True  # whether x may be overwritten: no module has seen it
        for i, block in enumerate(self.blocks):
            cache = self.caches[i]
            if cache is None:
                x, due = _settled(x, due), None
                x, owned = block(x=x, cond_BD=shared, attn_bias=None), False
                continue
            known = self.modulations[i]
            modulation = block.modulation(shared) if known is None else known
            gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
            if not owned:
                x, owned = x.clone(memory_format=torch.contiguous_format), True
            if due is None:
                h = modulated_layer_norm(x, scale1, shift1, block.ln_wo_grad.eps)
            else:
                h = gated_residual_layer_norm_(x, *due, scale1, shift1, block.ln_wo_grad.eps)
            h = block.attn.cached(h, cache)
            h = gated_residual_layer_norm_(x, h, gamma1, scale2, shift2, block.ln_wo_grad.eps)
            due = block.ffn(h), gamma2
        if self.head_modulation is None:
            return _settled(x, due)
        head, (scale, shift) = self.var.head_nm, self.head_modulation.unbind(2)
        # The head's norm works on float32, and rounds to nothing else: with 16-bit x or gates it is an operation apart.
        if due is not None and x.dtype == torch.float32 and due[1].dtype == scale.dtype:
            return gated_residual_layer_norm_(x, *due, scale, shift, head.ln_wo_grad.eps)
        return head.modulated(_settled(x, due).float(), self.head_modulation).float()

    def logits(self, hidden: Tensor, guidance: float | Tensor | None) -> Tensor:
        """What a call gave -> logits (B, n, V) float32, guided unless None: then it has both halves of the batch."""
        if not self.fused_head:
            logits = self.var.get_logits(hidden, self.cond_BD)
            return logits if guidance is None else ops.guided_logits_reference(logits, guidance)
        if guidance is not None:
            hidden = guided(hidden, guidance)
        return self.var.head(hidden.to(compute_dtype(self.var.head))).float()


def _settled(x: Tensor, due: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if due is None else x + due[0].mul(due[1])


def guided(hidden: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance of hidden states (2B, n, C), conditional rows first -> (B, n, C).

    The head is affine and the weights 1 + t and -t sum to one, so that it gives what guided logits would be. guidance:
    t, or (B, 1, 1).
    """
    cond, uncond = hidden.chunk(2)
    return torch.lerp(cond, uncond, -guidance)


def _lookup(codebook: Tensor, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, codebook)


def cached_scales(var: Transformer, label_B: Tensor, noise: NoiseSource, options: Options) -> Iterator[ScaleStep]:
    """The scales of a batch, each drawn with noise in the published order."""
    B, quantize, last = label_B.shape[0], var.vae_quant_proxy[0], var.num_stages_minus_1
    # Without guidance the unconditional half changes nothing, unless somebody's code sees it.
    halves = 2 if options.guides() or not all(map(is_plain, var.modules())) else 1
    labels = torch.cat((label_B, torch.full_like(label_B, var.num_classes))) if halves == 2 else label_B
    cond_BD = var.class_emb(labels)
    lvl_pos = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    x = cond_BD.unsqueeze(1) + var.pos_start + lvl_pos[:, : var.first_l]
    codebook = quantize.embedding.weight.float()
    # One conversion for all scales, where nobody's code stands in the lookup.
    embed = functools.partial(_lookup, codebook) if is_plain(quantize.embedding) else quantize.embedding
    size = B, var.Cvae, var.patch_nums[-1], var.patch_nums[-1]
    f_hat = torch.zeros(size, dtype=torch.float32, device=x.device)
    transformer = CachedTransformer(var, cond_BD)
    with transformer.caching():
        for k, p in enumerate(var.patch_nums):
            ratio = k / last
            hidden = transformer(x)
            logits = transformer.logits(hidden, options.guidance(ratio) if halves == 2 else None)
            if options.more_smooth:
                logits = ops.filter_logits(logits, None, options.top_k, options.top_p)
                tokens = ops.sample_tokens(logits, noise.noise(p * p, var.V))
                h = ops.smooth_codes_reference(logits, codebook, ratio, noise.noise(p * p, var.V))
            else:
                tokens = ops.sample_tokens(logits, noise.noise(p * p, var.V), None, options.top_k, options.top_p)
                h = embed(tokens).float()
            h = h.transpose(1, 2).reshape(B, var.Cvae, p, p)
            if options.keep is not None:
                h = options.keep.embeddings(k, h, embed)
            f_hat, following = quantize.get_next_autoregressive_input(k, last + 1, f_hat, h)
            yield ScaleStep(k, tokens, f_hat)
            if k != last:
                begin, end = var.begin_ends[k + 1]
                words = following.flatten(2).transpose(1, 2).to(compute_dtype(var.word_embed))
                # One addition writes both halves.
                x = var.word_embed(words) + lvl_pos[:, begin:end].expand(halves, 1, -1, -1)
                x = x.flatten(0, 1)
