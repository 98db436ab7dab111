"""What the benchmarks share: providers measured in turn, round by round, and what is recorded beside a time.

    pytest benchmarks --benchmark-json=out.json

Machines drift: another process, a clock that steps down. So the providers of one comparison are not timed one after
the other but interleaved, one call each in every round, in an order that rotates, and what is compared is the median
of the ratios within the rounds. Slow calls get fewer rounds.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import varkern

ROUNDS, WARM_UP = 60, 5
MIN_ROUNDS, MAX_SECONDS = 5, 15.0  # of one comparison
MIN_SECONDS = 1e-3  # of one sample: shorter calls are repeated


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    # Files named on the command line are collected anyway, whatever they are called.
    wanted = file_path.match("bench_*.py") and not parent.session.isinitpath(file_path)
    return pytest.Module.from_parent(parent, path=file_path) if wanted else None


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def _sample(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds a call."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats


def interleave(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
    """Seconds a call of each provider, one sample each in every round."""
    repeats, round_seconds = {}, 0.0
    for name, call in calls.items():
        first = _sample(call, 1, device)
        for _ in range(WARM_UP if first < 0.1 else 0):
            call()
        estimate = max(_sample(call, 3 if first < 0.1 else 1, device), 1e-7)
        repeats[name] = max(1, round(MIN_SECONDS / estimate))
        round_seconds += estimate * repeats[name]
    names, seconds = list(calls), {name: [] for name in calls}
    for i in range(min(ROUNDS, max(MIN_ROUNDS, round(MAX_SECONDS / round_seconds)))):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(_sample(calls[name], repeats[name], device))
    return seconds


@pytest.fixture
def compare(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """Time providers against the first of them, after their results were checked, and record a row for each.

    ``compare(calls, moved, flop, **facts)``: the least number of bytes that the computation has to move, and of
    floating-point operations that it has to do (0: they do not matter). The row that pytest-benchmark shows is the
    last provider's; ``extra_info["providers"]`` has them all.
    """

    def run(calls: dict[str, Callable[[], Any]], moved: int, flop: float = 0, **facts: Any) -> None:
        seconds = interleave(calls, device)
        baseline = seconds[next(iter(calls))]
        rows = {}
        for name, samples in seconds.items():
            low, middle, high = statistics.quantiles(samples, n=4)
            ratio = statistics.median(b / s for b, s in zip(baseline, samples, strict=True))
            rows[name] = {
                "median_s": middle,
                "quartiles_s": [low, high],
                "speedup": ratio,
                "gb_s": moved / middle / 1e9,
                "gflop_s": flop / middle / 1e9,
            }
            rates = f"{moved / middle / 1e9:7.1f} GB/s, {flop / middle / 1e9:8.1f} GFLOP/s"
            print(f"\n{name:>14}: {middle * 1e6:9.1f} µs, {rates}, {ratio:5.2f}x", end="")
        versions = {"varkern": varkern.__version__, "torch": torch.__version__, "python": platform.python_version()}
        benchmark.extra_info.update(
            facts,
            device=device_name(device),
            bytes=moved,
            flop=flop,
            providers=rows,
            versions=versions,
            rounds=len(baseline),
        )
        slow = rows[name]["median_s"] > 0.1
        benchmark.pedantic(calls[name], rounds=3 if slow else 10, iterations=1 if slow else 5, warmup_rounds=1)

    return run
