"""Every Triton kernel compiles ahead of time for the GPUs we serve, and none spills registers."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aot
import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parent.parent

# Bytes of shared memory that a program may ask for (Triton asks by itself above 48 KiB): CUDA C++ Programming Guide,
# technical specifications per compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


# Where `make test` unpacks the Triton of a PyTorch that many people have: its compiler allots registers otherwise.
OLDER_TRITON = Path(sys.prefix) / "triton-3.6"


def compiled(architecture: int, triton: Path | None) -> list[dict[str, Any]]:
    """The rows of ``tests/aot.py``, run without interpreting, by the Triton in a folder if one is named."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = str(triton)
    command = [sys.executable, str(ROOT / "tests" / "aot.py"), "--json", str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    print("\n" + aot.table(rows))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("triton", [None, OLDER_TRITON], ids=["installed", "3.6"])
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_no_kernel_spills(architecture: int, triton: Path | None) -> None:
    if triton is not None and not triton.is_dir():
        pytest.skip(f"there is no {triton}: make test installs it")
    rows = compiled(architecture, triton)
    assert {row["kernel"] for row in rows} == {case.kernel.__name__ for case in cases()}
    spilling = [row for row in rows if row["spilt"]]
    assert not spilling, "\n" + aot.table(spilling)
    assert all(row["registers"] > 0 and row["shared"] <= SHARED[architecture] for row in rows)


def cases() -> list[Any]:
    return [case for module in aot.kernel_modules() for case in module.CASES]


def entry_kernels() -> dict[str, str]:
    """Every function of ``kernels/*.py`` under ``@triton.jit`` whose name ends in ``_kernel``, and its file."""
    found = {}
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if any(decorator.startswith("triton.jit") for decorator in decorators):
                found[node.name] = path.name
    return {name: file for name, file in found.items() if name.endswith("_kernel")}


def launched() -> set[str]:
    """The names that ``kernels/*.py`` launches: ``name[grid](...)``."""
    names = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                names.add(ast.unparse(node.func.value))
    return names


def test_every_kernel_has_a_case() -> None:
    assert entry_kernels(), "no kernel found"
    assert set(entry_kernels()) == {case.kernel.__name__ for case in cases()}


def test_every_launched_function_is_named_a_kernel() -> None:
    assert launched() == set(entry_kernels())


def test_cases_name_every_argument() -> None:
    for case in cases():
        assert set(case.kernel.arg_names) == {*case.signature, *case.constexprs}, case.kernel.__name__
