"""Gradients of multi-scale residual quantization with respect to the codebook and the phis, for fixed codes.

f_hat after scale k is the sum of h_j over j <= k, and h_j = (1 - r) u_j + r (phi(u_j) + bias) with u_j the bicubically
upsampled codes. So with D_k the sum over j >= k of dLoss/d f_hat_j, scale by scale and without recursion:

    du = (1 - r) D + r phi^T(D),    dphi = r sum D u^T over shifted positions,    dcodes = up^T(du)

and the gradient of a code is the sum over the positions that hold it. Every sum runs in a fixed order, without atomics.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the parameters of its functions their types.)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .. import Case
from .maps import (
    PRECISION,
    Size,
    bicubic,
    blocks,
    convolution,
    cubic_source,
    cubic_weight,
    scale_plan,
    spatial_weight,
)

_BLOCK_N = 64  # positions of a map of codes at a time
_WARPS = 8
_CHUNKS = 64  # that the sums over images are cut into: the same on every device, so that they add in the same order


@triton.jit(do_not_specialize=["B", "HW", "K"])
def suffix_sum_kernel(p_grad, p_sum, B, HW, K, Cv: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """sum (K, B, HW, Cv): for each k the sum over j >= k of grad (K, B, Cv, HW)."""
    i_b = tl.program_id(1).to(tl.int64)
    i_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_c = tl.arange(0, BLOCK_C)
    m_block = (i_p < HW)[:, None] & (i_c < Cv)[None, :]
    b_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(0, K):
        i_map = ((K - 1 - step) * B.to(tl.int64) + i_b) * Cv * HW
        b_sum += tl.load(p_grad + i_map + i_c[None, :] * HW + i_p[:, None], mask=m_block, other=0.0)
        tl.store(p_sum + i_map + i_p[:, None] * Cv + i_c[None, :], b_sum, mask=m_block)


@triton.jit(do_not_specialize=["B", "H", "W", "L"])
def upsample_kernel(
    p_indices, p_codebook, p_plan, p_up, B, H, W, L, Cv: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """up (K, B, H*W, Cv): the codes of indices (B, L), each scale bicubically upsampled."""
    i_b, k = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = i_p < H * W
    i_c = tl.arange(0, BLOCK_C)
    h, w, first = tl.load(p_plan + 4 * k), tl.load(p_plan + 4 * k + 1), tl.load(p_plan + 4 * k + 2)
    b_up = bicubic(p_codebook, p_indices + i_b * L + first, i_p, m_p, h, w, H, W, Cv, 1, Cv, BLOCK_C, True)
    i_map = (k * B.to(tl.int64) + i_b) * H * W * Cv
    tl.store(p_up + i_map + i_p[:, None] * Cv + i_c[None, :], b_up, mask=m_p[:, None] & (i_c < Cv)[None, :])


@triton.jit(do_not_specialize=["B", "H", "W"])
def phi_transpose_kernel(
    p_grad,
    p_weight,
    p_plan,
    p_grad_up,
    ratio,
    B,
    H,
    W,
    Cv: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_up = (1 - ratio) grad + ratio phi^T(grad), all (K, B, H*W, Cv); weight turned (n, 9, Cv out, Cv in)."""
    i_b, k = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = i_p < H * W
    i_c = tl.arange(0, BLOCK_C)
    m_block = m_p[:, None] & (i_c < Cv)[None, :]
    i_phi = tl.load(p_plan + 4 * k + 3).to(tl.int64)
    i_map = (k * B.to(tl.int64) + i_b) * H * W * Cv
    i_block = i_map + i_p[:, None] * Cv + i_c[None, :]
    b_phi = convolution(
        p_grad + i_map, p_weight + i_phi * 9 * Cv * Cv, tl.where(m_p, i_p, 0), H, W, Cv, BLOCK_C, PRECISION
    )
    b_grad = (1 - ratio) * tl.load(p_grad + i_block, mask=m_block, other=0.0) + ratio * b_phi
    tl.store(p_grad_up + i_block, b_grad, mask=m_block)


