"""`make gpu` from beginning to end, against a device that is made up, and its parts.

The Python that it runs is a stand-in: it installs nothing, benchmarks by writing rows, watches with a sanitizer that
only prints, and passes real tests and the judging of bars on to the real one, whose torch.cuda says what an H100 would.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from planted_rows import BENCHMARKS, bars, gpu, record, result, row, suite

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
    if os.environ.get("REHEARSE") == "some":
        found["result"]["not_run"] = ["bench_norm.py: the time was up", "bench_conv.py: the time was up"]
    with open(os.environ["VARKERN_RESULTS"] + "/" + found["file"], "w") as file:
        json.dump(found["result"], file)
    sys.exit(0)
if "--judge" in arguments:
    os.environ["PYTHONPATH"] = folder + "/site"
if os.environ.get("REHEARSE") == "stop" and arguments[0].endswith("gpu_tests.py"):
    os.kill(os.getppid(), 15)
    time.sleep(600)
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
        for name in ("site", "results", "tests", "bin", "kept"):
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
        monkeypatch.setattr(gpu, "OUT", self.out)
        monkeypatch.setattr(gpu, "RESULTS", folder / "results")
        monkeypatch.setattr(gpu, "missing", list)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: DEVICE)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("VARKERN_RESULTS", str(folder / "results"))
        monkeypatch.delenv("VARKERN_CUDA_ARCHS", raising=False)

    def tests(self, wrong: int) -> None:
        (self.folder / "tests" / "test_norm.py").write_text(TESTS.format(wrong=wrong))
        (self.folder / "tests" / "test_zoo.py").write_text(TESTS.format(wrong=9))

    def run(self, parts: str, *options: str, rehearse: str = "") -> tuple[int, str]:
        """The exit status and the summary."""
        self.patch.setenv("REHEARSE", rehearse)
        status = gpu.main(["--parts", parts, *options])
        return status, (self.out / "summary.txt").read_text()

    def calls(self) -> list[Any]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]


def gpu_record() -> str:
    import measure

    return f"{measure.file_name(DEVICE)}.json"


def cases(machine: Machine) -> dict[str, list[Any]]:
    """The cases of the JUnit file, and what went wrong with each."""
    suites = ElementTree.parse(machine.out / "tests.xml").getroot()
    return {
        f"{case.get('classname')}::{case.get('name')}".replace(".py", ""): list(case)
        for case in suites.iter("testcase")
    }


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
    assert cases(machine)["test_norm::test_it[2]"] == []
    assert len(list(machine.out.iterdir())) < 8


def test_failing_tests_are_named_and_kept(machine: Machine) -> None:
    machine.tests(wrong=1)
    status, summary = machine.run("build test ops")
    assert status == 1
    assert "test       FAILED" in summary
    assert "1 failed, 5 passed" in summary
    assert "ops        ok" in summary  # goes on
    assert "bars       ok" in summary or "bars       missed" in summary
    assert "failed: test_norm.py::test_it[1]" in summary
    assert "test_norm.py::test_it[1]" in (machine.out / "log.txt").read_text()
    (entry,) = cases(machine)["test_norm::test_it[1]"]
    assert (entry.tag, entry.get("message")) == ("failure", "assert 1 != 1")
    assert (machine.out / gpu_record()).is_file()


def test_a_build_that_fails_ends_it(machine: Machine) -> None:
    status, summary = machine.run("build ops", rehearse="build")
    assert status == 1
    assert "build      FAILED" in summary
    assert "ops        not run" in summary
    assert "no space left" in (machine.out / "log.txt").read_text()


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
    assert set(gpu.NEEDED.values()) <= set(lacks)
    assert [name for name in lacks if name not in gpu.NEEDED.values() or name == "pybind11"] == [
        "pybind11",
        "cmake",
        "ninja",
        "wheel,",
        "Python.h",
        "nvcc",
    ]


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
    kept = json.loads((machine.out / gpu_record()).read_text())
    record.check(kept)
    assert (machine.out / "bars.txt").read_text()


def test_a_missed_bar_fails_only_when_asked(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "bars", lambda *_: gpu.Outcome("missed", "3 bars missed"))
    assert machine.run("ops")[0] == 0
    assert machine.run("ops", "--strict")[0] == 1


def test_what_runs_out_of_time_leaves_its_log(machine: Machine) -> None:
    machine.patch.setitem(gpu.LIMITS, "ops", 5)
    status, summary = machine.run("ops", rehearse="time")
    assert status == gpu.INCOMPLETE
    assert "ops        out of time" in summary
    assert "begun" in (machine.out / "log.txt").read_text()


def test_sanitizers(machine: Machine) -> None:
    status, summary = machine.run("sanitize")
    assert status == 0, summary
    assert "memcheck: 0 errors; racecheck: 0 errors" in summary
    rows = json.loads((machine.out / gpu_record()).read_text())["rows"]
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


HANGING = """
import time
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("i", range(4))
def test_it(i):
    assert i
    if i == 2:
        time.sleep(600)
