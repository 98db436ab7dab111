"""`varkern bench`: every benchmark file in a process of its own, then the record, the table, and what changed.

A file that crashes takes nothing with it: the failure is listed, the next file runs. What the time does not suffice for
is listed too. The record is written again with every row that is measured, so that a run which is killed leaves them;
one that is stopped by SIGTERM or Ctrl-C ends as if its time were up.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bars
import measure
import record
import torch

import varkern

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
# What the bars ask for comes first, what takes longest and can be missed last.
FIRST = ("generate", "memory", "attention", "quantize", "sampling", "training", "norm")
LAST = ("scaling",)
# Nothing is begun in the last part of the time: what runs has to end within it.
RESERVE = 0.1
POLL = 0.25  # seconds between two looks at what has been measured


def files(only: list[str]) -> list[Path]:
    """The benchmark files in the order in which they run; raises ValueError for a name that is none."""
    found = {path.stem.removeprefix("bench_"): path for path in sorted(BENCHMARKS.glob("bench_*.py"))}
    for name in only:
        if name not in found:
            raise ValueError(f"there is no benchmark {name!r}; name one of {', '.join(found)}")
    middle = [name for name in found if name not in FIRST + LAST]
    order = [name for name in (*FIRST, *middle, *LAST) if name in found]
    return [found[name] for name in order if not only or name in only]


def commit() -> str:
    """The commit that is checked out, with "-changed" where tracked files differ from it; else VARKERN_COMMIT's."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        # Of the sources alone: the results that a run writes are no other program.
        paths = ["varkern", "kernels", "csrc", "benchmarks/*.py"]
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *paths]).returncode
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("VARKERN_COMMIT") or "unknown"
    return head + ("-changed" if changed else "")


