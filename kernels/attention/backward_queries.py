"""Block-causal attention, backward, the kernel that owns queries: grad_q (see ``backward``)."""

# mypy: disallow-untyped-defs=False
# (Triton gives the parameters of its functions their types.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import Case
from .rows import (
    LOG2_E,
    MAX_INVERSE_NORM,
    MAX_LOG_TEMPERATURE,
    row_pointers,
    score_factor,
    strides,
    unproject,
)
from .tiles import Config, Configs, cases, choose, query_tiles, scale_bounds, to_device

CONFIGS: Configs = {
    (2, 32): Config(128, 64, num_warps=8, num_stages=3),
    (2, 64): Config(128, 32, num_warps=8, num_stages=3),
    (2, 128): Config(128, 32, num_warps=8, num_stages=3),
    (4, 32): Config(64, 32, num_warps=8, num_stages=2),
    (4, 64): Config(64, 16, num_warps=8, num_stages=2, max_registers=128),
    (4, 128): Config(32, 16, num_warps=8, num_stages=2),
}
HOPPER: Configs = {}  # at most 128 registers a thread as it is: two programs share a multiprocessor


@triton.jit
def _push(
    b_grad_u,
    b_u,
    b_grad_out,
    b_lse,
    b_rest,
    b_delta,
    p_k_tile,
    p_v_tile,
    p_norms_tile,
    b_end,
    i_n,
    last,
    factor,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What one tile of keys adds to grad_u / f of a tile of queries."""
    if MASKED:
        m_n = i_n < last
        b_k = tl.load(p_k_tile, mask=m_n[:, None], other=0.0)
        b_v = tl.load(p_v_tile, mask=m_n[:, None], other=0.0)
    else:
        b_k = tl.load(p_k_tile)
        b_v = tl.load(p_v_tile)
    b_scores = tl.dot(b_u, tl.trans(b_k), input_precision="ieee")
    if NORMALIZE:
        if MASKED:
            b_norms = tl.load(p_norms_tile, mask=m_n, other=0.0)
        else:
            b_norms = tl.load(p_norms_tile)
        b_scores = b_scores * (b_norms * factor)[None, :] - b_lse[:, None]
    else:
        b_scores = b_scores * factor - b_lse[:, None]
    if b_k.dtype == tl.float32:
        b_scores -= b_rest[:, None]
    b_p = tl.exp2(b_scores)
    if MASKED:
        b_p = tl.where(i_n[None, :] < b_end[:, None], b_p, 0.0)
    b_grad_p = tl.dot(b_grad_out, tl.trans(b_v), input_precision="ieee")
    b_grad_s = b_p * (b_grad_p - b_delta[:, None])
    if NORMALIZE:
        if b_k.dtype == tl.float16:
            # The norm is at its floor in float16 where the key is zero: it adds nothing, but 1e12 would not fit.
            b_norms = tl.where(b_norms < MAX_INVERSE_NORM, b_norms, 0.0)
        b_grad_s *= b_norms[None, :]
    return tl.dot(b_grad_s.to(b_k.dtype), b_k, b_grad_u, input_precision="ieee")


@triton.jit(do_not_specialize=["tiles", "H", "L"])
def attention_backward_queries_kernel(
    p_u,
    p_k,
    p_v,
    p_grad_out,
    p_log_scale,
    p_query_norms,
    p_key_norms,
    p_lse,
    p_delta,
    p_grad_q,
    p_partial_bias,
    p_partial_scale,
    p_bounds,
    p_tiles,
    tiles,
    H,
    L,
    u_stride_b,
    u_stride_h,
    u_stride_l,
    k_stride_b,
    k_stride_h,
    k_stride_l,
    v_stride_b,
    v_stride_h,
    v_stride_l,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_l,
    grad_q_stride_b,
    grad_q_stride_h,
    grad_q_stride_l,
    softmax_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GRAD_Q_BIAS: tl.constexpr,
    GRAD_LOG_SCALE: tl.constexpr,
):
    """grad_q (B, H, L, D) for one tile of queries, which sees the keys below the end of its scale.

    Also writes the tile's shares of the gradients of q_bias and log_scale, partial (B·H, tiles, D) and (B·H, tiles).
    u, delta: of ``attention_rows_kernel``; the rest as in the forward kernel.
    """
    i_tile = tl.program_id(0) % tiles
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    BH = (tl.num_programs(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    start, stop = tl.load(p_tiles + i_tile * 2), tl.load(p_tiles + i_tile * 2 + 1)
    i_m = start + tl.arange(0, BLOCK_M)
    m_m = i_m < stop
    b_end = tl.load(p_bounds + L + tl.minimum(i_m, stop - 1))
    whole = tl.load(p_bounds + L + start) // BLOCK_N * BLOCK_N
    last = tl.load(p_bounds + L + stop - 1)

    p_rows = row_pointers(p_u, i_b, i_h, i_m, u_stride_b, u_stride_h, u_stride_l, D)
    b_u = tl.load(p_rows, mask=m_m[:, None], other=0.0)
    p_rows = row_pointers(p_grad_out, i_b, i_h, i_m, grad_out_stride_b, grad_out_stride_h, grad_out_stride_l, D)
    b_grad_out = tl.load(p_rows, mask=m_m[:, None], other=0.0)
    p_lse += i_bh * L + i_m
    b_lse = tl.load(p_lse, mask=m_m, other=float("inf"))  # P is zero past the tile
    b_rest = tl.load(p_lse + BH * L, mask=m_m, other=0.0)
    b_delta = tl.load(p_delta + i_bh * L + i_m, mask=m_m, other=0.0)
    if NORMALIZE:
        factor = score_factor(p_log_scale, i_h, softmax_scale)
    else:
        factor = softmax_scale

    b_grad_u = tl.zeros((BLOCK_M, D), tl.float32)
    i_n = tl.arange(0, BLOCK_N)
    k_stride_l, v_stride_l = tl.cast(k_stride_l, tl.int64), tl.cast(v_stride_l, tl.int64)
    p_k_tile = row_pointers(p_k, i_b, i_h, i_n, k_stride_b, k_stride_h, k_stride_l, D)
    p_v_tile = row_pointers(p_v, i_b, i_h, i_n, v_stride_b, v_stride_h, v_stride_l, D)
    p_norms_tile = p_key_norms + i_bh * L + i_n
    for n in range(0, whole, BLOCK_N):
        b_grad_u = _push(
            b_grad_u,
            b_u,
            b_grad_out,
            b_lse,
            b_rest,
            b_delta,
            p_k_tile + n * k_stride_l,
            p_v_tile + n * v_stride_l,
            p_norms_tile + n,
            b_end,
            n + i_n,
            last,
            factor * LOG2_E,
            NORMALIZE,
            False,
        )
    for n in range(whole, last, BLOCK_N):
        b_grad_u = _push(
            b_grad_u,
            b_u,
            b_grad_out,
            b_lse,
            b_rest,
            b_delta,
            p_k_tile + n * k_stride_l,
            p_v_tile + n * v_stride_l,
            p_norms_tile + n,
            b_end,
            n + i_n,
            last,
            factor * LOG2_E,
            NORMALIZE,
            True,
        )

    b_grad_q = b_grad_u * factor
    i_tile += i_bh * tiles
    if NORMALIZE:
        # Read again behind a barrier, which the compiler does not look across: no registers hold it through the loops.
        tl.debug_barrier()
        p_rows = row_pointers(p_u, i_b, i_h, i_m, u_stride_b, u_stride_h, u_stride_l, D)
        b_unit = tl.load(p_rows, mask=m_m[:, None], other=0.0).to(tl.float32)
        if GRAD_LOG_SCALE:
            # As of torch.clamp_max: the gradient passes where the bound is not exceeded.
            passes = tl.load(p_log_scale + i_h).to(tl.float32) <= MAX_LOG_TEMPERATURE
            tl.store(p_partial_scale + i_tile, tl.where(passes, tl.sum(b_grad_q * b_unit), 0.0))
        b_inverse = tl.load(p_query_norms + i_bh * L + i_m, mask=m_m, other=0.0)
        b_grad_q = unproject(b_grad_q, b_unit, b_inverse)
    if GRAD_Q_BIAS:
        tl.store(p_partial_bias + i_tile * D + tl.arange(0, D), tl.sum(b_grad_q, 0))
    p_rows = row_pointers(p_grad_q, i_b, i_h, i_m, grad_q_stride_b, grad_q_stride_h, grad_q_stride_l, D)
    tl.store(p_rows, b_grad_q.to(p_grad_q.dtype.element_ty), mask=m_m[:, None])


def backward_queries(
    inputs: tuple[torch.Tensor, ...],
    log_scale: torch.Tensor | None,
    query_norms: torch.Tensor,
    key_norms: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_q: torch.Tensor,
    grad_q_bias: torch.Tensor | None,
    grad_log_scale: torch.Tensor | None,
    lengths: tuple[int, ...],
    softmax_scale: float,
) -> None:
    """Fill grad_q and, unless None, grad_q_bias and grad_log_scale. inputs: u, k, v, grad_out.

    The norms are read with log_scale alone.
    """
    u = inputs[0]
    B, H, L, D = u.shape
    config = choose(CONFIGS, HOPPER, u)
    tiles = to_device(query_tiles(lengths, config.BLOCK_M, config.BLOCK_N), u.device)
    partial_bias = partial_scale = delta
    if grad_q_bias is not None:
        partial_bias = u.new_empty((B, H, len(tiles), D), dtype=torch.float32)
    if grad_log_scale is not None:
        partial_scale = u.new_empty((B, H, len(tiles)), dtype=torch.float32)
    attention_backward_queries_kernel[(B * H * len(tiles),)](
        *(*inputs, delta if log_scale is None else log_scale, query_norms, key_norms, lse, delta),
        *(grad_q, partial_bias, partial_scale, scale_bounds(lengths, u.device), tiles, len(tiles), H, L),
        *(stride for tensor in (*inputs, grad_q) for stride in tensor.stride()[:3]),
        float(softmax_scale),
        D=D,
        NORMALIZE=log_scale is not None,
        GRAD_Q_BIAS=grad_q_bias is not None,
        GRAD_LOG_SCALE=grad_log_scale is not None,
        enable_fp_fusion=True,
        **config.meta(),
    )
    if grad_q_bias is not None:
        torch.sum(partial_bias, 2, out=grad_q_bias)
    if grad_log_scale is not None:
        torch.sum(partial_scale, 2, out=grad_log_scale)


def _case(dtype: str, D: int, prologue: bool, config: Config) -> Case:
    names = ("u", "k", "v", "grad_out", "grad_q")
    pointers = {f"p_{name}": f"*{dtype}" for name in names}
    floats = ("log_scale", "query_norms", "key_norms", "lse", "delta", "partial_bias", "partial_scale")
    pointers |= {f"p_{name}": "*fp32" for name in floats}
    pointers |= {"p_bounds": "*i32", "p_tiles": "*i32"}
    return Case(
        attention_backward_queries_kernel,
        pointers | {"tiles": "i32", "H": "i32", "L": "i32"} | strides(*names) | {"softmax_scale": "fp32"},
        {"D": D, "NORMALIZE": prologue, "GRAD_Q_BIAS": prologue, "GRAD_LOG_SCALE": prologue} | config.blocks(),
        config.num_warps,
        aligned=(*pointers, *strides(*names)),
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )


CASES = cases(CONFIGS, HOPPER, _case)
