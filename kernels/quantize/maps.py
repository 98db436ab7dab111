"""What the quantizer's kernels share: bicubic and area interpolation and the convolution phi, on blocks of positions.

Maps are channels-last, a row of channels for each position, positions row-major. Interpolation weights are computed
where they are needed: source coordinates are ratios of small integers, so their integer parts are exact.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the parameters of its functions their types.)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from varkern._kept import kept

from .. import Case

Size = tuple[int, int]

MAX_CHANNELS = 64  # the widest code whose blocks stay in registers

# 3 x tf32: each float32 operand split in two tf32 terms, the product of the two small ones left out; error about 2^-20.
PRECISION = "tf32x3"

CASES: list[Case] = []  # these are functions of other modules' kernels


def blocks(Cv: int) -> dict[str, int]:
    """The blocks of codes of width Cv: channels (a matrix product needs 16) and positions of a map at a time."""
    BLOCK_C = max(16, triton.next_power_of_2(Cv))
    return {"Cv": Cv, "BLOCK_C": BLOCK_C, "BLOCK_P": 64 if BLOCK_C <= 32 else 32}


def spatial_weight(phi_weight: torch.Tensor) -> torch.Tensor:
    """phi_weight (n, Cv out, Cv in, 3, 3) -> (n, 9, Cv in, Cv out), contiguous: the matrix of each of the nine taps."""
    n, Cv = phi_weight.shape[:2]
    return phi_weight.permute(0, 3, 4, 2, 1).reshape(n, 9, Cv, Cv).contiguous()


@kept
def plan(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Integers that a kernel reads, int32 on a device."""
    return torch.tensor(rows, dtype=torch.int32, device=device)


def scale_plan(device: torch.device, sizes: Sequence[Size], phi_of_scale: Sequence[int]) -> torch.Tensor:
    """(K, 4): height, width, first position among all scales, and phi of each scale."""
    rows, first = [], 0
    for k, (h, w) in enumerate(sizes):
        rows.append((h, w, first, phi_of_scale[k] if phi_of_scale else 0))
        first += h * w
    return plan(device, tuple(rows))


@triton.jit
def cubic_source(i, n, N):
    """Of output i of N: the cell of n inputs at or before it, and how far behind that cell it lies, in [0, 1)."""
    doubled = (2 * i + 1) * n - N  # of the source coordinate (i + 1/2) n / N - 1/2, in units of 1 / 2N
    i_first = (doubled + 2 * N) // (2 * N) - 1
    return i_first, (doubled - i_first * 2 * N).to(tl.float32) / (2 * N).to(tl.float32)


@triton.jit
def cubic_weight(t, tap):
    """Weight of tap 0..3 for an output t behind tap 1: the cubic convolution kernel (Keys, 1981), a = -0.75."""
    d = tl.abs(t + (1 - tap))
    near = (1.25 * d - 2.25) * d * d + 1.0
    far = ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0
    return tl.where(d <= 1, near, far)


@triton.jit
def load_codes(
    p_rows, p_index, i_pos, m_pos, row_stride, channel_stride, Cv, BLOCK_C: tl.constexpr, INDEXED: tl.constexpr
):
    """Code vectors (P, C) at positions: rows of a codebook by index (its low 32 bits), or the rows of a map itself."""
    i_c = tl.arange(0, BLOCK_C)
    if INDEXED:
        i_row = tl.load(p_index + i_pos, mask=m_pos, other=0) & 0xFFFFFFFF
    else:
        i_row = i_pos.to(tl.int64)
    p_block = p_rows + i_row[:, None] * row_stride + i_c[None, :] * channel_stride
    return tl.load(p_block, mask=m_pos[:, None] & (i_c < Cv)[None, :], other=0.0)


