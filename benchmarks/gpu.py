"""`make gpu`: build, tests, sanitizers, benchmarks and bars on a machine with a GPU, in at most eight minutes.

    python benchmarks/gpu.py [--parts "build test sanitize bench bars"] [--minutes 8]

Uses the packages of the Python that runs it and no network. A part that fails or runs out of its time does not keep the
next one from running; the exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
# The longest that a part may take, in seconds; the benchmarks have what is left.
LIMITS = {"build": 120, "test": 150, "sanitize": 90, "bars": 10}
PARTS = ("build", "test", "sanitize", "bench", "bars")
EXTRA = ("compile",)  # the benchmarks of generation with torch.compile, which takes minutes more
TOOLS = ("memcheck", "racecheck")
# Whole models take minutes under a sanitizer, and run no CUDA op that these leave out.
END_TO_END = ("generate", "memory", "scaling", "tokenizer", "training")


@dataclass
class Outcome:
    """How a part ended: "ok", "FAILED", "not run" or "out of time", and what there is to say."""

    status: str
    text: str = ""


def run(command: list[str], limit: float, folder: Path = ROOT, **environment: str) -> tuple[int | None, str]:
    """The exit status and the output, which is shown meanwhile; no status where the time was up."""
    child = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child.pid, signal.SIGKILL))
    signal.alarm(max(1, int(limit)))
    lines = []
    try:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        status: int | None = child.wait()
    finally:
        signal.alarm(0)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return (None if status == -signal.SIGKILL else status), "".join(lines)


def ended(status: int | None, text: str = "") -> Outcome:
    if status is None:
        return Outcome("out of time", text)
    return Outcome("ok" if status == 0 else "FAILED", text)


def build(limit: float) -> Outcome:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
    return ended(run(pip, limit)[0])


def test(limit: float) -> Outcome:
    # Most of the time goes into compiling Triton kernels, which processes do beside each other.
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    # From the tests' folder: "python -m" would put the root on the import path, and its folder kernels with it.
    status, output = run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *parallel, "."], limit, ROOT / "tests")
    summary = re.findall(r"^\d+ (?:passed|failed).*$", output, re.MULTILINE)
    return ended(status, summary[-1] if summary else "")


def errors_of(tool: str, output: str) -> int | None:
    """The number of errors in the last line of a sanitizer; None where it did not get that far."""
    pattern = {
        "memcheck": r"ERROR SUMMARY: (\d+) error",
        "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
    }[tool]
    found = re.findall(pattern, output)
    return int(found[-1]) if found else None


def sanitize(limit: float, rows: list[dict[str, Any]]) -> Outcome:
    """The smoke benchmarks of the CUDA ops under each tool, which watches the kernels of varkern alone."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return Outcome("not run", "there is no compute-sanitizer on PATH")
    ops = [path.name for path in sorted(BENCHMARKS.glob("bench_*.py")) if path.stem[6:] not in END_TO_END]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--smoke", "--on=cuda", "--benchmark-disable", "-W", "ignore"]
    outcomes = []
    for tool in TOOLS:
        command = [sanitizer, "--tool", tool, "--kernel-name", "kernel_substring=varkern", *pytest, *ops]
        # Without its cache every tensor is an allocation of its own, whose end the sanitizer knows.
        status, output = run(command, limit / len(TOOLS), BENCHMARKS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        errors = errors_of(tool, output)
        if status is None or errors is None or not re.search(r"^\d+ passed", output, re.MULTILINE):
            why = "out of time" if status is None else "not run" if errors is None else "FAILED"
            last = (output.strip().splitlines() or [""])[-1]
            outcomes.append(Outcome(why, f"{tool}: {why}" + (f" ({last})" if why != "out of time" else "")))
            continue
        key = {"file": "gpu.py", "group": "compute-sanitizer", "name": tool, "provider": "varkern"}
        facts = {"errors": errors}
        rows.append({"row": {**key, "baseline": "varkern", "shape": None, "dtype": "", "rounds": 1, "facts": facts}})
        outcomes.append(Outcome("FAILED" if errors else "ok", f"{tool}: {errors} errors"))
    order = ("FAILED", "out of time", "not run", "ok")
    worst = min((outcome.status for outcome in outcomes), key=order.index)
    return Outcome(worst, "; ".join(outcome.text for outcome in outcomes))


def bench(limit: float, *options: str) -> Outcome:
    # The benchmarks stop by themselves; half a minute more is for what they write at the end.
    minutes = max(0.2, (limit - 30) / 60)
    command = [sys.executable, "-m", "varkern", "bench", "--device", "cuda", f"--minutes={minutes:.2f}", *options]
    return ended(run(command, limit, BENCHMARKS)[0])


def bars(rows: list[dict[str, Any]]) -> Outcome:
    """Adds the sanitizers' rows to the record and shows the table of bars."""
    import bars as table
    import measure
    import record
    import suite
    import torch

    path = record.RESULTS / f"{measure.file_name(measure.device_name(torch.device('cuda')))}.json"
    recorded = record.read(path)
    if rows or recorded is None:
        found = suite.result_of(rows, "cuda", "make gpu")
        if recorded is not None:  # the benchmarks' own head stays: date, command and failures are theirs
            found = {**recorded, "rows": found["rows"]}
        recorded = record.merged(recorded, found, ["gpu.py"])
        record.write(path, recorded)
    print(table.table(recorded))
    missed = [v for v in table.evaluate(recorded) if v.status == table.MISS]
    return Outcome("FAILED" if missed else "ok", f"{len(missed)} bars missed; {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", default=" ".join(PARTS), help=f"of {', '.join(PARTS + EXTRA)} (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: %(default)s)")
    options = parser.parse_args(argv)
    parts = options.parts.split()
    unknown = [part for part in parts if part not in PARTS + EXTRA]
    if unknown or not parts:
        sys.exit(f"varkern: PARTS has {' '.join(unknown) or 'nothing'}; name some of {', '.join(PARTS + EXTRA)}")
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"varkern: {sys.executable} sees no CUDA device through torch; run: make gpu PYTHON=<one that does>")
    end, rows = time.monotonic() + 60 * options.minutes, []
    works: dict[str, Callable[[float], Outcome]] = {
        "build": build,
        "test": test,
        "sanitize": lambda limit: sanitize(limit, rows),
        "bench": bench,
        "compile": lambda limit: bench(limit, "--compile", "--only", "generate"),
        "bars": lambda limit: bars(rows),
    }
    outcomes: dict[str, tuple[Outcome, float]] = {}
    for part in [name for name in ("build", "test", "sanitize", "bench", "compile", "bars") if name in parts]:
        begun = time.monotonic()
        # What comes after has its time too.
        left = end - begun - (LIMITS["bars"] if part != "bars" and "bars" in parts else 0)
        print(f"=== {part}", flush=True)
        if left < 1 and part != "bars":
            outcomes[part] = Outcome("out of time"), 0.0
            continue
        try:
            outcome = works[part](min(left, LIMITS.get(part, left)))
        except (ValueError, OSError, RuntimeError) as error:
            outcome = Outcome("FAILED", str(error))
        outcomes[part] = outcome, time.monotonic() - begun
        if part == "build" and outcome.status != "ok":
            break  # what follows would measure something else
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for part, (outcome, seconds) in outcomes.items():
        print(f"  {part:9} {outcome.status:11} {seconds:5.0f} s  {outcome.text}")
    return int(any(outcome.status == "FAILED" for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
