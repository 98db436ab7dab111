"""Run the tests under other releases of PyTorch and Triton, each in an environment of its own (gigabytes to download).

    python tests/compat.py [torch-2.11 torch-2.8] [-- arguments of pytest]

What is tested is the last commit: each environment in ``.compat/`` builds a copy of it, for the extensions fit one
PyTorch alone. Closes with a table of the outcomes, and fails where a test did.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The oldest PyTorch that pyproject.toml accepts and the one with the last Triton before 3.7, each with the Triton that
# it was published with. Interpreting kernels, those Tritons read attributes of dtypes that NumPy 2.4 took away.
RELEASES = {
    "torch-2.11": ("torch==2.11.*", "triton==3.6.*", "numpy<2.4"),
    "torch-2.8": ("torch==2.8.*", "triton==3.4.*", "numpy<2.4"),
}


def run(*command: str | Path, cwd: Path, **more: str) -> int:
    print("+", *command, flush=True)
    return subprocess.run(list(map(str, command)), cwd=cwd, env={**os.environ, **more}, check=False).returncode


def install(folder: Path, versions: tuple[str, ...]) -> Path:
    """A copy of the last commit, installed with these versions; the environment's Python."""
    source, python = folder / "source", folder / "venv" / "bin" / "python"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    (folder / "constraints.txt").write_text("\n".join(versions) + "\n")
    steps: list[tuple[str | Path, ...]] = [
        ("sh", "-c", f'git -C "$0" archive HEAD | tar -x -C "{source}"', ROOT),
        (sys.executable, "-m", "venv", folder / "venv"),
        (python, "-m", "pip", "install", "-c", folder / "constraints.txt", "-e", ".[test]"),
    ]
    for step in steps:
        if run(*step, cwd=source, VARKERN_CUDA="off"):
            raise SystemExit(f"compat: {step[0]} failed in {source}; the output above says why.")
    return python


def outcome(report: Path) -> str:
    """``N passed, N failed, N skipped`` of a JUnit file."""
    if not report.is_file():
        return "did not finish"
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return f"{count['tests'] - failed - count['skipped']} passed, {failed} failed, {count['skipped']} skipped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("releases", nargs="*", help=f"of {', '.join(RELEASES)}; all unless named")
    own = sys.argv[1:]
    own, tests = (own[: own.index("--")], own[own.index("--") + 1 :]) if "--" in own else (own, [])
    names = parser.parse_args(own).releases or list(RELEASES)
    if unknown := [name for name in names if name not in RELEASES]:
        parser.error(f"there is no release {unknown[0]!r}: name some of {', '.join(RELEASES)}")
    rows, failed = [], False
    for name in names:
        folder = ROOT / ".compat" / name
        python = install(folder, RELEASES[name])
        report, start = folder / "junit.xml", time.monotonic()
        report.unlink(missing_ok=True)
        pytest = (python, "-m", "pytest", "-n", "auto", "--maxprocesses=8", f"--junitxml={report}", *tests)
        failed |= run(*pytest, cwd=folder / "source", OMP_NUM_THREADS="1") != 0
        rows.append(f"{name:12}{outcome(report)}, {(time.monotonic() - start) / 60:.0f} min")
    print("", *rows, sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
