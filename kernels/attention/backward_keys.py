"""Block-causal attention, backward, the kernel that owns keys: grad_k and grad_v (see ``backward``)."""

# mypy: disallow-untyped-defs=False
# (Triton gives the parameters of its functions their types.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import Case
from .rows import LOG2_E, row_pointers, score_factor, strides, unproject
from .tiles import Config, Configs, cases, choose, key_tiles, scale_bounds, to_device

CONFIGS: Configs = {
    (2, 32): Config(32, 128, num_warps=8, num_stages=3, max_registers=168),
    (2, 64): Config(32, 64, num_warps=4, num_stages=2),
    (2, 128): Config(32, 64, num_warps=8, num_stages=3, max_registers=248),
    (4, 32): Config(32, 32, num_warps=8, num_stages=2),
    (4, 64): Config(32, 32, num_warps=8, num_stages=2),
    (4, 128): Config(16, 32, num_warps=8, num_stages=2),
}
# Two programs share a multiprocessor, as in the forward kernel. Triton 3.6 spills with 64 rows of queries, and above
# with 128 of keys; 3.9 with neither.
HOPPER: Configs = {(2, 64): Config(32, 64, num_warps=4, num_stages=3)}


@triton.jit
def _pull(
    b_grad_k,
    b_grad_v,
    b_k,
    b_v,
    p_u_tile,
    p_grad_out_tile,
    p_lse_tile,
    p_rest_tile,
    p_delta_tile,
    b_begin,
    i_m,
    L,
    b_factor,
    MASKED: tl.constexpr,
):
    """What one tile of queries adds to (grad_k, grad_v) of a tile of keys; scores are transposed, keys by queries."""
    m_m = i_m < L
    b_u = tl.load(p_u_tile, mask=m_m[:, None], other=0.0)
    b_grad_out = tl.load(p_grad_out_tile, mask=m_m[:, None], other=0.0)
    b_lse = tl.load(p_lse_tile, mask=m_m, other=float("inf"))  # P is zero past the last query
    b_delta = tl.load(p_delta_tile, mask=m_m, other=0.0)
    b_scores = tl.dot(b_k, tl.trans(b_u), input_precision="ieee") * b_factor - b_lse[None, :]
    if b_k.dtype == tl.float32:  # which products round less than lse was
        b_scores -= tl.load(p_rest_tile, mask=m_m, other=0.0)[None, :]
    b_p = tl.exp2(b_scores)
    if MASKED:
        b_p = tl.where(b_begin[:, None] <= i_m[None, :], b_p, 0.0)
    b_grad_v = tl.dot(b_p.to(b_grad_out.dtype), b_grad_out, b_grad_v, input_precision="ieee")
    b_grad_p = tl.dot(b_v, tl.trans(b_grad_out), input_precision="ieee")
    b_grad_s = b_p * (b_grad_p - b_delta[None, :])
    b_grad_k = tl.dot(b_grad_s.to(b_u.dtype), b_u, b_grad_k, input_precision="ieee")
    return b_grad_k, b_grad_v


