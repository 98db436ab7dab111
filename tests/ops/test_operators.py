"""Every registered operator on every backend that it has: what PyTorch and its compiler may ask of one.

Called directly, those of backward passes too, as the samples of ``cases`` run them. Then what is compiled, threads, and
the levels of processors.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LARGE_SAMPLES, SAMPLES, Sample, copied, moved, op_of, operator_calls, summed, tensors_of
from everywhere import LAYOUTS, everywhere, quick
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import varkern
from varkern.ops import backends
from varkern.ops._op import Op

X86 = platform.machine().lower() in ("x86_64", "amd64")
pytestmark = pytest.mark.usefixtures("dot_in_one_order")


def calls(sample: Sample, device: torch.device) -> Iterator[tuple[Op, list[Any], str]]:
    """The operators that a sample runs, called directly."""
    backend = backends.current_backend()
    assert backend is not None
    for op, args in operator_calls(sample, backend, device):
        yield op, args, backend


def called(op: Op, args: list[Any], backend: str | None) -> list[Tensor]:
    """What an operator gives and what it has written, for copies of the arguments unless they are strided."""
    own = [t.clone() if i in op._written else t for i, t in enumerate(args)]
    return [*tensors_of(op.operator(*own, backend)), *(own[i] for i in op._written)]


@everywhere(CASES, quick)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_operators(device: torch.device, name: str, layout: str) -> None:
    """The results of dense tensors. What a forward pass leaves to its backward pass is not the same for all rows."""
    for op, args, backend in calls(SAMPLES[name], device):
        free = [i for i in op.tensors if args[i] is not None and i not in op._written]
        if layout == "expanded" and op.name.endswith("backward"):
            free = [i for i in free if op.names[i].startswith("grad")]
        odd = [LAYOUTS[layout](t) if i in free else t for i, t in enumerate(args)]
        dense = [t.contiguous() if i in free else t for i, t in enumerate(odd)]
        with torch.no_grad():
            got, want = called(op, odd, backend), called(op, dense, backend)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text, op=op: f"{op.name}: {text}")


@everywhere(SAMPLES, quick)
def test_operators_give_the_same_bits_whatever_memory_holds(device: torch.device, name: str) -> None:
    """Once in NaN, so that what is not written shows."""
    for op, args, backend in calls(SAMPLES[name], device):
        with torch.no_grad():
            want = called(op, args, backend)
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                got = called(op, args, backend)
            finally:
                torch.use_deterministic_algorithms(before)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), op.name


@everywhere(SAMPLES, quick)
def test_fake_outputs_are_the_real_ones(device: torch.device, name: str) -> None:
    for op, args, backend in calls(SAMPLES[name], device):
        with torch.no_grad():
            real = tensors_of(op.operator(*copied(args), backend))
            with FakeTensorMode() as mode:
                given = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in args]
                fake = tensors_of(op.operator(*given, backend))
        told, found = ([(t.shape, t.dtype, t.stride(), t.device) for t in tensors] for tensors in (fake, real))
        assert told == found, op.name


@pytest.mark.parametrize("name", SAMPLES)
def test_meta_tensors_reach_no_kernel(name: str) -> None:
    sample = SAMPLES[name]
    with torch.no_grad():
        want, got = (sample.results(*moved(sample.fresh(), torch.device(kind))) for kind in ("cpu", "meta"))
    assert [(t.device.type, t.shape, t.dtype) for t in got] == [("meta", t.shape, t.dtype) for t in want]


@everywhere(CASES)
def test_opcheck(device: torch.device, name: str) -> None:
    for op, args, backend in calls(SAMPLES[name], device):
        slow = backend == "triton" and backends.interpreting()
        utils = ("test_schema", "test_faketensor") if slow else torch.library._OPCHECK_DEFAULT_UTILS
        torch.library.opcheck(op.operator, (*copied(args), backend), test_utils=utils)
        if op._function is not None and not slow:
            leaves = [
                t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in copied(args)
            ]
            torch.library.opcheck(op.operator, (*leaves, backend))


@everywhere([name for name in CASES if op_of(name)._function is not None], quick)
def test_operators_are_differentiable(device: torch.device, name: str) -> None:
    """Called directly, the gradients of a call's registered op are those that its backward operator gives."""
    (op, args, backend), *inner = calls(SAMPLES[name], device)
    leaves = [t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in copied(args)]
    summed([t for t in tensors_of(op.operator(*leaves, backend)) if t.requires_grad]).backward()
    backward, given, _ = inner[-1]
    assert backward.name.endswith("backward")
    want = dict(zip(backward.outputs, tensors_of(backward.operator(*given, backend)), strict=True))
    for i in op.tensors:
        grad = want.get(f"grad_{op.names[i]}")
        if grad is not None and leaves[i] is not None:
            assert torch.equal(leaves[i].grad, grad)


# --- the compiler, threads, processors


@everywhere(CASES)
def test_compile_fullgraph(device: torch.device, name: str) -> None:
    compiled_matches_eager(SAMPLES[name], device, "aot_eager")


@everywhere(CASES, lambda _: False, kernels=True)
@pytest.mark.slow
def test_compile_fullgraph_inductor(device: torch.device, name: str) -> None:
    compiled_matches_eager(SAMPLES[name], device, "inductor")


def compiled_matches_eager(sample: Sample, device: torch.device, compiler: str) -> None:
    inputs = moved(sample.fresh(), device)
    torch.compiler.reset()
    compiled = torch.compile(sample.public, fullgraph=True, backend=compiler)

    def function(*tensors: Tensor) -> Any:
        return compiled(**sample.named(*tensors))

    with torch.no_grad():
        got, want = (sample.results(*moved(inputs, device), form=form) for form in (function, sample.function))
    if sample.differentiable:
        got, want = (
            [*had, *sample.gradients(*inputs, form=form)] for had, form in ((got, function), (want, sample.function))
        )
    for a, b in zip(got, want, strict=True):
        assert compiler == "inductor" or a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LARGE_SAMPLES)
def test_the_number_of_threads_does_not_change_a_bit(name: str) -> None:
    sample, threads, results = LARGE_SAMPLES[name], torch.get_num_threads(), []
    inputs = sample.fresh()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            with varkern.use_backend("cpu"):
                with torch.no_grad():
                    given = sample.results(*moved(inputs, torch.device("cpu")))
                results.append(
                    given + (sample.gradients(*inputs) if op_of(name)._function and sample.differentiable else [])
                )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"] if X86 else ["baseline"])
def test_simd_levels_and_uninitialised_memory(level: str) -> None:
    """The tests of values of all ops at each level the processor has, on a heap that glibc fills with garbage."""
    environment = {**os.environ, "VARKERN_SIMD": level, "MALLOC_PERTURB_": "85"}
    environment.pop("PYTEST_ADDOPTS", None)
    probe = [sys.executable, "-c", "from varkern import _C; print(_C.simd_level())"]
    if subprocess.run(probe, env=environment, capture_output=True, text=True, check=True).stdout.strip() != level:
        pytest.skip(f"this processor does not run {level}")
    command = [str(Path(sys.executable).with_name("pytest")), "-q", "-x", "-m", "levels", "-k", "cpu-cpu or on_the_cpu"]
    command += ["-p", "no:xdist", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 300, done.stdout[-400:]
