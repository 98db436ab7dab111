"""`make gpu`: a machine with a GPU, in three calls of at most eight minutes, and the sanitizers in a fourth.

    make gpu PARTS="build test"     GPU_OUT=results
    make gpu PARTS="build ops"      GPU_OUT=results
    make gpu PARTS="build generation"
    make gpu PARTS="build sanitize"

Uses the packages of the Python that runs it and no network. Each part's output, the record of the benchmarks, the
JUnit file of the tests and the table of bars lie in out/gpu and, where GPU_OUT names a folder, there too, as soon as a
part has ended, however it ended. The exit status is 1 if a part failed; a missed bar is shown, and fails with --strict.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
OUT = ROOT / "out" / "gpu"
RESULTS = Path(os.environ.get("VARKERN_RESULTS") or BENCHMARKS / "results")
# The longest that a part may take, in seconds; the benchmarks have what is left.
LIMITS = {"build": 150, "test": 400, "sanitize": 300, "bars": 30}
# The order in which they run. "compile": generation with torch.compile, which takes minutes more.
PARTS = ("build", "test", "sanitize", "ops", "generation", "compile", "bars")
DEFAULT = ("build", "test")
TOOLS = ("memcheck", "racecheck")
WATCHED = ("decode", "gated_norm", "group_norm", "norm", "sampling")  # whose kernels are CUDA
END_TO_END = ("generate", "memory", "scaling", "tokenizer", "training")
# What is new on a machine shows in the kernels' own tests, which go first.
KERNEL_TESTS = ("norm", "gated_norm", "group_norm", "sampling", "decode", "attention", "quantize", "conv")


@dataclass
class Outcome:
    """How a part ended: "ok", "FAILED", "missed" (bars), "not run" or "out of time", and what there is to say."""

    status: str
    text: str = ""


def run(command: list[str], limit: float, folder: Path = ROOT, **environment: str) -> tuple[int | None, str]:
    """The exit status and the output, which is shown and kept in a log meanwhile; no status where the time was up."""
    OUT.mkdir(parents=True, exist_ok=True)
    log = open(OUT / "log.txt", "a", encoding="utf-8")  # noqa: SIM115
    print("$", *command, file=log, flush=True)
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
            print(line, end="", file=log, flush=True)
            lines.append(line)
        status: int | None = child.wait()
    finally:
        signal.alarm(0)
        log.close()
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return (None if status == -signal.SIGKILL else status), "".join(lines)


def ended(status: int | None, text: str = "") -> Outcome:
    if status is None:
        return Outcome("out of time", text)
    return Outcome("ok" if status == 0 else "FAILED", text)


def missing() -> list[str]:
    """What the build needs and this Python or this machine has not."""
    lacks = [f"{name} (pip install {name})" for name in ("pybind11",) if importlib.util.find_spec(name) is None]
    lacks += [f"{tool} (pip install {tool})" for tool in ("cmake", "ninja") if _tool(tool) is None]
    try:
        setuptools = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        setuptools = 0
    if setuptools < 64:
        lacks.append("setuptools 64 or later (pip install -U setuptools)")
    elif setuptools < 71 and importlib.util.find_spec("wheel") is None:  # later ones bring it
        lacks.append(f"wheel, which setuptools {setuptools} needs (pip install wheel, or -U setuptools)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        lacks.append("Python.h (Debian, Ubuntu: apt-get install python3-dev)")
    if _tool("nvcc") is None and shutil.which("/usr/local/cuda/bin/nvcc") is None and not os.environ.get("CUDACXX"):
        lacks.append("nvcc (install the CUDA toolkit, or set CUDACXX)")
    return lacks


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")]))


def architecture() -> str:
    """Of the device, as VARKERN_CUDA_ARCHS takes it: from 9.0 on with the letter that allows its own instructions."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def build(limit: float) -> Outcome:
    lacks = missing()
    if lacks:
        return Outcome("FAILED", f"the build needs {'; '.join(lacks)}")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
    chosen = os.environ.get("VARKERN_CUDA_ARCHS") or architecture()
    # "on": without nvcc the CUDA tests would be skipped, and nobody would see.
    return ended(run(pip, limit, VARKERN_CUDA="on", VARKERN_CUDA_ARCHS=chosen)[0], f"sm_{chosen}")


