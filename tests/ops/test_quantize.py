"""The residual quantizer: values, choices, gradients, operator checks, threads, memory; on every backend."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from golden import ALL, SMALL, load_golden
from in_order import assert_as_accurate, plain
from ties import TOLERANCE, assert_same_codes
from torch import Tensor

import varkern
from varkern.modules.schedule import PATCH_NUMS_256, PATCH_NUMS_512, as_sizes
from varkern.ops import backends, use_backend
from varkern.ops import quantize as ops
from varkern.ops.quantize import Phi, Size, functions

X86 = platform.machine().lower() in ("x86_64", "amd64")


@dataclass(frozen=True)
class Case:
    sizes: tuple[Size, ...] = ((1, 1), (2, 2), (3, 3), (5, 5))
    B: int = 2
    V: int = 50
    Cv: int = 8
    phis: int = 2
    cosine: bool = False
    cut: int = 0  # scales that prog_si cuts off

    def make(self, device: torch.device | str = "cpu") -> Problem:
        B, V, Cv, full = self.B, self.V, self.Cv, self.sizes[-1]
        # Features as a slice of something wider and channels-last, as an encoder may leave them.
        features = torch.randn(B, full[0], full[1] + 1, Cv + 3).to(device)[:, :, 1:, 2 : Cv + 2].permute(0, 3, 1, 2)
        weights = [(torch.randn(Cv, Cv, 3, 3) / (3 * Cv**0.5), torch.randn(Cv) * 0.1) for _ in range(self.phis)]
        bank = [Phi(weight.to(device), bias.to(device), 0.5) for weight, bias in weights]
        run = len(self.sizes) - self.cut
        phis = [bank[k * self.phis // run] if bank else Phi(None, None, 0.0) for k in range(run)]
        codebook = torch.randn(V, Cv).mul(0.7).to(device)
        return Problem(features, codebook, phis, list(self.sizes), self.cosine, run)


@dataclass(frozen=True)
class Problem:
    features: Tensor
    codebook: Tensor
    phis: list[Phi]
    schedule: list[Size]
    cosine: bool
    run: int

    @property
    def sizes(self) -> list[Size]:
        return self.schedule[: self.run]

    @property
    def args(self) -> tuple[Tensor, Tensor, list[Phi], list[Size]]:
        return self.features, self.codebook, self.phis, self.sizes

    def to(self, target: torch.dtype | str) -> Problem:
        cast = {
            id(phi.weight): Phi(phi.weight.to(target), phi.bias.to(target), phi.ratio)
            for phi in self.phis
            if phi[0] is not None
        }
        phis = [phi if phi.weight is None else cast[id(phi.weight)] for phi in self.phis]
        return replace(self, features=self.features.to(target), codebook=self.codebook.to(target), phis=phis)

    def indices(self) -> Tensor:
        return torch.cat(ops.residual_quantize_reference(*self.args, self.cosine)[0], 1)


CASES = {
    "shared_by_scales": Case(),
    "one_phi": Case(phis=1),
    "phi_each": Case(phis=4),
    "identity": Case(phis=0),
    "cosine": Case(cosine=True),
    "prog_si": Case(cut=2),
    "rectangular": Case(sizes=((1, 1), (1, 3), (2, 4), (4, 7))),
    "same_height": Case(sizes=((2, 1), (4, 2), (4, 6))),
    "odd_channels": Case(Cv=5, V=7),
    "one_code": Case(V=1),
    "a_code_beyond_the_panels": Case(V=65, Cv=33, B=1),
    "no_images": Case(B=0),
    "five_images": Case(B=5, sizes=((1, 1), (3, 3))),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def interpreted() -> bool:
    """Triton's interpreter takes seconds a call; test_quantize_triton.py has the options of those kernels."""
    return backends.current_backend() == "triton" and backends.interpreting()


@pytest.fixture(autouse=True)
def _one_interpreted_case(request: pytest.FixtureRequest) -> None:
    if {"case", "device"} <= set(request.fixturenames):
        request.getfixturevalue("device")
        if interpreted() and request.node.callspec.params["case"] != CASES["rectangular"]:
            pytest.skip("one case for the interpreter")


