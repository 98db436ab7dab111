"""The quantizer's choice of codes: what is done once before it, and the search for the nearest code of each position.

Codes are scored with 3 x tf32 products, and the best two of each column of the tiles are kept. Where another code lies
within the error of such a score, the codes that close are scored again in float32.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the parameters of its functions their types.)
from __future__ import annotations

import triton
import triton.language as tl

from .. import Case

PREPARE_BLOCK = 64  # rows that a program of prepare_kernel takes at a time

# Of a score z.e + |e|^2, with S = |z| |e| + |e|^2 of the longest code: 3 x tf32 leaves out 3 * 2^-20 S (the product of
# the two small terms and what both splits cut off), and its 12 accumulations of 8 products err by at most 2^-18 S.
# Two scores that differ by more than twice the sum of both are in the right order.
MARGIN = 2.0**-16


@triton.jit(do_not_specialize=["B", "V", "H", "W", "keys"])
def prepare_kernel(
    p_features,
    p_codebook,
    p_search,
    p_bias,
    p_state,
    p_keys,
    B,
    V,
    H,
    W,
    keys,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    Cv: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Everything that is done once: residual and f_hat, the codebook as the search reads it, no codes chosen yet.

    state (2, B, H*W, Cv) = features (B, Cv, H, W), zeros. bias (V,) = |e|^2; with COSINE zeros, and search (V, Cv)
    the codes divided by their lengths. keys int64 = the largest number.
    """
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < Cv
    i_block = tl.arange(0, BLOCK)

    for start in range(i_program * BLOCK, V, programs * BLOCK):
        i_v = start + i_block
        m_block = (i_v < V)[:, None] & m_c[None, :]
        b_code = tl.load(p_codebook + i_v[:, None] * Cv + i_c[None, :], mask=m_block, other=0.0)
        b_square = tl.sum(b_code * b_code, 1)
        if COSINE:
            b_code = b_code / tl.maximum(tl.sqrt(b_square), 1e-12)[:, None]
            tl.store(p_search + i_v[:, None] * Cv + i_c[None, :], b_code, mask=m_block)
            b_square = tl.zeros_like(b_square)
        tl.store(p_bias + i_v, b_square, mask=i_v < V)

    plane = B.to(tl.int64) * H * W
    for start in range(i_program * BLOCK, plane, programs * BLOCK):
        i_row = start + i_block
        m_block = (i_row < plane)[:, None] & m_c[None, :]
        i_b, i_p = i_row // (H * W), i_row % (H * W)
        p_from = p_features + (i_b * stride_b + (i_p // W) * stride_h + (i_p % W) * stride_w)[:, None]
        b_feature = tl.load(p_from + (i_c.to(tl.int64) * stride_c)[None, :], mask=m_block, other=0.0)
        p_to = p_state + i_row[:, None] * Cv + i_c[None, :]
        tl.store(p_to, b_feature.to(tl.float32), mask=m_block)
        tl.store(p_to + plane * Cv, tl.zeros((BLOCK, BLOCK_C), tl.float32), mask=m_block)

    for start in range(i_program * BLOCK, keys, programs * BLOCK):
        i_key = start + i_block
        tl.store(p_keys + i_key, tl.full((BLOCK,), 0x7FFFFFFFFFFFFFFF, tl.int64), mask=i_key < keys)


@triton.jit
def score(
    b_query, p_search, p_bias, start, last, Cv, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr
):
    """query.e + bias of queries (N, C) and the BLOCK_V codes from start on, infinite from code last on; the biases."""
    i_v = start + tl.arange(0, BLOCK_V)
    i_c = tl.arange(0, BLOCK_C)
    m_v = i_v < last
    p_code = p_search + i_v[None, :].to(tl.int64) * Cv + i_c[:, None]
    b_code = tl.load(p_code, mask=m_v[None, :] & (i_c < Cv)[:, None], other=0.0)
    b_bias = tl.load(p_bias + i_v, mask=m_v, other=float("inf"))
    return tl.dot(b_query, b_code, input_precision=PRECISION) + b_bias[None, :], b_bias


@triton.jit
def float32_score(b_query, i_v, p_search, p_bias, Cv, BLOCK_C: tl.constexpr):
    """query.e + bias of each query and one code of its own, in float32; the same for the same codes, bit by bit."""
    i_c = tl.arange(0, BLOCK_C)
    b_code = tl.load(p_search + i_v[:, None].to(tl.int64) * Cv + i_c[None, :], mask=(i_c < Cv)[None, :], other=0.0)
    return tl.sum(b_query * b_code, 1) + tl.load(p_bias + i_v)


@triton.jit
def largest(b_x):
    """The largest of a vector, which must not be reduced as one: Triton 3.6 fails there for sm_100, on what the rows of
    a product were reduced to (TritonNvidiaGPUOptimizeTMemLayoutsPass, "parent layout must have at least rank >= 2")."""
    return tl.max(b_x[:, None])


@triton.jit
def search(
    b_query,
    p_search,
    p_bias,
    first,
    last,
    Cv,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    COSINE: tl.constexpr,
    MARGIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For each query (N, C) among codes [first, last): the code of least score, how many may have it, up to what score.

    Where more than one may (scores within MARGIN of the least), `search_again` tells.
    """
    BLOCK_N: tl.constexpr = b_query.shape[0]
    b_best = tl.full((BLOCK_N, BLOCK_V), float("inf"), tl.float32)
    b_second = tl.full((BLOCK_N, BLOCK_V), float("inf"), tl.float32)
    b_tile = tl.zeros((BLOCK_N, BLOCK_V), tl.int32) + first
    b_longest = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(first, last, BLOCK_V):
        b_score, b_bias = score(b_query, p_search, p_bias, start, last, Cv, BLOCK_C, BLOCK_V, PRECISION)
        b_tile = tl.where(b_score < b_best, start, b_tile)
        b_second = tl.minimum(b_second, tl.maximum(b_score, b_best))
        b_best = tl.minimum(b_best, b_score)
        b_longest = tl.maximum(b_longest, tl.where(b_bias < float("inf"), b_bias, 0.0))

    best = tl.min(b_best, 1)
    b_index = tl.where(b_best == best[:, None], b_tile + tl.arange(0, BLOCK_V)[None, :], last)
    winner = tl.min(b_index, 1)
    winner = tl.where(winner < last, winner, first)  # where every score is NaN
    longest = 1.0 if COSINE else tl.max(b_longest, 0)  # squared
    limit = best + MARGIN * (tl.sqrt(tl.sum(b_query * b_query, 1) * longest) + longest)
    close = tl.sum((b_best <= limit[:, None]).to(tl.int32) + (b_second <= limit[:, None]).to(tl.int32), 1)
    return winner, close, limit


@triton.jit
def search_again(
    b_query,
    m_n,
    limit,
    p_search,
    p_bias,
    first,
    last,
    Cv,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of the codes that PRECISION scores up to limit, the one of least float32 score, the first on a tie; for m_n."""
    BLOCK_N: tl.constexpr = b_query.shape[0]
    i_column = tl.arange(0, BLOCK_V)[None, :]
    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    winner = tl.zeros((BLOCK_N,), tl.int32) + first
    for start in range(first, last, BLOCK_V):
        b_score, _ = score(b_query, p_search, p_bias, start, last, Cv, BLOCK_C, BLOCK_V, PRECISION)
        m_close = (b_score <= limit[:, None]) & m_n[:, None] & (start + i_column < last)
        # One code of each query at a time, in ascending order.
        for _ in range(largest(tl.sum(m_close.to(tl.int32), 1))):
            column = tl.min(tl.where(m_close, i_column, BLOCK_V), 1)
            m_found = column < BLOCK_V
            i_v = tl.where(m_found, start + column, first)
            candidate = float32_score(b_query, i_v, p_search, p_bias, Cv, BLOCK_C)
            m_better = m_found & (candidate < best)
            best = tl.where(m_better, candidate, best)
            winner = tl.where(m_better, i_v, winner)
            m_close = m_close & (i_column != column[:, None])
    return winner


def _prepare_case(cosine: bool) -> Case:
    tensors = dict.fromkeys(("p_features", "p_codebook", "p_search", "p_bias", "p_state"), "*fp32") | {"p_keys": "*i64"}
    integers = ("B", "V", "H", "W", "keys", "stride_b", "stride_c", "stride_h", "stride_w")
    constexprs = {"Cv": 32, "BLOCK": PREPARE_BLOCK, "BLOCK_C": 32, "COSINE": cosine}
    return Case(prepare_kernel, tensors | dict.fromkeys(integers, "i32"), constexprs, 4, tuple(tensors))


CASES = [_prepare_case(cosine) for cosine in (False, True)]
