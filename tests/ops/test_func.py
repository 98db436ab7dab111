"""``torch.func`` on every op and on whole models: the values of autograd, on whatever backend autograd ran."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Sample, summed, tensors_of
from test_models import tiny
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import varkern

DIFFERENTIABLE = [name for name, case in CASES.items() if case.differentiable]
INFERENCE = [name for name, case in CASES.items() if not case.differentiable]
# float32 on both sides: sums of some thousand terms of order one, in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def value(case: Sample) -> Callable[..., Tensor]:
    """The op as a scalar function; what it writes to is a copy."""

    def call(*inputs: Tensor) -> Tensor:
        copies = [tensor.clone() if i == case.writes else tensor for i, tensor in enumerate(inputs)]
        return summed(case.function(*copies))

    return call


def batches(case: Sample, count: int = 3) -> list[Tensor]:
    """Several inputs of an op, stacked: indices are rolled, the rest is scaled."""
    stacks = []
    for tensor in case.fresh():
        variants = [tensor * (1 + i / 4) if tensor.is_floating_point() else tensor.roll(i, 1) for i in range(count)]
        stacks.append(torch.stack(variants))
    return stacks


@pytest.mark.parametrize("name", DIFFERENTIABLE)
class TestDerivatives:
    def test_grad(self, name: str) -> None:
        case = CASES[name]
        inputs = case.fresh()
        got = grad(value(case), argnums=tuple(case.differentiable))(*inputs)
        for a, b in zip(got, case.gradients(*inputs), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    def test_vjp(self, name: str) -> None:
        case = CASES[name]
        inputs = case.fresh()
        out, pull = vjp(value(case), *inputs) if inputs[0].is_floating_point() else (None, None)
        if pull is None or out is None:  # the indices are no input that vjp takes
            first, rest = inputs[0], inputs[1:]
            out, pull = vjp(lambda *t: value(case)(first, *t), *rest)
        torch.testing.assert_close(out, value(case)(*inputs), **CLOSE)
        got = pull(torch.full_like(out, 2.0))
        offset = len(inputs) - len(got)
        for i, want in zip(case.differentiable, case.gradients(*inputs), strict=True):
            torch.testing.assert_close(got[i - offset], 2 * want, **CLOSE)

    def test_jvp(self, name: str) -> None:
        """Forward mode: the gradient times the direction, within torch.func and without it."""
        case = CASES[name]
        inputs = case.fresh()
        varied = [inputs[i] for i in case.differentiable]
        tangents = [torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view(t.shape) for t in varied]

        def of_varied(*changed: Tensor) -> Tensor:
            whole = list(inputs)
            for i, tensor in zip(case.differentiable, changed, strict=True):
                whole[i] = tensor
            return value(case)(*whole)

        want = sum((g * t).sum() for g, t in zip(case.gradients(*inputs), tangents, strict=True))
        _, got = jvp(of_varied, tuple(varied), tuple(tangents))
        # PyTorch's tangent of a 0-dimensional float32 tensor times a Python number is float64.
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, check_dtype=False)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v, t) for v, t in zip(varied, tangents, strict=True)]
            got = forward_ad.unpack_dual(of_varied(*duals)).tangent
        # PyTorch's tangent of a 0-dimensional float32 tensor times a Python number is float64.
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, check_dtype=False)

    def test_gradients_of_each_sample(self, name: str) -> None:
        """vmap of grad, grad of vmap, and each of them with an axis for one input alone."""
        case = CASES[name]
        stacks = batches(case)
        each = [case.gradients(*(stack[i] for stack in stacks)) for i in range(3)]
        wanted = [torch.stack(grads) for grads in zip(*each, strict=True)]
        argnums = tuple(case.differentiable)
        for a, b in zip(vmap(grad(value(case), argnums=argnums))(*stacks), wanted, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
        whole = grad(lambda *t: vmap(value(case))(*t).sum(), argnums=argnums)(*stacks)
        for a, b in zip(whole, wanted, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
        for i in range(len(stacks)):
            if case.writes is not None and i != case.writes:
                continue  # refused, below
            inputs = [stack if i == j else stack[0] for j, stack in enumerate(stacks)]
            dims = tuple(0 if i == j else None for j in range(len(stacks)))
            got = vmap(value(case), in_dims=dims)(*inputs)
            want = [value(case)(*(t[k] if i == j else t for j, t in enumerate(inputs))) for k in range(3)]
            torch.testing.assert_close(got, torch.stack(want), **CLOSE)

    def test_second_derivative(self, name: str) -> None:
        """The gradient's own slope along a direction, against central differences of autograd's in float32."""
        case = CASES[name]
        inputs = case.fresh()
        i = case.differentiable[-1]

        def slope(changed: Tensor) -> Tensor:
            whole = list(inputs)
            whole[i] = changed
            return grad(value(case), argnums=i)(*whole).sum()

        got = grad(slope)(inputs[i])
        step, direction = 1e-3, torch.cos(torch.arange(inputs[i].numel(), dtype=torch.float32)).view(inputs[i].shape)
        above, below = slope(inputs[i] + step * direction), slope(inputs[i] - step * direction)
        want = (above - below) / (2 * step)
        scale = max(1.0, float(above.abs()))
        assert abs(float((got * direction).sum() - want)) < 2e-2 * scale


def test_jacobians_of_a_small_norm() -> None:
    x, scale, shift = (
        t[:1, :2, :4].double() if t.size(1) > 1 else t[:1, :, :4].double()
        for t in CASES["modulated_layer_norm"].fresh()
    )

    def op(x: Tensor) -> Tensor:
        return varkern.modulated_layer_norm(x, scale, shift)

    want = torch.autograd.functional.jacobian(op, x)
    torch.testing.assert_close(jacrev(op)(x), want)
    torch.testing.assert_close(jacfwd(op)(x), want)
    single = x.float()
    got = jacrev(lambda x: varkern.modulated_layer_norm(x, scale.float(), shift.float()))(single)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    second = hessian(lambda x: op(x).square().sum())(x)
    want = torch.autograd.functional.hessian(lambda x: op(x).square().sum(), x)
    torch.testing.assert_close(second, want)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_batch_of_gradients_through_the_kernels(name: str) -> None:
    """``is_grads_batched`` is vmap over the backward pass of a forward pass that ran on the kernels."""
    case = CASES[name]
    inputs = case.fresh()
    leaves = [t.clone().requires_grad_() if i in case.differentiable else t for i, t in enumerate(inputs)]
    varied = [leaves[i] for i in case.differentiable]
    out = value(case)(*leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs in a loop
        for differentiable_again in (False, True):
            got = torch.autograd.grad(
                out, varied, torch.tensor([1.0, 2.0]), True, differentiable_again, is_grads_batched=True
            )
            for a, b in zip(got, case.gradients(*inputs), strict=True):
                torch.testing.assert_close(a, torch.stack((b, 2 * b)), **CLOSE)


@pytest.mark.parametrize("name", INFERENCE)
class TestInference:
    def test_vmap(self, name: str) -> None:
        case = CASES[name]
        stacks = batches(case)
        got = vmap(case.function)(*(stack.clone() for stack in stacks))
        want = [case.function(*(stack[i].clone() for stack in stacks)) for i in range(3)]
        for a, b in zip(tensors_of(got), zip(*map(tensors_of, want), strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b), **CLOSE)

    def test_no_gradient_is_a_sentence_or_none_at_all(self, name: str) -> None:
        """Ops that refuse a gradient do so under torch.func too; what is discrete has none, as without it."""
        case = CASES[name]
        inputs = case.fresh()
        argnums = tuple(i for i, t in enumerate(inputs) if t.is_floating_point())

        def call(*tensors: Tensor) -> Tensor:
            copies = [tensor.clone() if i == case.writes else tensor for i, tensor in enumerate(tensors)]
            result = tensors_of(case.function(*copies))
            return sum((t.to(torch.float32).nan_to_num(0, 0, 0).sum() for t in result), tensors[argnums[0]].sum())

        if name in ("sample_tokens", "filter_logits", "residual_quantize", "teacher_forcing_input"):
            got = grad(call, argnums=argnums)(*inputs)
            assert torch.equal(got[0], torch.ones_like(got[0]))
            assert not any(other.any() for other in got[1:])
        else:
            with pytest.raises(RuntimeError, match=f"{name} has no gradient: call it under"):
                grad(call, argnums=argnums)(*inputs)
            with pytest.raises(RuntimeError, match=f"{name} has no gradient: call it under"):
                jvp(call, tuple(inputs), tuple(inputs))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.writes is not None])
def test_what_is_written_has_every_batched_axis(name: str) -> None:
    """A batch cannot be written into one tensor: one sentence, and nothing is written."""
    case = CASES[name]
    inputs = case.fresh()
    target = inputs[case.writes]
    before = target.clone()
    for i in range(len(inputs)):
        if i == case.writes:
            continue
        dims = tuple(0 if i == j else None for j in range(len(inputs)))
        batched = [torch.stack((t, 2 * t)) if i == j else t for j, t in enumerate(inputs)]
        if name == "gated_residual_layer_norm_" and i > 2:  # scale and shift do not reach x
            vmap(case.function, in_dims=dims)(*(t.clone() for t in batched))
            continue
        with pytest.raises(RuntimeError, match=f"{name}: .* is changed in place, and vmap has batched another"):
            vmap(case.function, in_dims=dims)(*batched)
        assert torch.equal(target, before)


def test_draws_under_vmap_follow_its_randomness() -> None:
    logits = torch.randn(3, 2, 4, 8)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(varkern.ops.sample_tokens)(logits)
    torch.manual_seed(1)
    got = vmap(varkern.ops.sample_tokens, randomness="same")(logits)
    torch.manual_seed(1)
    noise = varkern.ops.sampling.draw_noise(8, 8, "cpu")
    assert torch.equal(got, torch.stack([varkern.ops.sample_tokens(one, noise) for one in logits]))


@pytest.mark.parametrize("transform", [grad, lambda f: lambda x: jvp(f, (x,), (x,))], ids=["grad", "jvp"])
def test_the_bare_operator_says_where_to_go(transform: Callable[..., Any]) -> None:
    x, scale, shift = CASES["modulated_layer_norm"].fresh()
    with pytest.raises(RuntimeError, match=r"call the function of varkern\.ops"):
        transform(lambda x: torch.ops.varkern.modulated_layer_norm(x, scale, shift, 1e-6, None).sum())(x)


def test_compiled_transforms() -> None:
    x, scale, shift = CASES["modulated_layer_norm"].fresh()

    def loss(x: Tensor) -> Tensor:
        return varkern.modulated_layer_norm(x, scale, shift).square().sum()

    def all_of_them(x: Tensor) -> tuple[Tensor, ...]:
        return grad(loss)(x), vmap(grad(loss))(torch.stack((x, 2 * x))), jvp(loss, (x,), (x,))[1], loss(x)

    torch.compiler.reset()
    got = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(got, all_of_them(x), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


class TestModels:
    def test_var(self) -> None:
        _, var = tiny()
        var.eval()
        parameters, buffers = dict(var.named_parameters()), dict(var.named_buffers())
        labels, x = torch.tensor([1, 2]), torch.randn(2, var.L - 1, var.Cvae)

        def loss(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
            return functional_call(var, (parameters, buffers), (labels, x)).square().mean()

        got = grad(loss)(parameters, x, labels)
        want = torch.autograd.grad(loss(parameters, x, labels), list(parameters.values()), allow_unused=True)
        assert all(torch.is_tensor(g) for g in want)
        for (name, a), b in zip(got.items(), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")

    def test_vqvae(self) -> None:
        vae, _ = tiny()
        vae.eval()
        vae.requires_grad_()
        parameters, buffers = dict(vae.named_parameters()), dict(vae.named_buffers())
        side = vae.quantize.v_patch_nums[-1] * vae.downsample
        images = torch.rand(2, vae.in_channels, side, side) * 2 - 1

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            reconstructed, _, vq_loss = functional_call(vae, (parameters, buffers), (images,))
            return (reconstructed - images).square().mean() + vq_loss

        got = grad(loss)(parameters)
        want = torch.autograd.grad(loss(parameters), list(parameters.values()))
        for (name, a), b in zip(got.items(), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