def assert_ties(problem: Problem, got: list[Tensor], want: list[Tensor], f_hats: list[Tensor]) -> Tensor:
    args = problem.features, problem.codebook, problem.sizes, got, want, f_hats, problem.cosine
    return assert_same_codes(*args)


def check_forward(problem: Problem) -> None:
    want, want_maps = ops.residual_quantize_reference(*problem.args, problem.cosine)
    got, got_maps = ops.residual_quantize(*problem.args, problem.cosine)
    assert [idx.shape for idx in got] == [idx.shape for idx in want]
    same = assert_ties(problem, got, want, want_maps)
    assert (~same).sum() <= 1
    for a, b in zip(got_maps, want_maps, strict=True):
        torch.testing.assert_close(a[same], b[same], rtol=0, atol=TOLERANCE)
    again, last = ops.residual_quantize(*problem.args, problem.cosine, all_f_hats=False)
    assert len(last) == 1
    assert torch.equal(last[0], got_maps[-1])
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


@cases
@pytest.mark.usefixtures("nan_in_empty")
def test_quantize(device: torch.device, case: Case) -> None:
    check_forward(case.make(device))


@cases
@pytest.mark.usefixtures("nan_in_empty")
def test_dequantize(device: torch.device, case: Case) -> None:
    problem = case.make(device)
    indices, full = problem.indices(), problem.schedule[-1]
    maps = ops.code_maps_reference(indices, problem.codebook, problem.sizes)
    # The reference leaves the last scale alone; a cut schedule is upsampled to the end.
    want = ops.residual_quantize_reference(*problem.args, problem.cosine)[1]
    rows = torch.cat((indices, indices), 1)[:, : indices.size(1)]  # strided
    got = ops.residual_dequantize(rows, problem.codebook, problem.phis, problem.sizes, full)
    vectors = ops.residual_dequantize(*ops.maps_as_codes(maps)[:2], problem.phis, problem.sizes, full)
    for a, b, c in zip(got, want, vectors, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
        assert torch.equal(a, c)


@cases
@pytest.mark.usefixtures("nan_in_empty")
def test_teacher_forcing_input(device: torch.device, case: Case) -> None:
    problem = case.make(device)
    given = min(problem.run, len(problem.schedule) - 1)
    indices = problem.indices()[:, : sum(h * w for h, w in problem.schedule[:given])]
    maps = ops.code_maps_reference(indices, problem.codebook, problem.schedule[:given])
    want = ops.teacher_forcing_input_reference(maps, problem.phis[:given], problem.schedule)
    got = ops.teacher_forcing_input(indices, problem.codebook, problem.phis[:given], problem.schedule)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    assert got.is_contiguous()


@cases
@pytest.mark.usefixtures("nan_in_empty")
def test_next_scale_input(device: torch.device, case: Case) -> None:
    problem = case.make(device)
    codes = ops.code_maps_reference(problem.indices(), problem.codebook, problem.sizes)
    want = got = torch.zeros(codes[0].shape[:2] + problem.schedule[-1], device=device)
    want, got = want.clone(), got.clone()
    following = [*problem.schedule[1:], None][: problem.run]
    for code, phi, size in zip(codes, problem.phis, following, strict=True):
        before = got
        with torch.inference_mode(device.type == "cpu"):
            got, a = ops.next_scale_input(got, code, phi, size)
        want, b = ops.next_scale_input_reference(want, code, phi, size)
        assert got is before
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def train(function, problem: Problem, grad_out: Tensor) -> list[Tensor]:
    """Value, loss and the gradients of features, codebook and phis of the training form."""
    leaves = [problem.features.detach().requires_grad_(), problem.codebook.detach().requires_grad_()]
    phis, seen = [], {}
    for phi in problem.phis:
        if phi.weight is not None and id(phi.weight) not in seen:
            seen[id(phi.weight)] = replace_leaves(phi)
            leaves += seen[id(phi.weight)][:2]
        phis.append(phi if phi.weight is None else seen[id(phi.weight)])
    f_hat, loss, _ = function(leaves[0], leaves[1], phis, problem.sizes, 0.25, problem.cosine)
    total = (f_hat * grad_out.to(f_hat.dtype)).sum() + 3 * loss
    return [f_hat.detach(), loss.detach(), *torch.autograd.grad(total, leaves)]


def replace_leaves(phi: Phi) -> Phi:
    return Phi(phi.weight.detach().clone().requires_grad_(), phi.bias.detach().clone().requires_grad_(), phi.ratio)


@cases
@pytest.mark.usefixtures("nan_in_empty")
def test_training_form(device: torch.device, case: Case) -> None:
    if case.B == 0 or case.cut:
        pytest.skip("no mean over no images; training runs all scales")
    problem = case.make(device)
    grad_out = torch.randn(problem.features.shape, device=device) / problem.features.numel()
    got = train(ops.residual_quantize_train, problem, grad_out)
    plainly = plain(train, ops.residual_quantize_train_reference, problem.to("cpu"), grad_out)
    exact = train(ops.residual_quantize_train_reference, problem.to(torch.float64), grad_out)
    assert len(got) == 4 + 2 * case.phis
    for i, (a, b, c) in enumerate(zip(got, plainly, exact, strict=True)):
        assert a.dtype == torch.float32
        assert_as_accurate(f"result {i}", a, b, c, c.abs().max())  # a rounding of the result, and of the sum before it


def test_dequantize_is_differentiable(device: torch.device) -> None:
    problem = Case().make(device)
    indices, full = problem.indices(), problem.schedule[-1]
    weights = torch.randn(4, *problem.features.shape, device=device)
    results = []
    for run in (ops.residual_dequantize, None):
        codebook, phi = problem.codebook.detach().requires_grad_(), replace_leaves(problem.phis[0])
        if run:
            f_hats = run(indices, codebook, [phi] * 4, problem.sizes, full)
        else:
            maps = ops.code_maps_reference(indices, codebook, problem.sizes)
            up = [code if code.shape[2:] == full else F.interpolate(code, size=full, mode="bicubic") for code in maps]
            f_hats = torch.stack([ops.phi_reference(code, phi) for code in up]).cumsum(0)
        loss = sum((f * w).sum() for f, w in zip(f_hats, weights, strict=True))
        results.append(torch.autograd.grad(loss, (codebook, phi.weight, phi.bias)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradient_of_the_last_f_hat_alone() -> None:
    problem = Case().make()
    grads = []
    for every in (True, False):
        codebook = problem.codebook.detach().requires_grad_()
        bank = functions._stack("test", problem.phis, problem.sizes, codebook)
        f_hats, _ = torch.ops.varkern.residual_quantize(problem.features, codebook, *bank, False, every, None)
        grads.append(torch.autograd.grad(f_hats[-1].square().sum(), codebook)[0])
    assert torch.equal(*grads)


# --- the choice of codes


@pytest.mark.parametrize("cosine", [False, True], ids=["distance", "cosine"])
def test_the_first_of_equal_codes_is_chosen(device: torch.device, cosine: bool) -> None:
    if interpreted():
        pytest.skip("test_quantize_triton.py has it")
    problem = Case(V=70, cosine=cosine).make(device)
    half = problem.codebook[:35]
    copies = torch.cat((half, half.flip(0), half))
    got = torch.cat(ops.residual_quantize(problem.features, copies, *problem.args[2:], cosine)[0], 1)
    want = torch.cat(ops.residual_quantize(problem.features, half.contiguous(), *problem.args[2:], cosine)[0], 1)
    assert torch.equal(got, want)
    same = torch.ones_like(problem.codebook)
    assert not torch.cat(ops.residual_quantize(problem.features, same, *problem.args[2:], cosine)[0], 1).any()


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6])
def test_near_ties_are_told_apart_as_well_as_by_plain_float32(offset: float, step: float) -> None:
    """Pairs of codes that differ by a step, and features near the middle of a pair."""
    codes = torch.randn(150, 16) + offset
    codebook = torch.cat((codes, codes + step * torch.randn(150, 16)))
    z = (codes + codebook[150:]).mul(0.5).repeat(8, 1) + 1e-2 * torch.randn(1200, 16)
    features = z.reshape(3, 20, 20, 16).permute(0, 3, 1, 2)
    distance = (z.double().unsqueeze(1) - codebook.double()).square().sum(2)
    excess = []
    arguments = features, codebook, [Phi(None, None, 0.0)], [(20, 20)]
    for indices, _ in (ops.residual_quantize(*arguments), plain(ops.residual_quantize_reference, *arguments)):
        chosen = distance.gather(1, indices[0].reshape(-1, 1)).squeeze(1)
        excess.append((chosen - distance.amin(1)).max())
    rounding = 2.0**-24 * (z.double().square().sum(1).max() + codebook.double().square().sum(1).max())
    assert excess[0] <= 2 * excess[1] + rounding, f"{excess[0]:.3g} beyond the nearest, plainly {excess[1]:.3g}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_features_beyond_float32_give_valid_indices(device: torch.device, bad: float) -> None:
    problem = Case().make(device)
    problem.features[0, 0] = bad
    got = torch.cat(ops.residual_quantize(*problem.args)[0], 1)
    assert ((got >= 0) & (got < 50)).all()
    want = torch.cat(ops.residual_quantize_reference(*problem.args)[0], 1)
    assert torch.equal(got[1], want[1])  # another image is not affected


@pytest.mark.parametrize("cosine", [False, True], ids=["distance", "cosine"])
def test_ten_thousand_maps(cosine: bool) -> None:
    problem = Case(sizes=((1, 1), (2, 2), (3, 3), (4, 4)), B=10_000, V=64, cosine=cosine).make()
    with use_backend("cpu"):
        got, _ = ops.residual_quantize(*problem.args, cosine, all_f_hats=False)
    want, f_hats = ops.residual_quantize_reference(*problem.args, cosine)
    ties = int((~assert_ties(problem, got, want, f_hats)).sum())
    print(f"{ties} of 10000 maps have a tie")
    assert ties <= 20


@pytest.mark.slow
def test_maps_of_full_size() -> None:
    problem = Case(sizes=tuple(as_sizes(PATCH_NUMS_256)), B=200, V=4096, Cv=32, phis=4).make()
    with use_backend("cpu"):
        got, _ = ops.residual_quantize(*problem.args, all_f_hats=False)
    want, f_hats = ops.residual_quantize_reference(*problem.args)
    ties = int((~assert_ties(problem, got, want, f_hats)).sum())
    print(f"{ties} of 200 maps have a tie")
    assert ties <= 4


def test_512_px_schedule() -> None:
    with use_backend("cpu"):
        check_forward(Case(sizes=tuple(as_sizes(PATCH_NUMS_512)), B=1, V=300, Cv=32, phis=4).make())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n not in SMALL else ()) for n in ALL])
