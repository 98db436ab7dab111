"""Encoding by multi-scale residual quantization (VAR, arXiv 2404.02905, algorithm 1): one launch a scale.

Encoding is one launch a scale. Launch k applies the codes of scale k - 1 (look-up, bicubic upsampling, phi, residual
and f_hat) to the band of the map that its positions cover, downsamples the new residual and searches its share of the
codebook. Programs that need the same band compute it each for themselves, to the same bits, from what the launch
before left: that costs less than another launch, and the end of a launch is the only barrier between programs.

What leaves a program of the search is a float32 score, as the high half of an integer over the code's index: the
smallest such key is the nearest code, the first on a tie, whatever the order in which programs bring theirs.
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
    load_codes,
    spatial_weight,
)
from .search import MARGIN, PREPARE_BLOCK, float32_score, largest, prepare_kernel, search, search_again

_BLOCK_V = 32  # codes scored at a time
_WARPS = 8
# For the first launch on sm_80 the ptxas of Triton 3.6 aims at 80 registers a thread and spills two; told any limit,
# here the hardware's own, it takes the 98 that it needs.
_FIRST_REGISTERS = 255
# Programs that a search is split into where positions alone are fewer: about one for each multiprocessor.
_SEARCH_PROGRAMS = 128


# Sizes change from scale to scale and must not be compiled in.
@triton.jit(
    do_not_specialize=[
        *("B", "H", "W", "h_last", "w_last", "h", "w"),
        *("keys_stride", "keys_last", "keys_next", "V", "codes_a_program"),
    ]
)
def scale_kernel(
    p_keys,
    p_codebook,
    p_search,
    p_bias,
    p_phi_weight,
    p_phi_bias,
    p_state,
    p_state_out,
    p_up,
    p_f_hat,
    ratio,
    B,
    H,
    W,
    h_last,
    w_last,
    h,
    w,
    keys_stride,
    keys_last,
    keys_next,
    V,
    codes_a_program,
    Cv: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPDATE: tl.constexpr,
    UP: tl.constexpr,
    PHI: tl.constexpr,
    F_HAT: tl.constexpr,
    NEAREST: tl.constexpr,
    DOWN: tl.constexpr,
    COSINE: tl.constexpr,
    MARGIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Between two scales: apply the codes of one (UPDATE), then choose those of the next (NEAREST).

    A program takes BLOCK_N positions of the (h, w) map of one image, and a share of the codebook.
    keys (B, keys_stride): of this image's scales, keys_last and keys_next are the first positions of the two.
    state, state_out (2, B, H*W, Cv): residual and f_hat, before and after. up (B, H*W, Cv): scratch for phi.
    f_hat (B, Cv, H, W): the new one, with F_HAT. phi_weight (9, Cv in, Cv out), phi_bias (Cv,).
    UP, DOWN: the map of the last scale, of the next one, is smaller than (H, W).
    """
    tiles = tl.cdiv(h * w, BLOCK_N)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    i_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = i_n < h * w
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < Cv
    plane = B.to(tl.int64) * H * W * Cv
    p_state += i_b * H * W * Cv
    p_state_out += i_b * H * W * Cv
    p_up += i_b * H * W * Cv
    p_keys += i_b * keys_stride

    # The band of whole lines of the (H, W) map that these positions are pooled from.
    y_first = tl.program_id(0) % tiles * BLOCK_N // w
    y_last = (tl.minimum(tl.program_id(0) % tiles * BLOCK_N + BLOCK_N, h * w) - 1) // w
    first, last = bin_start(y_first, h, H) * W, bin_end(y_last, h, H) * W

    if UPDATE:
        if PHI:
            halo = tl.minimum(last + W, H * W)
            for start in range(tl.maximum(first - W, 0), halo, BLOCK_P):
                i_p = start + tl.arange(0, BLOCK_P)
                m_p = i_p < halo
                if UP:
                    b_up = bicubic(
                        p_codebook, p_keys + keys_last, i_p, m_p, h_last, w_last, H, W, Cv, 1, Cv, BLOCK_C, True
                    )
                else:
                    b_up = load_codes(p_codebook, p_keys + keys_last, i_p, m_p, Cv, 1, Cv, BLOCK_C, True)
                tl.store(p_up + i_p[:, None] * Cv + i_c[None, :], b_up, mask=m_p[:, None] & m_c[None, :])
            tl.debug_barrier()
        for start in range(first, last, BLOCK_P):
            i_p = start + tl.arange(0, BLOCK_P)
            m_p = i_p < last
            m_block = m_p[:, None] & m_c[None, :]
            i_block = i_p[:, None] * Cv + i_c[None, :]
            if PHI:
                b_h = (1 - ratio) * tl.load(p_up + i_block, mask=m_block, other=0.0)
                b_phi = convolution(p_up, p_phi_weight, tl.where(m_p, i_p, 0), H, W, Cv, BLOCK_C, PRECISION)
                b_h += ratio * (b_phi + tl.load(p_phi_bias + i_c, mask=m_c, other=0.0)[None, :])
            elif UP:
                b_h = bicubic(p_codebook, p_keys + keys_last, i_p, m_p, h_last, w_last, H, W, Cv, 1, Cv, BLOCK_C, True)
            else:
                b_h = load_codes(p_codebook, p_keys + keys_last, i_p, m_p, Cv, 1, Cv, BLOCK_C, True)
            b_rest = tl.load(p_state + i_block, mask=m_block, other=0.0) - b_h
            b_f_hat = tl.load(p_state + plane + i_block, mask=m_block, other=0.0) + b_h
            tl.store(p_state_out + i_block, b_rest, mask=m_block)
            tl.store(p_state_out + plane + i_block, b_f_hat, mask=m_block)
            if F_HAT:
                p_out = p_f_hat + i_b * Cv * H * W + i_p[:, None] + i_c[None, :] * (H * W)
                tl.store(p_out, b_f_hat, mask=m_block)
        # Every program of the image may do this: a key without its score is the index that the others take from it.
        for start in range(0, h_last * w_last, BLOCK_P):
            i_key = start + tl.arange(0, BLOCK_P)
            m_key = i_key < h_last * w_last
            b_key = tl.load(p_keys + keys_last + i_key, mask=m_key, other=0)
            tl.store(p_keys + keys_last + i_key, b_key & 0xFFFFFFFF, mask=m_key)
        tl.debug_barrier()

    if NEAREST:
        if DOWN:
            b_z = area(p_state_out, i_n, h, w, H, W, first, last, Cv, 1, Cv, BLOCK_C, BLOCK_P)
        else:
            b_z = tl.load(p_state_out + i_n[:, None] * Cv + i_c[None, :], mask=m_n[:, None] & m_c[None, :], other=0.0)
        if COSINE:
            b_query = -b_z / tl.maximum(tl.sqrt(tl.sum(b_z * b_z, 1)), 1e-12)[:, None]
        else:
            b_query = -2 * b_z
        first_v = tl.program_id(1) * codes_a_program
        last_v = tl.minimum(first_v + codes_a_program, V)
        winner, close, limit = search(
            b_query, p_search, p_bias, first_v, last_v, Cv, BLOCK_C, BLOCK_V, COSINE, MARGIN, PRECISION
        )
        if largest(tl.where(m_n, close, 0)) > 1:
            m_doubt = m_n & (close > 1)
            again = search_again(
                b_query, m_doubt, limit, p_search, p_bias, first_v, last_v, Cv, BLOCK_C, BLOCK_V, PRECISION
            )
            winner = tl.where(m_doubt, again, winner)
        b_score = float32_score(b_query, winner, p_search, p_bias, Cv, BLOCK_C)
        # As integers, floats order by size once the bits below the sign of negative ones are flipped; -0.0 is 0.0.
        bits = tl.where(b_score == 0, 0.0, b_score).to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = (ordered.to(tl.int64) << 32) | winner.to(tl.int64)
        tl.atomic_min(p_keys + keys_next + i_n, key, mask=m_n, sem="relaxed")


