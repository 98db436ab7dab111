"""What block-causal attention refuses, each with one sentence."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from varkern.ops.checks import check_device, check_floats


def scale_lengths(
    patch_nums: Sequence[int | Sequence[int]] | None, lengths: Sequence[int] | None, L: int
) -> tuple[int, ...]:
    """The number of positions of each scale; raises ``ValueError`` unless they are positive and sum to L."""
    if (patch_nums is None) == (lengths is None):
        raise ValueError("block_causal_attention: give patch_nums or lengths, one of them.")
    try:
        if lengths is None:
            sides = [p if isinstance(p, Sequence) else (p, p) for p in patch_nums or ()]
            lengths = [operator.index(h) * operator.index(w) for h, w in sides]
        lengths = tuple(operator.index(n) for n in lengths)
    except (TypeError, ValueError):
        name, value = ("lengths", lengths) if patch_nums is None else ("patch_nums", patch_nums)
        raise TypeError(f"block_causal_attention: {name} is {value!r}, give a sequence of integers.") from None
    check_lengths("block_causal_attention", lengths, L)
    return lengths


def check_lengths(op: str, lengths: Sequence[int], L: int) -> None:
    if not lengths or min(lengths) < 1 or sum(lengths) != L:
        raise ValueError(
            f"{op}: with these lengths the scales have {tuple(lengths)} positions, give positive numbers that sum to "
            f"L = {L}."
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or 0 in q.shape[1:]:
        raise ValueError(f"block_causal_attention: q has shape {tuple(q.shape)}, give (B, H, L, D) with H, L, D > 0.")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"block_causal_attention: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} and q "
                f"{q.dtype} {tuple(q.shape)} on {q.device}, give them one dtype, shape and device."
            )


def check_projection(qkv: Tensor, q_bias: Tensor | None, v_bias: Tensor | None, log_scale: Tensor | None) -> None:
    if qkv.dim() != 5 or qkv.size(2) != 3 or 0 in qkv.shape[1:]:
        raise ValueError(
            f"block_causal_attention_qkv: qkv has shape {tuple(qkv.shape)}, give (B, L, 3, H, D) with L, H, D > 0."
        )
    H, D = qkv.shape[3:]
    for name, tensor, numel in (("q_bias", q_bias, H * D), ("v_bias", v_bias, H * D), ("log_scale", log_scale, H)):
        if tensor is None:
            continue
        if tensor.numel() != numel:
            raise ValueError(
                f"block_causal_attention_qkv: {name} has shape {tuple(tensor.shape)}, give {numel} elements for "
                f"{H} heads of {D}."
            )
    check_device("block_causal_attention_qkv", "qkv", qkv, q_bias=q_bias, v_bias=v_bias, log_scale=log_scale)


def check_saved(
    op: str, like: Tensor, shape: Sequence[int], statistics: Tensor, rows: Sequence[int], **saved: Tensor
) -> None:
    """What a backward pass gets besides the inputs: grad_out and out of a shape, and statistics (4, B, H, L)."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    check_floats(op, (*saved, "statistics"), (*saved.values(), statistics))
    expected = [(name, tensor, tuple(shape), like.dtype) for name, tensor in saved.items()]
    for name, tensor, size, dtype in (*expected, ("statistics", statistics, (4, *rows), wide)):
        if tuple(tensor.shape) != size or tensor.dtype != dtype or tensor.device != like.device:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, give {dtype} {size} on "
                f"{like.device}."
            )