def test_golden_tokens(device: torch.device, name: str) -> None:
    golden = load_golden(name)
    if interpreted():
        pytest.skip("test_quantize_triton.py has it")
    quantizer = golden.vae.quantize.to(device)
    tokens = quantizer.f_to_idxBl_or_fhat(golden["encoder_features"].to(device), to_fhat=False)
    golden.vae.quantize.cpu()
    golden.same_codes([idx.cpu() for idx in tokens])


# --- the module


@pytest.mark.parametrize("share", [0, 1, 3, 4])
@pytest.mark.parametrize("quant_resi", [0.5, -0.3, 0.0])
@pytest.mark.parametrize("prog_si", [-1, 1])
def test_module_as_the_reference(share: int, quant_resi: float, prog_si: int) -> None:
    quantizer = varkern.VectorQuantizer2(
        40, 8, False, v_patch_nums=(1, 2, 3, 5), share_quant_resi=share, quant_resi=quant_resi
    )
    quantizer.prog_si = prog_si
    features, results = torch.randn(2, 8, 5, 5), []
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            tokens = quantizer.f_to_idxBl_or_fhat(features, to_fhat=False)
            f_hats = quantizer.f_to_idxBl_or_fhat(features, to_fhat=True)
            maps = [torch.randn(2, 8, p, p, generator=torch.Generator().manual_seed(p)) for p in (1, 2, 3, 5)]
            _, following = quantizer.get_next_autoregressive_input(1, 4, features.clone(), maps[1])
            decoded = quantizer.embed_to_fhat(maps)
            results.append([*tokens, *f_hats, quantizer.idxBl_to_var_input(tokens), *decoded, following])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def test_module_uses_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    extension = backends.extension("cpu")

    class Counting:
        def __getattr__(self, name: str):
            return lambda *args: (calls.append(name), getattr(extension, name)(*args))[1]

    monkeypatch.setattr("varkern.ops.quantize.operators.extension", lambda backend: Counting())
    quantizer = varkern.VectorQuantizer2(40, 8, False, v_patch_nums=(1, 2, 4))
    features = torch.randn(1, 8, 4, 4)
    tokens = quantizer.f_to_idxBl_or_fhat(features, to_fhat=False)
    assert calls == ["residual_quantize"]
    quantizer.idxBl_to_var_input(tokens)
    with torch.no_grad():
        quantizer.embed_to_fhat(quantizer.embeddings(tokens))
        quantizer.get_next_autoregressive_input(0, 3, features, quantizer.embeddings(tokens)[0])
    assert calls[1:] == ["residual_dequantize", "residual_dequantize", "next_scale_input"]
    quantizer(features)[2].backward()
    assert calls[4:] == ["residual_quantize", "residual_quantize_backward"]