def _most_positions(Cv: int) -> int:
    """Positions whose codes a program chooses together; wider codes leave registers for half as many."""
    return 64 if Cv <= 32 else 32


def _search_blocks(B: int, positions: int, V: int, Cv: int) -> tuple[int, int, int]:
    """Positions a program, programs that share the positions of an image, and codes a program."""
    BLOCK_N = 16 if positions <= 16 else _most_positions(Cv)
    tiles = triton.cdiv(positions, BLOCK_N)
    splits = max(1, min(_SEARCH_PROGRAMS // (B * tiles), triton.cdiv(V, _BLOCK_V)))
    return BLOCK_N, tiles, triton.cdiv(triton.cdiv(V, splits), _BLOCK_V) * _BLOCK_V


def residual_quantize(
    features: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor,
    phi_bias: torch.Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[Size],
    cosine: bool,
    all_f_hats: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (B, sum of h_k w_k) int64 and f_hat (K or 1, B, Cv, H, W) float32 of features (B, Cv, H, W).

    features may have any strides; codebook (V, Cv), phi_weight (n, Cv, Cv, 3, 3) and phi_bias (n, Cv) are float32,
    n = 0 makes phi the identity. The result does not depend on how the work is divided, float32 rounding aside.
    """
    B, Cv, H, W = features.shape
    V, K, block = codebook.size(0), len(sizes), blocks(Cv)
    L = sum(h * w for h, w in sizes)
    codebook, weight, phi_bias = codebook.contiguous(), spatial_weight(phi_weight), phi_bias.contiguous()
    phi = weight.size(0) > 0

    state = features.new_empty((2, 2, B, H * W, Cv), dtype=torch.float32)
    f_hats = features.new_empty((K if all_f_hats else 1, B, Cv, H, W), dtype=torch.float32)
    keys = torch.empty((B, L), dtype=torch.int64, device=features.device)
    if B == 0:
        return keys, f_hats
    up = state.new_empty((B, H * W, Cv)) if phi else state
    bias = state.new_empty(V)
    search_codes = torch.empty_like(codebook) if cosine else codebook
    prepare_kernel[(min(triton.cdiv(max(V, B * H * W, B * L), PREPARE_BLOCK), 4 * _SEARCH_PROGRAMS),)](
        features,
        codebook,
        search_codes,
        bias,
        state[0],
        keys,
        B,
        V,
        H,
        W,
        B * L,
        *features.stride(),
        Cv=Cv,
        BLOCK=PREPARE_BLOCK,
        BLOCK_C=block["BLOCK_C"],
        COSINE=cosine,
        num_warps=4,
        enable_fp_fusion=True,
    )

    first = 0  # position of the next scale among all
    for k in range(K + 1):
        # Launch K only applies the codes of the last scale, to the whole map.
        h, w = sizes[k] if k < K else (H, W)
        h_last, w_last = sizes[k - 1] if k else (H, W)
        i_phi = phi_of_scale[k - 1] if k and phi else 0
        BLOCK_N, tiles, codes_a_program = _search_blocks(B, h * w, V, Cv)
        out = f_hats[k - 1 if all_f_hats and k else 0]
        scale_kernel[(B * tiles, triton.cdiv(V, codes_a_program) if k < K else 1)](
            keys,
            codebook,
            search_codes,
            bias,
            weight[i_phi] if phi else codebook,
            phi_bias[i_phi] if phi else codebook,
            state[max(k - 1, 0) % 2],
            state[k % 2],
            up,
            out,
            float(ratio),
            B,
            H,
            W,
            h_last,
            w_last,
            h,
            w,
            L,
            first - h_last * w_last if k else 0,
            first,
            V,
            codes_a_program,
            **block,
            BLOCK_N=BLOCK_N,
            BLOCK_V=_BLOCK_V,
            UPDATE=k > 0,
            UP=(h_last, w_last) != (H, W),
            PHI=phi,
            F_HAT=k > 0 and (all_f_hats or k == K),
            NEAREST=k < K,
            DOWN=(h, w) != (H, W),
            COSINE=cosine,
            MARGIN=MARGIN,
            PRECISION=PRECISION,
            num_warps=_WARPS,
            maxnreg=None if k else _FIRST_REGISTERS,
            enable_fp_fusion=True,
        )
        first += h * w
    return keys, f_hats


_SCALE = dict.fromkeys(("p_codebook", "p_search", "p_bias", "p_phi_weight", "p_phi_bias"), "*fp32")
_SCALE |= dict.fromkeys(("p_state", "p_state_out", "p_up", "p_f_hat"), "*fp32") | {"p_keys": "*i64", "ratio": "fp32"}
_SCALE |= dict.fromkeys(("B", "H", "W", "h_last", "w_last", "h", "w"), "i32")
_SCALE |= dict.fromkeys(("keys_stride", "keys_last", "keys_next", "V", "codes_a_program"), "i32")


def _scale_case(Cv: int, BLOCK_N: int, cosine: bool = False, phi: bool = True, **parts: bool) -> Case:
    constexprs: dict[str, object] = {**blocks(Cv), "BLOCK_N": BLOCK_N, "BLOCK_V": _BLOCK_V}
    constexprs |= {name: parts.get(name, True) for name in ("UPDATE", "UP", "F_HAT", "NEAREST", "DOWN")}
    constexprs |= {"PHI": phi, "COSINE": cosine, "MARGIN": MARGIN, "PRECISION": PRECISION}
    aligned = tuple(name for name in _SCALE if name.startswith("p_"))
    registers = None if constexprs["UPDATE"] else _FIRST_REGISTERS
    return Case(scale_kernel, _SCALE, constexprs, _WARPS, aligned, maxnreg=registers)


CASES = [
    _scale_case(32, 16, UPDATE=False, F_HAT=False),
    *(_scale_case(Cv, BLOCK_N) for Cv in (16, 32, MAX_CHANNELS) for BLOCK_N in (16, _most_positions(Cv))),
    _scale_case(32, 64, DOWN=False),
    _scale_case(32, 64, UP=False, NEAREST=False, DOWN=False),
    _scale_case(32, 64, cosine=True),
    _scale_case(32, 64, phi=False),
]
