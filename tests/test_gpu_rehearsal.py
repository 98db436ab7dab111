"""`make gpu` from beginning to end, against a device that is made up.

The Python that it runs is a stand-in: it installs nothing, benchmarks by writing rows, watches with a sanitizer that
only prints, and passes real tests and the judging of bars on to the real one, whose torch.cuda says what an H100 would.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_rows import BENCHMARKS, gpu, record, result, row

DEVICE = "NVIDIA H100 80GB HBM3"
PYTHON = """#!{python}
import json, os, sys, time
arguments, folder = sys.argv[1:], {folder!r}
with open(folder + "/calls.jsonl", "a") as file:
    file.write(json.dumps([arguments, {{k: v for k, v in os.environ.items() if k.startswith("VARKERN")}}]) + "\\n")
if arguments[:3] == ["-m", "pip", "install"]:
    sys.exit("no space left on device" if os.environ.get("REHEARSE") == "build" else 0)
if arguments[:3] == ["-m", "varkern", "bench"]:
    if os.environ.get("REHEARSE") == "time":
        print("begun", flush=True)
        time.sleep(600)
    print("benchmarked", arguments[arguments.index("--only") + 1])
    found = json.load(open(folder + "/found.json"))
    with open(os.environ["VARKERN_RESULTS"] + "/" + found["file"], "w") as file:
        json.dump(found["result"], file)
    sys.exit(0)
os.environ["PYTHONPATH"] = folder + "/site"
os.execv({python!r}, [{python!r}, *arguments])
"""
SITE = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda *_: {device!r}
torch.cuda.get_device_capability = lambda *_: (9, 0)
"""
TESTS = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("i", range(3))
def test_it(i):
    assert i != {wrong}
def test_without_a_gpu():
    raise AssertionError("not selected")
"""
SANITIZER = """#!{python}
import os, sys
assert "bench_attention.py" not in sys.argv and "bench_norm.py" in sys.argv
tool = sys.argv[sys.argv.index("--tool") + 1]
print("========= COMPUTE-SANITIZER")
if os.environ.get("REHEARSE") == "sanitize" and tool == "memcheck":
    print("1 failed, 4 passed in 2 s"); print("========= ERROR SUMMARY: 2 errors"); sys.exit(1)
print("5 passed in 2 s")
print({{"memcheck": "========= ERROR SUMMARY: 0 errors",
       "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)"}}[tool])
"""


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


class Machine:
    """A fresh machine with a GPU, and where its results go."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.out, self.patch = folder, folder / "kept", monkeypatch
        for name in ("site", "results", "tests", "bin"):
            (folder / name).mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SITE.format(device=DEVICE))
        python = executable(folder / "python", PYTHON.format(python=sys.executable, folder=str(folder)))
        executable(folder / "bin" / "compute-sanitizer", SANITIZER.format(python=sys.executable))
        (folder / "tests" / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a CUDA device\n")
        self.tests(wrong=7)
        found = result(row(provider="reference"), row(), device=DEVICE, device_type="cuda")
        found["versions"] = {"torch": "2.11", "python": "3.12"}
        name = gpu_record()
        (folder / "found.json").write_text(json.dumps({"file": name, "result": found}))
        monkeypatch.setattr(gpu.sys, "executable", python)
        monkeypatch.setattr(gpu, "ROOT", folder)
        monkeypatch.setattr(gpu, "OUT", folder / "out")
        monkeypatch.setattr(gpu, "RESULTS", folder / "results")
        monkeypatch.setattr(gpu, "missing", list)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: DEVICE)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("GPU_OUT", str(self.out))
        monkeypatch.setenv("VARKERN_RESULTS", str(folder / "results"))
        monkeypatch.delenv("VARKERN_CUDA_ARCHS", raising=False)

    def tests(self, wrong: int) -> None:
        (self.folder / "tests" / "test_norm.py").write_text(TESTS.format(wrong=wrong))
        (self.folder / "tests" / "test_zoo.py").write_text(TESTS.format(wrong=9))

    def run(self, parts: str, *options: str, rehearse: str = "") -> tuple[int, str]:
        """The exit status and the summary."""
        self.patch.setenv("REHEARSE", rehearse)
        status = gpu.main(["--parts", parts, *options])
        return status, (self.out / "gpu" / "summary.txt").read_text()

    def calls(self) -> list[Any]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]