# --- operator, compiler, threads, memory


def test_opcheck(device: torch.device) -> None:
    problem, backend = Case(sizes=((1, 1), (2, 2), (3, 3))).make(device), backends.current_backend()
    bank = functions._stack("test", problem.phis, problem.sizes, problem.codebook)
    leaves = [tensor.detach().requires_grad_() for tensor in (problem.codebook, *bank[:2])]
    ours, features, indices = torch.ops.varkern, problem.features, problem.indices()
    options = {"test_utils": ("test_schema", "test_faketensor")} if interpreted() else {}

    def check(op, *args) -> None:
        torch.library.opcheck(op.default, args, **options)

    for tensors in ((problem.codebook, *bank[:2]), leaves):
        check(ours.residual_quantize, features, *tensors, *bank[2:], False, True, backend)
        check(ours.residual_dequantize, indices, *tensors, *bank[2:], 3, 3, backend)
    grads = torch.randn(3, *features.shape, device=device)
    check(ours.residual_quantize_backward, grads, indices, problem.codebook, *bank, backend)
    given = (*bank[:3], bank[3][:2], bank[4])
    check(ours.teacher_forcing_input, indices[:, :5], problem.codebook, *given, backend)
    codes = features[:, :, :1, :2]
    for weight, bias in ((bank[0][0], bank[1][0]), (None, None)):
        for following in ([2, 3], []):
            check(ours.next_scale_input, features.contiguous(), codes, weight, bias, 0.5, following, backend)


