"""The published order of operations of a generation and a training step, by a model's modules alone.

Written for the tests of what people do with a model: every module is called, none is stood in for.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from test_models import tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import varkern
from varkern.models.var import sample_with_top_k_top_p_


def model(**settings) -> varkern.VAR:
    """Two blocks of two heads, with weights by which every part of the model counts."""
    torch.manual_seed(0)
    _, var = tiny(**settings)
    var.init_weights(init_std=0.15, init_head=1.0, init_adaln_gamma=1.0)
    with torch.no_grad():
        for name, parameter in var.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return var


@torch.no_grad()
def generate(var: varkern.VAR, labels: Tensor, seed: int, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0):
    """Tokens of each scale and images, written as notebooks write the loop, with the model as ``self``."""
    B, K = len(labels), len(var.patch_nums)
    rng = torch.Generator(device=labels.device).manual_seed(seed)
    sos = cond_BD = var.class_emb(torch.cat((labels, torch.full_like(labels, fill_value=var.num_classes))))
    lvl_pos = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    x = sos.unsqueeze(1).expand(2 * B, var.first_l, -1) + var.pos_start.expand(2 * B, var.first_l, -1)
    x = x + lvl_pos[:, : var.first_l]
    f_hat = sos.new_zeros(B, var.Cvae, var.patch_nums[-1], var.patch_nums[-1])
    position, maps = 0, []
    for block in var.blocks:
        block.attn.kv_caching(True)
    try:
        for si, pn in enumerate(var.patch_nums):
            ratio = si / var.num_stages_minus_1
            position += pn * pn
            cond_BD_or_gss = var.shared_ada_lin(cond_BD)
            for block in var.blocks:
                x = block(x=x, cond_BD=cond_BD_or_gss, attn_bias=None)
            logits = var.get_logits(x, cond_BD)
            t = cfg * ratio
            logits = (1 + t) * logits[:B] - t * logits[B:]
            tokens = sample_with_top_k_top_p_(logits, top_k=top_k, top_p=top_p, rng=rng, num_samples=1)[:, :, 0]
            maps.append(tokens)
            h = var.vae_quant_proxy[0].embedding(tokens).transpose(1, 2).reshape(B, var.Cvae, pn, pn)
            f_hat, following = var.vae_quant_proxy[0].get_next_autoregressive_input(si, K, f_hat, h)
            if si != var.num_stages_minus_1:
                following = following.view(B, var.Cvae, -1).transpose(1, 2)
                following = var.word_embed(following) + lvl_pos[:, position : position + var.patch_nums[si + 1] ** 2]
                x = following.repeat(2, 1, 1)
    finally:
        for block in var.blocks:
            block.attn.kv_caching(False)
    return maps, var.vae_proxy[0].fhat_to_img(f_hat).add(1).mul(0.5)


def logits(var: varkern.VAR, labels: Tensor, inputs: Tensor) -> Tensor:
    """`VAR.forward` with the dense mask for every block, the labels kept."""
    cond = var.class_emb(labels)
    x = torch.cat((cond.unsqueeze(1) + var.pos_start, var.word_embed(inputs)), dim=1)
    x = x + var.lvl_embed(var.lvl_1L) + var.pos_1LC
    shared = var.shared_ada_lin(cond)
    for block in var.blocks:
        x = block(x=x, cond_BD=shared, attn_bias=var.attn_bias_for_masking)
    return var.get_logits(x, cond)


def loss(values: Tensor) -> Tensor:
    target = torch.arange(values.shape[0] * values.shape[1], device=values.device) % values.shape[-1]
    return F.cross_entropy(values.flatten(0, 1), target)


class Ops(TorchDispatchMode):
    """Counts the calls of varkern's operators, and all others under "other"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        own = func.namespace == "varkern"
        self.counts[func._schema.name.split("::")[1] if own else "other"] += 1
        return func(*args, **(kwargs or {}))
