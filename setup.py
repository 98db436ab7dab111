"""Builds varkern._C and varkern._C_cuda through CMakeLists.txt; everything else is in pyproject.toml.

The compiled code never sees torch, so this runs under ordinary build isolation. Environment variables:

VARKERN_CUDA        auto (default: build the CUDA kernels where nvcc works), on (fail where it does not), off
VARKERN_CUDA_ARCHS  architectures such as "80;90a;100" (from 80 on); the newest without a suffix also gets PTX
CXX, CUDACXX        the C++ compiler and nvcc
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("80", "90a", "100")
CPU, CUDA = "varkern._C", "varkern._C_cuda"


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"varkern: {sentence}")


def run_quietly(command: list[str]) -> tuple[bool, str]:
    """(whether it succeeded, the line of its output that says why not)."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
    return done.returncode == 0, f"exit status {done.returncode}: {reason}"


def find_tool(name: str) -> str:
    # The scripts folder too: without isolation the environment need not be activated.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    found = shutil.which(name, path=path)
    if not found:
        fail(f"{name} was not found; run: pip install {name}")
    return found


def find_cxx() -> str:
    """The C++ compiler CMake is going to use."""
    if os.environ.get("CXX"):
        cxx = shlex.split(os.environ["CXX"])[0]
        if not shutil.which(cxx):
            fail(f"CXX={os.environ['CXX']!r} is not a program; unset it, or set it to a C++17 compiler such as g++")
        return os.environ["CXX"]
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    fail("no C++ compiler was found; install g++ or clang++ (Debian, Ubuntu: apt-get install g++), or set CXX to one")


class Cuda(NamedTuple):
    """Whether the CUDA kernels are built, and why; nvcc and the CMake architectures when they are."""

    enabled: bool
    reason: str
    nvcc: str = ""
    architectures: tuple[str, ...] = ()

    def describe(self) -> str:
        return f"{'on' if self.enabled else 'off'}: {self.reason}"


def requested_architectures() -> tuple[str, ...]:
    """VARKERN_CUDA_ARCHS as ("80", "90a", ...), or () when it is not set."""
    text = os.environ.get("VARKERN_CUDA_ARCHS", "")
    names = tuple(name for name in re.split(r"[;,\s]+", text) if name)
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name) or int(name.rstrip("af")) < 80:
            fail(f"VARKERN_CUDA_ARCHS={text!r}: {name!r} is not an architecture from 80 on; write e.g. '80;90a;100'")
    return names


def find_nvcc() -> str | None:
    if os.environ.get("CUDACXX"):
        return os.environ["CUDACXX"]
    if found := shutil.which("nvcc"):
        return found
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return next((found for home in homes if home and (found := shutil.which("nvcc", path=f"{home}/bin"))), None)


def cmake_architectures(names: tuple[str, ...]) -> tuple[str, ...]:
    """Machine code for each, and PTX for the newest that newer devices can run ("90a" code runs on 9.0 only)."""
    portable = [name for name in names if name.isdigit()]
    newest = max(portable, key=int, default=None)
    return tuple(name if name == newest else f"{name}-real" for name in names)


def decide_cuda(cxx: str) -> Cuda:
    mode = os.environ.get("VARKERN_CUDA") or "auto"
    if mode not in ("auto", "on", "off"):
        fail(f"VARKERN_CUDA={mode!r} is not a choice; set it to auto, on or off")
    requested = requested_architectures()
    if mode == "off":
        return Cuda(False, "VARKERN_CUDA=off")

    def without(reason: str, fix: str) -> Cuda:
        if mode == "on":
            fail(f"VARKERN_CUDA=on, but {reason}; {fix}, or set VARKERN_CUDA=off")
        return Cuda(False, reason)

    nvcc = find_nvcc()
    if nvcc is None:
        return without("nvcc was not found", "install the CUDA toolkit or set CUDACXX to its nvcc")
    works, reason = run_quietly([nvcc, "--version"])
    if not works:
        return without(
            f"{nvcc} --version failed ({reason})", "repair the CUDA toolkit or set CUDACXX to a working nvcc"
        )
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listing))
    for name in requested:
        if name.rstrip("af") not in known:
            fail(
                f"VARKERN_CUDA_ARCHS: {nvcc} cannot compile for {name!r}; it knows {', '.join(sorted(known, key=int))}"
            )
    names = requested or tuple(name for name in DEFAULT_ARCHS if name.rstrip("af") in known)
    if not names:
        return without(f"{nvcc} compiles for none of {', '.join(DEFAULT_ARCHS)}", "install CUDA 12 or later")
    works, reason = compile_trivial(nvcc, cxx, names[0])
    if not works:
        return without(f"{nvcc} does not compile an empty kernel ({reason})", "repair the CUDA toolkit")
    return Cuda(True, f"{nvcc} for {', '.join(names)}", nvcc, cmake_architectures(names))


