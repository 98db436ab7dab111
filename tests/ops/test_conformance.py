"""Every op on every backend that it has: what all of them promise, on the samples of ``cases``.

What is special about an op is in its own file. Over the same samples, in files of their own: ``test_func``,
``test_operators`` (called directly and compiled), ``test_flops``, ``test_allocations`` (defaults in force),
``test_alignment``, ``test_messages`` and ``test_bad_calls``.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import CASES, LARGE_SAMPLES, SAMPLES, Sample, copied, moved, op_of, operator_calls, summed
from everywhere import LAYOUTS, everywhere, quick
from torch import Tensor

import varkern
from varkern.ops import backends
from varkern.ops._op import Op, library

X86 = platform.machine().lower() in ("x86_64", "amd64")
pytestmark = pytest.mark.usefixtures("dot_in_one_order")


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
    used, before = [t.clone() if i == sample.writes else t for i, t in enumerate(inputs)], [t.clone() for t in inputs]
    with torch.no_grad():
        got = sample.results(*used)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was changed"
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


@everywhere(DIFFERENTIABLE, quick)
def test_gradient_of_one_input_alone(device: torch.device, name: str) -> None:
    sample = SAMPLES[name]
    inputs = moved(sample.fresh(), device)
    for i, want in zip(sample.differentiable, sample.gradients(*inputs), strict=True):
        (got,) = replace(sample, differentiable=(i,)).gradients(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@everywhere([n for n in CASES if op_of(n)._function is not None and n in DIFFERENTIABLE], quick, kernels=True)
def test_there_is_no_second_derivative(device: torch.device, name: str) -> None:
    sample = SAMPLES[name]
    leaves = moved(sample.fresh(), device)
    varied = [leaves[i].requires_grad_() for i in sample.differentiable]
    grads = torch.autograd.grad(summed(sample.function(*leaves)), varied, create_graph=True)
    message = rf"{op_of(name).name} has no second derivative: .*use_backend\('reference'\)"
    with pytest.raises(RuntimeError, match=message):
        grads[-1].sum().backward()


# --- what has no kernel


REFUSING = [name for name in CASES if op_of(name).no_gradient and not SAMPLES[name].differentiable]


@everywhere(REFUSING)
def test_gradients_are_refused(device: torch.device, name: str) -> None:
    """Of each input, by function and operator, before anything is written; without gradients the same call runs."""
    sample, op = SAMPLES[name], op_of(name)
    inputs = moved(sample.fresh(), device)
    message = rf"{op.name} has no gradient: call it under torch\.no_grad\(\) or torch\.inference_mode\(\), or "
    for i in range(len(inputs)):
        leaves = [t.clone().requires_grad_() if i == j else t for j, t in enumerate(inputs)]
        with pytest.raises(RuntimeError, match=message):
            sample.function(*leaves)
        with torch.inference_mode():
            got = sample.results(*moved(leaves, device))
        for a, b in zip(got, sample.results(*moved(inputs, device)), strict=True):
            assert torch.equal(a, b)
    backend = backends.current_backend()
    ((_, args),) = operator_calls(sample, backend, device)
    leaves = [t.requires_grad_() if i in op.tensors and t is not None else t for i, t in enumerate(args)]
    before = copied(args)
    with pytest.raises(RuntimeError, match=message):
        op.operator(*leaves, backend)
    assert all(torch.equal(args[i], before[i]) for i in op._written)


@everywhere([name for name in CASES if op_of(name).detached])
def test_there_is_nothing_to_differentiate(device: torch.device, name: str) -> None:
    sample = SAMPLES[name]
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in moved(sample.fresh(), device)]
    assert not any(t.requires_grad for t in sample.results(*leaves))


SINGLE = ("modulated", "gated", "group", "conv", "sample", "filter")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(SINGLE)])
def test_float64_is_the_reference(name: str) -> None:
    sample = SAMPLES[name]
    doubles = [t.double() for t in sample.fresh()]
    if name == "sample_tokens":
        doubles[1] = sample.fresh()[1]  # noise is float32
    with torch.no_grad():
        got = sample.results(*moved(doubles, torch.device("cpu")))
        with varkern.use_backend("reference"):
            want = sample.results(*moved(doubles, torch.device("cpu")))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        with (
            varkern.use_backend("cpu"),
            pytest.raises(RuntimeError, match=rf"'cpu' cannot run {name}: torch\.float64 is"),
        ):
            sample.function(*doubles)


# --- layouts


@everywhere(CASES, quick)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device: torch.device, name: str, layout: str) -> None:
    sample = SAMPLES[name]
    inputs = moved(sample.fresh(), device)
    if layout == "expanded":  # codes that are all the same are ties
        changed = [i for i, axis in enumerate(sample.batch) if axis == 0 and i != sample.writes]
    else:
        changed = [i for i in range(len(inputs)) if i != sample.writes]
    assert_right(sample, [LAYOUTS[layout](t) if i in changed else t for i, t in enumerate(inputs)])


# --- batches


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


def check_values(op: str, device: torch.device) -> None:
    """What this file says of the values of an op, on the backend in force: for modules that stand in for a device's."""
    for name in SAMPLES:
        if name.partition(".")[0] == op:
            test_value(device, name)
    for layout in LAYOUTS:
        test_strides(device, op, layout)
    test_no_batch(device, op)
    test_rows_do_not_depend_on_their_batch(device, op)
