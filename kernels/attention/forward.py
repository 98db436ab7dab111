"""Block-causal flash attention, forward: softmax over the keys of a query's scale and the scales before, tile by tile.

After Dao, FlashAttention-2 (arXiv 2307.08691, algorithm 1), with the mask of Tian et al., VAR (arXiv 2404.02905): no
matrix of L x L exists, no key beyond a tile's last visible scale is read, and only tiles that the visible end of a row
crosses compare positions at all.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the parameters of its functions their types.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import Case
from .rows import (
    LOG2_E,
    add_bias,
    inverse_norm,
    key_norms,
    row_pointers,
    score_factor,
    strides,
)
from .tiles import Config, Configs, cases, choose, query_tiles, scale_bounds, to_device

CONFIGS: Configs = {
    (2, 32): Config(128, 64, num_warps=8, num_stages=3),
    (2, 64): Config(128, 64, num_warps=8, num_stages=3),
    (2, 128): Config(128, 64, num_warps=8, num_stages=3),
    (4, 32): Config(64, 32, num_warps=4, num_stages=2),
    (4, 64): Config(64, 32, num_warps=8, num_stages=2),
    (4, 128): Config(64, 16, num_warps=8, num_stages=2),
}
# Two programs of 128 registers a thread share a multiprocessor: one computes products while the other exponentiates.
HOPPER: Configs = {(2, 64): Config(128, 64, num_warps=8, num_stages=3, max_registers=128)}


@triton.jit
def _attend(
    b_acc,
    b_sum,
    b_max,
    b_u,
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
    """One tile of keys: (acc, sum, max) of the running softmax, in base 2."""
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
        b_scores *= (b_norms * factor)[None, :]
    if MASKED:
        if not NORMALIZE:
            b_scores *= factor
        b_scores = tl.where(i_n[None, :] < b_end[:, None], b_scores, float("-inf"))
    if NORMALIZE or MASKED:
        b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
        b_p = tl.exp2(b_scores - b_new_max[:, None])
    else:  # one fused multiply-add where the factor is a number that is not negative
        b_new_max = tl.maximum(b_max, tl.max(b_scores, 1) * factor)
        b_p = tl.exp2(b_scores * factor - b_new_max[:, None])
    b_rescale = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None], input_precision="ieee")
    return b_acc, b_sum, b_new_max


@triton.jit(do_not_specialize=["tiles", "H", "L"])
def block_causal_attention_forward_kernel(
    p_q,
    p_k,
    p_v,
    p_q_bias,
    p_v_bias,
    p_log_scale,
    p_out,
    p_lse,
    p_query_norms,
    p_key_norms,
    p_bounds,
    p_tiles,
    tiles,
    H,
    L,
    q_stride_b,
    q_stride_h,
    q_stride_l,
    k_stride_b,
    k_stride_h,
    k_stride_l,
    v_stride_b,
    v_stride_h,
    v_stride_l,
    out_stride_b,
    out_stride_h,
    out_stride_l,
    softmax_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORMALIZE: tl.constexpr,
    Q_BIAS: tl.constexpr,
    V_BIAS: tl.constexpr,
):
    """out = softmax(S) v + v_bias and lse = log2 Σ exp(S) for one tile of queries, S as in ``rows``.

    q, k, v, out (B, H, L, D); q_bias, v_bias (H, D); log_scale (H,); lse (2, B, H, L): rounded, and what rounding left;
    the norms (B, H, L); bounds (2, L), the
    begin and end of each row's scale; tiles (tiles, 2). The tiles of one head follow each other, so that its keys and
    values stay in the L2 cache. Also writes query_norms with NORMALIZE.
    """
    p_tiles += tl.program_id(0) % tiles * 2
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    start, stop = tl.load(p_tiles), tl.load(p_tiles + 1)
    i_m = start + tl.arange(0, BLOCK_M)
    m_m = i_m < stop
    # Rows past the tile see what its last row sees.
    b_end = tl.load(p_bounds + L + tl.minimum(i_m, stop - 1))
    whole = tl.load(p_bounds + L + start) // BLOCK_N * BLOCK_N
    last = tl.load(p_bounds + L + stop - 1)

    p_rows = row_pointers(p_q, i_b, i_h, i_m, q_stride_b, q_stride_h, q_stride_l, D)
    b_u = tl.load(p_rows, mask=m_m[:, None], other=0.0)
    if NORMALIZE or Q_BIAS:
        b_q = b_u.to(tl.float32)
        if Q_BIAS:
            b_q = add_bias(b_q, p_q_bias, i_h, D)
        if NORMALIZE:
            b_inverse = inverse_norm(b_q)
            tl.store(p_query_norms + i_bh * L + i_m, b_inverse, mask=m_m)
            b_q *= b_inverse[:, None]
        b_u = b_q.to(p_q.dtype.element_ty)
    if NORMALIZE:
        factor = score_factor(p_log_scale, i_h, softmax_scale) * LOG2_E
    else:
        factor = softmax_scale * LOG2_E

    b_acc = tl.zeros((BLOCK_M, D), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    # The first key is visible to every row: the maximum is finite after the first tile.
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    i_n = tl.arange(0, BLOCK_N)
    k_stride_l, v_stride_l = tl.cast(k_stride_l, tl.int64), tl.cast(v_stride_l, tl.int64)
    p_k_tile = row_pointers(p_k, i_b, i_h, i_n, k_stride_b, k_stride_h, k_stride_l, D)
    p_v_tile = row_pointers(p_v, i_b, i_h, i_n, v_stride_b, v_stride_h, v_stride_l, D)
    p_norms_tile = p_key_norms + i_bh * L + i_n
    for n in range(0, whole, BLOCK_N):
        b_acc, b_sum, b_max = _attend(
            b_acc,
            b_sum,
            b_max,
            b_u,
            p_k_tile + n * k_stride_l,
            p_v_tile + n * v_stride_l,
            p_norms_tile + n,
            b_end,
            n + i_n,
            last,
            factor,
            NORMALIZE,
            False,
        )
    for n in range(whole, last, BLOCK_N):
        b_acc, b_sum, b_max = _attend(
            b_acc,
            b_sum,
            b_max,
            b_u,
            p_k_tile + n * k_stride_l,
            p_v_tile + n * v_stride_l,
            p_norms_tile + n,
            b_end,
            n + i_n,
            last,
            factor,
            NORMALIZE,
            True,
        )

    b_out = b_acc / b_sum[:, None]
    if V_BIAS:
        b_out = add_bias(b_out, p_v_bias, i_h, D)
    p_rows = row_pointers(p_out, i_b, i_h, i_m, out_stride_b, out_stride_h, out_stride_l, D)
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None])
    # A rounded logarithm near 100 alone would cost every probability of the backward pass seven bits.
    b_log_sum = tl.log2(b_sum)
    b_lse = b_max + b_log_sum
    p_lse += i_bh * L + i_m
    tl.store(p_lse, b_lse, mask=m_m)
    tl.store(p_lse + (tl.num_programs(0) // tiles).to(tl.int64) * L, (b_max - b_lse) + b_log_sum, mask=m_m)


def block_causal_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_bias: torch.Tensor | None,
    v_bias: torch.Tensor | None,
    log_scale: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    norms: torch.Tensor | None,
    lengths: tuple[int, ...],
    softmax_scale: float,
) -> None:
    """Fill out (B, H, L, D), lse (2, B, H, L) and, with log_scale, norms (2, B, H, L).

    Args:
        q, k, v, out: one dtype, float32, float16 or bfloat16; last axes contiguous, any other strides.
        q_bias, v_bias: (H, D), contiguous, or None. log_scale: (H,), contiguous, or None. Of dtypes of their own.
        lse: float32, contiguous: the base-2 logarithm of the sum of the exponentials of each row's visible scores, and
            what rounding it left.
        norms: float32, contiguous: 1 / max(|q + q_bias|, 1e-12) and 1 / max(|k|, 1e-12). None where log_scale is.
        lengths: rows of each scale; they sum to L.
        softmax_scale: not negative.
    """
    B, H, L, D = q.shape
    config = choose(CONFIGS, HOPPER, q)
    tiles = to_device(query_tiles(lengths, config.BLOCK_M, config.BLOCK_N), q.device)
    query_norms, inverse_key_norms = (lse, lse) if norms is None else norms.unbind(0)
    if log_scale is not None:
        key_norms(k, inverse_key_norms)
    block_causal_attention_forward_kernel[(B * H * len(tiles),)](
        *(q, k, v, q if q_bias is None else q_bias, q if v_bias is None else v_bias),
        *(lse if log_scale is None else log_scale, out, lse, query_norms, inverse_key_norms),
        *(scale_bounds(lengths, q.device), tiles, len(tiles), H, L),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], float(softmax_scale)),
        D=D,
        NORMALIZE=log_scale is not None,
        Q_BIAS=q_bias is not None,
        V_BIAS=v_bias is not None,
        enable_fp_fusion=True,
        **config.meta(),
    )


def _case(dtype: str, D: int, prologue: bool, config: Config) -> Case:
    pointers = {f"p_{name}": f"*{dtype}" for name in ("q", "k", "v", "q_bias", "v_bias", "out")}
    pointers |= {f"p_{name}": "*fp32" for name in ("log_scale", "lse", "query_norms", "key_norms")}
    pointers |= {"p_bounds": "*i32", "p_tiles": "*i32"}
    lines = strides("q", "k", "v", "out")
    return Case(
        block_causal_attention_forward_kernel,
        pointers | {"tiles": "i32", "H": "i32", "L": "i32"} | lines | {"softmax_scale": "fp32"},
        {"D": D, "NORMALIZE": prologue, "Q_BIAS": prologue, "V_BIAS": prologue} | config.blocks(),
        config.num_warps,
        aligned=(*pointers, *lines),
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
    )


CASES = cases(CONFIGS, HOPPER, _case)
