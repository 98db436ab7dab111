"""How a benchmark is timed: providers in turn, round by round, beside what the machine can do at that moment.

Machines drift: another process, a clock that steps down. So the providers of one comparison are not timed one after
the other but interleaved, one sample each in every round, in an order that rotates, and a speed-up is the median of the
ratios within the rounds. Slow calls get fewer rounds.

A provider other than varkern that the GPU's memory does not suffice for costs its own row alone: ``out_of_memory``
takes its place among the calls.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from varkern.engine import clear_graphs
from varkern.ops._precision import full_float32

Call = Callable[[], Any]

ROUNDS, WARM_UP = 60, 5
MIN_ROUNDS = 5  # 3 where a round takes longer than SLOW_ROUND
SLOW_ROUND, SLOW_CALL = 5.0, 1.0  # seconds
MIN_SECONDS = 1e-3  # of one sample: shorter calls are repeated
L2_BYTES = 256 << 20  # more than any GPU's second-level cache


@dataclass
class Settings:
    """What the command line asked for; set before the benchmarks are imported, so that their tables may depend on it.

    smoke: tiny shapes, checked and called once. full: more shapes, more rounds. compile: torch.compile as a provider.
    """

    smoke: bool = False
    full: bool = False
    compile: bool = os.environ.get("VARKERN_BENCH_COMPILE") == "1"
    rows: Path | None = None
    deadline: float = float("inf")  # of time.time(): what has not begun by then is not run

    @property
    def seconds(self) -> float:
        """Of one comparison."""
        return 15.0 if self.full else 2.0


settings = Settings()
_checks = contextlib.ExitStack()


def begin_checks() -> None:
    """Until the next measurement, or ``end_checks``, a GPU computes float32 in full: TF32 is no measure of a result."""
    if torch.cuda.is_available():
        _checks.enter_context(full_float32())


def end_checks() -> None:
    """From here on as PyTorch does left alone: so people run it, and so it is timed."""
    _checks.close()


def remember(line: dict[str, Any]) -> None:
    """Written at once: what was measured before a crash is not lost."""
    if settings.rows is not None:
        with settings.rows.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")


_inside: list[dict[str, str]] = []


def float32_settings() -> dict[str, str]:
    """How a GPU computes in float32 as PyTorch is set now: "tf32", "ieee", or "none" where that is left to PyTorch."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):
        found = {"convolutions": cudnn.conv.fp32_precision, "products": matmul.fp32_precision}
    else:
        flags = {"convolutions": cudnn.allow_tf32, "products": matmul.allow_tf32}
        found = {name: "tf32" if flag else "ieee" for name, flag in flags.items()}
    with contextlib.suppress(RuntimeError):  # where the newer switches say what it has no word for
        found["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    return found


def note_float32() -> None:
    """For what switches within the call that is timed: a row is recorded with what held in there."""
    _inside[:] = [float32_settings()]


class Short(Exception):
    """The memory of the device did not suffice for a provider that is not varkern's."""


def out_of_memory() -> None:
    """Stands among the calls for one that the memory did not suffice for."""
    raise Short


def spared(calls: dict[str, Call], name: str) -> Any:
    """The result of a provider; raises Short where the memory does not suffice, and puts ``out_of_memory`` for it.

    varkern's own error is passed on: that is a failure.
    """
    try:
        return calls[name]()
    except torch.cuda.OutOfMemoryError:
        if name.startswith("varkern"):
            raise
    # Out of the handler, since the error holds the frames of the failed call, and these its tensors.
    calls[name] = out_of_memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise Short


def results_of(calls: dict[str, Call]) -> dict[str, Any]:
    """What each provider returns, called once, to be checked; without those that are out of memory.

    Whatever else a peer raises is recorded as a failure, and it leaves ``calls``; what the baseline or varkern raises
    is passed on.
    """
    found, first = {}, next(iter(calls))
    for name in list(calls):
        try:
            found[name] = spared(calls, name)
        except Short:
            continue
        except Exception as error:  # of a compiler, say
            if name == first or name.startswith("varkern"):
                raise
            del calls[name]
            test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            remember({"failure": f"{test}, {name}", "message": message})
    return found


@dataclass(frozen=True)
class Ceilings:
    """What a plain copy and a plain product reach: bytes a second, read and written, and operations a second."""

    bytes_s: float
    flop_s: float

    def floor(self, moved: float, flop: float) -> float:
        """Seconds that the bytes or the operations take at least."""
        return max(moved / self.bytes_s, flop / self.flop_s)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model, SIMD level and number of threads: what a result belongs to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {simd_level()}, {torch.get_num_threads()} threads"


def simd_level() -> str:
    from varkern.ops.backends import load

    extension, _ = load("varkern._C")
    return "no extension" if extension is None else str(extension.simd_level())


def file_name(device: str) -> str:
    """A device's name as that of a file: "AMD EPYC, avx512, 2 threads" -> "amd-epyc-avx512-2-threads"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", device.lower())).strip("-")


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # it is written in and out of that mode
        return torch.empty(L2_BYTES, dtype=torch.int8, device=device)


def sample(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds a call. On a GPU from events, each call with a cold second-level cache.

    Writing the buffer that empties the cache also gives the host time to queue the call, so that a call of few launches
    is timed on the device and not on the way to it.
    """
    if device.type == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            _flush_buffer(device).zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return statistics.fmean(start.elapsed_time(end) for start, end in events) / 1e3
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats


def interleave(calls: dict[str, Call], device: torch.device) -> dict[str, list[float]]:
    """Seconds a call of each provider, one sample each in every round."""
    if settings.smoke:
        return {name: [sample(call, 1, device)] for name, call in calls.items()}
    first = {name: sample(call, 1, device) for name, call in calls.items()}
    if device.type == "cpu" and min(first.values()) >= SLOW_CALL:
        seconds = {name: [value] for name, value in first.items()}  # the checks were the warm-up
        repeats, round_seconds = dict.fromkeys(calls, 1), sum(first.values())
    else:
        seconds = {name: [] for name in calls}
        estimates = {name: _warm(call, first[name], device) for name, call in calls.items()}
        repeats = {name: max(1, round(MIN_SECONDS / estimate)) for name, estimate in estimates.items()}
        round_seconds = sum(estimates[name] * repeats[name] for name in calls)
    names, least = list(calls), MIN_ROUNDS if round_seconds < SLOW_ROUND else 3
    for i in range(len(seconds[names[0]]), min(ROUNDS, max(least, round(settings.seconds / round_seconds)))):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(sample(calls[name], repeats[name], device))
    return seconds


def _warm(call: Call, first: float, device: torch.device) -> float:
    """Seconds a call once it is warm, roughly; its first call, which may have compiled something, took ``first``."""
    if first >= 0.1:
        first = sample(call, 1, device)
    if first < 0.1:
        for _ in range(WARM_UP):
            call()
        first = sample(call, 3, device)
    return max(first, 1e-7)


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What the machine can do now: the best of five copies of a large tensor, and of five products of squares.

    dtype is that of the product's operands. On a CPU it is float32 whatever is asked for, since the kernels compute
    in it; on a GPU float32 means without TF32.
    """
    cuda = device.type == "cuda"
    dtype = dtype if cuda and dtype.is_floating_point else torch.float32
    count, side = (1 << 28, 8192) if cuda else (1 << 24, 1024)
    if settings.smoke:
        count, side = 1 << 20, 256
    elif cuda and dtype == torch.float32:
        side = 4096
    with torch.inference_mode():
        source = torch.ones(count, device=device)
        target = torch.empty_like(source)
        a, b = torch.randn(2, side, side, device=device).to(dtype).unbind(0)
        out = torch.empty_like(a)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            copy = [sample(lambda: target.copy_(source), 1, device) for _ in range(6)]
            product = [sample(lambda: torch.mm(a, b, out=out), 1, device) for _ in range(6)]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    return Ceilings(2 * source.nbytes / min(copy[1:]), 2 * side**3 / min(product[1:]))


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Memory that a call takes at its peak above what was allocated before; None on a CPU (see memory_child.py).

    A generation that has become a CUDA graph takes no memory any more. So graphs are freed first, and of two calls the
    first runs without a graph, the second captures one. None, too, where the memory does not suffice for that.
    """
    if device.type != "cuda":
        return None
    clear_graphs()
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        for _ in range(2):
            call()
    except torch.cuda.OutOfMemoryError:
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def quartiles(samples: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile; of a single sample thrice the same."""
    return statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3


def _in_succession(calls: dict[str, Call], name: str, steps: int) -> Call:
    def run() -> None:
        for _ in range(steps):
            spared(calls, name)

    return run


def measure(
    calls: dict[str, Call],
    device: torch.device,
    moved: float,
    flop: float,
    dtype: torch.dtype = torch.float32,
    steps: int = 1,
) -> dict[str, dict[str, Any]]:
    """One row a provider, compared with the first of them, whose results have been checked.

    moved, flop: the bytes that the computation has to move at least, and the operations that it has to do.
    steps: so many calls follow each other in a sample, without waiting for the device in between; times are of one.
    """
    end_checks()
    now, first = ceilings(device, dtype), next(iter(calls))
    unchecked = calls[first] is out_of_memory
    seconds: dict[str, list[float]] | None = None
    while seconds is None:
        timed = {name: _in_succession(calls, name, steps) for name, call in calls.items() if call is not out_of_memory}
        with contextlib.suppress(Short):  # then all over again, without it
            seconds = interleave(timed, device)
    floor, rows = now.floor(moved, flop), {}
    for name in calls:
        if name not in seconds:
            rows[name] = {"rounds": 0, "facts": {"out_of_memory": True}}
            continue
        samples = [value / steps for value in seconds[name]]
        low, middle, high = quartiles(samples)
        ratios = [b / s / steps for b, s in zip(seconds[first], samples, strict=True)] if first in seconds else None
        slow, ratio, fast = quartiles(ratios) if ratios else [None] * 3
        _inside.clear()
        peak = peak_bytes(calls[name], device)
        facts: dict[str, Any] = {"unchecked": True} if unchecked else {}
        if device.type == "cuda":
            facts["float32"] = _inside[0] if _inside else float32_settings()
        rows[name] = {
            "median_s": middle,
            "quartiles_s": [low, high],
            "speedup": ratio,
            "speedup_quartiles": [slow, fast] if ratios else None,
            "gb_s": moved / middle / 1e9,
            "gflop_s": flop / middle / 1e9,
            "floor_s": floor,
            "fraction": floor / middle,
            "peak_bytes": peak,
            "rounds": len(samples),
            "ceilings": [now.bytes_s / 1e9, now.flop_s / 1e9],
            "facts": facts,
        }
    begin_checks()
    return rows
