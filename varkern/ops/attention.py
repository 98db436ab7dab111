"""Attention of the transformer's blocks: q/k normalisation with a temperature, and block-causal softmax attention."""

import torch.nn.functional as F
from torch import Tensor

MAX_LOG_TEMPERATURE = 4.605170185988092  # log 100


def normalize_qk_reference(q: Tensor, k: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """L2-normalise q and k (B, H, n, D) over D and multiply q by ``exp(min(log_scale, log 100))`` of its head."""
    scale = log_scale.clamp_max(MAX_LOG_TEMPERATURE).exp()
    return F.normalize(q, dim=-1).mul(scale), F.normalize(k, dim=-1)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, softmax_scale: float = 1.0, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of q (B, H, n, D) over k, v (B, H, N, D) with an additive bias (1, 1, n, N) -> (B, H, n, D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=softmax_scale, dropout_p=dropout)
