"""Block-causal attention, the training attention of VAR: a position sees every position of its own and earlier scales.

    out_i = Σ_j softmax_j(q_i · k_j · softmax_scale) v_j,    j < end(i), the end of the scale that i belongs to

(arXiv 2404.02905, section 3.2), computed tile by tile without a matrix of scores or a mask (flash attention,
arXiv 2205.14135). ``block_causal_attention_qkv`` starts from the qkv projection: it adds the biases of q and v, and
with a temperature it divides q and k by their L2 norms (scaled cosine attention, arXiv 2111.09883, section 3.2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varkern.ops._op import Op
from varkern.ops.attention.checks import check_lengths, check_projection, check_qkv, check_saved, scale_lengths
from varkern.ops.attention.launch import launch_backward, launch_forward
from varkern.ops.attention.reference import (
    Prologue,
    block_causal_attention_qkv_reference,
    block_causal_attention_reference,
)
from varkern.ops.backends import dense_last_axis, dtype_why_not, triton_kernels
from varkern.ops.checks import check_floats
from varkern.ops.flops import visible_pairs

__all__ = [
    "BlockCausal",
    "block_causal_attention",
    "block_causal_attention_qkv",
    "block_causal_attention_qkv_reference",
    "block_causal_attention_reference",
]

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class BlockCausal:
    """Which positions see which, in place of a dense mask: those of a scale see it and all earlier scales.

    lengths: the number of positions of each scale. attention: what computes it, a name of
    ``varkern.ops.attention.peers.ATTENTIONS``.
    """

    lengths: tuple[int, ...]
    attention: str = "varkern"


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return *torch.zeros(3, 1, 1, 5, 64, device=device, dtype=dtype), [1, 4], 0.125


def _example_qkv(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.zeros(1, 5, 3, 1, 64, device=device, dtype=dtype), None, None, None, [1, 4], 0.125


def _example_backward(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    q, k, v, *settings = _example(device, dtype)
    return q, q, k, v, q, _new_statistics(q, 1, 1, 5), *settings


def _example_qkv_backward(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    qkv, *rest = _example_qkv(device, dtype)
    out = qkv[:, :, 0].clone()
    return out, qkv, *rest[:3], out, _new_statistics(qkv, 1, 1, 5), *rest[3:]


_BACKENDS = ("triton", "cpu")
_INPUTS = "Tensor q, Tensor k, Tensor v"
_INPUTS_QKV = "Tensor qkv, Tensor? q_bias, Tensor? v_bias, Tensor? log_scale"
_SETTINGS = "int[] lengths, float softmax_scale"
# statistics (4, B, H, L), float64 for float64, else float32: what the backend keeps of each row for its backward pass.
# cpu: the largest score and the sum of exponentials relative to it; triton: the base-2 logarithm of the sum of
# exponentials in two parts and, with log_scale, the inverse norms of q and k; reference: the log of the sum.
_OUTPUTS = "(Tensor out, Tensor statistics)"
_OP = Op(f"block_causal_attention({_INPUTS}, {_SETTINGS}) -> {_OUTPUTS}", _BACKENDS, _example)
_BACKWARD = Op(
    f"block_causal_attention_backward(Tensor grad_out, {_INPUTS}, Tensor out, Tensor statistics, {_SETTINGS})"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _BACKENDS,
    _example_backward,
)
_OP.gradient(_BACKWARD)
_QKV = Op(f"block_causal_attention_qkv({_INPUTS_QKV}, {_SETTINGS}) -> {_OUTPUTS}", _BACKENDS, _example_qkv)
# Gradients of what is not there are empty tensors.
_QKV_BACKWARD = Op(
    f"block_causal_attention_qkv_backward(Tensor grad_out, {_INPUTS_QKV}, Tensor out, Tensor statistics, {_SETTINGS})"
    " -> (Tensor grad_qkv, Tensor grad_q_bias, Tensor grad_v_bias, Tensor grad_log_scale)",
    _BACKENDS,
    _example_qkv_backward,
)
_QKV.gradient(_QKV_BACKWARD)


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
    out = _OP(q, k, v, lengths, softmax_scale)[0]
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
    _QKV.check_types((qkv, q_bias, v_bias, log_scale, lengths, softmax_scale))
    check_projection(qkv, q_bias, v_bias, log_scale)
    lengths = scale_lengths(None, lengths, qkv.size(1))
    return _QKV(qkv, q_bias, v_bias, log_scale, lengths, softmax_scale)[0]


@_OP.check
def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], softmax_scale: float) -> None:
    check_qkv(q, k, v)
    check_lengths("block_causal_attention", lengths, q.size(2))


@_QKV.check
def _check_qkv(
    qkv: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    lengths: Sequence[int],
    softmax_scale: float,
) -> None:
    check_projection(qkv, q_bias, v_bias, log_scale)
    check_lengths("block_causal_attention_qkv", lengths, qkv.size(1))


@_BACKWARD.check
def _check_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, *settings: Any
) -> None:
    _check(q, k, v, *settings)
    check_saved("block_causal_attention_backward", q, q.shape, statistics, q.shape[:3], grad_out=grad_out, out=out)


@_QKV_BACKWARD.check
def _check_qkv_backward(grad_out: Tensor, qkv: Tensor, *rest: Any) -> None:
    out, statistics, lengths, softmax_scale = rest[3:]
    _check_qkv(qkv, rest[0], rest[1], rest[2], lengths, softmax_scale)
    B, L, _, H, D = qkv.shape
    op = "block_causal_attention_qkv_backward"
    check_saved(op, qkv, (B, L, H, D), statistics, (B, H, L), grad_out=grad_out, out=out)


@_OP.limits
@_QKV.limits
def _limits(backend: str, q: Tensor, *_: object) -> str | None:
    if backend == "triton" and q.size(-1) not in (dims := triton_kernels("attention").DIMS):
        return f"heads are {q.size(-1)} wide and its kernels take {', '.join(map(str, dims))}"
    return None if backend == "cpu" and q.dtype == torch.float64 else dtype_why_not(q)


@_BACKWARD.limits
@_QKV_BACKWARD.limits
def _limits_backward(backend: str, grad_out: Tensor, q: Tensor, *_: object) -> str | None:
    return _limits(backend, q)


def _empty_heads(like: Tensor) -> Tensor:
    """Uninitialised (B, H, L, D), dense, with L and H in memory in the order that they have in ``like``."""
    B, H, L, D = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((B, L, H, D)).transpose(1, 2)
    return like.new_empty((B, H, L, D))


def _new_statistics(q: Tensor, B: int, H: int, L: int) -> Tensor:
    return q.new_zeros((4, B, H, L), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


@_OP.empty
def _empty(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_heads(q), _new_statistics(q, *q.shape[:3])


@_QKV.empty
def _empty_qkv(qkv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, L, _3, H, D = qkv.shape
    return qkv.new_empty((B, L, H, D)), _new_statistics(qkv, B, H, L)


@_BACKWARD.empty
def _empty_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> Triple:
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


@_QKV_BACKWARD.empty
def _empty_qkv_backward(grad_out: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sums = (qkv.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in rest[:3])
    return qkv.new_empty(qkv.shape), *sums


@_OP.kernels
def _launch(
    backend: str, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    out, statistics = _empty(q)
    q, k, v = dense_last_axis(q), dense_last_axis(k), dense_last_axis(v)
    launch_forward(backend, (q, k, v), (None, None, None), out, statistics, tuple(lengths), softmax_scale)
    return out, statistics


@_BACKWARD.kernels
def _launch_backward(
    backend: str,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    lengths: Sequence[int],
    softmax_scale: float,
) -> Triple:
    grads = _empty_backward(grad_out, q, k, v)
    inputs = dense_last_axis(q), dense_last_axis(k), dense_last_axis(v)
    saved = dense_last_axis(grad_out), dense_last_axis(out), statistics.contiguous()
    nothing = (None, None, None)
    launch_backward(backend, saved, inputs, nothing, grads, nothing, tuple(lengths), softmax_scale)
    return grads


@_QKV.kernels
def _launch_qkv(
    backend: str,
    qkv: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    lengths: Sequence[int],
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    out, statistics = _empty_qkv(qkv)
    heads, prologue = _heads(qkv), (q_bias, v_bias, log_scale)
    launch_forward(backend, heads, prologue, out.transpose(1, 2), statistics, tuple(lengths), softmax_scale)
    return out, statistics


@_QKV_BACKWARD.kernels
def _launch_qkv_backward(
    backend: str,
    grad_out: Tensor,
    qkv: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    lengths: Sequence[int],
    softmax_scale: float,
) -> tuple[Tensor, ...]:
    B, _, _, H, D = qkv.shape
    prologue = (q_bias, v_bias, log_scale)
    grad_qkv = qkv.new_empty(qkv.shape)
    shares = _new_shares(prologue, (B, H, D), statistics.dtype)
    grad_out, out = dense_last_axis(grad_out), dense_last_axis(out)
    saved = grad_out.transpose(1, 2), out.transpose(1, 2), statistics.contiguous()
    launch_backward(backend, saved, _heads(qkv), prologue, _heads(grad_qkv), shares, tuple(lengths), softmax_scale)
    sums = (
        qkv.new_empty(0) if tensor is None or share is None else share.sum(0).to(tensor.dtype).view(tensor.shape)
        for tensor, share in zip(prologue, shares, strict=True)
    )
    return grad_qkv, *sums


for _op, _function in (
    (_OP, _launch),
    (_BACKWARD, _launch_backward),
    (_QKV, _launch_qkv),
    (_QKV_BACKWARD, _launch_qkv_backward),
):
    _op.reference(functools.partial(_function, "reference"))


@_OP.eager
def _eager(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], softmax_scale: float) -> tuple[Tensor]:
    return (block_causal_attention_reference(q, k, v, lengths, softmax_scale),)


@_QKV.eager
def _eager_qkv(qkv: Tensor, *rest: Any) -> tuple[Tensor]:
    return (block_causal_attention_qkv_reference(qkv, *rest),)


@_OP.flops
@_QKV.flops
def _flops(a: Any) -> int:
    B, H, D = (a.q[0], a.q[1], a.q[3]) if hasattr(a, "q") else (a.qkv[0], *a.qkv[3:])
    return 4 * B * H * D * visible_pairs(a.lengths)


@_BACKWARD.flops
@_QKV_BACKWARD.flops
def _flops_backward(a: Any) -> int:
    return _flops(a) * 5 // 2


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
