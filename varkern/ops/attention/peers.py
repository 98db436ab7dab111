"""Other implementations of block-causal attention, to compare with: PyTorch's and flash-attn's.

Each takes q, k, v (B, H, L, D), the length of every scale and the softmax scale, and returns (B, H, L, D).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varkern._kept import kept
from varkern.ops.attention.reference import block_causal_attention_reference, scales_of

# "varkern" is ours, varkern.ops.block_causal_attention.
ATTENTIONS = ("varkern", "sdpa", "flex", "flash")


def check_attention(name: str) -> str:
    """The name itself; raises ``ValueError`` unless it is one of ``ATTENTIONS``."""
    if name not in ATTENTIONS:
        raise ValueError(f"attention is {name!r}, give one of {', '.join(ATTENTIONS)}.")
    return name


def peer_attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float, dropout: float = 0.0
) -> Tensor:
    """Block-causal attention by the peer of that name (not ``"varkern"``), with dropout of the weights.

    Raises ``RuntimeError`` with the reason where the peer cannot serve these tensors.
    """
    peer, why_not = _PEERS[name]
    reason = why_not(q, dropout)
    if reason is not None:
        raise RuntimeError(f"The attention {name!r} cannot serve: {reason}.")
    return peer(q, k, v, lengths, softmax_scale, dropout)


def why_not_peer(name: str, q: Tensor, dropout: float = 0.0) -> str | None:
    """Why a peer cannot serve q and its like, or ``None``."""
    return _PEERS[name][1](q, dropout)


def _sdpa_why_not(q: Tensor, dropout: float) -> str | None:
    return None


@kept
def _block_mask(lengths: tuple[int, ...], device: torch.device) -> Any:
    """FlexAttention's sparse form of the mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    scale_of = scales_of(lengths, device)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return scale_of[query] >= scale_of[key]

    return create_block_mask(visible, None, None, sum(lengths), sum(lengths), device=device)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # uncompiled it makes the whole matrix of scores


def _flex_why_not(q: Tensor, dropout: float) -> str | None:
    if dropout:
        return f"FlexAttention has no dropout, and dropout is {dropout}; use 'sdpa'"
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        return "FlexAttention has no backward pass on the CPU; use 'sdpa', or run it under torch.no_grad()"
    if q.size(-1) < 16 or q.size(-1) & (q.size(-1) - 1):
        return f"FlexAttention takes heads whose width is a power of two from 16 up, these are {q.size(-1)} wide"
    return None


def _flex(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float, dropout: float) -> Tensor:
    return _compiled_flex()(q, k, v, block_mask=_block_mask(lengths, q.device), scale=softmax_scale)


@functools.cache
def _flash_function() -> tuple[Callable[..., Any] | None, str | None]:
    """``flash_attn_func`` of flash-attn 2 or else 4, or why there is none."""
    reasons = []
    for module in ("flash_attn", "flash_attn.cute"):
        try:
            # With version 4 alone, flash_attn is a namespace without the function: only importing it tells.
            return importlib.import_module(module).flash_attn_func, None
        # A broken installation raises anything from OSError to RuntimeError; the reason is shown.
        except Exception as error:
            reasons.append(f"{module}: {type(error).__name__}: {error}")
    return None, f"flash-attn is not installed ({'; '.join(reasons)}); see https://github.com/Dao-AILab/flash-attention"


def _flash_why_not(q: Tensor, dropout: float) -> str | None:
    if q.device.type != "cuda":
        return f"flash-attn runs on CUDA devices, and the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, the tensors are {q.dtype}"
    return _flash_function()[1]


def _flash(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], softmax_scale: float, dropout: float) -> Tensor:
    """flash-attn has no block-causal mask: one call a scale, over the keys up to its end."""
    function = _flash_function()[0]
    assert function is not None
    options: dict[str, Any] = {"softmax_scale": softmax_scale}
    if dropout:
        options["dropout_p"] = dropout
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    outs, begin = [], 0
    for length in lengths:
        end = begin + length
        out = function(q[:, begin:end], k[:, :end], v[:, :end], **options)
        outs.append(out[0] if isinstance(out, tuple) else out)
        begin = end
    return torch.cat(outs, dim=1).transpose(1, 2)


_PEERS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, float], str | None]]] = {
    "sdpa": (block_causal_attention_reference, _sdpa_why_not),
    "flex": (_flex, _flex_why_not),
    "flash": (_flash, _flash_why_not),
}
