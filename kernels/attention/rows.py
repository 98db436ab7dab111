"""What happens to single rows around block-causal attention: the prologue on q and k, and what backward needs first.

With the biases and the temperature of the prologue (each may be missing),

    u = q~ / max(|q~|, 1e-12),    q~ = q + q_bias,    r = 1 / max(|k|, 1e-12)
    f = exp(min(log_scale, log 100)) · softmax_scale

scores are f · r_j · (u_i . k_j): u is rounded to the dtype of q once and k is multiplied as it is, so that f and r stay
float32 factors of a float32 product. Without log_scale u is q~ and f · r_j the softmax scale.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the parameters of its functions their types.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import Case

LOG2_E = tl.constexpr(1.4426950408889634)
_LOG2_E_REST = tl.constexpr(1.925963033500e-8)  # what rounding log2(e) to float32 leaves
MAX_LOG_TEMPERATURE = tl.constexpr(4.605170185988092)  # log 100
MAX_INVERSE_NORM = tl.constexpr(1e12)  # of F.normalize's floor of 1e-12

_BLOCK_ELEMENTS = 4096  # that a program of the kernels below takes: 32 a thread
_WARPS = 4


@triton.jit
def score_factor(p_log_scale, i_h, softmax_scale):
    """f of a head, within 2^-22: a temperature of 100 multiplies its relative error into the scores' absolute one."""
    log_scale = tl.minimum(tl.load(p_log_scale + i_h).to(tl.float32), MAX_LOG_TEMPERATURE)
    power = log_scale * LOG2_E
    rest = tl.fma(log_scale, tl.full((), LOG2_E, tl.float32), -power) + log_scale * _LOG2_E_REST
    return tl.exp2(power) * (1 + rest * 0.6931471805599453) * softmax_scale


@triton.jit
def inverse_norm(b_x):
    """1 / max(|x|, 1e-12) of float32 rows; MAX_INVERSE_NORM exactly where the floor is in force."""
    b_norm = tl.sqrt_rn(tl.sum(b_x * b_x, 1))
    # Where the norm is zero the quotient is not used.
    b_inverse = tl.div_rn(tl.full(b_norm.shape, 1.0, tl.float32), tl.where(b_norm > 0, b_norm, 1.0))
    return tl.where(b_norm > 0, tl.minimum(b_inverse, MAX_INVERSE_NORM), MAX_INVERSE_NORM)


@triton.jit
def add_bias(b_x, p_bias, i_h, D: tl.constexpr):
    """float32 rows plus the bias (H, D) of their head."""
    return b_x.to(tl.float32) + tl.load(p_bias + i_h * D + tl.arange(0, D)).to(tl.float32)[None, :]


@triton.jit
def row_pointers(p_x, i_b, i_h, i_l, stride_b, stride_h, stride_l, D: tl.constexpr):
    """Of rows i_l of (B, H, L, D), whose last axis is contiguous."""
    p_head = p_x + i_b * stride_b + i_h * stride_h
    return p_head + i_l.to(tl.int64)[:, None] * stride_l + tl.arange(0, D)[None, :]


@triton.jit
def unproject(b_grad, b_unit, b_inverse_norm):
    """Gradient of rows x from that of the unit rows x / max(|x|, 1e-12); at the floor the divisor is a constant."""
    b_along = tl.where(b_inverse_norm < MAX_INVERSE_NORM, tl.sum(b_grad * b_unit, 1), 0.0)
    return b_inverse_norm[:, None] * (b_grad - b_unit * b_along[:, None])