"""


def test_tests_that_run_out_of_time_are_told_apart(machine: Machine) -> None:
    """What had ended, what had not and how many had not begun, though the process was killed."""
    (machine.folder / "tests" / "test_norm.py").write_text(HANGING)
    (machine.folder / "tests" / "test_zoo.py").unlink()
    machine.patch.setattr(gpu.importlib.util, "find_spec", lambda name: None)  # one after another
    machine.patch.setattr(gpu, "GRACE", 0.01)
    machine.patch.setitem(gpu.LIMITS, "test", 10)
    status, summary = machine.run("test")
    assert status == gpu.INCOMPLETE
    assert "test       out of time" in summary
    assert "1 failed, 1 stopped, 1 passed, 1 not run" in summary
    assert "stopped: test_norm.py::test_it[2]" in summary
    found = cases(machine)
    assert [entry.tag for i in range(3) for entry in found[f"test_norm::test_it[{i}]"]] == ["failure", "error"]


@pytest.mark.parametrize("parallel", [False, True], ids=["one", "xdist"])
def test_a_file_that_cannot_be_imported_keeps_no_other_back(machine: Machine, parallel: bool) -> None:
    (machine.folder / "tests" / "test_decode.py").write_text("import no_such_module")
    if not parallel:
        machine.patch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    status, summary = machine.run("test")
    assert status == 1
    assert "1 error, 6 passed; error: test_decode.py" in summary
    (entry,) = cases(machine)["test_decode::"]
    assert "no_such_module" in entry.text


def test_benchmarks_that_the_time_did_not_suffice_for(machine: Machine) -> None:
    """`varkern bench` ends with status 0 then."""
    status, summary = machine.run("ops", rehearse="some")
    assert status == gpu.INCOMPLETE
    assert "ops        out of time" in summary
    assert "2 not run: bench_norm.py: the time was up, ..." in summary


def test_what_is_stopped_says_so(machine: Machine) -> None:
    before = signal.getsignal(signal.SIGTERM)
    status, summary = machine.run("test ops", rehearse="stop")
    assert status == gpu.INCOMPLETE
    assert "test       stopped" in summary
    assert "ops        not run" in summary
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_record_is_kept_while_it_is_written(machine: Machine) -> None:
    record_of = machine.folder / "results" / gpu_record()
    with gpu.keeping(time.time()):
        record_of.write_text("{}")
        deadline = time.monotonic() + 20
        while not (machine.out / gpu_record()).is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_earlier_calls_stay_in_the_summary(machine: Machine) -> None:
    machine.run("build")
    _, summary = machine.run("build", rehearse="build")
    assert summary.count(DEVICE) == 2
    assert "build      ok" in summary
    assert "build      FAILED" in summary


def test_without_a_sanitizer_it_is_not_run(machine: Machine) -> None:
    (machine.folder / "bin" / "compute-sanitizer").unlink()
    machine.patch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    status, summary = machine.run("sanitize")
    assert status == gpu.INCOMPLETE
    assert "sanitize   not run" in summary


# --- its parts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the results for `gpu.run`."""
    monkeypatch.setattr(gpu, "OUT", tmp_path)


