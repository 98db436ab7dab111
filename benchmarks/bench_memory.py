"""Peak memory of a call on a CPU, weights and inputs excluded, each in a process of its own; see memory_child.py.

On a GPU every comparison records its peak beside its time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import record as records
import torch
from measure import settings

CHILD = Path(__file__).with_name("memory_child.py")
CASES = [
    "generate d16-B1",
    "generate small-B1",
    "generate small-B8",
    "encode 256px-B32",
    "sample_tokens B8-16x16",
    "attention 512px-forward+backward",
]
if settings.full:
    CASES.append("generate small-B32")
if settings.smoke:
    CASES = ["generate tiny-B1"]


def measured(case: str, backend: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, CHILD, case, backend], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.benchmark(group="peak memory")
@pytest.mark.parametrize("case", CASES)
def test_peak(benchmark: Any, device: torch.device, record: Callable[..., None], case: str) -> None:
    if device.type == "cuda" or sys.platform != "linux":
        pytest.skip("read from /proc of a process on a CPU")
    found = {"reference": measured(case, "reference"), "varkern": measured(case, "varkern")}
    assert found["varkern"]["result"] == pytest.approx(found["reference"]["result"], rel=1e-3)
    peaks = {name: entry["peak_bytes"] for name, entry in found.items()}
    print(f"\n{case}: " + ", ".join(f"{name} {records.bytes_(peak)}" for name, peak in peaks.items()), end="")
    record({name: {"peak_bytes": peak, "rounds": 1} for name, peak in peaks.items()}, case=case)
    benchmark.extra_info.update(peak_bytes=peaks)
    benchmark.pedantic(int)  # there is no time to show