@triton.jit(do_not_specialize=["H", "L", "blocks"])
def key_norms_kernel(
    p_k, p_norms, H, L, blocks, k_stride_b, k_stride_h, k_stride_l, D: tl.constexpr, BLOCK_L: tl.constexpr
):
    """norms (B, H, L) = r of k (B, H, L, D)."""
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    i_l = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = i_l < L
    p_rows = row_pointers(p_k, i_bh // H, i_bh % H, i_l, k_stride_b, k_stride_h, k_stride_l, D)
    b_k = tl.load(p_rows, mask=m_l[:, None], other=0.0).to(tl.float32)
    tl.store(p_norms + i_bh * L + i_l, inverse_norm(b_k), mask=m_l)


@triton.jit(do_not_specialize=["H", "L", "blocks"])
def attention_rows_kernel(
    p_grad_out,
    p_out,
    p_q,
    p_q_bias,
    p_v_bias,
    p_query_norms,
    p_unit,
    p_delta,
    p_partial,
    H,
    L,
    blocks,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_l,
    out_stride_b,
    out_stride_h,
    out_stride_l,
    q_stride_b,
    q_stride_h,
    q_stride_l,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    NORMALIZE: tl.constexpr,
    Q_BIAS: tl.constexpr,
    V_BIAS: tl.constexpr,
    GRAD_V_BIAS: tl.constexpr,
):
    """What the backward kernels read over and over, for a block of rows.

    delta (B, H, L) = rowsum(grad_out · (out - v_bias)), which is what the rows of P · (grad_out v^T) sum to;
    unit (B, H, L, D) = u, bit for bit as in the forward pass, where it is not q itself;
    partial (B·H, blocks, D) = Σ grad_out, a share of the gradient of v_bias.
    """
    i_block = tl.program_id(0) % blocks
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_l = i_block * BLOCK_L + tl.arange(0, BLOCK_L)
    m_l = i_l < L
    p_rows = row_pointers(p_grad_out, i_b, i_h, i_l, grad_out_stride_b, grad_out_stride_h, grad_out_stride_l, D)
    b_grad = tl.load(p_rows, mask=m_l[:, None], other=0.0).to(tl.float32)
    p_rows = row_pointers(p_out, i_b, i_h, i_l, out_stride_b, out_stride_h, out_stride_l, D)
    b_out = tl.load(p_rows, mask=m_l[:, None], other=0.0).to(tl.float32)
    if V_BIAS:
        b_out -= tl.load(p_v_bias + i_h * D + tl.arange(0, D)).to(tl.float32)[None, :]
    i_row = i_bh * L + i_l
    tl.store(p_delta + i_row, tl.sum(b_grad * b_out, 1), mask=m_l)
    if GRAD_V_BIAS:
        tl.store(p_partial + (i_bh * blocks + i_block) * D + tl.arange(0, D), tl.sum(b_grad, 0))
    if NORMALIZE or Q_BIAS:
        p_rows = row_pointers(p_q, i_b, i_h, i_l, q_stride_b, q_stride_h, q_stride_l, D)
        b_q = tl.load(p_rows, mask=m_l[:, None], other=0.0).to(tl.float32)
        if Q_BIAS:
            b_q = add_bias(b_q, p_q_bias, i_h, D)
        if NORMALIZE:
            b_q *= tl.load(p_query_norms + i_row, mask=m_l, other=0.0)[:, None]
        p_rows = p_unit + i_row[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(p_rows, b_q.to(p_unit.dtype.element_ty), mask=m_l[:, None])


def key_norms(k: torch.Tensor, norms: torch.Tensor) -> None:
    """Fill norms, float32 (B, H, L) contiguous, with 1 / max(|k|, 1e-12) of k (B, H, L, D)."""
    B, H, L, D = k.shape
    blocks = triton.cdiv(L, _BLOCK_ELEMENTS // D)
    key_norms_kernel[(B * H * blocks,)](
        *(k, norms, H, L, blocks, *k.stride()[:3]),
        D=D,
        BLOCK_L=_BLOCK_ELEMENTS // D,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )


def attention_rows(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    q_bias: torch.Tensor | None,
    v_bias: torch.Tensor | None,
    out: torch.Tensor,
    query_norms: torch.Tensor | None,
    grad_v_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(u, delta) of ``attention_rows_kernel``; fills grad_v_bias (B, H, D) unless None.

    query_norms: 1 / max(|q~|, 1e-12), (B, H, L), from the forward pass; None without log_scale.
    """
    B, H, L, D = q.shape
    blocks = triton.cdiv(L, _BLOCK_ELEMENTS // D)
    prologue = q_bias is not None or query_norms is not None
    unit = q.new_empty(q.shape) if prologue else q
    delta = q.new_empty((B, H, L), dtype=torch.float32)
    partial = delta if grad_v_bias is None else q.new_empty((B, H, blocks, D), dtype=torch.float32)
    attention_rows_kernel[(B * H * blocks,)](
        *(grad_out, out, q, q if q_bias is None else q_bias, q if v_bias is None else v_bias),
        *(delta if query_norms is None else query_norms, unit, delta, partial),
        *(H, L, blocks, *grad_out.stride()[:3], *out.stride()[:3], *q.stride()[:3]),
        D=D,
        BLOCK_L=_BLOCK_ELEMENTS // D,
        NORMALIZE=query_norms is not None,
        Q_BIAS=q_bias is not None,
        V_BIAS=v_bias is not None,
        GRAD_V_BIAS=grad_v_bias is not None,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )
    if grad_v_bias is not None:
        torch.sum(partial, 2, out=grad_v_bias)
    return unit, delta


def strides(*names: str) -> dict[str, str]:
    """The types of the strides of tensors (B, H, L, D), for ``Case``."""
    return {f"{name}_stride_{axis}": "i32" for name in names for axis in "bhl"}


def _case(
    kernel: triton.JITFunction, dtype: str, tensors: str, floats: str, scalars: dict[str, str], D: int, **flags: object
) -> Case:
    pointers = {f"p_{name}": f"*{dtype}" for name in tensors.split()} | {
        f"p_{name}": "*fp32" for name in floats.split()
    }
    aligned = (*pointers, *(name for name in scalars if "_stride_" in name))
    return Case(kernel, pointers | scalars, {"D": D, "BLOCK_L": _BLOCK_ELEMENTS // D, **flags}, _WARPS, aligned)


_SIZES = {"H": "i32", "L": "i32", "blocks": "i32"}
CASES = [
    _case(key_norms_kernel, dtype, "k", "norms", _SIZES | strides("k"), D=D)
    for dtype, D in (("bf16", 64), ("fp32", 128))
]
CASES += [
    _case(
        attention_rows_kernel,
        dtype,
        "grad_out out q q_bias v_bias unit",
        "query_norms delta partial",
        _SIZES | strides("grad_out", "out", "q"),
        D=D,
        NORMALIZE=prologue,
        Q_BIAS=prologue,
        V_BIAS=prologue,
        GRAD_V_BIAS=prologue,
    )
    for dtype, D, prologue in (("bf16", 64, True), ("bf16", 64, False), ("fp32", 128, True))
]
