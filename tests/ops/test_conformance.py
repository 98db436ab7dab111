"""Every op on every backend that it has: what all of them promise, on the samples of ``cases``.

What is special about an op is in its own file. Over the same samples, in files of their own: ``test_func``,
``test_flops``, ``test_allocations`` (defaults in force), ``test_alignment`` and ``test_bad_calls``.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, LARGE_SAMPLES, SAMPLES, Sample, copied, moved, op_of, operator_calls, summed, tensors_of
from places import parameter, places
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import varkern
from varkern.ops import backends
from varkern.ops._op import Op, library

X86 = platform.machine().lower() in ("x86_64", "amd64")
pytestmark = pytest.mark.usefixtures("dot_in_one_order")


INTERPRETED = {"cpu-triton"} if backends.interpreting() else set()


def everywhere(samples: Iterable[str], in_the_interpreter: Callable[[str], bool] = lambda _: True) -> Any:
    """Each sample in each place of its op; in Triton's interpreter, which takes seconds for some, not all of them."""
    grid = [(name, place) for name in samples for place in places(op_of(name).name)]
    grid = [(name, place) for name, place in grid if place not in INTERPRETED or in_the_interpreter(name)]
    return pytest.mark.parametrize(("name", "device"), [parameter(*case) for case in grid], indirect=["device"])


def quick(name: str) -> bool:
    """In the interpreter."""
    return name in CASES and "triton" in op_of(name).backends and not name.startswith(("residual", "teacher"))


DIFFERENTIABLE = {name: sample for name, sample in SAMPLES.items() if sample.differentiable}
# A backward stable algorithm gives the exact result for inputs that are each off by a few roundings of the largest.
# Sums of some hundred terms in any order and the transforms of a convolution are off by less than this many.
ROUNDINGS = 32


def test_every_op_has_samples() -> None:
    """And every operator is run by one: those of backward passes too."""
    assert set(CASES) - {"residual_quantize_train"} == set(Op.registry)
    assert set(LARGE_SAMPLES) == set(CASES)
    run = {op.name for sample in CASES.values() for op, _ in operator_calls(sample, None)}
    assert run == {name.split("::")[1].split(".")[0] for name in library._op_defs}


# --- values and gradients


Form = Callable[[list[Tensor], Callable[[Tensor], Tensor]], list[Tensor]]


def assert_accurate(got: list[Tensor], exactly: Form, inputs: list[Tensor]) -> None:
    """Within what ROUNDINGS of the inputs change in float64, and one rounding of the result. Integers are equal.

    ``exactly(doubles, change)``: ``change`` is made to what an incoming gradient is multiplied with.
    """
    doubles = [t.double() if t.is_floating_point() else t for t in inputs]
    coarsest = max(torch.finfo(t.dtype).eps for t in inputs if t.is_floating_point())
    exact = exactly([t.clone() for t in doubles], lambda t: t)
    changed = []
    for draw in range(6):
        generator = torch.Generator("cpu").manual_seed(draw)

        def signs(tensor: Tensor, generator: torch.Generator = generator) -> Tensor:
            return torch.randint(0, 2, tensor.shape, generator=generator, device="cpu").to(tensor) * 2 - 1

        off = [
            d + torch.finfo(t.dtype).eps * d.abs().amax() * signs(d) if d.is_floating_point() and d.numel() else d
            for d, t in zip(doubles, inputs, strict=True)
        ]
        changed.append(exactly(off, lambda t, signs=signs: t * (1 + coarsest * signs(t))))
    assert len(got) == len(exact)
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert a.shape == b.shape, f"result {i}"
        others = [other[i] for other in changed]
        if not a.is_floating_point():
            assert all(torch.equal(b, other) for other in others), f"result {i}: the sample has a tie, take another"
            assert torch.equal(a, b), f"result {i}"
            continue
        finite = b.isfinite()
        assert torch.equal(a.double()[~finite], b.double()[~finite]), f"result {i}"
        if not finite.any():
            continue
        response = max(float((other - b)[finite].abs().amax()) for other in others)
        error = float((a.double() - b)[finite].abs().amax())
        allowed = ROUNDINGS * response + torch.finfo(a.dtype).eps * float(b[finite].abs().amax())
        assert error <= allowed, f"result {i}: error {error:.3g}, allowed {allowed:.3g}"


def assert_right(sample: Sample, inputs: list[Tensor]) -> None:
    used = [t.clone() if i == sample.writes else t for i, t in enumerate(inputs)]
    with torch.no_grad():
        got = sample.results(*used)
        assert_accurate(got, lambda doubles, _: sample.results(*doubles, form=sample.plain), inputs)