def test(limit: float) -> Outcome:
    # Most of the time goes into compiling Triton kernels, which processes do beside each other.
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    tests = ROOT / "tests"
    kernels = [path.name for name in KERNEL_TESTS for path in sorted(tests.glob(f"test_{name}*.py"))]
    others = [path.name for path in sorted(tests.glob("test_*.py")) if path.name not in kernels]
    report = ["--junitxml", str(OUT / "tests.xml"), "-rf", "--tb=line", "--maxfail=40"]
    # From the tests' folder: "python -m" would put the root on the import path, and its folder kernels with it.
    # Failures are named as they come, for a run that does not get to its end.
    pytest = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", *report, *parallel]
    status, output = run([*pytest, *dict.fromkeys(kernels), *others], limit, ROOT / "tests")
    summary = re.findall(r"^=*\s*((?:\d+ \w+, )*\d+ (?:passed|failed|error)[^=]*?)\s*=*$", output, re.MULTILINE)
    failed = list(dict.fromkeys(re.findall(r"FAILED.*?(\S+::\S+)", output)))
    so_far = f"{len(failed)} failed so far: {', '.join(failed[:5])}" if failed else "none failed so far"
    return ended(status, summary[-1] if status is not None and summary else so_far)


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
    ops = [f"bench_{name}.py" for name in WATCHED]
    pytest = [sys.executable, "-m", "pytest", "-q", "--smoke", "--on=cuda", "--benchmark-disable", "-W", "ignore"]
    outcomes = []
    for tool in TOOLS:
        command = [sanitizer, "--tool", tool, "--kernel-name", "kernel_substring=varkern", *pytest, *ops]
        # Without its cache every tensor is an allocation of its own, whose end the sanitizer knows.
        status, output = run(command, limit / len(TOOLS), BENCHMARKS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        errors = errors_of(tool, output)
        if status is None or errors is None or not re.search(r"^(?:\d+ failed, )?\d+ passed", output, re.MULTILINE):
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


def bench(limit: float, names: Sequence[str], *options: str) -> Outcome:
    # The benchmarks stop by themselves; half a minute more is for what they write at the end.
    minutes = max(0.2, (limit - 30) / 60)
    only = ["--only", ",".join(names)]
    command = [
        sys.executable,
        "-m",
        "varkern",
        "bench",
        "--device",
        "cuda",
        f"--minutes={minutes:.2f}",
        *only,
        *options,
    ]
    return ended(run(command, limit, BENCHMARKS)[0])


def ops() -> list[str]:
    names = [path.stem.removeprefix("bench_") for path in sorted(BENCHMARKS.glob("bench_*.py"))]
    return [name for name in names if name not in END_TO_END]


def bars(limit: float, rows: list[dict[str, Any]]) -> Outcome:
    """`judge` in a process of its own: this one began before its installation, whose import hook it does not have."""
    OUT.mkdir(parents=True, exist_ok=True)
    found, verdict = OUT / "rows.json", OUT / "verdict.json"
    found.write_text(json.dumps(rows))
    verdict.unlink(missing_ok=True)
    status, output = run([sys.executable, str(Path(__file__)), "--judge", str(found), str(verdict)], limit, BENCHMARKS)
    (OUT / "bars.txt").write_text(output)
    if status != 0 or not verdict.is_file():
        return ended(status or (None if status is None else 1), (output.strip().splitlines() or ["no output"])[-1])
    missed, path = json.loads(verdict.read_text())
    return Outcome("ok" if not missed else "missed", f"{missed} bars missed; {path}")


def judge(found: Path, verdict: Path) -> None:
    """Adds the sanitizers' rows to the record, shows the table of bars, and writes the number missed and the record."""
    import bars as table
    import measure
    import record
    import suite
    import torch

    rows = json.loads(found.read_text())
    path = record.RESULTS / f"{measure.file_name(measure.device_name(torch.device('cuda')))}.json"
    recorded = record.read(path)
    if rows or recorded is None:
        result = suite.result_of(rows, "cuda", "make gpu")
        if recorded is not None:  # the benchmarks' own head stays: date, command and failures are theirs
            result = {**recorded, "rows": result["rows"]}
        recorded = record.merged(recorded, result, ["gpu.py"])
        record.write(path, recorded)
    print(table.table(recorded))
    missed = sum(v.status == table.MISS for v in table.evaluate(recorded))
    verdict.write_text(json.dumps([missed, str(path)]))


def collect() -> None:
    """Copies what there is of results to the folder that GPU_OUT names."""
    target = os.environ.get("GPU_OUT")
    if not target:
        return
    folder = Path(target)
    for name, source in (("gpu", OUT), ("results", RESULTS)):
        for path in sorted(source.glob("*")):
            if path.is_file():
                (folder / name).mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, folder / name / path.name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=" ".join(DEFAULT), help=f"of {', '.join(PARTS)} (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="a missed bar is a failure, too")
    parser.add_argument("--judge", nargs=2, type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.judge:
        judge(*options.judge)
        return 0
    parts = options.parts.split()
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        sys.exit(f"varkern: PARTS has {' '.join(unknown) or 'nothing'}; name some of {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"varkern: {sys.executable} sees no CUDA device through torch; run: make gpu PYTHON=<one that does>")
    if not (ROOT / ".git").exists() and not os.environ.get("VARKERN_COMMIT"):
        print("varkern: there is no .git here, so the record cannot name its commit; set VARKERN_COMMIT", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    end, rows = time.monotonic() + 60 * options.minutes, []
    works: dict[str, Callable[[float], Outcome]] = {
        "build": lambda limit: build(limit),
        "test": lambda limit: test(limit),
        "sanitize": lambda limit: sanitize(limit, rows),
        "ops": lambda limit: bench(limit, ops()),
        "generation": lambda limit: bench(limit, END_TO_END),
        "compile": lambda limit: bench(limit, ("generate",), "--compile"),
        "bars": lambda limit: bars(limit, rows),
    }
    if any(part in parts for part in ("sanitize", "ops", "generation", "compile")):
        parts.append("bars")
    outcomes: dict[str, tuple[Outcome, float]] = {}
    for part in [name for name in PARTS if name in parts]:
        begun = time.monotonic()
        # What comes after has its time too.
        left = end - begun - (LIMITS["bars"] if part != "bars" and "bars" in parts else 0)
        print(f"=== {part}", flush=True)
        if left < 1 and part != "bars":
            outcomes[part] = Outcome("out of time"), 0.0
            continue
        try:
            outcome = works[part](max(1.0, min(left, LIMITS.get(part, left))))
        except Exception as error:  # whatever it is, the others' results are shown and kept
            outcome = Outcome("FAILED", f"{type(error).__name__}: {error}")
        outcomes[part] = outcome, time.monotonic() - begun
        summary = "".join(
            f"  {p:10} {o.status:11} {seconds:5.0f} s  {o.text}\n" for p, (o, seconds) in outcomes.items()
        )
        (OUT / "summary.txt").write_text(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n{summary}")
        collect()
        if part == "build" and outcome.status != "ok":
            break  # what follows would measure something else
    print(f"\n{(OUT / 'summary.txt').read_text()}", end="")
    bad = ("FAILED", "missed") if options.strict else ("FAILED",)
    return int(any(outcome.status in bad for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
