"""What the benchmarks share: the device, `compare`, and what is recorded of a comparison.

varkern bench                                      the whole suite, recorded in results/
pytest benchmarks --benchmark-only -s -k norm      a part of it, by hand
pytest benchmarks --smoke                          tiny shapes, each call checked and made once
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import pytest
import torch

import varkern


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("varkern")
    group.addoption("--smoke", action="store_true", help="tiny shapes, every call checked and made once")
    group.addoption("--full", action="store_true", help="more shapes and rounds: takes much longer than ten minutes")
    group.addoption("--compile", action="store_true", help="torch.compile of the reference as a provider")
    group.addoption("--on", choices=("cpu", "cuda"), help="benchmarks of this device alone")
    group.addoption("--rows", type=Path, help="append what is measured, and what failed, to this file of JSON lines")
    group.addoption("--deadline", type=float, default=float("inf"), help="time.time() after which nothing is begun")


def pytest_configure(config: pytest.Config) -> None:
    settings, option = measure.settings, config.getoption
    settings.smoke, settings.full = option("--smoke"), option("--full")
    settings.compile |= option("--compile") or settings.full
    settings.rows, settings.deadline = option("--rows"), option("--deadline")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    # Files named on the command line are collected anyway, whatever they are called.
    wanted = file_path.match("bench_*.py") and not parent.session.isinitpath(file_path)
    return pytest.Module.from_parent(parent, path=file_path) if wanted else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only = config.getoption("--on")
    if only is not None:
        other = {"cpu": "cuda", "cuda": "cpu"}[only]
        items[:] = [item for item in items if device_of(item) != [other]]


def device_of(item: pytest.Item) -> list[str]:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return [params["device"]] if "device" in params else []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > measure.settings.deadline:
        measure.remember({"not_run": item.nodeid, "reason": "the time was up"})
        pytest.skip("the time was up")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
        measure.remember({"failure": report.nodeid, "message": " ".join(message.split())[:300]})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        measure.remember({"failure": report.nodeid, "message": " ".join(str(report.longrepr).split())[-300:]})


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _checks() -> Iterator[None]:
    if "torch._dynamo" in sys.modules:  # compiled for other shapes, it would be compiled again for any, or no more
        torch._dynamo.reset()
    measure.begin_checks()
    yield
    measure.end_checks()


@pytest.fixture
def record(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """Record the rows of a comparison, a dictionary by provider, under the benchmark's group and name.

    The name is the function's with its parameters, or with ``case`` instead of them.
    """
    marker = request.node.get_closest_marker("benchmark")
    group = marker.kwargs["group"] if marker else request.node.path.stem
    function, _, which = request.node.name.partition("[")
    which = "-".join(part for part in which.rstrip("]").split("-") if part != device.type)

    def write(rows: dict[str, dict[str, Any]], case: str = which, **facts: Any) -> None:
        name = " ".join(filter(None, (function.removeprefix("test_"), case)))
        shape = facts.pop("shape", None)
        dtype = str(facts.pop("dtype", "float32")).removeprefix("torch.")
        shared = {"shape": None if shape is None else list(shape), "dtype": dtype}
        baseline = next(iter(rows))
        for provider, row in rows.items():
            key = {"file": request.node.path.name, "group": group, "name": name, "provider": provider}
            all_facts = {**facts, **row.get("facts", {})}
            measure.remember({"row": {**key, "baseline": baseline, **shared, **row, "facts": all_facts}})

    return write


@pytest.fixture
def compare(benchmark: Any, device: torch.device, record: Callable[..., None]) -> Callable[..., None]:
    """Time providers against the first of them, after their results were checked, and record a row for each.

    ``compare(calls, moved, flop, **facts)``: the least number of bytes that the computation has to move, and of
    floating-point operations that it has to do (0: they do not matter). ``dtype`` among the facts says which products
    the floor counts; ``steps``: how many calls a sample has in succession. The row that pytest-benchmark shows is the
    last provider's; ``extra_info["providers"]`` has all.
    """

    def run(calls: dict[str, Callable[[], Any]], moved: float, flop: float = 0, steps: int = 1, **facts: Any) -> None:
        dtype = getattr(torch, str(facts.get("dtype", "float32")).removeprefix("torch."), torch.float32)
        rows = measure.measure(calls, device, moved, flop, dtype, steps)
        if steps > 1:
            facts["steps"] = steps
        for name, row in rows.items():
            if not row["rounds"]:
                print(f"\n{name:>14}: out of memory", end="")
                continue
            rates = f"{row['gb_s']:7.1f} GB/s, {row['gflop_s']:8.1f} GFLOP/s, {row['fraction']:4.0%} of the floor"
            ratio = "" if row["speedup"] is None else f", {row['speedup']:5.2f}x"
            print(f"\n{name:>14}: {row['median_s'] * 1e6:9.1f} µs, {rates}{ratio}", end="")
        record(rows, **facts)
        versions = {"varkern": varkern.__version__, "torch": torch.__version__, "python": platform.python_version()}
        benchmark.extra_info.update(
            facts,
            device=measure.device_name(device),
            bytes=moved,
            flop=flop,
            providers=rows,
            versions=versions,
            rounds=rows[name]["rounds"],
        )
        if benchmark.disabled:  # by `varkern bench` and xdist: the rows have all
            benchmark.pedantic(int)
            return
        seconds = rows[name]["median_s"]
        rounds, iterations = (10, 5) if seconds < 0.1 else (1 if seconds > 1 else 3, 1)
        if measure.settings.smoke:
            rounds, iterations = 1, 1
        benchmark.pedantic(calls[name], rounds=rounds, iterations=iterations)

    return run