def compiled_matches_eager(device: torch.device, compiler: str) -> None:
    problem = Case(sizes=((1, 1), (2, 2), (3, 3))).make(device)
    sizes, full = problem.sizes, problem.schedule[-1]

    def training(features: Tensor, codebook: Tensor, phis: list[Phi]) -> tuple[Tensor, Tensor]:
        f_hat, loss, _ = ops.residual_quantize_train(features * 2, codebook, phis, sizes, 0.25)
        return f_hat.square().sum() + loss

    def inference(features: Tensor, codebook: Tensor, phis: list[Phi]) -> tuple[Tensor, ...]:
        indices, f_hats = ops.residual_quantize(features, codebook, phis, sizes)
        tokens = torch.cat(indices, 1)
        decoded = ops.residual_dequantize(tokens, codebook, phis, sizes, full)
        teacher = ops.teacher_forcing_input(tokens[:, :5], codebook, phis[:2], sizes)
        f_hat, following = ops.next_scale_input(torch.zeros_like(f_hats[0]), features[:, :, :1, :1], phis[0], (2, 2))
        return tokens, decoded[-1], teacher, f_hat, following

    torch.compiler.reset()
    results = []
    for step in (training, torch.compile(training, fullgraph=True, backend=compiler)):
        phis = [replace_leaves(problem.phis[0])] * 2 + [replace_leaves(problem.phis[-1])]
        leaves = [problem.features.detach().requires_grad_(), problem.codebook.detach().requires_grad_()]
        total = step(*leaves, phis)
        results.append([total, *torch.autograd.grad(total, [*leaves, *phis[0][:2], *phis[2][:2]])])
    with torch.no_grad():
        for i, step in enumerate((inference, torch.compile(inference, fullgraph=True, backend=compiler))):
            results[i] += step(*problem.args[:3])
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_compile_fullgraph(device: torch.device) -> None:
    compiled_matches_eager(device, "aot_eager")