def gpu_record() -> str:
    import measure

    return f"{measure.file_name(DEVICE)}.json"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_build_and_tests(machine: Machine) -> None:
    status, summary = machine.run("build test")
    assert status == 0, summary
    assert summary.startswith(f"{DEVICE}, torch ")
    assert "6 passed" in summary
    pip, tests = machine.calls()
    assert pip[1]["VARKERN_CUDA"] == "on"  # without nvcc it fails, and skips nothing
    assert pip[1]["VARKERN_CUDA_ARCHS"] == "90a"
    assert tests[0].index("test_norm.py") < tests[0].index("test_zoo.py")
    assert "--maxfail=40" in tests[0]
    assert '<testsuite name="pytest"' in (machine.out / "gpu" / "tests.xml").read_text()


def test_failing_tests_are_named_and_kept(machine: Machine) -> None:
    machine.tests(wrong=1)
    status, summary = machine.run("build test ops")
    assert status == 1
    assert "test       FAILED" in summary
    assert "1 failed, 5 passed" in summary
    assert "ops        ok" in summary  # goes on
    assert "bars       ok" in summary or "bars       missed" in summary
    assert "test_norm.py::test_it[1]" in (machine.out / "gpu" / "log.txt").read_text()
    assert (machine.out / "results" / gpu_record()).is_file()


def test_a_build_that_fails_ends_it(machine: Machine) -> None:
    status, summary = machine.run("build ops", rehearse="build")
    assert status == 1
    assert "build      FAILED" in summary
    assert "ops" not in summary
    assert "no space left" in (machine.out / "gpu" / "log.txt").read_text()


def test_what_the_build_lacks_is_one_sentence(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "missing", lambda: ["nvcc (install it)", "ninja (pip install ninja)"])
    _, summary = machine.run("build")
    assert "the build needs nvcc (install it); ninja (pip install ninja)" in summary


def test_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_tool", lambda name: None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "65.1.0")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.delenv("CUDACXX", raising=False)
    lacks = [entry.split()[0] for entry in gpu.missing()]
    assert lacks == ["pybind11", "cmake", "ninja", "wheel,", "Python.h", "nvcc"]


@pytest.mark.parametrize("part", ["ops", "generation"])
def test_benchmarks_and_bars(machine: Machine, part: str) -> None:
    status, summary = machine.run(part)
    assert status == 0
    assert f"{part:10} ok" in summary
    assert "bars missed; " in summary
    names = machine.calls()[0][0]
    only = names[names.index("--only") + 1].split(",")
    assert ("generate" in only) == (part == "generation")
    assert ("norm" in only) == (part == "ops")
    kept = json.loads((machine.out / "results" / gpu_record()).read_text())
    record.check(kept)
    assert (machine.out / "gpu" / "bars.txt").read_text()


def test_a_missed_bar_fails_only_when_asked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "bars", lambda *_: gpu.Outcome("missed", "3 bars missed"))
    assert machine.run("ops")[0] == 0
    assert machine.run("ops", "--strict")[0] == 1


def test_what_runs_out_of_time_leaves_its_log(machine: Machine) -> None:
    monkeypatch = machine.patch
    monkeypatch.setitem(gpu.LIMITS, "ops", 5)
    status, summary = machine.run("ops", rehearse="time")
    assert status in (0, 1)
    assert "ops        out of time" in summary
    assert "begun" in (machine.out / "gpu" / "log.txt").read_text()


def test_sanitizers(machine: Machine) -> None:
    status, summary = machine.run("sanitize")
    assert status == 0, summary
    assert "memcheck: 0 errors; racecheck: 0 errors" in summary
    rows = json.loads((machine.out / "results" / gpu_record()).read_text())["rows"]
    assert {r["name"] for r in rows if r["file"] == "gpu.py"} == {"memcheck", "racecheck"}
    status, summary = machine.run("sanitize", rehearse="sanitize")
    assert status == 1
    assert "memcheck: 2 errors; racecheck: 0 errors" in summary


def test_a_defect_of_a_part_loses_no_summary(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "test", lambda limit: 1 // 0)
    status, summary = machine.run("build test")
    assert status == 1
    assert "test       FAILED" in summary
    assert "ZeroDivisionError" in summary


def test_the_commit_of_a_copy_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import suite

    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.delenv("VARKERN_COMMIT", raising=False)
    assert suite.commit() == "unknown"
    monkeypatch.setenv("VARKERN_COMMIT", "0123abc")
    assert suite.commit() == "0123abc"
    assert BENCHMARKS.is_dir()