@triton.jit(do_not_specialize=["tiles", "H", "L"])
def attention_backward_keys_kernel(
    p_u,
    p_k,
    p_v,
    p_grad_out,
    p_log_scale,
    p_key_norms,
    p_lse,
    p_delta,
    p_grad_k,
    p_grad_v,
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
    grad_k_stride_b,
    grad_k_stride_h,
    grad_k_stride_l,
    grad_v_stride_b,
    grad_v_stride_h,
    grad_v_stride_l,
    softmax_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """grad_k and grad_v (B, H, L, D) for one tile of keys, which queries from the begin of a key's scale on see.

    u, delta: of ``attention_rows_kernel``; the rest as in the forward kernel.
    """
    p_tiles += tl.program_id(0) % tiles * 2
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    BH = (tl.num_programs(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    start, stop = tl.load(p_tiles), tl.load(p_tiles + 1)
    i_n = start + tl.arange(0, BLOCK_N)
    m_n = i_n < stop
    b_begin = tl.load(p_bounds + tl.minimum(i_n, stop - 1))
    first = tl.load(p_bounds + start)
    # From the first of these tiles on every query sees every key.
    whole = first + tl.cdiv(tl.load(p_bounds + stop - 1) - first, BLOCK_M) * BLOCK_M

    p_rows = row_pointers(p_k, i_b, i_h, i_n, k_stride_b, k_stride_h, k_stride_l, D)
    b_k = tl.load(p_rows, mask=m_n[:, None], other=0.0)
    p_rows = row_pointers(p_v, i_b, i_h, i_n, v_stride_b, v_stride_h, v_stride_l, D)
    b_v = tl.load(p_rows, mask=m_n[:, None], other=0.0)
    if NORMALIZE:
        factor = score_factor(p_log_scale, i_h, softmax_scale)
        b_norms = tl.load(p_key_norms + i_bh * L + i_n, mask=m_n, other=0.0)
        b_factor = (b_norms * (factor * LOG2_E))[:, None]
    else:
        factor = softmax_scale
        b_factor = factor * LOG2_E

    b_grad_k = tl.zeros((BLOCK_N, D), tl.float32)
    b_grad_v = tl.zeros((BLOCK_N, D), tl.float32)
    i_m = tl.arange(0, BLOCK_M)
    u_stride_l, grad_out_stride_l = tl.cast(u_stride_l, tl.int64), tl.cast(grad_out_stride_l, tl.int64)
    p_u_tile = row_pointers(p_u, i_b, i_h, i_m, u_stride_b, u_stride_h, u_stride_l, D)
    p_grad_out_tile = row_pointers(
        p_grad_out, i_b, i_h, i_m, grad_out_stride_b, grad_out_stride_h, grad_out_stride_l, D
    )
    p_lse_tile = p_lse + i_bh * L + i_m
    p_rest_tile = p_lse_tile + BH * L
    p_delta_tile = p_delta + i_bh * L + i_m
    for m in range(first, whole, BLOCK_M):
        b_grad_k, b_grad_v = _pull(
            b_grad_k,
            b_grad_v,
            b_k,
            b_v,
            p_u_tile + m * u_stride_l,
            p_grad_out_tile + m * grad_out_stride_l,
            p_lse_tile + m,
            p_rest_tile + m,
            p_delta_tile + m,
            b_begin,
            m + i_m,
            L,
            b_factor,
            True,
        )
    for m in range(whole, L, BLOCK_M):
        b_grad_k, b_grad_v = _pull(
            b_grad_k,
            b_grad_v,
            b_k,
            b_v,
            p_u_tile + m * u_stride_l,
            p_grad_out_tile + m * grad_out_stride_l,
            p_lse_tile + m,
            p_rest_tile + m,
            p_delta_tile + m,
            b_begin,
            m + i_m,
            L,
            b_factor,
            False,
        )

    p_rows = row_pointers(p_grad_v, i_b, i_h, i_n, grad_v_stride_b, grad_v_stride_h, grad_v_stride_l, D)
    tl.store(p_rows, b_grad_v.to(p_grad_v.dtype.element_ty), mask=m_n[:, None])
    b_grad_k *= factor
    if NORMALIZE:
        # Read again, so that no registers hold them through the loops.
        p_rows = row_pointers(p_k, i_b, i_h, i_n, k_stride_b, k_stride_h, k_stride_l, D)
        b_k = tl.load(p_rows, mask=m_n[:, None], other=0.0)
        b_norms = tl.load(p_key_norms + i_bh * L + i_n, mask=m_n, other=0.0)
        b_grad_k = unproject(b_grad_k, b_k.to(tl.float32) * b_norms[:, None], b_norms)
    p_rows = row_pointers(p_grad_k, i_b, i_h, i_n, grad_k_stride_b, grad_k_stride_h, grad_k_stride_l, D)
    tl.store(p_rows, b_grad_k.to(p_grad_k.dtype.element_ty), mask=m_n[:, None])


def backward_keys(
    inputs: tuple[torch.Tensor, ...],
    log_scale: torch.Tensor | None,
    key_norms: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    lengths: tuple[int, ...],
    softmax_scale: float,
) -> None:
    """Fill grad_k and grad_v. inputs: u, k, v, grad_out; key_norms is read with log_scale alone."""
    k = inputs[1]
    B, H, L, D = k.shape
    config = choose(CONFIGS, HOPPER, k)
    tiles = to_device(key_tiles(lengths, config.BLOCK_M, config.BLOCK_N), k.device)
    attention_backward_keys_kernel[(B * H * len(tiles),)](
        *(*inputs, delta if log_scale is None else log_scale, key_norms, lse, delta, grad_k, grad_v),
        *(scale_bounds(lengths, k.device), tiles, len(tiles), H, L),
        *(stride for tensor in (*inputs, grad_k, grad_v) for stride in tensor.stride()[:3]),
        float(softmax_scale),
        D=D,
        NORMALIZE=log_scale is not None,
        enable_fp_fusion=True,
        **config.meta(),
    )


def _case(dtype: str, D: int, prologue: bool, config: Config) -> Case:
    names = ("u", "k", "v", "grad_out", "grad_k", "grad_v")
    pointers = {f"p_{name}": f"*{dtype}" for name in names}
    pointers |= {f"p_{name}": "*fp32" for name in ("log_scale", "key_norms", "lse", "delta")}
    pointers |= {"p_bounds": "*i32", "p_tiles": "*i32"}
    return Case(
        attention_backward_keys_kernel,
        pointers | {"tiles": "i32", "H": "i32", "L": "i32"} | strides(*names) | {"softmax_scale": "fp32"},
        {"D": D, "NORMALIZE": prologue} | config.blocks(),
        config.num_warps,
        aligned=(*pointers, *strides(*names)),
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )


CASES = cases(CONFIGS, HOPPER, _case)
