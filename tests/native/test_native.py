"""csrc/ on its own: the conversions bit for bit, and kernels at every SIMD level and under emulation."""

import ctypes
import functools
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import toolchain
import torch

X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVELS = ["baseline", "avx2", "avx512"] if X86 else ["baseline"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


CHECKS = ["norm_check.py", "sampling_check.py"]


def run_check(script: str, target: str, **environment: str) -> str:
    command = [sys.executable, str(toolchain.NATIVE / script), target]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module", params=LEVELS)
def conversions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    level = request.param
    compiler = toolchain.cxx()
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    library = tmp_path_factory.mktemp("conversions") / f"{level}.so"
    flags = ["-std=c++17", "-O3", "-shared", "-fPIC", *toolchain.LEVEL_FLAGS[level], f"-I{toolchain.CSRC}"]
    subprocess.run([compiler, *flags, str(toolchain.NATIVE / "conversions.cpp"), "-o", str(library)], check=True)
    if level not in runnable_levels():
        pytest.skip(f"this processor does not run {level}; it compiles")
    return ctypes.CDLL(str(library))


@functools.cache
def runnable_levels() -> list[str]:
    # A fresh process: the level is chosen once, and VARKERN_SIMD may cap it in this one.
    code = "from varkern import _C; print(_C.simd_level())"
    environment = {key: value for key, value in os.environ.items() if key != "VARKERN_SIMD"}
    best = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return LEVELS[: LEVELS.index(best.stdout.strip()) + 1]


def call(function: ctypes._CFuncPtr, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    function(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr()), ctypes.c_int64(source.numel()))
    return target


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("form", ["", "scalar_"])
def test_every_half_widens_exactly(conversions: ctypes.CDLL, name: str, form: str) -> None:
    bits = torch.arange(65535, -1, -1, dtype=torch.int32)[:-1].to(torch.uint16)  # 65535 values: the tail is used too
    halves = bits.view(DTYPES[name])
    ours = call(getattr(conversions, f"widen_{form}{name}"), halves, torch.empty(65535))
    expected = halves.float()
    if name == "float16":
        numpys = torch.from_numpy(bits.numpy().view(np.float16).astype(np.float32))
        assert torch.equal(expected.nan_to_num(nan=1.5), numpys.nan_to_num(nan=1.5))
    nan = expected.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan].view(torch.int32), expected[~nan].view(torch.int32))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("form", ["", "scalar_"])
def test_floats_round_to_the_nearest_even_half(conversions: ctypes.CDLL, name: str, form: str) -> None:
    dtype = DTYPES[name]
    # Every half, the midpoint to its neighbour, the floats beside the midpoint; then random bits.
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    exact = halves.float().view(torch.int32)
    step = 1 << (12 if name == "float16" else 15)
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (500_003,), generator=generator).to(torch.int32)
    bits = torch.cat([exact, exact + step, exact + step - 1, exact + step + 1, exact - 1, random])
    # Below float16's smallest normal number the midpoints lie elsewhere: at multiples of 2^-25.
    small = torch.arange(-4100, 4100, dtype=torch.float64).mul(2.0**-25).float().view(torch.int32)
    floats = torch.cat([bits, small, small + 1, small - 1]).view(torch.float32)
    ours = call(getattr(conversions, f"narrow_{form}{name}"), floats, torch.empty_like(floats, dtype=dtype))
    expected = floats.to(dtype)
    nan = expected.isnan()
    assert torch.equal(nan, floats.isnan())
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan].view(torch.int16), expected[~nan].view(torch.int16))


def test_exponential_is_within_its_bound(conversions: ctypes.CDLL) -> None:
    x = torch.cat(
        [torch.linspace(-87, 87, 2_000_003), torch.linspace(-1e-3, 1e-3, 10_001), -torch.logspace(-45, 0, 999)]
    )
    got = call(conversions.exponential_all, x, torch.empty_like(x)).double()
    error = (got / x.double().exp() - 1).abs().max().item()
    assert error <= 4 * 2.0**-24


@pytest.mark.parametrize("script", CHECKS)
@pytest.mark.parametrize("level", LEVELS)
def test_kernels_at_every_level(level: str, script: str) -> None:
    if level not in runnable_levels():
        pytest.skip(f"this processor does not run {level}")
    assert run_check(script, "cpu", VARKERN_SIMD=level) == level


def test_an_unknown_simd_level_is_refused() -> None:
    code = "from varkern import _C; _C.simd_level()"
    environment = {**os.environ, "VARKERN_SIMD": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode
    assert "VARKERN_SIMD='sse9' is not a SIMD level" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_cuda_kernels_under_emulation(tmp_path: Path) -> None:
    """The .cu files as plain C++, behind the bindings: the arithmetic, the indices, the arguments' order."""
    compiler = toolchain.cxx()
    if compiler is None or platform.system() != "Linux":
        pytest.skip("the emulation needs Linux and a C++ compiler on PATH")
    import pybind11

    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    sources = [*sorted(toolchain.CSRC.glob("cuda/*.cu")), toolchain.CSRC / "bindings_cuda.cpp"]
    flags = ["-O1", "-fPIC", "-fvisibility=hidden", *includes]
    objects = [toolchain.emulated(source, flags, tmp_path / f"{source.stem}.o") for source in sources]
    module = tmp_path / "_C_cuda.so"
    toolchain.run([compiler, "-shared", *objects, toolchain.emulated_runtime(tmp_path), "-o", module])
    for script in [*CHECKS, "cached_attention_check.py", "fused_norm_check.py"]:
        assert run_check(script, str(module)) == "cuda ['emulation']"


@pytest.mark.gpu
@pytest.mark.parametrize("script", CHECKS)
def test_cuda_kernels_on_the_device(script: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert run_check(script, "cuda").startswith("cuda ")
