"""`make gpu`: a machine with a GPU, in three calls of at most eight minutes, and the sanitizers in a fourth.

    make gpu PARTS="build test"     GPU_OUT=results
    make gpu PARTS="build ops"      GPU_OUT=results
    make gpu PARTS="build generation"
    make gpu PARTS="build sanitize"

Uses the packages of the Python that runs it and no network. GPU_OUT names the folder of the results (default: out/gpu):
log.txt, tests.jsonl and tests.xml (JUnit) of the tests, the record of the benchmarks, bars.txt and summary.txt. They
are written as things come, so that a part which fails, is stopped or runs out of time leaves what it had. The summary,
which is printed last, has a line a part. Exit status: 0 where every part ran to its end, whatever the bars say; 1 where
one failed, or with --strict missed a bar; 3 where none failed, but one was not finished. Chain calls by ";", not "&&".
"""

from __future__ import annotations

import argparse
import contextlib
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
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_tests

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
OUT = Path(os.environ.get("GPU_OUT") or ROOT / "out" / "gpu").absolute()
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
GRACE = 10.0  # seconds that what is interrupted has to write what it has
INCOMPLETE = 3  # the exit status
# What runs besides torch imports, and an installation without its dependencies does not bring.
NEEDED = {"numpy": "numpy", "safetensors": "safetensors", "huggingface_hub": "huggingface_hub", "PIL": "pillow"}
NEEDED |= {"tqdm": "tqdm", "pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "pybind11": "pybind11"}
KERNEL_TESTS = (
    "conformance",
    "norm",
    "gated_norm",
    "group_norm",
    "sampling",
    "decode",
    "attention",
    "quantize",
    "conv",
)


@dataclass
class Outcome:
    """How a part ended: "ok", "FAILED", "missed" (bars), "not run", "stopped" or "out of time"; and what is to say."""

    status: str
    text: str = ""


class Stopped(Exception):
    """Somebody sent SIGTERM or SIGINT."""


def _stop(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: now it cleans up
    raise Stopped


def run(command: list[str], limit: float, folder: Path = ROOT, **environment: str) -> tuple[int | None, str]:
    """The exit status and the output, which is shown and kept in a log meanwhile; no status where the time was up.

    Then it is interrupted, has ``GRACE`` seconds to write what it has, and is killed. However it ends, so does whatever
    it started, in sessions of its own too: that would hold the pipe of the output, and the device.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    mark, lines = f"VARKERN_GPU_{uuid.uuid4().hex}", []
    with open(OUT / "log.txt", "a", encoding="utf-8") as log:
        print("$", *command, file=log, flush=True)
        child = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", mark: "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

        def pump() -> None:
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line)
                print(line, end="", flush=True)
                with contextlib.suppress(ValueError):  # closed, and somebody still writes
                    print(line, end="", file=log, flush=True)

        reader, status = threading.Thread(target=pump, daemon=True), None
        reader.start()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = child.wait(limit)
        finally:
            if status is None:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(child.pid, signal.SIGINT)
                    child.wait(GRACE)
            kill(child.pid, mark)
            with contextlib.suppress(subprocess.TimeoutExpired):  # what hangs in the driver cannot be killed
                child.wait(5)
            reader.join(5)
    return status, "".join(lines)


def kill(group: int, mark: str) -> None:
    """The process group, and whatever has this variable in its environment: what it started in other sessions."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for _ in range(20):  # again, since one may have started another meanwhile
        marked = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"{mark}=1".encode() in path.read_bytes().split(b"\0"):
                    marked.append(int(path.parent.name))
                    os.kill(marked[-1], signal.SIGKILL)
        if not marked:
            return
        time.sleep(0.05)


def ended(status: int | None, text: str = "") -> Outcome:
    if status is None:
        return Outcome("out of time", text)
    return Outcome("ok" if status == 0 else "FAILED", text)


def missing() -> list[str]:
    """What the build needs and this Python or this machine has not."""
    packages = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    lacks = [f"{package} (pip install {package})" for package in packages]
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
    files = [path.relative_to(tests) for folder in (tests / "ops", tests) for path in sorted(folder.glob("test_*.py"))]
    kernels = [str(path) for name in KERNEL_TESTS for path in files if path.name.startswith(f"test_{name}")]
    others = [str(path) for path in files if str(path) not in kernels]
    # A file that cannot be imported keeps none of the others back. Failures are named as they come.
    options = ["-v", "-m", "gpu", "-rf", "--tb=line", "--maxfail=40", "--continue-on-collection-errors", *parallel]
    notes = OUT / "tests.jsonl"
    notes.unlink(missing_ok=True)
    command = [sys.executable, str(BENCHMARKS / "gpu_tests.py"), str(notes), *options]
    # From the tests' folder, since at the root there is the folder kernels.
    try:
        status, output = run([*command, *dict.fromkeys(kernels), *others], limit, tests)
    finally:
        found = gpu_tests.read(notes)
        (OUT / "tests.xml").write_text(gpu_tests.junit(found))
    text = gpu_tests.counts(found) or last_line(output)
    missed = gpu_tests.selected(notes) - sum("::" in line["test"] for line in found)
    if missed > 0:
        text += f", {missed} not run"
    for what in ("failed", "error", gpu_tests.STOPPED):
        names = [line["test"] for line in found if line["outcome"] == what]
        text += f"; {what}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}" if names else ""
    return ended(status, text)


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1][:300]


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
            text = f" ({last_line(output)})" if why != "out of time" else ""
            outcomes.append(Outcome(why, f"{tool}: {why}{text}"))
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
    command = [sys.executable, "-m", "varkern", "bench", "--device", "cuda", f"--minutes={minutes:.2f}"]
    command += ["--only", ",".join(names), *options]
    begun = time.time()
    with keeping(begun):
        status, output = run(command, limit, BENCHMARKS)
    result = next((json.loads(path.read_text()) for path in written_since(begun)), None)
    if result is None:
        return ended(status or (None if status is None else 1), f"no record was written ({last_line(output)})")
    said = [(what, result[key]) for key, what in (("failures", "failed"), ("not_run", "not run")) if result[key]]
    text = "; ".join(f"{len(lines)} {what}: {lines[0]}{', ...' * (len(lines) > 1)}" for what, lines in said)
    # It ends by itself, with status 0, where the time did not suffice for all.
    return ended(None if status == 0 and result["not_run"] else status, text)


def ops() -> list[str]:
    names = [path.stem.removeprefix("bench_") for path in sorted(BENCHMARKS.glob("bench_*.py"))]
    return [name for name in names if name not in END_TO_END]


def bars(limit: float, rows: list[dict[str, Any]]) -> Outcome:
    """`judge` in a process of its own: this one began before its installation, whose import hook it does not have."""
    with tempfile.TemporaryDirectory() as folder, keeping(time.time()):
        found, verdict = Path(folder, "rows.json"), Path(folder, "verdict.json")
        found.write_text(json.dumps(rows))
        command = [sys.executable, str(Path(__file__)), "--judge", str(found), str(verdict)]
        status, output = run(command, limit, BENCHMARKS)
        (OUT / "bars.txt").write_text(output)
        if status != 0 or not verdict.is_file():
            return ended(status or (None if status is None else 1), last_line(output))
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
        result = suite.result_of(rows, "cuda", "make gpu", suite.commit())
        if recorded is not None:  # the benchmarks' own head stays: date, command and failures are theirs
            result = {**recorded, "rows": result["rows"]}
        recorded = record.merged(recorded, result, ["gpu.py"])
        record.write(path, recorded)
    print(table.table(recorded))
    missed = sum(v.status == table.MISS for v in table.evaluate(recorded))
    verdict.write_text(json.dumps([missed, str(path)]))


def written_since(begun: float) -> list[Path]:
    """The records of this run; a file system's clock may be a little behind."""
    return [path for path in RESULTS.glob("*.json") if path.stat().st_mtime >= begun - 0.1]


@contextlib.contextmanager
def keeping(begun: float) -> Iterator[None]:
    """Every second, and at the end, a copy of the records written since then to the folder of the results."""
    over = threading.Event()

    def work() -> None:
        last = False
        while not last:
            last = over.wait(1)
            for path in written_since(begun):
                if path.parent.resolve() != OUT.resolve():
                    shutil.copy2(path, OUT / f"{path.name}.tmp")
                    os.replace(OUT / f"{path.name}.tmp", OUT / path.name)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Report:
    """What the parts came to, written after each of them, below what earlier calls have written."""

    def __init__(self, head: str) -> None:
        self.path, self.head = OUT / "summary.txt", head
        self.before = self.path.read_text() if self.path.is_file() else ""
        self.outcomes: dict[str, tuple[Outcome, float]] = {}

    def add(self, part: str, outcome: Outcome, seconds: float = 0.0) -> None:
        self.outcomes[part] = outcome, seconds
        self.path.write_text(self.before + self.text())

    def text(self) -> str:
        lines = [f"  {name:10} {o.status:11} {spent:5.0f} s  {o.text}" for name, (o, spent) in self.outcomes.items()]
        return "\n".join([self.head, *lines, ""])

    def status(self, strict: bool) -> int:
        """The program's."""
        found = {outcome.status for outcome, _ in self.outcomes.values()}
        if "FAILED" in found or (strict and "missed" in found):
            return 1
        return INCOMPLETE if found - {"ok", "missed"} else 0


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
    try:
        OUT.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"varkern: the folder of the results cannot be made ({error}); name another: GPU_OUT=<folder>")
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
    report, why_not = Report(f"{torch.cuda.get_device_name()}, torch {torch.__version__}"), ""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    for part in [name for name in PARTS if name in parts]:
        begun = time.monotonic()
        # What comes after has its time too, and so has what is interrupted.
        left = end - begun - GRACE - (LIMITS["bars"] if part != "bars" and "bars" in parts else 0)
        if why_not:
            report.add(part, Outcome("not run", why_not))
            continue
        print(f"=== {part}", flush=True)
        if left < 1 and part != "bars":
            report.add(part, Outcome("out of time", "the parts before took all of it"))
            continue
        report.add(part, Outcome("stopped", "in the middle"))  # unless it says something else
        try:
            outcome = works[part](max(1.0, min(left, LIMITS.get(part, left))))
        except Stopped:
            outcome, why_not = Outcome("stopped", "by a signal"), "stopped by a signal"
        except Exception as error:  # whatever it is, the others' results are shown and kept
            outcome = Outcome("FAILED", f"{type(error).__name__}: {error}")
        report.add(part, outcome, time.monotonic() - begun)
        if part == "build" and outcome.status != "ok" and not why_not:
            why_not = "without its build it would measure something else"
    for number, handler in before.items():
        signal.signal(number, handler)
    print(f"\n{report.text()}", end="", flush=True)
    return report.status(options.strict)


if __name__ == "__main__":
    sys.exit(main())
