"""The modules of benchmarks/, and rows and results such as they record."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


bars, gpu, measure, record, suite = map(module, ("bars", "gpu", "measure", "record", "suite"))


def row(name: str = "encode 256px-B1", provider: str = "varkern", **changes: Any) -> dict[str, Any]:
    """A row with a spread of 4 %, at half the floor, twice as fast as the reference."""
    time = changes.pop("median_s", 1e-3 if provider == "varkern" else 2e-3)
    speedup = changes.pop("speedup", 2.0 if provider == "varkern" else 1.0)
    return {
        **{"file": "bench_quantize.py", "group": bars.ENCODE, "name": name, "provider": provider},
        **{"baseline": "reference", "shape": [1, 32, 16, 16], "dtype": "float32", "commit": "0" * 9},
        **{"median_s": time, "quartiles_s": [0.98 * time, 1.02 * time], "rounds": 60, "facts": {}},
        **{"speedup": speedup, "speedup_quartiles": [0.98 * speedup, 1.02 * speedup]},
        **{"gb_s": 0.1, "gflop_s": 50.0, "floor_s": time / 2, "fraction": 0.5, "peak_bytes": None},
        **{"ceilings": [20.0, 100.0], **changes},
    }


def result(*rows: dict[str, Any], device_type: str = "cpu", **changes: Any) -> dict[str, Any]:
    return {
        **{"schema": 1, "device": "some CPU, avx2, 2 threads", "device_type": device_type, "versions": {}},
        **{"commit": "0" * 40, "command": "varkern bench", "date": "2026-01-01T00:00:00+00:00"},
        **{"rows": list(rows), "failures": [], "not_run": [], **changes},
    }
