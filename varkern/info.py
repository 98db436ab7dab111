"""``python -m varkern.info [--json]``: what is installed and built, and which backend runs each op where and why."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from varkern._version import __version__
from varkern.ops._op import Op, explain
from varkern.ops.backends import current_backend, load

__all__ = ["main", "report"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def report() -> dict[str, Any]:
    """Versions, devices, extensions and, for each op, device and dtype, the backend and why not the others.

    Keys: ``versions``, ``cpu``, ``gpus``, ``extensions``, ``override`` and ``ops``; JSON-serialisable. What is absent
    is a string that says why.
    """
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "extensions": _extensions(),
        "override": current_backend(),
        "ops": {name: _op(op) for name, op in sorted(Op.registry.items())},
    }


def _versions() -> dict[str, str]:
    return {
        "varkern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "flash-attn": _flash_attn(),
    }


def _version(module: str) -> str:
    found, reason = load(module)
    return found.__version__ if found is not None else f"absent: {reason}"


def _flash_attn() -> str:
    # Imported by function: with version 4 alone, flash_attn is a namespace package that imports but holds nothing.
    reasons = []
    for distribution, module in (("flash-attn", "flash_attn"), ("flash-attn-4", "flash_attn.cute")):
        found, reason = load(module)
        if found is not None and hasattr(found, "flash_attn_func"):
            return f"{importlib.metadata.version(distribution)} ({module})"
        reasons.append(reason or f"{module} has no flash_attn_func")
    return f"absent: {'; '.join(reasons)}"


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    extension, reason = load("varkern._C")
    return {
        "model": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": reason if extension is None else extension.simd_level(),
        "openmp": reason if extension is None else extension.openmp(),
    }


def _gpus() -> list[dict[str, Any]] | str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return f"none: torch is built for {built} and finds no device" if built else "none: torch is built without CUDA"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "multiprocessors": gpu.multi_processor_count,
        }
        for gpu in gpus
    ]


def _extensions() -> dict[str, Any]:
    cpu, cpu_reason = load("varkern._C")
    cuda, cuda_reason = load("varkern._C_cuda")
    return {
        "varkern._C": cpu_reason if cpu is None else {"file": cpu.__file__, "simd_levels": cpu.simd_levels()},
        "varkern._C_cuda": cuda_reason
        if cuda is None
        else {"file": cuda.__file__, "architectures": cuda.architectures(), "driver": cuda.driver_version()},
    }


def _op(op: Op) -> list[dict[str, Any]]:
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    rows: list[dict[str, Any]] = []
    for device in map(torch.device, devices):
        for dtype in _DTYPES:
            example = op.example(device, dtype)
            try:
                backend = op.choose(current_backend(), *example)
            except RuntimeError as error:
                backend = f"none: {error}"
            why_not = explain(op.name, *example)
            del why_not["reference"]  # which always could
            why_not.pop(backend, None)
            row = {"device": str(device), "backend": backend, "others": why_not}
            # One row for all dtypes of a device that fare alike.
            same = next((seen for seen in rows if row.items() <= seen.items()), None)
            if same is None:
                rows.append(same := {**row, "dtypes": []})
            same["dtypes"].append(str(dtype).removeprefix("torch."))
    return rows


def _text(value: Any, indent: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [f"{indent}{value}"]
    lines = []
    for key, entry in value.items():
        if isinstance(entry, dict):
            lines += [f"{indent}{key}", *_text(entry, indent + "  ")]
        else:
            shown = ", ".join(map(str, entry)) if isinstance(entry, list) else entry
            lines.append(f"{indent}{key}: {shown}")
    return lines


def _render(found: dict[str, Any]) -> str:
    lines = _text({"versions": found["versions"], "cpu": found["cpu"]})
    if isinstance(found["gpus"], str):
        lines.append(f"gpus: {found['gpus']}")
    else:
        lines += [line for i, gpu in enumerate(found["gpus"]) for line in _text({f"gpu {i}": gpu})]
    lines += _text({"extensions": found["extensions"]})
    lines += ["", f"backend asked for: {found['override'] or 'none, every op chooses'}"]
    for name, rows in found["ops"].items():
        lines += ["", name]
        for row in rows:
            lines.append(f"  {row['device']} {', '.join(row['dtypes'])}: {row['backend']}")
            lines += [f"    {other}: {reason or 'could serve'}" for other, reason in row["others"].items()]
    return "\n".join(lines)


def show(as_json: bool = False) -> None:
    """Print the report, as text or as JSON."""
    found = report()
    print(json.dumps(found, indent=2) if as_json else _render(found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m varkern.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    show(parser.parse_args().json)


if __name__ == "__main__":
    main()
