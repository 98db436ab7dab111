"""Adaptive layer normalisation (AdaLN), forward and backward, after Peebles and Xie (arXiv 2212.09748, section 3.2)."""

# mypy: disallow-untyped-defs=False
# (Triton gives the parameters of its functions their types.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import Case

MAX_C = 8192  # a wider row spills registers in the backward kernel; the widest VAR has 2304 channels

# Chunks and channels that one program of sum_chunks_kernel adds at a time.
_SUM_BLOCK_CHUNKS, _SUM_BLOCK_C = 16, 64


def _row_meta(C: int) -> tuple[int, int]:
    """The block that holds a row and the warps that share it: at most 16 elements a thread."""
    BLOCK_C = triton.next_power_of_2(C)
    return BLOCK_C, 4 if BLOCK_C <= 2048 else 8 if BLOCK_C <= 4096 else 16


@triton.jit(do_not_specialize=["rows", "L"])
def modulated_layer_norm_forward_kernel(
    p_x,
    p_scale,
    p_shift,
    p_out,
    p_statistics,
    rows,
    L,
    C,
    x_stride_b,
    x_stride_l,
    scale_stride_b,
    shift_stride_b,
    eps,
    BLOCK_C: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """y = (x - mean) · rstd · (1 + scale) + shift, rstd = (var + eps)^-1/2; a program computes one row of C.

    x (B, L, C), scale and shift (B, C), out (B, L, C) contiguous, statistics (2, B·L) = mean, rstd.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_l = i_row // L, i_row % L
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < C

    b_x = tl.load(p_x + i_b * x_stride_b + i_l * x_stride_l + i_c, mask=m_c, other=0.0).to(tl.float32)
    b_scale = tl.load(p_scale + i_b * scale_stride_b + i_c, mask=m_c, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + i_b * shift_stride_b + i_c, mask=m_c, other=0.0).to(tl.float32)

    mean = tl.sum(b_x, 0) / C
    b_centred = tl.where(m_c, b_x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(b_centred * b_centred, 0) / C + eps)
    b_out = b_centred * rstd * (1 + b_scale) + b_shift

    tl.store(p_out + i_row * C + i_c, b_out.to(p_out.dtype.element_ty), mask=m_c)
    if STATISTICS:
        tl.store(p_statistics + i_row, mean)
        tl.store(p_statistics + rows + i_row, rstd)


@triton.jit(do_not_specialize=["L", "chunks", "rows_per_chunk"])
def modulated_layer_norm_backward_kernel(
    p_grad_out,
    p_x,
    p_scale,
    p_statistics,
    p_grad_x,
    p_workspace,
    L,
    C,
    chunks,
    rows_per_chunk,
    grad_out_stride_b,
    grad_out_stride_l,
    x_stride_b,
    x_stride_l,
    scale_stride_b,
    BLOCK_C: tl.constexpr,
):
    """With n = (x - mean) · rstd and g = grad_out · (1 + scale): grad_x = rstd · (g - mean(g) - n · mean(g · n)).

    A program takes one chunk of consecutive rows of one batch element and also writes its share of
    grad_scale = Σ grad_out · n and grad_shift = Σ grad_out to workspace (2, B, chunks, C).
    """
    i_chunk = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    B = tl.num_programs(1).to(tl.int64)
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < C

    b_gain = 1 + tl.load(p_scale + i_b * scale_stride_b + i_c, mask=m_c, other=0.0).to(tl.float32)
    b_grad_scale = tl.zeros((BLOCK_C,), tl.float32)
    b_grad_shift = tl.zeros((BLOCK_C,), tl.float32)

    first = i_chunk * rows_per_chunk
    for i_l in range(first, tl.minimum(first + rows_per_chunk, L)):
        i_row = i_b * L + i_l
        b_x = tl.load(p_x + i_b * x_stride_b + i_l * x_stride_l + i_c, mask=m_c, other=0.0).to(tl.float32)
        p_g = p_grad_out + i_b * grad_out_stride_b + i_l * grad_out_stride_l + i_c
        b_g = tl.load(p_g, mask=m_c, other=0.0).to(tl.float32)
        mean = tl.load(p_statistics + i_row)
        rstd = tl.load(p_statistics + B * L + i_row)

        b_normed = (b_x - mean) * rstd
        b_grad_scale += b_g * b_normed
        b_grad_shift += b_g
        b_g *= b_gain
        # Beyond C b_g is zero, so that the sums need no mask of their own.
        b_grad_x = rstd * (b_g - tl.sum(b_g, 0) / C - b_normed * (tl.sum(b_g * b_normed, 0) / C))
        tl.store(p_grad_x + i_row * C + i_c, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_c)

    p_partial = p_workspace + (i_b * chunks + i_chunk) * C + i_c
    tl.store(p_partial, b_grad_scale, mask=m_c)
    tl.store(p_partial + B * chunks * C, b_grad_shift, mask=m_c)


@triton.jit(do_not_specialize=["chunks"])
def sum_chunks_kernel(
    p_workspace, p_grad_scale, p_grad_shift, C, chunks, BLOCK_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """grad_scale, grad_shift (B, C) = Σ over chunks of workspace (2, B, chunks, C), always in the same order."""
    i_b = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0).to(tl.int64)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = i_c < C

    b_grad_scale = tl.zeros((BLOCK_CHUNKS, BLOCK_C), tl.float32)
    b_grad_shift = tl.zeros((BLOCK_CHUNKS, BLOCK_C), tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        i_chunk = first + tl.arange(0, BLOCK_CHUNKS)
        m_chunk = (i_chunk[:, None] < chunks) & m_c[None, :]
        p_partial = p_workspace + (i_b * chunks + i_chunk[:, None]) * C + i_c[None, :]
        b_grad_scale += tl.load(p_partial, mask=m_chunk, other=0.0)
        b_grad_shift += tl.load(p_partial + B * chunks * C, mask=m_chunk, other=0.0)
    tl.store(p_grad_scale + i_b * C + i_c, tl.sum(b_grad_scale, 0).to(p_grad_scale.dtype.element_ty), mask=m_c)
    tl.store(p_grad_shift + i_b * C + i_c, tl.sum(b_grad_shift, 0).to(p_grad_shift.dtype.element_ty), mask=m_c)


def modulated_layer_norm_forward(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor | None,
    eps: float,
) -> None:
    """Fill out (B, L, C) and, unless None, statistics float32 (2, B, L); the last axes are contiguous."""
    B, L, C = x.shape
    BLOCK_C, num_warps = _row_meta(C)
    modulated_layer_norm_forward_kernel[(B * L,)](
        x,
        scale,
        shift,
        out,
        out if statistics is None else statistics,
        B * L,
        L,
        C,
        x.stride(0),
        x.stride(1),
        scale.stride(0),
        shift.stride(0),
        eps,
        BLOCK_C=BLOCK_C,
        STATISTICS=statistics is not None,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )


def modulated_layer_norm_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    statistics: torch.Tensor,
    grad_x: torch.Tensor,
    grad_scale: torch.Tensor,
    grad_shift: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """Fill grad_x (B, L, C) and grad_scale, grad_shift (B, C), each contiguous and rounded to its own dtype.

    workspace: float32 (2, B, chunks, C), scratch; the sums depend on the number of chunks and on nothing else.
    """
    B, L, C = x.shape
    chunks = workspace.size(2)
    BLOCK_C, num_warps = _row_meta(C)
    modulated_layer_norm_backward_kernel[(chunks, B)](
        grad_out,
        x,
        scale,
        statistics,
        grad_x,
        workspace,
        L,
        C,
        chunks,
        triton.cdiv(L, chunks),
        grad_out.stride(0),
        grad_out.stride(1),
        x.stride(0),
        x.stride(1),
        scale.stride(0),
        BLOCK_C=BLOCK_C,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    sum_chunks_kernel[(B, triton.cdiv(C, _SUM_BLOCK_C))](
        workspace,
        grad_scale,
        grad_shift,
        C,
        chunks,
        BLOCK_CHUNKS=_SUM_BLOCK_CHUNKS,
        BLOCK_C=_SUM_BLOCK_C,
        num_warps=4,
        enable_fp_fusion=True,
    )


_FORWARD = {"rows": "i32", "L": "i32", "C": "i32", "x_stride_b": "i32", "x_stride_l": "i32"}
_FORWARD |= {"scale_stride_b": "i32", "shift_stride_b": "i32", "eps": "fp32"}
_BACKWARD = {"L": "i32", "C": "i32", "chunks": "i32", "rows_per_chunk": "i32"}
_BACKWARD |= {"grad_out_stride_b": "i32", "grad_out_stride_l": "i32", "x_stride_b": "i32", "x_stride_l": "i32"}
_BACKWARD |= {"scale_stride_b": "i32"}


_STRIDES = tuple(name for name in (*_FORWARD, *_BACKWARD) if "_stride_" in name)


def _cases(dtype: str, C: int) -> list[Case]:
    BLOCK_C, num_warps = _row_meta(C)
    forward = dict.fromkeys(("p_x", "p_scale", "p_shift", "p_out"), f"*{dtype}") | {"p_statistics": "*fp32"}
    backward = dict.fromkeys(("p_grad_out", "p_x", "p_scale", "p_grad_x"), f"*{dtype}")
    backward |= {"p_statistics": "*fp32", "p_workspace": "*fp32"}
    return [
        Case(
            modulated_layer_norm_forward_kernel,
            forward | _FORWARD,
            {"BLOCK_C": BLOCK_C, "STATISTICS": True},
            num_warps,
            aligned=(*forward, "C", *_STRIDES),
        ),
        Case(
            modulated_layer_norm_backward_kernel,
            backward | _BACKWARD,
            {"BLOCK_C": BLOCK_C},
            num_warps,
            aligned=(*backward, "C", *_STRIDES),
        ),
    ]


CASES = [case for dtype in ("bf16", "fp16", "fp32") for C in (1024, 1920, 2304, MAX_C) for case in _cases(dtype, C)]
CASES += [
    Case(
        sum_chunks_kernel,
        {"p_grad_scale": f"*{dtype}", "p_grad_shift": f"*{dtype}", "p_workspace": "*fp32", "C": "i32", "chunks": "i32"},
        {"BLOCK_CHUNKS": _SUM_BLOCK_CHUNKS, "BLOCK_C": _SUM_BLOCK_C},
        num_warps=4,
        aligned=("p_grad_scale", "p_grad_shift", "p_workspace", "C"),
    )
    for dtype in ("bf16", "fp32")
]
