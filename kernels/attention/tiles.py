"""How block-causal attention is cut into tiles: on the host, once for a schedule, from nothing but its lengths.

A program that owns the queries [start, stop) reads the keys below the end of its last row's scale; one that owns the
keys [start, stop) reads the queries from the begin of its first key's scale on. Tiles that end where a scale ends have
fewer pairs to compute that nobody sees, so cuts are chosen among the ends of scales and whole blocks, at least cost.
"""

from __future__ import annotations

import functools
import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from varkern._kept import kept

from .. import Case

Tiles = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled: a program takes BLOCK_M queries and BLOCK_N keys at a time, one of the two its own."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; the compiler, left alone, spends all that it may

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N}

    def meta(self) -> dict[str, int]:
        """What a launch names beside the arguments."""
        meta = {**self.blocks(), "num_warps": self.num_warps, "num_stages": self.num_stages}
        return meta if self.max_registers is None else meta | {"maxnreg": self.max_registers}


Configs = Mapping[tuple[int, int], Config]  # by bytes of an element and D


def choose(configs: Configs, hopper: Configs, x: torch.Tensor) -> Config:
    """The configuration for rows like x's: of ``hopper`` on its GPUs where it has one, else of ``configs``."""
    key = (x.element_size(), x.size(-1))
    return hopper[key] if key in hopper and x.is_cuda and _is_hopper(x.device) else configs[key]


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


# What starting and ending a program costs, in blocks of the other side that it would read in that time.
_OVERHEAD = 1


def _cut(lengths: tuple[int, ...], block: int, cost: Callable[[int, int], int]) -> Tiles:
    """The cheapest division of [0, L) into tiles (start, stop) of at most ``block`` rows.

    A tile ends at the end of a scale or has ``block`` rows, so that few positions can be reached at all. Dynamic
    program over them in ascending order: a tile leads to a later one, so what is least is known when its turn comes.
    """
    ends = tuple(accumulate(lengths))
    L = ends[-1]
    best = {0: (0, 0)}  # position: least cost up to it, where the tile before it starts
    waiting = [0]
    while (start := heapq.heappop(waiting)) < L:
        within = ends[bisect_right(ends, start) : bisect_left(ends, start + block)]
        for stop in (*within, min(start + block, L)):
            total = best[start][0] + _OVERHEAD + cost(start, stop)
            if stop not in best:
                heapq.heappush(waiting, stop)
            if stop not in best or total < best[stop][0]:
                best[stop] = (total, start)
    tiles = []
    stop = L
    while stop:
        start = best[stop][1]
        tiles.append((start, stop))
        stop = start
    return tuple(reversed(tiles))


@functools.lru_cache(maxsize=256)
def query_tiles(lengths: tuple[int, ...], BLOCK_M: int, BLOCK_N: int) -> Tiles:
    """Tiles of at most BLOCK_M queries, which read keys by BLOCK_N, the last queries (and most work) first."""
    ends = tuple(accumulate(lengths))
    tiles = _cut(lengths, BLOCK_M, lambda _, stop: -(-ends[bisect_left(ends, stop)] // BLOCK_N))
    return tiles[::-1]


@functools.lru_cache(maxsize=256)
def key_tiles(lengths: tuple[int, ...], BLOCK_M: int, BLOCK_N: int) -> Tiles:
    """Tiles of at most BLOCK_N keys, which read queries by BLOCK_M, the first keys (and most work) first."""
    ends = tuple(accumulate(lengths))
    begins = (0, *ends)
    return _cut(lengths, BLOCK_N, lambda start, _: -(-(ends[-1] - begins[bisect_right(ends, start)]) // BLOCK_M))


@kept
def to_device(tiles: Tiles, device: torch.device) -> torch.Tensor:
    """Tiles as kernels read them, int32 (number, 2)."""
    return torch.tensor(tiles, dtype=torch.int32, device=device)


@kept
def scale_bounds(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 (2, L): where the scale of each row begins and ends."""
    sizes = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    ends = sizes.cumsum(0)
    bounds = torch.stack((ends - sizes, ends)).to(torch.int32)
    return bounds.repeat_interleave(sizes, dim=1, output_size=sum(lengths)).to(device)


CASES: list[Case] = []  # there is no kernel here


def cases(configs: Configs, hopper: Configs, case: Callable[[str, int, bool, Config], Case]) -> list[Case]:
    """What a kernel that loops over tiles is compiled for: dtypes at the width of VAR, other widths in bfloat16."""
    rows = []
    for dtype, D in (("bf16", 64), ("fp16", 64), ("fp32", 64), ("bf16", 32), ("bf16", 128)):
        key = (4 if dtype == "fp32" else 2, D)
        for prologue in (True, False):
            rows.append(case(dtype, D, prologue, configs[key]))
            if key in hopper:
                rows.append(replace(case(dtype, D, prologue, hopper[key]), architectures=(90,)))
    return rows
