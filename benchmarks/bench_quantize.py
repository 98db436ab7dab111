"""The residual quantizer beside eager PyTorch: encode, decode, teacher-forcing input, training, a step of generation.

The inputs are those of the 256 px and 512 px tokenizers with random weights: the work does not depend on values. Each
row records the floor's arithmetic: the distances, and phi as a full-size convolution a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import shapes
import torch
from torch import Tensor

from varkern.modules.schedule import as_sizes, phi_index
from varkern.ops import quantize as ops
from varkern.ops.quantize import Phi, Size

V, CV, NUM_PHIS = 4096, 32, 4
SCHEDULES = {"256px": shapes.PATCH_NUMS_256, "512px": shapes.PATCH_NUMS_512}
# On a CPU batch 64 is the same work as 8, only more of it.
CUDA_ONLY = ("256px", 64)
PROBLEMS = shapes.some([("256px", 1), ("256px", 8), ("512px", 1), CUDA_ONLY])
BATCHES = [pytest.param(problem, id=f"{problem[0]}-B{problem[1]}") for problem in PROBLEMS]
STEPS = [0, 5, 8]
which = pytest.mark.parametrize("which", BATCHES)


class Problem:
    def __init__(self, which: tuple[str, int], device: torch.device) -> None:
        if which == CUDA_ONLY and device.type == "cpu":
            pytest.skip("a size for a GPU")
        torch.manual_seed(0)
        self.sizes: list[Size] = as_sizes(SCHEDULES[which[0]])
        K, full = len(self.sizes), self.sizes[-1]
        self.features = torch.randn(which[1], CV, *full, device=device)
        self.codebook = torch.randn(V, CV, device=device) * 0.5
        self.weights = [torch.randn(CV, CV, 3, 3, device=device) / 17 for _ in range(NUM_PHIS)]
        self.biases = [torch.randn(CV, device=device) * 0.02 for _ in range(NUM_PHIS)]
        self.of_scale = [phi_index(k / (K - 1), NUM_PHIS) for k in range(K)]
        self.tokens = sum(h * w for h, w in self.sizes)
        self.phi_flop = which[1] * 2 * K * full[0] * full[1] * 9 * CV * CV
        self.flop = which[1] * 2 * self.tokens * V * CV + self.phi_flop

    @property
    def phis(self) -> list[Phi]:
        return [Phi(self.weights[i], self.biases[i], 0.5) for i in self.of_scale]

    def facts(self) -> dict[str, Any]:
        return {"shape": tuple(self.features.shape), "V": V, "batch": len(self.features)}


def check_indices(got: list[Tensor], want: list[Tensor], device: torch.device) -> None:
    """The same codes; on a GPU a near-tie may go to the other code, and the scales after it follow."""
    same = (torch.cat(got, 1) == torch.cat(want, 1)).double().mean()
    assert same == 1 if device.type == "cpu" else same > 0.99, f"{same:.2%} of the codes agree"


def check_gradients(got: tuple[Tensor, ...], want: tuple[Tensor, ...], same: Tensor, terms: int) -> None:
    """Of features and of what all images share, in the Euclidean norm; same: whether an image has the same codes (B,).

    Sums in float32 of so many terms are off by sqrt(terms) roundings. An image with another code at a near-tie has
    another gradient altogether, and if a share s of the images has, the sums differ by sqrt(2 s) of their norm.
    """
    rounding = (32 + 2 * math.sqrt(terms)) * 2.0**-23
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        bound = rounding
        if i == 0:
            a, b = a[same], b[same]
        else:
            bound += 2 * math.sqrt(1 - float(same.double().mean()))
        error, size = float(torch.linalg.vector_norm(a - b)), float(torch.linalg.vector_norm(b))
        assert error <= bound * size, f"gradient {i} is off by {error / size:.2e} of its norm, {bound:.2e} at most"


@pytest.mark.benchmark(group="residual_quantize: features to indices")
@which
def test_encode(compare: Any, device: torch.device, which: tuple[str, int]) -> None:
    p = Problem(which, device)
    args = (p.features, p.codebook, p.phis, p.sizes, False, False)
    with torch.inference_mode():
        got, want = ops.residual_quantize(*args)[0], ops.residual_quantize_reference(*args)[0]
        check_indices(got, want, device)
        calls = {
            "reference": lambda: ops.residual_quantize_reference(*args),
            "varkern": lambda: ops.residual_quantize(*args),
        }
        compare(calls, moved=2 * p.features.nbytes + p.codebook.nbytes, flop=p.flop, **p.facts())


@pytest.mark.benchmark(group="residual_dequantize: indices to f_hat")
@which
def test_dequantize(compare: Any, device: torch.device, which: tuple[str, int]) -> None:
    p = Problem(which, device)
    tokens = torch.randint(V, (len(p.features), p.tokens), device=device)
    args = (p.codebook, p.phis, p.sizes)

    def eager() -> list[Tensor]:
        return ops.residual_dequantize_reference(ops.code_maps_reference(tokens, *args[::2]), p.phis, p.sizes[-1])

    def ours() -> list[Tensor]:
        return ops.residual_dequantize(tokens, *args, p.sizes[-1])

    with torch.inference_mode():
        for got, want in zip(ours(), eager(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
        moved = tokens.nbytes + p.codebook.nbytes + len(p.sizes) * p.features.nbytes
        compare({"reference": eager, "varkern": ours}, moved=moved, flop=p.phi_flop, **p.facts())


@pytest.mark.benchmark(group="teacher_forcing_input: indices to input")
@which
def test_teacher_forcing(compare: Any, device: torch.device, which: tuple[str, int]) -> None:
    p = Problem(which, device)
    with torch.inference_mode():
        tokens = torch.cat(ops.residual_quantize(p.features, p.codebook, p.phis, p.sizes)[0][:-1], 1)

        def eager() -> Tensor:
            maps = ops.code_maps_reference(tokens, p.codebook, p.sizes[:-1])
            return ops.teacher_forcing_input_reference(maps, p.phis[:-1], p.sizes)

        def ours() -> Tensor:
            return ops.teacher_forcing_input(tokens, p.codebook, p.phis[:-1], p.sizes)

        torch.testing.assert_close(ours(), eager(), rtol=0, atol=2e-5)
        compare(
            {"reference": eager, "varkern": ours}, moved=tokens.nbytes + ours().nbytes, flop=p.phi_flop, **p.facts()
        )


@pytest.mark.benchmark(group="residual_quantize_train: forward and backward")
@which
def test_training(compare: Any, device: torch.device, which: tuple[str, int]) -> None:
    p = Problem(which, device)
    leaves = [p.features, p.codebook, *p.weights, *p.biases]
    for leaf in leaves:
        leaf.requires_grad_()

    def timed(function: Callable[..., Any]) -> Callable[[], tuple[list[Tensor], tuple[Tensor, ...]]]:
        def step() -> tuple[list[Tensor], tuple[Tensor, ...]]:
            f_hat, loss, indices = function(p.features, p.codebook, p.phis, p.sizes, 0.25)
            return indices, torch.autograd.grad(loss + f_hat.square().mean(), leaves)

        return step

    calls = {
        "reference": timed(ops.residual_quantize_train_reference),
        "varkern": timed(ops.residual_quantize_train),
    }
    (codes, want), (our_codes, got) = (call() for call in calls.values())
    check_indices(our_codes, codes, device)
    same = (torch.cat(our_codes, 1) == torch.cat(codes, 1)).all(1)
    check_gradients(got, want, same, len(p.sizes) * p.features.numel() // CV)
    compare(calls, moved=2 * sum(leaf.nbytes for leaf in leaves), flop=p.flop, **p.facts())


@pytest.mark.benchmark(group="next_scale_input: one step of generation")
@pytest.mark.parametrize("k", shapes.some(STEPS))
def test_step(compare: Any, device: torch.device, k: int) -> None:
    p = Problem(("256px", 1), device)
    codes, f_hat = torch.randn(1, CV, *p.sizes[k], device=device), torch.zeros_like(p.features)
    args = (codes, p.phis[k], p.sizes[k + 1])
    with torch.inference_mode():
        for got, want in zip(
            ops.next_scale_input(f_hat.clone(), *args),
            ops.next_scale_input_reference(f_hat.clone(), *args),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        calls = {
            "reference": lambda: ops.next_scale_input_reference(f_hat.zero_(), *args),
            "varkern": lambda: ops.next_scale_input(f_hat.zero_(), *args),
        }
        compare(calls, moved=2 * f_hat.nbytes + codes.nbytes, scale=p.sizes[k])
