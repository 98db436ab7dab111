"""The CUDA kernels on the CPU under sanitizers, and the emulation that runs them: scalar models and planted faults."""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import toolchain
from toolchain import NATIVE, SANITIZERS

CHECKS = sorted(NATIVE.glob("checks/*.cpp"))
PROGRAMS = {path.stem: path for path in [NATIVE / "emulator.cu", *CHECKS]}

# The planted faults of faults.cpp: the sanitizer that runs them, and what the error says.
FAULTS = {
    "global_overflow": ("address", "heap-buffer-overflow"),
    "shared_overflow": ("address", "insufficient space|global-buffer-overflow"),
    "dynamic_shared_overflow": ("address", "heap-buffer-overflow"),
    "local_overflow": ("address", "insufficient space|stack-buffer-overflow"),
    "misaligned_vector": ("address", "misaligned address .* for type .*float2"),
    "missing_syncthreads": ("thread", "data race"),
    "missing_second_syncthreads": ("thread", "data race"),
    "missing_syncwarp": ("thread", "data race"),
    "syncwarp_across_warps": ("thread", "data race"),
    "plain_add": ("thread", "data race"),
    "copy_over_readers": ("thread", "data race"),
    "unfinished_copy": ("address", "the copy has not landed"),
    "early_return": ("address", "thread 0 waits at __syncthreads; thread 5 returned"),
    "divergent_barrier": ("address", "thread 0 waits for the lanes of its warp; thread 1 waits at __syncthreads"),
    "divergent_operations": ("address", "thread 5: the lane calls a vote while others .* are in __shfl_xor_sync"),
    "partial_mask": ("address", "thread 0: a shuffle without all 32 lanes"),
}

Build = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """Compiles a program for a sanitizer, once, and in the background for the others."""
    folder = tmp_path_factory.mktemp("emulation")
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        @functools.cache
        def start(source: Path, sanitizer: str) -> Future[Path]:
            flags = [*SANITIZERS[sanitizer], "-fno-omit-frame-pointer"]
            return pool.submit(toolchain.emulated, source, flags, folder / f"{source.stem}-{sanitizer}")

        def build(source: Path, sanitizer: str) -> Path:
            if not (folder / "runtime.o").exists():
                toolchain.emulated_runtime(folder)
            for name in SANITIZERS:
                if not toolchain.sanitizer_why_not(name):
                    start(source, name)
            return start(source, sanitizer).result()

        yield build


@pytest.fixture(params=SANITIZERS)
def sanitizer(request: pytest.FixtureRequest) -> str:
    if why_not := toolchain.sanitizer_why_not(request.param):
        pytest.skip(why_not)
    return request.param


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **toolchain.SANITIZER_ENVIRONMENT}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_under_sanitizer(build: Build, name: str, sanitizer: str) -> None:
    done = run(build(PROGRAMS[name], sanitizer))
    assert done.returncode == 0, done.stderr[:10_000]


def test_every_kernel_has_a_check() -> None:
    checked = {name for path in CHECKS for name in re.findall(r'#include "cuda/(\w+\.cu)"', path.read_text())}
    kernels = {path.name for path in toolchain.CSRC.glob("cuda/*.cu") if "__global__" in path.read_text()}
    assert kernels <= checked, f"no tests/native/checks/*.cpp includes {sorted(kernels - checked)}"


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_seen(build: Build, name: str) -> None:
    sanitizer, message = FAULTS[name]
    if why_not := toolchain.sanitizer_why_not(sanitizer):
        pytest.skip(why_not)
    program = build(NATIVE / "faults.cpp", sanitizer)
    done = run(program, name, "1")
    assert done.returncode
    assert re.search(message, done.stderr), done.stderr[:10_000]
    done = run(program, name, "0")
    assert done.returncode == 0, done.stderr[:10_000]


def compile_for_device(source: Path, output: Path, *flags: str) -> None:
    compiler = toolchain.nvcc()
    if compiler is None:
        pytest.skip("nvcc was not found, or does not run")
    includes = [f"-I{path}" for path in (NATIVE, toolchain.CSRC)]
    toolchain.run([compiler, "-std=c++17", "-O3", *includes, *flags, "-x", "cu", source, "-o", output])


@pytest.mark.parametrize("architecture", toolchain.ARCHITECTURES)
def test_nvcc_compiles_the_instructions(tmp_path: Path, architecture: str) -> None:
    """emulator.cu uses all of csrc/common/ptx.cuh; ptxas knows whether the architecture has the instructions."""
    compile_for_device(NATIVE / "emulator.cu", tmp_path / "cubin", "-cubin", f"-arch=sm_{architecture}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_on_the_device(tmp_path: Path, name: str) -> None:
    """What holds in the emulation holds on a GPU, and under its own memory checker where that is installed."""
    compile_for_device(PROGRAMS[name], tmp_path / name, "-arch=native")
    checker = ["compute-sanitizer", "--error-exitcode=1"] if shutil.which("compute-sanitizer") else []
    done = run(*checker, tmp_path / name)
    assert done.returncode == 0, done.stdout + done.stderr
