"""Compilers for the tests of csrc/, and the register report of the CUDA kernels: python tests/native/toolchain.py."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

NATIVE = Path(__file__).resolve().parent
CSRC = NATIVE.parents[1] / "csrc"
LEVEL_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
ARCHITECTURES = ("80", "90a")


def cxx() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def nvcc() -> str | None:
    """nvcc if it runs."""
    path = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if path is None or subprocess.run([path, "--version"], capture_output=True).returncode:
        return None
    return path


class Usage(NamedTuple):
    """What one kernel takes on one architecture; stack and spills in bytes a thread, shared in bytes a block."""

    source: str
    architecture: str
    kernel: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def parse_ptxas(log: str, source: str, architecture: str) -> list[Usage]:
    """The lines of ptxas -v as one Usage a kernel."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        numbers = {
            name: int(match[1]) if (match := re.search(pattern, part)) else 0
            for name, pattern in {
                "registers": r"Used (\d+) registers",
                "stack": r"(\d+) bytes stack frame",
                "spill_stores": r"(\d+) bytes spill stores",
                "spill_loads": r"(\d+) bytes spill loads",
                "shared": r"(\d+) bytes smem",
            }.items()
        }
        if not numbers["registers"]:
            raise RuntimeError(f"ptxas -v printed no register count for {part.partition(chr(39))[0]} of {source}")
        found.append(Usage(source, architecture, demangle(part.partition("'")[0]), **numbers))
    return found


def demangle(symbol: str) -> str:
    """forward_kernel<float, bfloat16, float>; the mangled name where c++filt is missing."""
    if not shutil.which("c++filt"):
        return symbol
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    text = re.sub(r"varkern::(cuda::)?|\(anonymous namespace\)::|^void ", "", text)
    return re.sub(r"\(.*\)$", "", text)


def kernel_usage(compiler: str) -> list[Usage]:
    """Compiles every csrc/cuda/*.cu for every architecture of ARCHITECTURES and reads what ptxas reports."""
    found = []
    for source in sorted(CSRC.glob("cuda/*.cu")):
        for architecture in ARCHITECTURES:
            with tempfile.TemporaryDirectory() as folder:
                command = [compiler, "-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas=-v", "-cubin", "-o", f"{folder}/cubin"]
                done = subprocess.run(
                    [*command, f"-arch=sm_{architecture}", str(source)], capture_output=True, text=True
                )
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile for sm_{architecture}:\n{done.stderr}")
            found += parse_ptxas(done.stdout + done.stderr, source.name, architecture)
    return found


def table(usages: list[Usage]) -> str:
    lines = [f"{'source':26} {'arch':5} {'regs':>4} {'stack':>5} {'spill':>5} {'smem':>6}  kernel"]
    for u in usages:
        spill = u.spill_stores + u.spill_loads
        lines.append(f"{u.source:26} {u.architecture:5} {u.registers:4} {u.stack:5} {spill:5} {u.shared:6}  {u.kernel}")
    return "\n".join(lines)


if __name__ == "__main__":
    compiler = nvcc()
    sys.exit("nvcc was not found, or does not run" if compiler is None else print(table(kernel_usage(compiler))))
