"""Decoding multi-scale residual quantization (VAR, arXiv 2404.02905, algorithm 2): f_hat of each scale, next inputs.

The scales' contributions do not depend on each other, so one launch makes all: a program keeps a piece of f_hat in
registers from scale to scale. A second launch downsamples where inputs are wanted.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the parameters of its functions their types.)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .. import Case
from .maps import (
    MAX_CHANNELS,
    PRECISION,
    Size,
    area,
    bicubic,
    bin_end,
    bin_start,
    blocks,
    convolution,
    scale_plan,
    spatial_weight,
)

_BLOCK_N = 64  # positions of a downsampled map at a time
_WARPS = 8


@triton.jit(do_not_specialize=["B", "H", "W", "K"])
def dequantize_kernel(
    p_codes,
    p_codebook,
    p_phi_weight,
    p_phi_bias,
    p_plan,
    p_f_hat,
    p_up,
    p_out,
    ratio,
    B,
    H,
    W,
    K,
    codes_stride_b,
    codes_stride_l,
    codes_stride_c,
    Cv: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INDEXED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PHI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """f_hat after each of K scales; a program keeps BLOCK_P positions of one image over all of them.

    codes: indices (B, L) with INDEXED, else vectors (B, L, Cv). plan (K, 4): height, width, first position, phi.
    f_hat (B, Cv, H*W) is what to begin with where ACCUMULATE. up: scratch, a piece of map with a margin for phi for
    each program. out (K, B, Cv, H*W), or (K, B, H*W, Cv) with CHANNELS_LAST.
    """
    i_b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_P
    i_p = start + tl.arange(0, BLOCK_P)
    m_p = i_p < H * W
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < Cv
    m_block = m_p[:, None] & m_c[None, :]
    p_codes += i_b * codes_stride_b
    # Row 0 of the scratch is position ``lowest`` of the map; p_up is moved so that it is addressed by position.
    margin, lowest = W + 1, start - (W + 1)
    i_program = i_b * tl.num_programs(0) + tl.program_id(0)
    p_up += (i_program * (BLOCK_P + 2 * margin) - lowest) * Cv
    highest = tl.minimum(start + BLOCK_P + margin, H * W)

    if ACCUMULATE:
        p_before = p_f_hat + i_b * Cv * H * W + i_p[:, None] + i_c[None, :] * (H * W)
        b_f_hat = tl.load(p_before, mask=m_block, other=0.0)
    else:
        b_f_hat = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for k in range(0, K):
        h, w = tl.load(p_plan + 4 * k), tl.load(p_plan + 4 * k + 1)
        first, i_phi = tl.load(p_plan + 4 * k + 2), tl.load(p_plan + 4 * k + 3).to(tl.int64)
        if INDEXED:
            p_rows, p_index, row_stride, channel_stride = p_codebook, p_codes + first, Cv, 1
        else:
            p_rows, p_index = p_codes + first.to(tl.int64) * codes_stride_l, p_plan
            row_stride, channel_stride = codes_stride_l, codes_stride_c
        if PHI:
            for piece in range(tl.maximum(lowest, 0), highest, BLOCK_P):
                i_q = piece + tl.arange(0, BLOCK_P)
                m_q = i_q < highest
                b_up = bicubic(p_rows, p_index, i_q, m_q, h, w, H, W, row_stride, channel_stride, Cv, BLOCK_C, INDEXED)
                tl.store(p_up + i_q[:, None] * Cv + i_c[None, :], b_up, mask=m_q[:, None] & m_c[None, :])
            tl.debug_barrier()
            b_h = (1 - ratio) * tl.load(p_up + i_p[:, None] * Cv + i_c[None, :], mask=m_block, other=0.0)
            i_inside = tl.where(m_p, i_p, start)
            b_phi = convolution(p_up, p_phi_weight + i_phi * 9 * Cv * Cv, i_inside, H, W, Cv, BLOCK_C, PRECISION)
            b_h += ratio * (b_phi + tl.load(p_phi_bias + i_phi * Cv + i_c, mask=m_c, other=0.0)[None, :])
            tl.debug_barrier()
        else:
            b_h = bicubic(p_rows, p_index, i_p, m_p, h, w, H, W, row_stride, channel_stride, Cv, BLOCK_C, INDEXED)
        b_f_hat += b_h
        i_map = (k * B.to(tl.int64) + i_b) * Cv * H * W
        if CHANNELS_LAST:
            tl.store(p_out + i_map + i_p[:, None] * Cv + i_c[None, :], b_f_hat, mask=m_block)
        else:
            tl.store(p_out + i_map + i_p[:, None] + i_c[None, :] * (H * W), b_f_hat, mask=m_block)


@triton.jit(do_not_specialize=["B", "H", "W", "L"])
def area_kernel(
    p_maps,
    p_plan,
    p_out,
    B,
    H,
    W,
    L,
    Cv: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Each of several maps, area-downsampled to its own size; a program makes BLOCK_N positions of one.

    maps (K, B, H*W, Cv) and out (B, L, Cv) with CHANNELS_LAST, else (K, B, Cv, H*W) and (B, Cv, L).
    plan (K, 4): height, width, first position among the L, and a number that is not used.
    """
    k = tl.program_id(1)
    h, w, first = tl.load(p_plan + 4 * k), tl.load(p_plan + 4 * k + 1), tl.load(p_plan + 4 * k + 2)
    start = tl.program_id(0) * BLOCK_N
    if start < h * w:
        i_b = tl.program_id(2).to(tl.int64)
        i_n = start + tl.arange(0, BLOCK_N)
        i_c = tl.arange(0, BLOCK_C)
        m_block = (i_n < h * w)[:, None] & (i_c < Cv)[None, :]
        y_last = (tl.minimum(start + BLOCK_N, h * w) - 1) // w
        lowest, highest = bin_start(start // w, h, H) * W, bin_end(y_last, h, H) * W
        p_map = p_maps + (k * B.to(tl.int64) + i_b) * Cv * H * W
        if CHANNELS_LAST:
            b_z = area(p_map, i_n, h, w, H, W, lowest, highest, Cv, 1, Cv, BLOCK_C, BLOCK_P)
            tl.store(p_out + ((i_b * L + first + i_n[:, None]) * Cv + i_c[None, :]), b_z, mask=m_block)
        else:
            b_z = area(p_map, i_n, h, w, H, W, lowest, highest, 1, H * W, Cv, BLOCK_C, BLOCK_P)
            tl.store(p_out + i_b * Cv * L + first + i_n[:, None] + i_c[None, :] * L, b_z, mask=m_block)


def _dequantize(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor,
    phi_bias: torch.Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[Size],
    out: torch.Tensor,
    full: Size,
    f_hat: torch.Tensor | None = None,
    channels_last: bool = False,
) -> None:
    """Fill out (K, B, ...) with f_hat after each scale; codes are (B, L) indices or (B, L, Cv) vectors."""
    indexed = codes.dim() == 2
    B, Cv, (H, W) = codes.size(0), codebook.size(1), full
    codes = codes.contiguous() if indexed else codes
    codebook, weight, phi_bias = codebook.contiguous(), spatial_weight(phi_weight), phi_bias.contiguous()
    phi = weight.size(0) > 0
    if B * len(sizes) == 0:
        return
    block = blocks(Cv)
    tiles = triton.cdiv(H * W, block["BLOCK_P"])
    up = out.new_empty((B, tiles, block["BLOCK_P"] + 2 * (W + 1), Cv)) if phi else out
    dequantize_kernel[(tiles, B)](
        codes,
        codebook,
        weight if phi else codebook,
        phi_bias if phi else codebook,
        scale_plan(codes.device, sizes, phi_of_scale if phi else ()),
        out if f_hat is None else f_hat,
        up,
        out,
        float(ratio),
        B,
        H,
        W,
        len(sizes),
        codes.stride(0),
        codes.stride(1),
        1 if indexed else codes.stride(2),
        **block,
        INDEXED=indexed,
        ACCUMULATE=f_hat is not None,
        CHANNELS_LAST=channels_last,
        PHI=phi,
        PRECISION=PRECISION,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )


def _area(maps: torch.Tensor, full: Size, sizes: Sequence[Size], out: torch.Tensor, channels_last: bool) -> None:
    """Downsample maps[k] of maps (K, B, ...) to sizes[k], one after another in out."""
    (H, W), (B, L, Cv) = full, out.shape if channels_last else (out.size(0), out.shape[2:].numel(), out.size(1))
    if out.numel() == 0:
        return
    area_kernel[(triton.cdiv(max(h * w for h, w in sizes), _BLOCK_N), len(sizes), B)](
        maps,
        scale_plan(maps.device, sizes, ()),
        out,
        B,
        H,
        W,
        L,
        **blocks(Cv),
        BLOCK_N=_BLOCK_N,
        CHANNELS_LAST=channels_last,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )


def residual_dequantize(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor,
    phi_bias: torch.Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[Size],
    H: int,
    W: int,
) -> torch.Tensor:
    """f_hat (K, B, Cv, H, W) float32 after each of K scales.

    codes: indices (B, sum of h_k w_k) int64 into codebook (V, Cv), or instead of them float32 vectors
    (B, sum of h_k w_k, Cv) of any strides; then the codebook gives nothing but its width.
    """
    f_hats = codebook.new_empty((len(sizes), codes.size(0), codebook.size(1), H, W), dtype=torch.float32)
    _dequantize(codes, codebook, phi_weight, phi_bias, ratio, phi_of_scale, sizes, f_hats, (H, W))
    return f_hats


def teacher_forcing_input(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor,
    phi_bias: torch.Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[Size],
) -> torch.Tensor:
    """Transformer input (B, sum of h_k w_k over the scales after those of codes, Cv) float32.

    sizes is the whole schedule, ending in the full size; codes, indices or vectors as in `residual_dequantize`, belong
    to its first len(phi_of_scale) scales, and as many inputs are made, at most one for each scale after the first.
    """
    produced = min(len(phi_of_scale), len(sizes) - 1)
    B, Cv, (H, W) = codes.size(0), codebook.size(1), sizes[-1]
    following = sizes[1 : produced + 1]
    out = codebook.new_empty((B, sum(h * w for h, w in following), Cv), dtype=torch.float32)
    f_hats = out.new_empty((produced, B, H * W, Cv))
    _dequantize(
        codes,
        codebook,
        phi_weight,
        phi_bias,
        ratio,
        phi_of_scale[:produced],
        sizes[:produced],
        f_hats,
        (H, W),
        channels_last=True,
    )
    _area(f_hats, (H, W), following, out, channels_last=True)
    return out


def next_scale_input(
    f_hat: torch.Tensor,
    embeddings: torch.Tensor,
    phi_weight: torch.Tensor | None,
    phi_bias: torch.Tensor | None,
    ratio: float,
    following: Size | None,
) -> torch.Tensor:
    """Add one scale's code vectors (B, Cv, h, w) to f_hat (B, Cv, H, W) in place; the input map of the next scale.

    f_hat is float32 and contiguous, embeddings float32 of any strides; phi_weight (Cv, Cv, 3, 3) and phi_bias (Cv,),
    or None for the identity. Returns (B, Cv, *following), or f_hat itself where nothing follows.
    """
    B, Cv, H, W = f_hat.shape
    h, w = embeddings.shape[2:]
    codes = embeddings.flatten(2).transpose(1, 2)
    weight = f_hat.new_empty((0, Cv, Cv, 3, 3)) if phi_weight is None else phi_weight.unsqueeze(0)
    bias = f_hat.new_empty((0, Cv)) if phi_bias is None else phi_bias.unsqueeze(0)
    # Every position is read and written by one program alone, so f_hat is both the beginning and the result.
    _dequantize(codes, f_hat.new_empty((0, Cv)), weight, bias, ratio, (0,), [(h, w)], f_hat, (H, W), f_hat)
    if following is None:
        return f_hat
    out = f_hat.new_empty((B, Cv, *following))
    _area(f_hat, (H, W), [following], out, channels_last=False)
    return out


def _dequantize_case(Cv: int, indexed: bool, accumulate: bool, channels_last: bool, phi: bool) -> Case:
    tensors = dict.fromkeys(("p_codebook", "p_phi_weight", "p_phi_bias", "p_f_hat", "p_up", "p_out"), "*fp32")
    tensors |= {"p_codes": "*i64" if indexed else "*fp32", "p_plan": "*i32"}
    integers = ("B", "H", "W", "K", "codes_stride_b", "codes_stride_l", "codes_stride_c")
    constexprs: dict[str, object] = {**blocks(Cv), "INDEXED": indexed}
    constexprs |= {"ACCUMULATE": accumulate, "CHANNELS_LAST": channels_last, "PHI": phi, "PRECISION": PRECISION}
    signature = tensors | {"ratio": "fp32"} | dict.fromkeys(integers, "i32")
    return Case(dequantize_kernel, signature, constexprs, _WARPS, tuple(tensors))


def _area_case(Cv: int, channels_last: bool) -> Case:
    tensors = {"p_maps": "*fp32", "p_plan": "*i32", "p_out": "*fp32"}
    constexprs = {**blocks(Cv), "BLOCK_N": _BLOCK_N, "CHANNELS_LAST": channels_last}
    return Case(area_kernel, tensors | dict.fromkeys("BHWL", "i32"), constexprs, _WARPS, tuple(tensors))


CASES = [
    *(
        _dequantize_case(Cv, True, False, channels_last, True)
        for Cv in (32, MAX_CHANNELS)
        for channels_last in (False, True)
    ),
    _dequantize_case(32, True, False, False, False),
    _dequantize_case(32, False, True, False, True),
    *(_area_case(32, channels_last) for channels_last in (False, True)),
]
