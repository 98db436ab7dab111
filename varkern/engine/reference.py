"""The published generation, step for step: the oracle and the baseline of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from varkern.engine.options import Options, ScaleStep
from varkern.modules.blocks import AdaLNSelfAttn
from varkern.modules.plain import compute_dtype
from varkern.modules.transformer import Transformer
from varkern.ops import sampling as ops


def reference_scales(
    var: Transformer, label_B: Tensor, generator: torch.Generator | None, options: Options
) -> Iterator[ScaleStep]:
    """The scales of a batch, by plain PyTorch in the published order.

    The batch is doubled (conditional rows, then "no class"), AdaLN is recomputed at each scale, caches grow by
    concatenation within the modules. It must not become faster itself.
    """
    B, quantize = label_B.shape[0], var.vae_quant_proxy[0]
    cond_BD = var.class_emb(torch.cat((label_B, torch.full_like(label_B, var.num_classes))))
    lvl_pos = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    x = (
        cond_BD.unsqueeze(1).expand(2 * B, var.first_l, -1)
        + var.pos_start.expand(2 * B, var.first_l, -1)
        + lvl_pos[:, : var.first_l]
    )
    size = B, var.Cvae, var.patch_nums[-1], var.patch_nums[-1]
    f_hat = torch.zeros(size, dtype=torch.float32, device=x.device)
    blocks = cast("list[AdaLNSelfAttn]", list(var.blocks))
    try:
        for block in blocks:
            block.attn.kv_caching(True)
        for k, p in enumerate(var.patch_nums):
            ratio = k / var.num_stages_minus_1
            cond_BD_or_gss = var.shared_ada_lin(cond_BD)
            for block in blocks:
                x = block(x=x, cond_BD=cond_BD_or_gss, attn_bias=None)
            logits = ops.guided_logits_reference(var.get_logits(x, cond_BD), options.guidance(ratio))
            logits = ops.filter_logits_reference_(logits, options.top_k, options.top_p)
            tokens = ops.sample_tokens_reference(logits, generator)
            if options.more_smooth:
                h = ops.smooth_codes_reference(logits, quantize.embedding.weight.float(), ratio, generator)
            else:
                h = quantize.embedding(tokens).float()
            h = h.transpose(1, 2).reshape(B, var.Cvae, p, p)
            if options.keep is not None:
                h = options.keep.embeddings(k, h, quantize.embedding)
            f_hat, following = quantize.get_next_autoregressive_input(k, len(var.patch_nums), f_hat, h)
            yield ScaleStep(k, tokens, f_hat)
            if k != var.num_stages_minus_1:
                begin, end = var.begin_ends[k + 1]
                words = following.flatten(2).transpose(1, 2).to(compute_dtype(var.word_embed))
                x = (var.word_embed(words) + lvl_pos[:, begin:end]).repeat(2, 1, 1)
    finally:
        for block in blocks:
            block.attn.kv_caching(False)
