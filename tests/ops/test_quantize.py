"""The residual quantizer: values, choices, gradients, operator checks, threads, memory; on every backend."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from golden import ALL, SMALL, load_golden
from in_order import assert_as_accurate, plain
from places import parameter, places
from ties import TOLERANCE, assert_same_codes
from torch import Tensor

import varkern
from varkern.modules.schedule import PATCH_NUMS_256, PATCH_NUMS_512, as_sizes
from varkern.ops import backends, use_backend
from varkern.ops import quantize as ops
from varkern.ops.quantize import Phi, Size, functions

OPS = ("residual_quantize", "residual_dequantize", "teacher_forcing_input", "next_scale_input")


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
# Triton's interpreter takes seconds a call; test_quantize_triton.py has the options of those kernels.
GRID = [(name, place) for name in CASES for place in places(*OPS)]
GRID = [(name, place) for name, place in GRID if place != "cpu-triton" or name == "rectangular"]
cases = pytest.mark.parametrize(
    ("case", "device"),
    [parameter(CASES[name], place) for name, place in GRID],
    ids=["-".join(pair) for pair in GRID],
    indirect=["device"],
)


def interpreted() -> bool:
    return backends.current_backend() == "triton" and backends.interpreting()


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
@pytest.mark.levels
def test_quantize(device: torch.device, case: Case) -> None:
    check_forward(case.make(device))


@cases
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.levels
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
@pytest.mark.levels
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
@pytest.mark.levels
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
@pytest.mark.levels
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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, env=environment, check=True)
    ours, eager = map(float, done.stdout.split())
    print(f"{ours:.1f} MiB above the inputs, the reference {eager:.1f}")
    assert eager > 128  # its distances at the last scale; so the measure works
    assert ours < 64


def test_a_strided_f_hat_is_left_to_the_reference() -> None:
    codes, phi = torch.zeros(2, 8, 1, 1), Case().make().phis[0]
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
