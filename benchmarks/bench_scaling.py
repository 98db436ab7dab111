"""How the cost of a generation grows: with the batch, the depth and the resolution, for the reference and for varkern.

On a CPU small models, d2 to d8 with a tokenizer of 32 channels; on a GPU the published ones. One axis is varied at a
time; facts name it. Here the sampling is plain and the result is checked by its tokens, as in bench_generate.py.
"""

from __future__ import annotations

from typing import Any

import models
import pytest
import shapes
import torch
from bench_generate import check_all, generation
from measure import settings

CPU_DEPTHS, CUDA_DEPTHS = [2, 4, 8], [8, 12, 16, 20, 24, 30]
CPU_BATCHES, CUDA_BATCHES = [1, 2, 4, 8], [1, 2, 4, 8, 16, 32, 64, 128, 256]
if settings.full:
    CPU_BATCHES, CPU_DEPTHS = [1, 2, 4, 8, 16, 32, 64], [2, 3, 4, 6, 8, 12]
if settings.smoke:
    CPU_DEPTHS = CUDA_DEPTHS = [1]
    CPU_BATCHES = CUDA_BATCHES = [2]
# Sizes for a GPU are no benchmarks where there is none: they would be listed as not run when the time is up.
BATCHES = sorted({*CPU_BATCHES, *(CUDA_BATCHES if torch.cuda.is_available() else ())})
DEPTHS = sorted({*CPU_DEPTHS, *(CUDA_DEPTHS if torch.cuda.is_available() else ())})
SCHEDULES = {"64px": shapes.PATCH_NUMS} if settings.smoke else shapes.SCHEDULES


def run(compare: Any, device: torch.device, depth: int, batch: int, schedule: str, **axis: Any) -> None:
    ch = 32 if device.type == "cpu" else 160
    var = models.build(depth, device, SCHEDULES[schedule], ch=ch)
    calls = {"reference": generation(var, batch, "reference"), "varkern": generation(var, batch, None)}
    shape = check_all(calls, device)
    moved, flop = models.generation_work(var, batch, 4 if device.type == "cpu" else 2)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    facts = {"batch": batch, "depth": depth, "pixels": shape[-1], **axis}
    compare(calls, moved, flop, dtype=dtype, shape=shape, **facts)


def only(device: torch.device, value: int, cpu: list[int], cuda: list[int]) -> None:
    if value not in (cpu if device.type == "cpu" else cuda):
        pytest.skip("a size for another device")


@pytest.mark.benchmark(group="generation against batch")
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"B{batch}")
def test_batch(compare: Any, device: torch.device, batch: int) -> None:
    only(device, batch, CPU_BATCHES, CUDA_BATCHES)
    depth = CPU_DEPTHS[0] if device.type == "cpu" else 16
    run(compare, device, 1 if settings.smoke else depth, batch, next(iter(SCHEDULES)), axis="batch")


@pytest.mark.benchmark(group="generation against depth")
@pytest.mark.parametrize("depth", DEPTHS, ids=lambda depth: f"d{depth}")
def test_depth(compare: Any, device: torch.device, depth: int) -> None:
    only(device, depth, CPU_DEPTHS, CUDA_DEPTHS)
    run(compare, device, depth, 1 if device.type == "cpu" or settings.smoke else 8, next(iter(SCHEDULES)), axis="depth")


@pytest.mark.benchmark(group="generation against resolution")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resolution(compare: Any, device: torch.device, schedule: str) -> None:
    depth = CPU_DEPTHS[0] if device.type == "cpu" or settings.smoke else 16
    run(compare, device, depth, 1, schedule, axis="pixels")