MEMCHECK = "========= COMPUTE-SANITIZER\n5 passed in 2 s\n========= ERROR SUMMARY: {} errors\n"
RACECHECK = (
    "========= COMPUTE-SANITIZER\n5 passed in 2 s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n"
)


def test_sanitizers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "compute-sanitizer")
    outputs = {"memcheck": (0, MEMCHECK.format(0)), "racecheck": (0, RACECHECK)}
    monkeypatch.setattr(gpu, "run", lambda command, *_, **__: outputs[command[2]])
    rows: list[dict[str, Any]] = []
    assert gpu.sanitize(60, rows) == gpu.Outcome("ok", "memcheck: 0 errors; racecheck: 0 errors")
    assert [entry["row"]["facts"]["errors"] for entry in rows] == [0, 0]
    found = suite.result_of(rows, "cpu", "make gpu", "0" * 40)
    record.check(found)
    found["device_type"] = "cuda"
    statuses = {v.bar.name: v.status for v in bars.evaluate(found) if v.bar.area == "sanitizer"}
    assert statuses == {"memcheck": "pass", "racecheck": "pass"}

    outputs |= {"memcheck": (1, MEMCHECK.format(3)), "racecheck": (None, "")}
    rows.clear()
    assert gpu.sanitize(60, rows) == gpu.Outcome("FAILED", "memcheck: 3 errors; racecheck: out of time")
    outputs["memcheck"] = (1, "compute-sanitizer: unknown option\n")
    assert gpu.sanitize(60, rows).text.startswith("memcheck: not run (compute-sanitizer: unknown option)")
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    assert gpu.sanitize(60, rows).status == "not run"


SESSION = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep({seconds})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("seconds", [0, 600], ids=["ends", "is_stopped"])
@pytest.mark.usefixtures("out")
def test_what_a_part_leaves_in_another_session_ends_with_it(seconds: int) -> None:
    """It holds the pipe of the output, and would the device."""
    begun = time.monotonic()
    status, output = gpu.run([sys.executable, "-c", SESSION.format(seconds=seconds)], 5)
    assert time.monotonic() - begun < 60
    assert status == (None if seconds else 0)
    state = Path(f"/proc/{int(output.split()[0])}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.usefixtures("out")
def test_what_is_interrupted_has_time_to_write() -> None:
    script = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('written')"
    # A shell's background job ignores SIGINT, and what it starts inherits that; main() has a handler of its own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:  # for as long as an interpreter takes to start where other tests keep the machine busy
        assert gpu.run([sys.executable, "-uc", script], 8) == (None, "written\n")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("out")
def test_a_part_ends_with_its_time() -> None:
    status, output = gpu.run([sys.executable, "-c", "print('begun'); import time; time.sleep(60)"], 3)
    assert status is None
    assert output.startswith("begun\n")
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 60)[0] == 3


def test_parts_that_are_none_and_machines_without_a_gpu() -> None:
    with pytest.raises(SystemExit, match="PARTS has tests; name some of build, test"):
        gpu.main(["--parts", "tests ops"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="sees no CUDA device through torch"):
            gpu.main(["--parts", "bars"])


def test_parts_run_in_order_and_one_that_fails_keeps_none_back(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    ran = []

    def part(name: str, outcome: Any) -> Callable[..., Any]:
        return lambda *_: (ran.append(name), outcome)[1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    for name in ("build", "test", "sanitize", "bench", "bars"):
        monkeypatch.setattr(gpu, name, part(name, gpu.Outcome("FAILED" if name == "test" else "ok")))
    assert gpu.main(["--parts", "ops test"]) == 1
    assert ran == ["test", "bench", "bars"]
    assert "FAILED" in capsys.readouterr().out


def test_the_commit_of_a_copy_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.delenv("VARKERN_COMMIT", raising=False)
    assert suite.commit() == "unknown"
    monkeypatch.setenv("VARKERN_COMMIT", "0123abc")
    assert suite.commit() == "0123abc"
    assert BENCHMARKS.is_dir()