@triton.jit
def bicubic(
    p_rows,
    p_index,
    i_p,
    m_p,
    h,
    w,
    H,
    W,
    row_stride,
    channel_stride,
    Cv,
    BLOCK_C: tl.constexpr,
    INDEXED: tl.constexpr,
):
    """Positions i_p of the (H, W) bicubic upsampling of a (h, w) map of codes, (P, C); borders repeat."""
    y, t_y = cubic_source(i_p // W, h, H)
    x, t_x = cubic_source(i_p % W, w, W)
    b_up = tl.zeros((i_p.shape[0], BLOCK_C), tl.float32)
    for tap_y in range(4):
        i_row = tl.minimum(tl.maximum(y + (tap_y - 1), 0), h - 1) * w
        b_line = tl.zeros((i_p.shape[0], BLOCK_C), tl.float32)
        for tap_x in tl.static_range(4):
            i_pos = i_row + tl.minimum(tl.maximum(x + (tap_x - 1), 0), w - 1)
            b_code = load_codes(p_rows, p_index, i_pos, m_p, row_stride, channel_stride, Cv, BLOCK_C, INDEXED)
            b_line += cubic_weight(t_x, tap_x)[:, None] * b_code
        b_up += cubic_weight(t_y, tap_y)[:, None] * b_line
    return b_up


@triton.jit
def bin_start(i, n, N):
    """First of the N cells that adaptive average pooling to n cells puts into cell i."""
    return i * N // n


@triton.jit
def bin_end(i, n, N):
    """One past the last cell of that bin; neighbouring bins overlap where n does not divide N."""
    return ((i + 1) * N + n - 1) // n


@triton.jit
def area(
    p_map,
    i_n,
    h,
    w,
    H,
    W,
    first,
    last,
    position_stride,
    channel_stride,
    Cv,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Positions i_n of the (h, w) area-downsampling of a (H, W) map, (N, C); its bins lie in [first, last).

    A product with the 0-1 matrix of the bins, and one division. Split into three tf32 terms a float32 number is exact.
    """
    i_c = tl.arange(0, BLOCK_C)
    y_first, y_last = bin_start(i_n // w, h, H), bin_end(i_n // w, h, H)
    x_first, x_last = bin_start(i_n % w, w, W), bin_end(i_n % w, w, W)
    b_sum = tl.zeros((i_n.shape[0], BLOCK_C), tl.float32)
    STEP: tl.constexpr = BLOCK_P // 2  # the matrix is made in registers: half a block at a time
    for start in range(first, last, STEP):
        i_p = start + tl.arange(0, STEP)
        p_block = p_map + i_p[:, None] * position_stride + i_c[None, :] * channel_stride
        b_map = tl.load(p_block, mask=(i_p < last)[:, None] & (i_c < Cv)[None, :], other=0.0)
        y, x = (i_p // W)[None, :], (i_p % W)[None, :]
        m_bin = (y >= y_first[:, None]) & (y < y_last[:, None]) & (x >= x_first[:, None]) & (x < x_last[:, None])
        b_bin = m_bin.to(tl.float32)
        for _ in tl.static_range(3):
            b_term = (b_map.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
            b_sum = tl.dot(b_bin, b_term, b_sum, input_precision="tf32")
            b_map -= b_term
    return b_sum / ((y_last - y_first) * (x_last - x_first)).to(tl.float32)[:, None]


@triton.jit
def convolution(
    p_map,
    p_weight,
    i_p,
    H,
    W,
    Cv,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Positions i_p of the 3x3 convolution of a channels-last map with weight (9, Cv in, Cv out), zero-padded: (P, C).

    Position q is read from row q of p_map, which may begin before the map where the caller keeps a part of it only.
    """
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < Cv
    y, x = i_p // W, i_p % W
    b_conv = tl.zeros((i_p.shape[0], BLOCK_C), tl.float32)
    for tap in tl.range(0, 9, num_stages=2 if BLOCK_C <= 32 else 1):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        m_p = (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        i_q = i_p + dy * W + dx
        b_map = tl.load(p_map + i_q[:, None] * Cv + i_c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0)
        p_tap = p_weight + (tap * Cv + i_c[:, None]) * Cv + i_c[None, :]
        b_weight = tl.load(p_tap, mask=m_c[:, None] & m_c[None, :], other=0.0)
        b_conv = tl.dot(b_map, b_weight, b_conv, input_precision=PRECISION)
    return b_conv
