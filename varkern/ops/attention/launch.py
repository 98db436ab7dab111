"""The launches of block-causal attention: one forward and one backward pass on a chosen backend."""

from __future__ import annotations

import torch
from torch import Tensor

from varkern._kept import kept
from varkern.ops.attention.reference import Prologue, backward_eager, forward_eager
from varkern.ops.backends import DTYPE_CODES, extension, pointer, triton_kernels

_CODES = {**DTYPE_CODES, torch.float64: 3}


@kept
def _lengths(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int64, device="cpu")


def _rows(*tensors: Tensor) -> list[int]:
    return [number for t in tensors for number in (t.data_ptr(), *t.stride()[:3])]


def _plain(prologue: Prologue, H: int, dtype: torch.dtype) -> Prologue:
    """Biases (H, D) and log_scale (H,), contiguous, as the CPU kernels take them."""
    q_bias, v_bias, log_scale = (
        None if tensor is None else tensor.detach().to(dtype).reshape(H, -1).contiguous() for tensor in prologue
    )
    return q_bias, v_bias, log_scale


def launch_forward(
    backend: str,
    inputs: tuple[Tensor, Tensor, Tensor],
    prologue: Prologue,
    out: Tensor,
    statistics: Tensor,
    lengths: tuple[int, ...],
    softmax_scale: float,
) -> None:
    """Fill out (B, H, L, D) and statistics (4, B, H, L) from q, k, v (B, H, L, D), whose last axes are contiguous."""
    if out.numel() == 0:
        return
    first, second = statistics[0], statistics[1]
    if backend == "reference":
        forward_eager(inputs, prologue, out, first, lengths, softmax_scale)
        return
    q = inputs[0]
    B, H, L, D = q.shape
    if backend == "triton":
        triton_kernels("attention").block_causal_attention_forward(
            *(*inputs, *_shaped(prologue, H), out, statistics[:2], _norms(prologue, statistics)),
            *(lengths, softmax_scale),
        )
        return
    prologue, table = _plain(prologue, H, statistics.dtype), _lengths(lengths)
    extension(backend).block_causal_attention_forward(
        *_rows(*inputs),
        *map(pointer, prologue),
        *(table.data_ptr(), len(lengths), B, H, L, D, L, _CODES[q.dtype], softmax_scale),
        *(*_rows(out), first.data_ptr(), second.data_ptr()),
    )


def launch_backward(
    backend: str,
    saved: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    prologue: Prologue,
    grads: tuple[Tensor, Tensor, Tensor],
    shares: Prologue,
    lengths: tuple[int, ...],
    softmax_scale: float,
) -> None:
    """Fill the gradients of q, k and v, and for each batch element its share of those of the prologue.

    saved: grad_out, out (B, H, L, D) and statistics; shares: (B, H, D), (B, H, D), (B, H), None as in the prologue.
    """
    grad_out, out, statistics = saved
    if grad_out.numel() == 0:
        return
    first, second = statistics[0], statistics[1]
    if backend == "reference":
        backward_eager((grad_out, out, first), inputs, prologue, grads, shares, lengths, softmax_scale)
        return
    q = inputs[0]
    B, H, L, D = q.shape
    if backend == "triton":
        triton_kernels("attention").block_causal_attention_backward(
            *(grad_out, *inputs, *_shaped(prologue, H), out, statistics[:2], _norms(prologue, statistics)),
            *(*grads, *shares, lengths, softmax_scale),
        )
        return
    prologue, table = _plain(prologue, H, statistics.dtype), _lengths(lengths)
    extension(backend).block_causal_attention_backward(
        *_rows(*inputs),
        *map(pointer, prologue),
        *(table.data_ptr(), len(lengths), B, H, L, D, L, _CODES[q.dtype], softmax_scale),
        *(*_rows(grad_out, out), first.data_ptr(), second.data_ptr()),
        *_rows(*grads),
        *map(pointer, shares),
    )


def _shaped(prologue: Prologue, H: int) -> Prologue:
    """Biases (H, D) and log_scale (H,) in their own dtypes, contiguous, as the Triton kernels take them."""
    q_bias, v_bias, log_scale = (None if tensor is None else tensor.reshape(H, -1).contiguous() for tensor in prologue)
    return q_bias, v_bias, None if log_scale is None else log_scale.view(H)


def _norms(prologue: Prologue, statistics: Tensor) -> Tensor | None:
    return None if prologue[2] is None else statistics[2:]
