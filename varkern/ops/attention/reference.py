"""Attention of the eager model: q/k normalisation with a temperature, and softmax attention with a dense mask."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from varkern._kept import passing
from varkern.ops.backends import transformed

MAX_LOG_TEMPERATURE = 4.605170185988092  # log 100
NORM_FLOOR = 1e-12


def normalize_qk_reference(q: Tensor, k: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """L2-normalise q and k (B, H, n, D) over D and multiply q by ``exp(min(log_scale, log 100))`` of its head."""
    scale = log_scale.clamp_max(MAX_LOG_TEMPERATURE).exp()
    return F.normalize(q, dim=-1, eps=NORM_FLOOR).mul(scale), F.normalize(k, dim=-1, eps=NORM_FLOOR)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, softmax_scale: float = 1.0, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of q (B, H, n, D) over k, v (B, H, N, D) with an additive bias (1, 1, n, N) -> (B, H, n, D)."""
    if transformed():  # PyTorch's fused kernels have one derivative, backwards
        scores = q @ k.transpose(-1, -2) * softmax_scale
        return F.dropout((scores if bias is None else scores + bias).softmax(-1), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=softmax_scale, dropout_p=dropout)


def scales_of(lengths: Sequence[int], device: torch.device | None) -> Tensor:
    """The scale of each of the L positions, int32: counted on the device, so that nothing is copied from the host."""
    positions = torch.arange(sum(lengths), dtype=torch.int32, device=device)
    scale_of = torch.zeros_like(positions)
    for end in accumulate(lengths):
        scale_of += positions >= end
    return scale_of


def block_causal_mask(lengths: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """(L, L): 0 where the key's scale is at most the query's, else -inf."""
    scale_of = scales_of(lengths, device)
    hidden = scale_of.view(-1, 1) < scale_of.view(1, -1)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def cached_block_causal_mask(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``block_causal_mask``, made once: the eager model holds it as a buffer.

    A CUDA graph that is being captured makes its own, in its memory: masks are large, and only the last four are kept.
    """
    if passing() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return block_causal_mask(lengths, dtype, device)
    return _kept_mask(lengths, dtype, device)


@functools.lru_cache(maxsize=4)
def _kept_mask(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a mask that inference made could not be saved for a backward pass
        return block_causal_mask(lengths, dtype, device)


def block_causal_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], softmax_scale: float, dropout: float = 0.0
) -> Tensor:
    """``block_causal_attention`` in plain PyTorch, with a dense mask: (B, H, L, D) -> (B, H, L, D)."""
    mask = cached_block_causal_mask(tuple(lengths), q.dtype, q.device)
    return attention_reference(q, k, v, mask, softmax_scale, dropout)


def block_causal_attention_qkv_reference(
    qkv: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    lengths: Sequence[int],
    softmax_scale: float,
) -> Tensor:
    """``block_causal_attention_qkv`` in plain PyTorch; same arguments and result."""
    H, D = qkv.shape[3:]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if q_bias is not None:
        q = q + q_bias.to(q.dtype).view(H, 1, D)
    if v_bias is not None:
        v = v + v_bias.to(v.dtype).view(H, 1, D)
    if log_scale is not None:
        q, k = normalize_qk_reference(q, k, log_scale.view(H, 1, 1))
        q, k = q.to(v.dtype), k.to(v.dtype)
    return block_causal_attention_reference(q, k, v, lengths, softmax_scale).transpose(1, 2).contiguous()


# The same as two functions below autograd, for devices and dtypes that no kernel serves.

Prologue = tuple[Tensor | None, Tensor | None, Tensor | None]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _prepare(
    inputs: tuple[Tensor, ...], prologue: Prologue
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q with temperature but without softmax scale, k, v in float32 or float64, and the divisors of q and k."""
    q, k, v = (_wide(tensor) for tensor in inputs)
    q_bias, v_bias, log_scale = prologue
    H, D = q.size(1), q.size(3)
    if q_bias is not None:
        q = q + q_bias.to(q.dtype).view(H, 1, D)
    if v_bias is not None:
        v = v + v_bias.to(v.dtype).view(H, 1, D)
    if log_scale is None:
        return q, k, v, None, None
    q_norm, k_norm = (x.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR) for x in (q, k))
    temperature = log_scale.to(q.dtype).clamp_max(MAX_LOG_TEMPERATURE).exp().view(H, 1, 1)
    return q / q_norm * temperature, k / k_norm, v, q_norm, k_norm


def forward_eager(
    inputs: tuple[Tensor, ...], prologue: Prologue, out: Tensor, lse: Tensor, lengths: tuple[int, ...], scale: float
) -> None:
    """Fill out (B, H, L, D) and lse (B, H, L)."""
    q, k, v, _, _ = _prepare(inputs, prologue)
    scores = q @ k.transpose(-1, -2) * scale + block_causal_mask(lengths, q.dtype, q.device)
    lse.copy_(scores.logsumexp(-1))
    out.copy_(scores.softmax(-1) @ v)


def backward_eager(
    saved: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, ...],
    prologue: Prologue,
    grads: tuple[Tensor, ...],
    shares: Prologue,
    lengths: tuple[int, ...],
    scale: float,
) -> None:
    """Fill the gradients of q, k, v (B, H, L, D), and a batch element's share of those of the prologue."""
    grad_out, out, lse = (_wide(tensor) for tensor in saved)
    q, k, v, q_norm, k_norm = _prepare(inputs, prologue)
    scores = q @ k.transpose(-1, -2) * scale + block_causal_mask(lengths, q.dtype, q.device)
    p = (scores - lse.unsqueeze(-1)).exp()
    delta = (grad_out * out).sum(-1, keepdim=True)
    grad_scores = p * (grad_out @ v.transpose(-1, -2) - delta) * scale
    grad_q, grad_k, grad_v = grad_scores @ k, grad_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_out
    q_bias, v_bias, log_scale = shares
    if q_norm is not None and k_norm is not None and prologue[2] is not None:
        temperature = prologue[2].to(q.dtype).clamp_max(MAX_LOG_TEMPERATURE).exp().view(-1, 1, 1)
        along = (grad_q * q).sum(-1, keepdim=True)
        if log_scale is not None:
            passes = prologue[2].view(-1) <= MAX_LOG_TEMPERATURE
            log_scale.copy_(along.sum((2, 3)) * passes)
        grad_q = (grad_q * temperature - q * along / temperature * (q_norm > NORM_FLOOR)) / q_norm
        grad_k = (grad_k - k * (grad_k * k).sum(-1, keepdim=True) * (k_norm > NORM_FLOOR)) / k_norm
    if q_bias is not None:
        q_bias.copy_(grad_q.sum(2))
    if v_bias is not None:
        v_bias.copy_(grad_out.sum(2))
    for grad, value in zip(grads, (grad_q, grad_k, grad_v), strict=True):
        grad.copy_(value)
