"""Block-causal attention, the training attention of VAR: a position sees every position of its own and earlier scales.

    out_i = Σ_j softmax_j(q_i · k_j · softmax_scale) v_j,    j < end(i), the end of the scale that i belongs to

(arXiv 2404.02905, section 3.2), computed tile by tile without a matrix of scores or a mask (flash attention,
arXiv 2205.14135). ``block_causal_attention_qkv`` starts from the qkv projection: it adds the biases of q and v, and
with a temperature it divides q and k by their L2 norms (scaled cosine attention, arXiv 2111.09883, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varkern.ops._library import (
    Op,
    autograd,
    check_floats,
    check_number,
    cpu_why_not,
    current_backend,
    dense_last_axis,
    dtype_why_not,
    fake,
    impl,
    library,
    needs_gradient,
    once_differentiable,
    reference_forced,
    triton_why_not,
)
from varkern.ops._library import kernels as triton_kernels
from varkern.ops.attention_checks import (
    check_backward,
    check_lengths,
    check_projection,
    check_qkv,
    check_qkv_backward,
    scale_lengths,
)
from varkern.ops.attention_launch import launch_backward, launch_forward
from varkern.ops.attention_reference import (
    Prologue,
    block_causal_attention_qkv_reference,
    block_causal_attention_reference,
)

__all__ = [
    "BlockCausal",
    "block_causal_attention",
    "block_causal_attention_qkv",
    "block_causal_attention_qkv_reference",
    "block_causal_attention_reference",
]


@dataclass(frozen=True)
class BlockCausal:
    """Which positions see which, in place of a dense mask: those of a scale see it and all earlier scales.

    lengths: the number of positions of each scale. attention: what computes it, a name of
    ``varkern.ops.attention_peers.ATTENTIONS``.
    """

    lengths: tuple[int, ...]
    attention: str = "varkern"


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patch_nums: Sequence[int | Sequence[int]] | None = None,
    softmax_scale: float | None = None,
    *,
    lengths: Sequence[int] | None = None,
    layout: str = "BHLD",
) -> Tensor:
    """Softmax attention of each position over the positions of its own and earlier scales (module docstring).

    Args:
        q, k, v: (B, H, L, D), or (B, L, H, D) with ``layout="BLHD"``; one shape, dtype and device, any strides of B, H
            and L (a strided last axis is copied). float32, float16, bfloat16; on the CPU float64 too.
        patch_nums: the scales, coarse to fine: sides of square maps, or (height, width); L positions together.
        softmax_scale: of the scores, 1 / sqrt(D) by default.
        lengths: in place of patch_nums, the number of positions of each scale.

    Returns:
        Shape, dtype and layout of q. Accumulation is float32 (float64 for float64); differentiable once, with
        deterministic gradients.

    Raises ``ValueError`` for shapes, dtypes, devices or scales that do not fit, ``RuntimeError`` where the backend
    asked for cannot serve.
    """
    if layout not in ("BHLD", "BLHD"):
        raise ValueError(f"block_causal_attention: layout is {layout!r}, give 'BHLD' or 'BLHD'.")
    check_floats("block_causal_attention", ("q", "k", "v"), (q, k, v))
    if layout == "BLHD":
        q, k, v = (tensor.transpose(1, 2) if tensor.dim() == 4 else tensor for tensor in (q, k, v))
    check_qkv(q, k, v)
    lengths = scale_lengths(patch_nums, lengths, q.size(2))
    softmax_scale = q.size(3) ** -0.5 if softmax_scale is None else softmax_scale
    check_number("block_causal_attention", "softmax_scale", softmax_scale)
    if reference_forced():
        out = block_causal_attention_reference(q, k, v, lengths, softmax_scale)
    elif needs_gradient(q, k, v):
        out = _Attention.apply(q, k, v, lengths, softmax_scale, current_backend())[0]
    else:
        out = torch.ops.varkern.block_causal_attention(q, k, v, lengths, softmax_scale, current_backend())[0]
    return out.transpose(1, 2) if layout == "BLHD" else out


def block_causal_attention_qkv(
    qkv: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    lengths: Sequence[int],
    softmax_scale: float,
) -> Tensor:
    """Block-causal attention from the qkv projection: biases, L2 norms and temperature in the same kernels.

    Args:
        qkv: (B, L, 3, H, D), the projection without its bias, as ``linear(x).view(B, L, 3, H, D)``; any strides but
            for D. float32, float16, bfloat16; on the CPU float64 too.
        q_bias, v_bias: (H * D,), added to q and v; or None.
        log_scale: log of each head's temperature, H elements of any shape: q and k are divided by their L2 norms
            (at least 1e-12) and q is multiplied by ``exp(min(log_scale, log 100))``. None: neither.
        lengths: the number of positions of each scale, L together.
        softmax_scale: of the scores.

    Returns:
        (B, L, H, D), contiguous, of qkv's dtype. Accumulation is float32 (float64 for float64). Differentiable once in
        qkv, the biases and log_scale; the gradients are deterministic.

    Raises ``ValueError`` for shapes, dtypes, devices or scales that do not fit, ``RuntimeError`` where the backend
    asked for cannot serve.
    """
    check_projection(qkv, q_bias, v_bias, log_scale)
    lengths = scale_lengths(None, lengths, qkv.size(1))
    check_number("block_causal_attention_qkv", "softmax_scale", softmax_scale)
    if reference_forced():
        return block_causal_attention_qkv_reference(qkv, q_bias, v_bias, log_scale, lengths, softmax_scale)
    arguments = (qkv, q_bias, v_bias, log_scale, lengths, softmax_scale, current_backend())
    if needs_gradient(*(tensor for tensor in arguments[:4] if tensor is not None)):
        return _AttentionQKV.apply(*arguments)[0]
    return torch.ops.varkern.block_causal_attention_qkv(*arguments)[0]


def _why_not_cpu(q: Tensor, *_: object) -> str | None:
    return cpu_why_not(q) or (None if q.dtype == torch.float64 else dtype_why_not(q))


def _why_not_triton(q: Tensor, *_: object) -> str | None:
    reason = triton_why_not(q) or dtype_why_not(q)
    if reason is None and q.size(-1) not in (dims := triton_kernels("attention").DIMS):
        reason = f"heads are {q.size(-1)} wide and its kernels take {', '.join(map(str, dims))}"
    return reason


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.zeros(1, 1, 5, 64, device=device, dtype=dtype),) * 3


def _example_qkv(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.zeros(1, 5, 3, 1, 64, device=device, dtype=dtype),)


_BACKENDS = {"triton": _why_not_triton, "cpu": _why_not_cpu}
_OP = Op("block_causal_attention", _BACKENDS, _example)
_OP_QKV = Op("block_causal_attention_qkv", _BACKENDS, _example_qkv)

_INPUTS = "Tensor q, Tensor k, Tensor v"
_INPUTS_QKV = "Tensor qkv, Tensor? q_bias, Tensor? v_bias, Tensor? log_scale"
_SETTINGS = "int[] lengths, float softmax_scale, str? backend"
# statistics (4, B, H, L), float64 for float64, else float32: what the backend keeps of each row for its backward pass.
# cpu: the largest score and the sum of exponentials relative to it; triton: the base-2 logarithm of the sum of
# exponentials in two parts and, with log_scale, the inverse norms of q and k; reference: the log of the sum.
library.define(f"block_causal_attention({_INPUTS}, {_SETTINGS}) -> (Tensor out, Tensor statistics)")
library.define(
    f"block_causal_attention_backward(Tensor grad_out, {_INPUTS}, Tensor out, Tensor statistics, {_SETTINGS})"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)"
)
library.define(f"block_causal_attention_qkv({_INPUTS_QKV}, {_SETTINGS}) -> (Tensor out, Tensor statistics)")
# Gradients of what is not there are empty tensors.
library.define(
    f"block_causal_attention_qkv_backward(Tensor grad_out, {_INPUTS_QKV}, Tensor out, Tensor statistics, {_SETTINGS})"
    " -> (Tensor grad_qkv, Tensor grad_q_bias, Tensor grad_v_bias, Tensor grad_log_scale)"
)


def _empty_heads(like: Tensor) -> Tensor:
    """Uninitialised (B, H, L, D), dense, with L and H in memory in the order that they have in ``like``."""
    B, H, L, D = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((B, L, H, D)).transpose(1, 2)
    return like.new_empty((B, H, L, D))


def _new_statistics(q: Tensor, B: int, H: int, L: int) -> Tensor:
    return q.new_zeros((4, B, H, L), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


@impl("block_causal_attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], softmax_scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    check_qkv(q, k, v)
    check_lengths("block_causal_attention", lengths, q.size(2))
    backend = _OP.choose(backend, q.device.type, q)
    out, statistics = _empty_heads(q), _new_statistics(q, *q.shape[:3])
    q, k, v = dense_last_axis(q), dense_last_axis(k), dense_last_axis(v)
    launch_forward(backend, (q, k, v), (None, None, None), out, statistics, tuple(lengths), softmax_scale)
    return out, statistics


@impl("block_causal_attention_backward")
def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    lengths: Sequence[int],
    softmax_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad_out, q, k, v, out, statistics, lengths)
    backend = _OP.choose(backend, q.device.type, q)
    grads = _empty_heads(q), _empty_heads(k), _empty_heads(v)
    inputs = dense_last_axis(q), dense_last_axis(k), dense_last_axis(v)
    saved = dense_last_axis(grad_out), dense_last_axis(out), statistics.contiguous()
    launch_backward(
        backend, saved, inputs, (None, None, None), grads, (None, None, None), tuple(lengths), softmax_scale
    )
    return grads


@impl("block_causal_attention_qkv")
def _attention_qkv(
    qkv: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    lengths: Sequence[int],
    softmax_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    check_projection(qkv, q_bias, v_bias, log_scale)
    check_lengths("block_causal_attention_qkv", lengths, qkv.size(1))
    backend = _OP_QKV.choose(backend, qkv.device.type, qkv)
    B, L, _, H, D = qkv.shape
    out, statistics = qkv.new_empty((B, L, H, D)), _new_statistics(qkv, B, H, L)
    heads, prologue = _heads(qkv), (q_bias, v_bias, log_scale)
    launch_forward(backend, heads, prologue, out.transpose(1, 2), statistics, tuple(lengths), softmax_scale)
    return out, statistics


@impl("block_causal_attention_qkv_backward")
def _attention_qkv_backward(
    grad_out: Tensor,
    qkv: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    lengths: Sequence[int],
    softmax_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_qkv_backward(grad_out, qkv, q_bias, v_bias, log_scale, out, statistics, lengths)
    backend = _OP_QKV.choose(backend, qkv.device.type, qkv)
    B, _, _, H, D = qkv.shape
    prologue = (q_bias, v_bias, log_scale)
    grad_qkv = qkv.new_empty(qkv.shape)
    shares = _new_shares(prologue, (B, H, D), statistics.dtype)
    grad_out, out = dense_last_axis(grad_out), dense_last_axis(out)
    saved = grad_out.transpose(1, 2), out.transpose(1, 2), statistics.contiguous()
    launch_backward(backend, saved, _heads(qkv), prologue, _heads(grad_qkv), shares, tuple(lengths), softmax_scale)
    sums = [
        qkv.new_empty(0) if tensor is None or share is None else share.sum(0).to(tensor.dtype).view(tensor.shape)
        for tensor, share in zip(prologue, shares, strict=True)
    ]
    return grad_qkv, sums[0], sums[1], sums[2]


def _new_shares(prologue: Prologue, shape: tuple[int, int, int], dtype: torch.dtype) -> Prologue:
    """For each tensor of the prologue, what each batch element's part of its gradient is written to."""
    q_bias, v_bias, log_scale = prologue
    return (
        None if q_bias is None else q_bias.new_empty(shape, dtype=dtype),
        None if v_bias is None else v_bias.new_empty(shape, dtype=dtype),
        None if log_scale is None else log_scale.new_empty(shape[:2], dtype=dtype),
    )


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, H, L, D) of (B, L, 3, H, D), views unless the last axis is strided."""
    q, k, v = dense_last_axis(qkv).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


@fake("block_causal_attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *_: object) -> tuple[Tensor, Tensor]:
    check_qkv(q, k, v)
    check_lengths("block_causal_attention", lengths, q.size(2))
    return _empty_heads(q), _new_statistics(q, *q.shape[:3])


@fake("block_causal_attention_backward")
def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    lengths: Sequence[int],
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad_out, q, k, v, out, statistics, lengths)
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


@fake("block_causal_attention_qkv")
def _fake_qkv(
    qkv: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    lengths: Sequence[int],
    *settings: object,
) -> tuple[Tensor, Tensor]:
    check_projection(qkv, q_bias, v_bias, log_scale)
    B, L, _, H, D = qkv.shape
    check_lengths("block_causal_attention_qkv", lengths, L)
    return qkv.new_empty((B, L, H, D)), _new_statistics(qkv, B, H, L)


@fake("block_causal_attention_qkv_backward")
def _fake_qkv_backward(
    grad_out: Tensor,
    qkv: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    lengths: Sequence[int],
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_qkv_backward(grad_out, qkv, q_bias, v_bias, log_scale, out, statistics, lengths)
    prologue = (q_bias, v_bias, log_scale)
    sums = [qkv.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in prologue]
    return qkv.new_empty(qkv.shape), sums[0], sums[1], sums[2]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], softmax_scale: float, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        out, statistics = torch.ops.varkern.block_causal_attention(q, k, v, lengths, softmax_scale, backend)
        ctx.save_for_backward(q, k, v, out, statistics)
        ctx.settings = lengths, softmax_scale, backend
        ctx.mark_non_differentiable(statistics)
        return out, statistics

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, statistics = ctx.saved_tensors
        backward = torch.ops.varkern.block_causal_attention_backward
        grads = once_differentiable(
            "block_causal_attention",
            (grad_out, q, k, v),
            lambda: backward(grad_out, q, k, v, out, statistics, *ctx.settings),
        )
        return (*grads, None, None, None)


class _AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_bias: Tensor | None,
        v_bias: Tensor | None,
        log_scale: Tensor | None,
        lengths: Sequence[int],
        softmax_scale: float,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        settings = lengths, softmax_scale, backend
        out, statistics = torch.ops.varkern.block_causal_attention_qkv(qkv, q_bias, v_bias, log_scale, *settings)
        ctx.save_for_backward(qkv, q_bias, v_bias, log_scale, out, statistics)
        ctx.settings = settings
        ctx.mark_non_differentiable(statistics)
        return out, statistics

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, statistics = ctx.saved_tensors
        backward = torch.ops.varkern.block_causal_attention_qkv_backward
        grads = once_differentiable(
            "block_causal_attention_qkv",
            [grad_out, *(tensor for tensor in inputs if tensor is not None)],
            lambda: backward(grad_out, *inputs, out, statistics, *ctx.settings),
        )
        present = (None if tensor is None else grad for tensor, grad in zip(inputs, grads, strict=True))
        return (*present, None, None, None)


autograd("block_causal_attention", _Attention.apply)
autograd("block_causal_attention_qkv", _AttentionQKV.apply)
