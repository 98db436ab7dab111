"""Compilers for the tests of csrc/, and the register report of the CUDA kernels: python tests/native/toolchain.py."""

import functools
import os
import platform
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
EMULATION = NATIVE / "emulation"
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
SANITIZER_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",  # it needs ptrace, which containers forbid
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0",
}


def cxx() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def run(command: list[str | Path], **environment: str) -> None:
    """Runs a compiler; its messages are the error."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def emulated(source: Path, flags: list[str], output: Path) -> Path:
    """A .cu or .cpp file as an object or, with runtime.o beside output, a program that runs without a device."""
    compiler = cxx()
    assert compiler is not None
    includes = [f"-I{path}" for path in (EMULATION, NATIVE, CSRC)]
    # The packs of csrc/common/device.cuh read memory through other types, as nvcc lets them.
    common = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
    link = ["-c"] if output.suffix == ".o" else ["-x", "none", output.parent / "runtime.o"]
    run([compiler, *common, *includes, *flags, "-x", "c++", source, *link, "-o", output])
    return output


def emulated_runtime(folder: Path) -> Path:
    """What runs the threads, as folder/runtime.o: never under a sanitizer, so that it is no part of what is tested."""
    compiler = cxx()
    assert compiler is not None
    sources = sorted(EMULATION.glob("*.cpp"))
    objects = [emulated(source, ["-O2", "-fPIC"], folder / f"runtime-{source.stem}.o") for source in sources]
    run([compiler, "-r", *objects, "-o", folder / "runtime.o"])
    return folder / "runtime.o"


@functools.cache
def sanitizer_why_not(sanitizer: str) -> str | None:
    """Why a program under the sanitizer cannot be built and run here."""
    compiler = cxx()
    if platform.system() != "Linux" or compiler is None:
        return "the emulation needs Linux and a C++ compiler on PATH"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int main() {}")
        try:
            run([compiler, *SANITIZERS[sanitizer], source, "-o", f"{folder}/empty"])
            run([f"{folder}/empty"], **SANITIZER_ENVIRONMENT)
        except RuntimeError as error:
            return f"the sanitizer does not work here: {str(error).splitlines()[-1]}"
    return None


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
