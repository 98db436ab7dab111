"""What is shipped and how the build decides: run on a copy of the sources, never on the checkout."""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
SCRIPTS = sysconfig.get_path("scripts")
SHIPPED = ("csrc", "kernels", "varkern", "docs", "tests", "benchmarks")
BUILD_HOOK = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build_environment(**changes: str) -> dict[str, str]:
    ours = {"VARKERN_CUDA", "VARKERN_CUDA_ARCHS", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"}
    return {**{key: value for key, value in os.environ.items() if key not in ours}, **changes}


def run(command: list[str], folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=build_environment(**changes))


def failure(folder: Path, **changes: str) -> str:
    """The one sentence with which a build under these variables stops."""
    done = run([sys.executable, "setup.py", "build_ext"], folder, **changes)
    assert done.returncode, done.stdout
    assert "Traceback" not in done.stderr
    assert not (folder / "build").exists(), "stops before anything is built"
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def broken_nvcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH whose first nvcc exits with 1."""
    nvcc = tmp_path_factory.mktemp("bin") / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'error: licence of the universe expired' >&2\nexit 1\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return os.pathsep.join([str(nvcc.parent), SCRIPTS, os.environ["PATH"]])


def test_a_copied_checkout_builds_afresh(tmp_path: Path) -> None:
    """What CMake cached holds the folder that it was made in: Docker's COPY, or a move, brought it along."""
    first, second = tmp_path / "first", tmp_path / "with a space" / "zweites"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "csrc", first / "csrc", ignore=ignore)
    (first / "varkern").mkdir()
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, first)
    shutil.copy(ROOT / "varkern" / "_version.py", first / "varkern")
    # Enough of a build to leave a cache: the compilation itself is cut short.
    (first / "csrc" / "bindings.cpp").write_text("#error stop\n")
    for folder in (first, second):
        if folder is second:
            second.parent.mkdir()
            shutil.copytree(first, second)
        done = run([sys.executable, "setup.py", "build_ext", "--inplace"], folder, VARKERN_CUDA="off")
        assert done.returncode
        assert "#error stop" in done.stdout + done.stderr, done.stdout + done.stderr
        cache = next(folder.glob("build/cmake-*/CMakeCache.txt")).read_text()
        assert f"CMAKE_HOME_DIRECTORY:INTERNAL={folder}\n" in cache


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("sources") / "varkern"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "golden")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    (copy / "varkern" / f"_C_cuda{SUFFIX}").write_bytes(b"built here before")
    done = run([sys.executable, "-c", BUILD_HOOK, "build_sdist", "dist"], copy)
    assert done.returncode == 0, done.stderr
    return copy / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sources(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = folder.iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sources: Path, broken_nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist beside a broken nvcc, with the _C_cuda of an earlier build lying about."""
    folder = tmp_path_factory.mktemp("wheel") / sources.name
    shutil.copytree(sources, folder)
    stale = [
        folder / "varkern",
        folder / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/varkern",
    ]
    for place in stale:
        place.mkdir(parents=True, exist_ok=True)
        (place / f"_C_cuda{SUFFIX}").write_bytes(b"stale")
    done = run([sys.executable, "-c", BUILD_HOOK, "build_wheel", "dist"], folder, PATH=broken_nvcc)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "varkern: CUDA kernels off: " in done.stdout
    assert "licence of the universe expired" in done.stdout
    assert not any((place / f"_C_cuda{SUFFIX}").exists() for place in stale)
    return folder / "dist" / done.stdout.splitlines()[-1]


def test_sdist_has_what_the_build_needs_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "kernels/__init__.py"}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    needed |= {str(p.relative_to(ROOT)) for p in (ROOT / "varkern").rglob("*.py")}
    assert needed <= names, needed - names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@pytest.mark.slow
def test_wheel_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"varkern"}, "no top-level kernels"
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "varkern").rglob("*.py")}
    ours |= {f"varkern/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    ours |= {
        str(p.relative_to(ROOT)) for p in (ROOT / "varkern/assets").rglob("*") if p.is_file() and p.suffix != ".pyc"
    }
    expected = ours | {"varkern/py.typed", f"varkern/_C{SUFFIX}"}
    assert {name for name in names if name.startswith("varkern/")} == expected
    metadata = next(name for name in names if name.endswith("METADATA"))
    version = {}
    exec((ROOT / "varkern/_version.py").read_text(), version)
    assert f"Version: {version['__version__']}" in zipfile.ZipFile(wheel).read(metadata).decode()


@pytest.mark.slow
def test_installed_wheel_imports_and_computes(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    done = run([*pip, str(wheel)], tmp_path)
    assert done.returncode == 0, done.stderr
    script = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]  # the development install
sys.path.insert(0, {str(target)!r})
import torch, varkern, varkern._C as C
assert varkern.__file__.startswith({str(target)!r}), varkern.__file__
assert C.__file__.startswith({str(target)!r}), C.__file__
import importlib.util
assert importlib.util.find_spec("varkern.kernels").origin.startswith({str(target)!r})
assert importlib.util.find_spec("varkern._C_cuda") is None
x, out, zero = torch.tensor([1.0, 3.0]), torch.empty(2), torch.zeros(2)
C.modulated_layer_norm_forward(x.data_ptr(), zero.data_ptr(), zero.data_ptr(), out.data_ptr(), 0, 0,
                               1, 1, 2, 2, 2, 2, 2, 0, 0, 0, 0.0)
assert out.tolist() == [-1.0, 1.0], out
"""
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.returncode == 0, done.stderr


def test_kernels_are_importable_here_under_the_package_only() -> None:
    spec = importlib.util.find_spec("varkern.kernels")
    assert spec is not None
    assert Path(spec.origin).parent == ROOT / "kernels"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"VARKERN_CUDA": "yes"}, "VARKERN_CUDA='yes' is not a choice; set it to auto, on or off"),
        ({"VARKERN_CUDA_ARCHS": "80;75"}, "'75' is not an architecture from 80 on"),
        ({"VARKERN_CUDA_ARCHS": "sm_90"}, "'sm_90' is not an architecture from 80 on"),
        ({"CXX": "no-such-compiler"}, "CXX='no-such-compiler' is not a program"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_environment_values_stop_the_build(sources: Path, variables: dict[str, str], sentence: str) -> None:
    assert sentence in failure(sources, **variables)


def test_broken_nvcc_stops_the_build_when_cuda_is_demanded(sources: Path, broken_nvcc: str) -> None:
    last = failure(sources, PATH=broken_nvcc, VARKERN_CUDA="on")
    assert last.startswith("varkern: VARKERN_CUDA=on, but ")
    assert "licence of the universe expired" in last
    assert last.endswith("or set VARKERN_CUDA=off")


def test_missing_compiler_is_named(sources: Path, tmp_path: Path) -> None:
    assert "no C++ compiler was found; install g++" in failure(sources, PATH=str(tmp_path))


def test_missing_nvcc_stops_the_build_when_cuda_is_demanded(sources: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    if shutil.which("nvcc", path="/usr/local/cuda/bin"):
        pytest.skip("a CUDA toolkit at /usr/local/cuda is found without PATH")
    assert "nvcc was not found; install the CUDA toolkit" in failure(sources, PATH=str(tmp_path), VARKERN_CUDA="on")