def compile_trivial(nvcc: str, cxx: str, architecture: str) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.write_text("__global__ void empty() {}\n")
        host = ["-ccbin", shlex.split(cxx)[-1]] if os.environ.get("CXX") else []
        target = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        return run_quietly([nvcc, *host, *target, "-c", str(source), "-o", f"{folder}/empty.o"])


class CMakeBuild(build_ext):
    """Configures and builds once for all extensions; the build folder is kept between builds."""

    build_dir: Path

    def run(self) -> None:
        cxx = find_cxx()
        cuda = decide_cuda(cxx)
        print(f"varkern: CUDA kernels {cuda.describe()}", flush=True)
        if not cuda.enabled:
            self.extensions = [e for e in self.extensions if e.name != CUDA]
            self.remove_stale(CUDA)
        self.build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        self.cmake(cxx, cuda)
        super().run()

    def remove_stale(self, name: str) -> None:
        """An extension of an earlier build would otherwise be imported, or packed into the wheel."""
        relative = self.get_ext_filename(name)
        for folder in (ROOT, Path(self.build_lib)):
            (folder / relative).unlink(missing_ok=True)

    def cmake(self, cxx: str, cuda: Cuda) -> None:
        import pybind11

        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        # CMake cannot change compilers or the place of the sources in an existing cache: start afresh when they change,
        # as where a checkout was moved or copied with what was built in it.
        made_with = json.dumps([str(ROOT), cxx, cuda.nvcc, os.environ.get("CXXFLAGS"), os.environ.get("CUDAFLAGS")])
        stamp = self.build_dir / "made_with.json"
        try:
            if self.build_dir.exists() and (not stamp.exists() or stamp.read_text() != made_with):
                shutil.rmtree(self.build_dir)
            self.build_dir.mkdir(parents=True, exist_ok=True)
            stamp.write_text(made_with)
        except OSError as error:
            fail(f"the build folder cannot be written ({error}); give write access to {ROOT} or copy the checkout")
        # Every path is passed each time: an isolated build's environment is gone at the next one, and the cache
        # would keep pointing into it; architectures stick in the cache too.
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "VARKERN_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "VARKERN_PYBIND11_INCLUDE": pybind11.get_include(),
            "VARKERN_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "VARKERN_WITH_CUDA": "ON" if cuda.enabled else "OFF",
            "VARKERN_CUDA_DECISION": cuda.describe(),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(self.build_dir / "lib"),
        }
        if cuda.enabled:
            options["CMAKE_CUDA_COMPILER"] = cuda.nvcc
            options["CMAKE_CUDA_ARCHITECTURES"] = ";".join(cuda.architectures)
            if os.environ.get("CXX"):
                options["CMAKE_CUDA_HOST_COMPILER"] = shlex.split(cxx)[-1]
        defines = [f"-D{key}={value}" for key, value in options.items()]
        self.call([cmake, "-S", str(ROOT), "-B", str(self.build_dir), "-G", "Ninja", *defines], "CMake's configuration")
        self.call([cmake, "--build", str(self.build_dir)], "the compilation")

    def call(self, command: list[str], what: str) -> None:
        done = subprocess.run(command)
        if done.returncode:
            fail(f"{what} failed; the messages above say where")

    def build_extension(self, ext: Extension) -> None:
        self.place(Path(self.get_ext_fullpath(ext.name)), ext)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            self.place(ROOT / self.get_ext_filename(ext.name), ext)

    def place(self, target: Path, ext: Extension) -> None:
        """Copies the built module by os.replace: a process may have the old file mapped."""
        built = self.build_dir / "lib" / (ext.name.rpartition(".")[2] + sysconfig.get_config_var("EXT_SUFFIX"))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        shutil.copy2(built, temporary)
        os.replace(temporary, target)


setup(ext_modules=[Extension(CPU, []), Extension(CUDA, [])], cmdclass={"build_ext": CMakeBuild})