def versions() -> dict[str, str]:
    found = {"varkern": varkern.__version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


class Limit:
    """When the time is up: at once after SIGTERM or SIGINT, which end what runs, so that all is written down."""

    def __init__(self, minutes: float | None) -> None:
        self.begun = time.time()
        self.end = float("inf") if minutes is None else self.begun + 60 * minutes
        self.deadline = float("inf") if minutes is None else self.begun + (1 - RESERVE) * 60 * minutes
        self.stopped = False

    @property
    def up(self) -> bool:
        return self.stopped or time.time() > self.end

    def stop(self, *_: Any) -> None:
        self.stopped = True

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Measured:
    """The lines that the benchmarks wrote, the files of which nothing is missing, and whether somebody stopped it."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    stopped: bool = False


def written(rows: Path) -> list[dict[str, Any]]:
    """The lines of a file that are written to their end."""
    return [json.loads(line) for line in rows.read_text().split("\n")[:-1]]


def run_files(
    paths: list[Path], arguments: list[str], limit: Limit, note: Callable[[list[dict[str, Any]]], None]
) -> tuple[list[dict[str, Any]], bool]:
    """One pytest process over these files: the lines that it wrote, and one more where it died; whether it has all.

    ``note`` is given the lines so far whenever there are more of them.
    """
    names = ", ".join(path.name for path in paths)
    environment = dict(os.environ)
    if "--smoke" in arguments:  # runs beside other tests, where threads mostly wait for each other
        environment["OMP_NUM_THREADS"] = "1"
    else:
        environment.setdefault("OMP_PROC_BIND", "true")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.touch()
        # From this folder, "python -m" puts it on the import path, and not the root with its folder kernels.
        command = [sys.executable, "-m", "pytest", "-q", "-s", "--no-header"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-disable", "-W", "ignore"]
        command += [f"--rows={rows}", *arguments, *map(str, paths)]
        child = subprocess.Popen(command, cwd=BENCHMARKS, env=environment, start_new_session=True)
        status, seen = None, 0
        try:
            while status is None and not limit.up:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = child.wait(POLL)
                lines = written(rows)
                if len(lines) > seen:
                    seen = len(lines)
                    note(lines)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        lines = written(rows)
    if status is None:
        why = "it was stopped" if limit.stopped else "stopped in the middle, the time was up"
        lines.append({"not_run": names, "reason": why})
    elif status not in (0, 1, 5):
        lines.append({"failure": names, "message": f"ended with status {status}"})
    return lines, status in (0, 1, 5) and not any("not_run" in line for line in lines)


def collect(options: argparse.Namespace, device_type: str, note: Callable[[Measured], None]) -> Measured:
    """Run what the options ask for. ``note`` is given what there is so far whenever there is more."""
    limit = Limit(options.minutes if options.minutes is not None else (None if options.full else 10.0))
    arguments = [f"--{name}" for name in ("smoke", "full", "compile") if getattr(options, name)]
    arguments += [f"--on={device_type}"]
    if limit.deadline != float("inf"):
        arguments += [f"--deadline={limit.deadline}"]
    paths, found = files(options.only), Measured()
    with limit.signals():
        for part in [paths] if options.smoke else [[path] for path in paths]:
            if limit.up:
                why = "it was stopped" if limit.stopped else "the time was up"
                found.lines += [{"not_run": path.name, "reason": why} for path in part]
                continue
            print(f"== {', '.join(path.stem.removeprefix('bench_') for path in part)}", flush=True)
            before = Measured(list(found.lines), list(found.whole))
            lines, whole = run_files(
                part, arguments, limit, lambda lines, before=before: note(Measured(before.lines + lines, before.whole))
            )
            found.lines += lines
            found.whole += [path.name for path in part] if whole else []
    found.stopped = limit.stopped
    return found


def result_of(lines: list[dict[str, Any]], device_type: str, command: str, head: str) -> dict[str, Any]:
    """The lines that benchmarks wrote as a result of a commit on this machine."""
    rows, failures = [], [f"{line['failure']}: {line['message']}" for line in lines if "failure" in line]
    for row in (line["row"] for line in lines if "row" in line):
        whole = {**record.UNTIMED, **row, "commit": head[:9]}
        try:
            record.check_row(whole)
            rows.append(whole)
        except ValueError as error:  # one benchmark that records nonsense does not cost the others' rows
            failures.append(f"{row.get('file')}, {row.get('name')}: {error}")
    return {
        "schema": record.SCHEMA,
        "device": measure.device_name(torch.device(device_type)),
        "device_type": device_type,
        "versions": versions(),
        "commit": head,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
        "failures": failures,
        "not_run": [f"{line['not_run']}: {line['reason']}" for line in lines if "not_run" in line],
    }


def command_line(options: argparse.Namespace) -> list[str]:
    """The options that change what is measured, as they are typed."""
    words = [f"--{name}" for name in ("smoke", "full", "compile") if getattr(options, name)]
    words += ["--device", options.device] if options.device else []
    words += ["--only", ",".join(options.only)] if options.only else []
    words += ["--minutes", f"{options.minutes:g}"] if options.minutes is not None else []
    return words


def run(options: argparse.Namespace) -> int:
    """The command; its exit status: 1 where a benchmark failed, or somebody stopped it."""
    device_type = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; leave it out")
    name = measure.file_name(measure.device_name(torch.device(device_type)))
    out = options.out or (None if options.smoke else record.RESULTS / f"{name}.json")
    # All are read first: a file that cannot be read is better known before ten minutes of measuring.
    recorded = None if out is None else record.read(out)
    against = recorded if options.against is None else record.read(options.against)
    if options.against is not None and against is None:
        raise ValueError(f"--against {options.against}: there is no such file")
    files(options.only)
    for page in options.markdown:
        record.filled(page, ())
    command, head = shlex.join(["varkern", "bench", *command_line(options)]), commit()

    def note(found: Measured) -> None:
        if out is not None:
            so_far = result_of(found.lines, device_type, command, head)
            record.write(out, record.merged(recorded, so_far, found.whole))

    found = collect(options, device_type, note)
    result = result_of(found.lines, device_type, command, head)
    report = [record.table(result)]
    losses = record.not_faster(result)
    if losses:
        report += ["\nnot faster than the baseline", *(f"  {line}" for line in losses)]
    if against is not None:
        report += [f"\nslower than the recorded run of {against['date'][:10]} ({against['commit'][:9]})"]
        report += [f"  {line}" for line in record.slower(against, result)] or ["  nothing"]
    kept = record.merged(recorded, result, found.whole)
    if out is not None:
        record.write(out, kept)
        report += [f"\nwritten to {out}"]
    for page in options.markdown:
        record.fill(page, record.all_recorded(kept))
        report += [f"tables in {page}"]
    report += ["", bars.table(kept)]
    for title, lines in (("not run", result["not_run"]), ("failed", result["failures"])):
        if lines:
            report += [f"\n{title}", *(f"  {line}" for line in lines)]
    print("\n".join(("", *report)), flush=True)
    return 1 if result["failures"] or found.stopped else 0
