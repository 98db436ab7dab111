"""Block-causal flash attention, backward: one kernel owns keys (dk, dv), one owns queries (dq); both recompute P.

After Dao, FlashAttention-2 (arXiv 2307.08691, algorithm 2). With S = f · r_j · (u_i . k_j) as in ``rows``,
P = exp(S - lse), delta = rowsum(grad_out · (out - v_bias)) and dS = P · (grad_out v^T - delta):

    dv = P^T grad_out,    d(r k)_j = f Σ_i dS_ij u_i,    du_i = f Σ_j dS_ij r_j k_j,    dlog_scale = Σ_i u_i . du_i

and the gradients of k and q from those of their unit rows. There are no atomics: every element is the sum of one
program, or of the partial sums of programs in a fixed order, so that gradients are deterministic.
"""

from __future__ import annotations

import torch

from .. import Case
from .backward_keys import backward_keys
from .backward_queries import backward_queries
from .rows import attention_rows


def block_causal_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_bias: torch.Tensor | None,
    v_bias: torch.Tensor | None,
    log_scale: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    norms: torch.Tensor | None,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    grad_q_bias: torch.Tensor | None,
    grad_v_bias: torch.Tensor | None,
    grad_log_scale: torch.Tensor | None,
    lengths: tuple[int, ...],
    softmax_scale: float,
) -> None:
    """Fill grad_q, grad_k, grad_v (B, H, L, D) and, unless None, the shares of each batch element in the others.

    Args:
        grad_out: (B, H, L, D), of the dtype of q; like the three gradients with any strides but for the last axis.
        out, lse, norms: what the forward pass filled; the inputs and the last two arguments as they were there.
        grad_q_bias, grad_v_bias: float32 (B, H, D), contiguous; grad_log_scale: float32 (B, H), contiguous.
    """
    query_norms, key_norms = (lse, lse) if norms is None else norms.unbind(0)
    u, delta = attention_rows(grad_out, q, q_bias, v_bias, out, None if log_scale is None else query_norms, grad_v_bias)
    inputs = (u, k, v, grad_out)
    backward_keys(inputs, log_scale, key_norms, lse, delta, grad_k, grad_v, lengths, softmax_scale)
    backward_queries(
        *(inputs, log_scale, query_norms, key_norms, lse, delta, grad_q, grad_q_bias, grad_log_scale),
        *(lengths, softmax_scale),
    )


CASES: list[Case] = []  # the two modules list their kernels'
