"""What the tests share: one seed, NaN in uninitialised memory, the grid of devices and backends, the command line.

Without a CUDA device the Triton kernels run in Triton's interpreter, which must be asked for before they are imported;
what has to see compiled kernels (``test_kernels_aot.py``) runs in processes of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from places import parameter, places

from varkern.ops import backends
from varkern.ops._precision import full_float32


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with the fixture ``device`` run in each place that the ops have which their module names as ``OPS``."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    own = hasattr(metafunc.module, "device") or any("device" in names for names in named)
    if "device" in metafunc.fixturenames and not own:
        there = places(*getattr(metafunc.module, "OPS", ()))
        metafunc.parametrize("device", [parameter(place) for place in there], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # of "keywords" a folder called gpu is one, too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, with one of the backends in force that an op may have there."""
    name, backend = request.param.split("-")
    probe = torch.empty(0, device=name)
    # What the build made optional may be missing; the CPU extension may not.
    missing = {"triton": backends.triton_why_not, "cuda": backends.cuda_why_not}.get(backend, lambda _: None)(probe)
    if missing:
        pytest.skip(missing)
    with backends.use_backend(backend):
        yield probe.device


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """Without TF32, which PyTorch's convolutions use on a GPU: what is compared with must be as exact as float32 is."""
    with full_float32() if torch.cuda.is_available() else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_in_empty() -> Iterator[None]:
    """Fill every new ``torch.empty`` with NaN, so that an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def dot_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted float32 products whose bits depend on neither the tile nor which operand comes first.

    On a GPU each element of a float32 ``tl.dot`` is a chain of multiply-adds in the order of the summed axis, whatever
    the tile, so that a kernel may compute again what another one has. NumPy's order changes with the shape.
    """
    if not backends.interpreting():
        return
    from triton.runtime import interpreter

    builder, create_dot = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot

    def exact(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.data.dtype != np.float32:
            return create_dot(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(builder, "create_dot", exact)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random weights."""
    from tiny_model import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A colour photograph-like file, not square, of another size than the model's."""
    from PIL import Image

    y, x = np.mgrid[0:50, 0:80]
    pixels = np.stack([x * 3, y * 5, (x + y) * 2], axis=-1).astype(np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """``run("sample", ...)`` in an empty folder on the tiny model: (exit status, stdout, stderr)."""
    from varkern import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VARKERN_DEBUG", raising=False)

    def call(*arguments: object, model: bool = True) -> tuple[int, str, str]:
        argv = [str(argument) for argument in arguments]
        status = cli.main([*argv, "--checkpoint", str(tiny), "--device", "cpu"] if model else argv)
        out, err = capsys.readouterr()
        return status, out, err

    return call
