"""Compile the Triton kernels ahead of time, without a GPU, and read what they cost.

    python tests/aot.py [--json] [architecture ...]        (80, 90 and 100 unless named)

prints, for every case that the modules of ``varkern.kernels`` list and every architecture, the registers a thread,
the bytes spilt to local memory and the shared memory. The cubins are read by the ``cuobjdump`` that Triton bundles.
Kernels must not be interpreted, so the tests run this file in a process of its own (``test_kernels_aot.py``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)


def kernel_modules() -> list[Any]:
    """The modules of ``varkern.kernels``, each with its list ``CASES``."""
    package = importlib.import_module("varkern.kernels")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "varkern.kernels.")]
    return [importlib.import_module(name) for name in names]


def compile_case(case: Any, architecture: int) -> dict[str, Any]:
    """Compile one case for one architecture; its registers, spills and shared memory, in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    ordered = {name: signature[name] for name in case.kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(case.kernel.arg_names.index(name),): aligned for name in case.aligned if name in signature}
    source = ASTSource(case.kernel, ordered, dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    options["enable_fp_fusion"] = True
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilt = resource_usage(compiled.asm["cubin"])
    constants = ", ".join(f"{name}={value}" for name, value in case.constexprs.items())
    return {
        "kernel": case.kernel.__name__,
        "case": f"{next(iter(case.signature.values()))[1:]} {constants} num_warps={case.num_warps}",
        "architecture": architecture,
        "registers": registers,
        "spilt": spilt,
        "shared": compiled.metadata.shared,
    }


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory of the one kernel in a cubin."""
    tool = Path(importlib.import_module("triton").__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = map(int, match.groups())
    return registers, stack + local


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    columns = list(rows[0])
    lines = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("architectures", nargs="*", type=int, default=ARCHITECTURES)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    cases = [case for module in kernel_modules() for case in module.CASES]
    pairs = [(c, a) for c in cases for a in options.architectures if a in (c.architectures or options.architectures)]
    rows = []
    for i, (case, architecture) in enumerate(pairs):
        print(f"\r{i + 1} of {len(pairs)}", end="", file=sys.stderr, flush=True)
        rows.append(compile_case(case, architecture))
    print(file=sys.stderr)
    print(json.dumps(rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