@everywhere(SAMPLES)
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.levels
def test_value(device: torch.device, name: str) -> None:
    assert_right(SAMPLES[name], moved(SAMPLES[name].fresh(), device))


@everywhere(DIFFERENTIABLE)
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.levels
def test_gradient(device: torch.device, name: str) -> None:
    sample = SAMPLES[name]
    inputs = moved(sample.fresh(), device)
    got = sample.gradients(*inputs)
    assert [t.dtype for t in got] == [inputs[i].dtype for i in sample.differentiable]
    assert_accurate(got, lambda doubles, change: sample.gradients(*doubles, form=sample.plain, change=change), inputs)


# --- layouts


def spread(tensor: Tensor) -> Tensor:
    """With gaps between the elements of the last axis."""
    return tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor


def turned(tensor: Tensor) -> Tensor:
    """With its first two axes in the other order in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


def cut(tensor: Tensor) -> Tensor:
    """Out of a wider tensor, not at its begin."""
    return torch.cat((tensor[..., :1], tensor, tensor[..., :2]), -1)[..., 1 : tensor.size(-1) + 1]


LAYOUTS = {"spread": spread, "turned": turned, "cut": cut}


@everywhere(CASES, quick)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device: torch.device, name: str, layout: str) -> None:
    sample = SAMPLES[name]
    inputs = moved(sample.fresh(), device)
    assert_right(sample, [t if i == sample.writes else LAYOUTS[layout](t) for i, t in enumerate(inputs)])


# --- operators


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
    """Of backward passes too: the results of dense tensors."""
    for op, args, backend in calls(SAMPLES[name], device):
        odd = [LAYOUTS[layout](t) if isinstance(t, Tensor) and i not in op._written else t for i, t in enumerate(args)]
        with torch.no_grad():
            got, want = called(op, odd, backend), called(op, args, backend)
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


# Of no images there is no mean, which the loss of training the tokenizer is.
BATCHED = [name for name, sample in CASES.items() if sample.batch]


@everywhere(BATCHED)
def test_no_batch(device: torch.device, name: str) -> None:
    """Empty results of the right shape, and gradients of zero for what all rows share."""
    sample = SAMPLES[name]
    inputs = moved(sample.fresh(), device)
    none = [t if axis is None else t.narrow(axis, 0, 0) for t, axis in zip(inputs, sample.batch, strict=True)]
    none = [t.contiguous() if i == sample.writes else t for i, t in enumerate(none)]
    with torch.no_grad():
        got, whole = sample.results(*none), sample.results(*inputs)
    for a, b in zip(got, whole, strict=True):
        assert a.numel() == 0
        assert a.dtype == b.dtype
        assert sum(m != n for m, n in zip(a.shape, b.shape, strict=True)) == 1
    if sample.differentiable:
        grads = sample.gradients(*none)
        for grad, i in zip(grads, sample.differentiable, strict=True):
            assert grad.shape == none[i].shape
            assert not grad.any()


@everywhere(BATCHED, quick)
def test_rows_do_not_depend_on_their_batch(device: torch.device, name: str) -> None:
    """The last image alone is right, too: within the bound of its own call."""
    sample = SAMPLES[name]
    inputs = moved(sample.fresh(), device)
    if name in ("sample_tokens", "filter_logits"):
        one = [t[1::2].contiguous() if i == 0 else t[: len(t) // 2] for i, t in enumerate(inputs)]  # of each half
    else:
        one = [t if axis is None else t.narrow(axis, 1, 1) for t, axis in zip(inputs, sample.batch, strict=True)]
    assert_right(sample, [t.contiguous() if i == sample.writes else t for i, t in enumerate(one)])


# --- the compiler, threads, processors


@everywhere(CASES)
def test_compile_fullgraph(device: torch.device, name: str) -> None:
    sample = SAMPLES[name]
    inputs = moved(sample.fresh(), device)
    torch.compiler.reset()
    compiled = torch.compile(sample.public, fullgraph=True, backend="aot_eager")

    def function(*tensors: Tensor) -> Any:
        return compiled(**sample.named(*tensors))

    with torch.no_grad():
        got, want = (sample.results(*moved(inputs, device), form=form) for form in (function, sample.function))
    if sample.differentiable:
        got, want = (
            [*had, *sample.gradients(*inputs, form=form)] for had, form in ((got, function), (want, sample.function))
        )
    for a, b in zip(got, want, strict=True):
        assert a.stride() == b.stride()
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