@triton.jit(do_not_specialize=["B", "H", "W", "K", "chunks"])
def phi_gradient_kernel(
    p_grad,
    p_up,
    p_plan,
    p_partial_weight,
    p_partial_bias,
    B,
    H,
    W,
    K,
    chunks,
    Cv: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk's share of the gradients of one tap of one phi, and of its bias.

    grad, up (K, B, H*W, Cv); partial_weight (n, chunks, 9, Cv out, Cv in), partial_bias (n, chunks, Cv).
    """
    tap = tl.program_id(0)
    i_chunk, i_phi = tl.program_id(1), tl.program_id(2)
    dy, dx = tap // 3 - 1, tap % 3 - 1
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < Cv
    b_weight = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    b_bias = tl.zeros((BLOCK_C,), tl.float32)
    for k in range(0, K):
        if tl.load(p_plan + 4 * k + 3) == i_phi:
            for i_b in range(i_chunk, B, chunks):
                i_map = (k * B.to(tl.int64) + i_b) * H * W * Cv
                for start in tl.range(0, H * W, BLOCK_P, num_stages=2):
                    i_p = start + tl.arange(0, BLOCK_P)
                    y, x = i_p // W + dy, i_p % W + dx
                    m_p = i_p < H * W
                    m_q = m_p & (y >= 0) & (y < H) & (x >= 0) & (x < W)
                    p_turned = p_grad + i_map + i_p[None, :] * Cv + i_c[:, None]
                    b_grad = tl.load(p_turned, mask=m_p[None, :] & m_c[:, None], other=0.0)
                    p_shifted = p_up + i_map + (y * W + x)[:, None] * Cv + i_c[None, :]
                    b_up = tl.load(p_shifted, mask=m_q[:, None] & m_c[None, :], other=0.0)
                    b_weight = tl.dot(b_grad, b_up, b_weight, input_precision=PRECISION)
                    b_bias += tl.sum(b_grad, 1)
    i_partial = i_phi.to(tl.int64) * chunks + i_chunk
    p_out = p_partial_weight + (i_partial * 9 + tap) * Cv * Cv + i_c[:, None] * Cv + i_c[None, :]
    tl.store(p_out, b_weight, mask=m_c[:, None] & m_c[None, :])
    if tap == 4:
        tl.store(p_partial_bias + i_partial * Cv + i_c, b_bias, mask=m_c)


@triton.jit
def cubic_matrix(i, cell, n, N):
    """Of outputs i and input cells, broadcast: the weight of the cell in the output, with repeated borders."""
    source, t = cubic_source(i, n, N)
    weight = tl.zeros_like(t)
    for tap in tl.static_range(4):
        reached = tl.minimum(tl.maximum(source + (tap - 1), 0), n - 1)
        weight += tl.where(reached == cell, cubic_weight(t, tap), 0.0)
    return weight


@triton.jit(do_not_specialize=["B", "H", "W", "L"])
def upsample_transpose_kernel(
    p_grad_up,
    p_plan,
    p_grad_codes,
    B,
    H,
    W,
    L,
    Cv: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_codes (B, L, Cv) from grad_up (K, B, H*W, Cv): each scale times the transposed matrix of its upsampling."""
    i_b, k = tl.program_id(1).to(tl.int64), tl.program_id(2)
    h, w, first = tl.load(p_plan + 4 * k), tl.load(p_plan + 4 * k + 1), tl.load(p_plan + 4 * k + 2)
    if tl.program_id(0) * BLOCK_N < h * w:
        i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        i_c = tl.arange(0, BLOCK_C)
        m_c = i_c < Cv
        p_map = p_grad_up + (k * B.to(tl.int64) + i_b) * H * W * Cv
        b_codes = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        STEP: tl.constexpr = BLOCK_P // 2  # the matrix is made in registers: half a block at a time
        for start in range(0, H * W, STEP):
            i_p = start + tl.arange(0, STEP)
            m_block = (i_p < H * W)[:, None] & m_c[None, :]
            b_grad = tl.load(p_map + i_p[:, None] * Cv + i_c[None, :], mask=m_block, other=0.0)
            b_y = cubic_matrix((i_p // W)[None, :], (i_n // w)[:, None], h, H)
            b_x = cubic_matrix((i_p % W)[None, :], (i_n % w)[:, None], w, W)
            b_codes = tl.dot(b_y * b_x, b_grad, b_codes, input_precision=PRECISION)
        p_out = p_grad_codes + (i_b * L + first + i_n[:, None]) * Cv + i_c[None, :]
        tl.store(p_out, b_codes, mask=(i_n < h * w)[:, None] & m_c[None, :])


@triton.jit
def codebook_gradient_kernel(
    p_grad_codes,
    p_order,
    p_begin,
    p_grad_codebook,
    Cv: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """grad_codebook (V, Cv), a program a code: its positions are order[begin[v] : begin[v + 1]], ascending."""
    i_v = tl.program_id(0).to(tl.int64)
    first, last = tl.load(p_begin + i_v), tl.load(p_begin + i_v + 1)
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < Cv
    b_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_P):
        i_l = start + tl.arange(0, BLOCK_P)
        m_l = i_l < last
        i_row = tl.load(p_order + i_l, mask=m_l, other=0)
        p_row = p_grad_codes + i_row[:, None] * Cv + i_c[None, :]
        b_sum += tl.load(p_row, mask=m_l[:, None] & m_c[None, :], other=0.0)
    tl.store(p_grad_codebook + i_v * Cv + i_c, tl.sum(b_sum, 0), mask=m_c)


_OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": True}


def residual_quantize_backward(
    features: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor,
    phi_bias: torch.Tensor,
    ratio: float,
    phi_of_scale: Sequence[int],
    sizes: Sequence[Size],
    indices: torch.Tensor,
    f_hats: torch.Tensor,
    grad_f_hats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of codebook (V, Cv), phi_weight (n, Cv, Cv, 3, 3) and phi_bias (n, Cv), float32; deterministic.

    indices (B, sum of h_k w_k) int64; grad_f_hats (K, B, Cv, H, W): dLoss/d f_hat of each scale. The codes being fixed,
    features and f_hats change nothing.
    """
    K, B, Cv, H, W = grad_f_hats.shape
    (V, _), L, n = codebook.shape, indices.size(1), phi_weight.size(0)
    if B * K == 0:
        return torch.zeros_like(codebook), torch.zeros_like(phi_weight), torch.zeros_like(phi_bias)
    codebook, indices = codebook.contiguous(), indices.contiguous()
    schedule = scale_plan(indices.device, sizes, phi_of_scale if n else ())
    block = blocks(Cv)
    tiles = triton.cdiv(H * W, block["BLOCK_P"])

    grad = codebook.new_empty((K, B, H * W, Cv), dtype=torch.float32)
    suffix_sum_kernel[(tiles, B)](grad_f_hats.float().contiguous(), grad, B, H * W, K, **block, **_OPTIONS)
    grad_weight, grad_bias, grad_up = torch.zeros_like(phi_weight), torch.zeros_like(phi_bias), grad
    if n:
        up, grad_up = torch.empty_like(grad), torch.empty_like(grad)
        upsample_kernel[(tiles, B, K)](indices, codebook, schedule, up, B, H, W, L, **block, **_OPTIONS)
        chunks = min(B, _CHUNKS)
        partial_weight = grad.new_empty((n, chunks, 9, Cv, Cv))
        partial_bias = grad.new_empty((n, chunks, Cv))
        phi_gradient_kernel[(9, chunks, n)](
            grad,
            up,
            schedule,
            partial_weight,
            partial_bias,
            B,
            H,
            W,
            K,
            chunks,
            **block,
            PRECISION=PRECISION,
            **_OPTIONS,
        )
        grad_weight = partial_weight.sum(1).mul_(ratio).view(n, 3, 3, Cv, Cv).permute(0, 3, 4, 1, 2).contiguous()
        grad_bias = partial_bias.sum(1).mul_(ratio)
        turned = spatial_weight(phi_weight.flip(3, 4).transpose(1, 2))
        phi_transpose_kernel[(tiles, B, K)](
            grad, turned, schedule, grad_up, float(ratio), B, H, W, **block, PRECISION=PRECISION, **_OPTIONS
        )

    grad_codes = grad.new_empty((B, L, Cv))
    most = triton.cdiv(max(h * w for h, w in sizes), _BLOCK_N)
    upsample_transpose_kernel[(most, B, K)](
        grad_up, schedule, grad_codes, B, H, W, L, **block, BLOCK_N=_BLOCK_N, PRECISION=PRECISION, **_OPTIONS
    )
    codes, order = torch.sort(indices.flatten(), stable=True)
    begin = torch.searchsorted(codes, torch.arange(V + 1, dtype=codes.dtype, device=codes.device))
    grad_codebook = grad.new_empty((V, Cv))
    codebook_gradient_kernel[(V,)](grad_codes, order, begin, grad_codebook, **block, **_OPTIONS)
    return grad_codebook, grad_weight, grad_bias


def _case(kernel: Any, tensors: str, integers: str, Cv: int, **other: str) -> Case:
    signature = {name: other.get(name, "*fp32") for name in tensors.split()}
    signature |= dict.fromkeys(integers.split(), "i32")
    if kernel is phi_transpose_kernel:
        signature["ratio"] = "fp32"
    constexprs: dict[str, object] = {**blocks(Cv), "BLOCK_N": _BLOCK_N, "PRECISION": PRECISION}
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    return Case(kernel, signature, constexprs, _WARPS, tuple(tensors.split()))


def _cases(Cv: int) -> list[Case]:
    plan = {"p_plan": "*i32"}
    return [
        _case(suffix_sum_kernel, "p_grad p_sum", "B HW K", Cv),
        _case(
            upsample_kernel,
            "p_indices p_codebook p_plan p_up",
            "B H W L",
            Cv,
            p_indices="*i64",
            **plan,
        ),
        _case(phi_transpose_kernel, "p_grad p_weight p_plan p_grad_up", "B H W", Cv, **plan),
        _case(
            phi_gradient_kernel,
            "p_grad p_up p_plan p_partial_weight p_partial_bias",
            "B H W K chunks",
            Cv,
            **plan,
        ),
        _case(upsample_transpose_kernel, "p_grad_up p_plan p_grad_codes", "B H W L", Cv, **plan),
        _case(
            codebook_gradient_kernel,
            "p_grad_codes p_order p_begin p_grad_codebook",
            "",
            Cv,
            p_order="*i64",
            p_begin="*i64",
        ),
    ]


CASES = [case for Cv in (16, 32, 64) for case in _cases(Cv)]
