"""What the compilers made of csrc/: registers and spills of the CUDA kernels, symbols of the CPU kernels."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from varkern import _C

sys.path.insert(0, str(Path(__file__).resolve().parent / "native"))
import toolchain

X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.mark.slow
def test_no_cuda_kernel_spills() -> None:
    compiler = toolchain.nvcc()
    if compiler is None:
        pytest.skip("no working nvcc")
    usages = toolchain.kernel_usage(compiler)
    print(toolchain.table(usages))
    assert {u.architecture for u in usages} == set(toolchain.ARCHITECTURES)
    assert any("forward_kernel" in u.kernel for u in usages)
    spilling = [u for u in usages if u.stack or u.spill_stores or u.spill_loads]
    assert not spilling, f"registers spill to memory, or arrays live on the stack:\n{toolchain.table(spilling)}"


def test_ptxas_report_is_read() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1kv\n"
        "    24 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 255 registers, 1024 bytes smem, 400 bytes cmem[0]\n"
    )
    (usage,) = toolchain.parse_ptxas(log, "k.cu", "80")
    assert usage[3:] == (255, 24, 8, 16, 1024)


@pytest.mark.parametrize("source", sorted(p.name for p in toolchain.CSRC.glob("cpu/*.cpp")))
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_cpu_kernels_share_no_code_between_levels(source: str, level: str, tmp_path: Path) -> None:
    """A weak symbol of an AVX file could be the copy the linker keeps for every processor."""
    compiler = toolchain.cxx()
    if compiler is None or not shutil.which("nm") or not X86:
        pytest.skip("needs a C++ compiler and nm on an x86 processor")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fno-exceptions", "-fno-rtti", *toolchain.LEVEL_FLAGS[level]]
    command = [compiler, *flags, f"-DVARKERN_LEVEL={level}", f"-I{toolchain.CSRC}", "-c"]
    subprocess.run([*command, str(toolchain.CSRC / "cpu" / source), "-o", f"{tmp_path}/kernel.o"], check=True)
    symbols = subprocess.run(["nm", "-C", f"{tmp_path}/kernel.o"], capture_output=True, text=True, check=True).stdout
    defined = [line for line in symbols.splitlines() if line[17:18] in "TDBRWVuw" and line[:1].strip()]
    assert defined
    assert all(line[17] == "T" and f"varkern::cpu::{level}::" in line for line in defined), symbols


def test_simd_level_is_one_that_was_compiled() -> None:
    assert _C.simd_level() in _C.simd_levels()
    assert _C.simd_levels() == (["baseline", "avx2", "avx512"] if X86 else ["baseline"])


def test_torch_governs_the_number_of_threads() -> None:
    """Both use one OpenMP runtime; where they do not, torch.set_num_threads leaves ours alone."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert _C.openmp()["max_threads"] == threads, _C.openmp()
    finally:
        torch.set_num_threads(before)


def test_build_info_names_the_cuda_decision() -> None:
    info = _C.build_info()
    assert info["cuda"].split(":")[0] in ("on", "off")
    assert info["compiler"].strip()


def test_cuda_module_imports_and_explains_a_missing_driver() -> None:
    _C_cuda = pytest.importorskip("varkern._C_cuda", reason="built without CUDA", exc_type=ImportError)
    assert all(int(name.rstrip("af")) >= 80 for name in _C_cuda.architectures())
    if _C_cuda.driver_version():
        pytest.skip("this machine has a CUDA driver")
    with pytest.raises(RuntimeError, match="no CUDA driver is installed"):
        _C_cuda.modulated_layer_norm_forward(*[0] * 6, 1, 1, 8, 8, 8, 8, 8, 0, 0, 0, 1e-6, 0)