@pytest.mark.slow
def test_compile_fullgraph_inductor() -> None:
    compiled_matches_eager(torch.device("cpu"), "inductor")


@pytest.mark.parametrize("B", [1, 3, 8])
def test_the_number_of_threads_does_not_change_a_bit(B: int) -> None:
    problem = Case(sizes=((1, 1), (2, 2), (5, 5), (8, 8)), B=B, V=1500, Cv=32, phis=2).make()
    grad_out, indices = torch.randn(B, 32, 8, 8), problem.indices()
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 4):
            torch.set_num_threads(number)
            with use_backend("cpu"):
                tokens, f_hats = ops.residual_quantize(*problem.args)
                teacher = ops.teacher_forcing_input(
                    indices[:, :30], *problem.args[1:2], problem.phis[:3], problem.sizes
                )
                f_hat, following = ops.next_scale_input(
                    problem.features.contiguous().clone(), f_hats[0][:, :, :5, :5], problem.phis[0], (6, 7)
                )
                _, _, *grads = train(ops.residual_quantize_train, problem, grad_out)
            results.append([*tokens, *f_hats, teacher, f_hat, following, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


LEVELS = """
import torch, test_quantize as t
from varkern import _C
torch.manual_seed(0)
for case in (t.Case(), t.Case(V=65, Cv=33, B=3), t.Case(cosine=True, B=5), t.Case(phis=0)):
    problem = case.make()
    t.check_forward(problem)
    grad = torch.randn(problem.features.shape)
    forms = t.ops.residual_quantize_train, t.ops.residual_quantize_train_reference
    for a, b in zip(*(t.train(form, problem, grad) for form in forms)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
print(_C.simd_level())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"] if X86 else ["baseline"])
def test_simd_levels_and_uninitialised_memory(level: str) -> None:
    """Each level the processor has, on a heap that glibc fills with garbage: the workspace holds nothing by chance."""
    environment = {"VARKERN_SIMD": level, "MALLOC_PERTURB_": "85", "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", LEVELS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != level:
        pytest.skip(f"this processor does not run {level}")


PEAK = """
import pathlib, re, torch, test_quantize as t
from varkern.ops import quantize as ops
torch.manual_seed(0)
torch.set_num_threads(2)
full = t.Case(sizes=tuple(t.as_sizes(t.PATCH_NUMS_256)), B=32, V=4096, Cv=32, phis=4).make()
small = t.Case(sizes=((1, 1), (2, 2))).make()
status = lambda key: int(re.search(key + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
with torch.inference_mode():
    for function in (ops.residual_quantize, ops.residual_quantize_reference):
        function(*small.args)  # what is loaded at the first call
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is in use
        before = status("VmRSS")
        function(*full.args, all_f_hats=False)
        print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_of_32_images() -> None:
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, env=environment, check=True)
    ours, eager = map(float, done.stdout.split())
    print(f"{ours:.1f} MiB above the inputs, the reference {eager:.1f}")
    assert eager > 128  # its distances at the last scale; so the measure works
    assert ours < 64


# --- bad input


BAD = {
    "features_of_three_axes": (
        lambda p: replace(p, features=p.features[0]),
        "features have shape (8, 5, 5), give (B, 8, H, W)",
    ),
    "features_of_other_channels": (
        lambda p: replace(p, features=p.features[:, :4]),
        "features have shape (2, 4, 5, 5), give (B, 8, H, W)",
    ),
    "integer_features": (
        lambda p: replace(p, features=p.features.long()),
        "features is torch.int64, give a floating-point",
    ),
    "integer_codebook": (lambda p: replace(p, codebook=p.codebook.long()), "codebook is torch.int64"),
    "codebook_of_one_axis": (lambda p: replace(p, codebook=p.codebook[0]), "codebook has shape (8,), give (V, Cv)"),
    "no_codes": (lambda p: replace(p, codebook=p.codebook[:0]), "codebook has shape (0, 8), give (V, Cv) with 1 to"),
    "fewer_phis": (lambda p: replace(p, phis=p.phis[:2]), "2 phis for 4 sizes"),
    "two_ratios": (
        lambda p: replace(p, phis=[*p.phis[:3], p.phis[0]._replace(ratio=0.25)]),
        "phis with ratios [0.25, 0.5]",
    ),
    "an_identity_among_weights": (lambda p: replace(p, phis=[*p.phis[:3], Phi(None, None, 0.5)]), "or all no weights"),
    "phi_of_other_channels": (
        lambda p: replace(p, phis=[Phi(torch.zeros(9, 9, 3, 3), torch.zeros(9), 0.5)] * 4),
        "phi has weights (9, 9, 3, 3)",
    ),
    "a_side_of_zero": (lambda p: replace(p, schedule=[(0, 1), *p.schedule[1:]]), "have a side below 1"),
    "another_device": (
        lambda p: replace(p, features=p.features.to("meta")),
        "features are on meta and codebook on cpu",
    ),
}


@pytest.mark.parametrize("form", ["tokens", "training"])
@pytest.mark.parametrize("backend", ["reference", "cpu", None])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(change, message: str, backend: str | None, form: str) -> None:
    problem = change(Case().make())
    function, rest = (ops.residual_quantize, ()) if form == "tokens" else (ops.residual_quantize_train, (0.25,))
    with use_backend(backend), pytest.raises(ValueError, match=re.escape(message)):
        function(*problem.args, *rest)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bad_indices(backend: str) -> None:
    problem = Case().make()
    indices = problem.indices()
    rest, full = (problem.codebook, problem.phis, problem.sizes), problem.schedule[-1]
    with use_backend(backend):
        with pytest.raises(ValueError, match=r"indices have shape \(2, 38\), give \(B, 39\)"):
            ops.residual_dequantize(indices[:, 1:], *rest, full)
        with pytest.raises(ValueError, match=r"indices are torch.int32, give int64"):
            ops.residual_dequantize(indices.int(), *rest, full)
        for wrong in (50, -1):
            indices[1, 3] = wrong
            with pytest.raises(IndexError):
                ops.residual_dequantize(indices, *rest, full)
            with pytest.raises(IndexError):
                ops.teacher_forcing_input(indices[:, :14], rest[0], rest[1][:3], rest[2])
        with pytest.raises(ValueError, match="4 phis for 4 sizes, give one for each scale that has indices"):
            ops.teacher_forcing_input(indices, *rest)


def test_bad_step() -> None:
    f_hat, codes, phi = torch.zeros(2, 8, 5, 5), torch.zeros(2, 8, 1, 1), Case().make().phis[0]
    with pytest.raises(ValueError, match=r"f_hat is torch.float64 \(2, 8, 5, 5\), give"):
        ops.next_scale_input(f_hat.double(), codes, phi, (2, 2))
    with pytest.raises(ValueError, match=r"codes have shape \(2, 7, 1, 1\), give \(2, 8, h, w\)"):
        ops.next_scale_input(f_hat, codes[:, :7], phi, (2, 2))
    with pytest.raises(ValueError, match=r"codes: torch\.float16 on cpu, give float32"):
        ops.next_scale_input(f_hat, codes.half(), phi, (2, 2))
    strided = torch.zeros(2, 5, 5, 8).permute(0, 3, 1, 2)
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' cannot run next_scale_input: f_hat of strides"):
        ops.next_scale_input(strided, codes, phi, (2, 2))
    assert ops.next_scale_input(strided, codes, phi, (2, 2))[0] is strided  # left to choose, the reference serves


def test_half_precision_is_computed_in_float32() -> None:
    problem = Case().make()
    half = problem.features.half()
    got = ops.residual_quantize(half, *problem.args[1:])
    want = ops.residual_quantize(half.float(), *problem.args[1:])
    assert all(torch.equal(a, b) for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.residual_quantize(half, *problem.args[1:])
    assert all(torch.equal(a, b) for a, b in zip(inside[1], want[1], strict=True))


def test_no_second_derivative() -> None:
    problem = Case().make()
    codebook = problem.codebook.detach().requires_grad_()
    _, loss, _ = ops.residual_quantize_train(problem.features, codebook, *problem.args[2:], 0.25)
    (grad,) = torch.autograd.grad(loss, codebook, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
