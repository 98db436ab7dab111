"""The schedule of token maps: side lengths p_1 < ... < p_K, coarse to fine."""

import math
import operator
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

Size = tuple[int, int]


def as_sizes(patch_nums: Sequence[int | Sequence[int]]) -> list[Size]:
    """(h, w) of each scale; an int stands for a square map.

    Raises ValueError unless there are at least two scales and each is larger than the one before.
    """
    sizes: list[Size] = []
    try:
        for p in patch_nums:
            h, w = (operator.index(side) for side in (p if isinstance(p, Sequence) else (p, p)))
            sizes.append((h, w))
    except (TypeError, ValueError):
        raise TypeError(f"patch_nums must be integers or (height, width) pairs of them, got {patch_nums!r}") from None
    grows = all(a[0] <= b[0] and a[1] <= b[1] and a != b for a, b in pairwise(sizes))
    if len(sizes) < 2 or min(min(s) for s in sizes) < 1 or not grows:
        raise ValueError(
            f"patch_nums must be at least two positive sizes, each larger than the one before, such as "
            f"(1, 2, 3, 4); got {tuple(patch_nums)}"
        )
    return sizes


def as_patch_nums(patch_nums: Sequence[int]) -> tuple[int, ...]:
    """The schedule as a tuple of ints; raises ValueError where it is not strictly increasing."""
    as_sizes(patch_nums)
    return tuple(int(p) for p in patch_nums)


def patch_nums_of_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Side lengths of square maps with these numbers of tokens; raises ValueError where one is no square."""
    sides = tuple(math.isqrt(n) for n in lengths)
    for side, n in zip(sides, lengths, strict=True):
        if side * side != n:
            raise ValueError(f"a square token map has a square number of tokens, got {n}")
    return sides


def phi_ticks(num_phis: int) -> tuple[float, ...]:
    """The position in [0, 1] of each of ``num_phis`` residual convolutions."""
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    return tuple(np.linspace(margin, 1 - margin, num_phis).tolist())


def nearest_tick(position: float, ticks: Sequence[float]) -> int:
    """Which residual convolution serves the scale at ``position`` = k / (K - 1) in [0, 1]: the first of the nearest.

    Half-way cases occur in the 256 px schedule, so both the ticks and the distances are float64, the ticks those of
    ``numpy.linspace``: another rounding would pick another convolution. Plain numbers, which torch.compile reads as
    constants.
    """
    distances = [abs(tick - position) for tick in ticks]
    return distances.index(min(distances))


def phi_index(position: float, num_phis: int) -> int:
    """Which of ``num_phis`` residual convolutions serves the scale at ``position``; see `nearest_tick`."""
    return nearest_tick(position, phi_ticks(num_phis))
