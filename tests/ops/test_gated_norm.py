"""The gated residual: values, the two operations it stands for, operator checks, bad input, and in the engine."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from in_order import assert_as_accurate, plain
from test_models import tiny
from ties import assert_same_draws
from torch import Tensor

import varkern
from varkern.engine import cached
from varkern.ops import (
    backends,
    gated_residual_layer_norm_,
    gated_residual_layer_norm_reference_,
    modulated_layer_norm,
    modulated_layer_norm_reference,
    use_backend,
)

OPS = ("gated_residual_layer_norm_",)

SHAPES = {
    "one_channel": (2, 3, 1),
    "odd_channels": (2, 5, 33),
    "one_token_d16": (2, 1, 1024),
    "rows_of_two_warps": (1, 7, 520),
    "many_rows": (3, 37, 24),
    "no_batch": (0, 4, 16),
    "no_rows": (2, 0, 16),
    "no_channels": (2, 3, 0),
}
ALL = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DTYPES = {"-".join(names): tuple(ALL[n] for n in names) for names in itertools.product(ALL, ALL, ALL)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def arguments(
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    x_dtype: torch.dtype = torch.float32,
    h_dtype: torch.dtype = torch.float32,
    condition_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As a model has them: h a slice, gate of one projection, scale and shift of another one."""
    B, L, C = shape
    x, h = torch.randn(B, L, C), torch.randn(B, L + 2, C + 3)
    own, following = (torch.randn(B, 1, 6, C).to(device, condition_dtype) for _ in range(2))
    scale, shift = following.unbind(2)[2::2]
    return x.to(device, x_dtype), h.to(device, h_dtype)[:, 1 : L + 1, :C], own.unbind(2)[1], scale, shift


def layer_norm_beside(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """By the backend that the op itself takes, which has no Triton kernel."""
    backend = backends.current_backend()
    with use_backend(None if backend == "triton" else backend):
        return modulated_layer_norm(x, scale, shift, eps)


def check(inputs: tuple[Tensor, ...], eps: float = 1e-6) -> None:
    x, h, gate, scale, shift = inputs
    C = x.size(2)
    got_x = x.clone()
    got = gated_residual_layer_norm_(got_x, h, gate, scale, shift, eps)
    assert got.is_contiguous()

    def updated(x: Tensor, *others: Tensor) -> Tensor:
        gated_residual_layer_norm_reference_(mine := x.clone(), *others, eps)
        return mine

    row = (gate.size(0), 1, C)
    exact_x = x.double() + gate.double().view(row) * h.double()
    assert_as_accurate("x", got_x, plain(updated, *inputs), exact_x)
    # y is judged against the x that it was made of.
    if backends.current_backend() == "cpu":  # CUDA may take kernels that add in another order
        assert torch.equal(got, layer_norm_beside(got_x, scale, shift, eps))
    if x.numel():
        factor, wide = 1 + scale.double().view(row), got_x.double()
        exact = torch.layer_norm(wide, (C,), eps=eps) * factor + shift.double().view(row)
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        of_the_mean = float((mean * (variance + eps).rsqrt() * factor).abs().max())
        two = plain(modulated_layer_norm_reference, got_x, scale, shift, eps)
        assert_as_accurate("y", got, two.to(torch.promote_types(x.dtype, scale.dtype)), exact, of_the_mean)


def test_reference_is_the_formula() -> None:
    x, h, gate, scale, shift = (tensor.double() for tensor in arguments((2, 3, 5)))
    want_x = x + gate * h
    centred = want_x - want_x.mean(-1, keepdim=True)
    want = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift
    got = gated_residual_layer_norm_reference_(x, h, gate, scale, shift)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(x, want_x)


@shapes
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.levels
def test_value(device: torch.device, shape: tuple[int, int, int]) -> None:
    for dtypes in ((torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float32, torch.float16, torch.float16)):
        check(arguments(shape, device, *dtypes))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("C", [33, 64])
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.levels
def test_every_mixture_of_dtypes(device: torch.device, C: int, dtypes: tuple[torch.dtype, ...]) -> None:
    check(arguments((2, 5, C), device, *dtypes))


def test_two_dimensional_condition_shared_by_the_batch(device: torch.device) -> None:
    x, h, *condition = arguments((3, 4, 33), device)
    flat = [t.squeeze(1) for t in condition]
    results = []
    for forms in (condition, flat, [t[:1].expand(3, 33) for t in flat]):
        mine = x.clone()
        results.append((gated_residual_layer_norm_(mine, h, *forms), mine))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[2][1][0], results[0][1][0])
    torch.testing.assert_close(results[2][1], x + flat[0][:1] * h)
    check((x, h, *flat))


def test_large_mean(device: torch.device) -> None:
    x, *others = arguments((2, 4, 96), device)
    check((x + 1000.0, *others))
    check((x - 30.0, *others))


class TestEngine:
    @staticmethod
    def blocks(var: varkern.VAR, condition: Tensor, x: Tensor) -> Tensor:
        for block in var.blocks:
            x = block(x=x, cond_BD=var.shared_ada_lin(condition), attn_bias=None)
        return var.head_nm(x.float(), condition).float()

    @pytest.mark.parametrize("shared_aln", [False, True])
    @pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
    def test_it_is_the_blocks_one_after_another(
        self, mode: str, shared_aln: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, var = tiny(shared_aln=shared_aln)
        var.init_weights(init_std=0.1, init_head=1.0, init_adaln_gamma=1.0)
        if mode == "bfloat16":
            var = var.bfloat16()
        calls = []
        monkeypatch.setattr(
            cached, "gated_residual_layer_norm_", lambda *a: (calls.append(1), gated_residual_layer_norm_(*a))[1]
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            condition = var.class_emb(torch.tensor([1, 2, 3]))
            transformer = cached.CachedTransformer(var, condition)
            for block in var.blocks:
                block.attn.kv_caching(True)
            for n in (1, 4):
                dtype = torch.float32 if mode == "autocast" else var.head.weight.dtype
                x = torch.randn(3, n, var.C).to(dtype)
                got, want = transformer(x.clone()), self.blocks(var, condition, x)
                assert got.dtype == want.dtype == torch.float32
                tolerance = 1e-5 if mode == "float32" else 0.1
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        # In 16 bits, and where shared gates are float32 beside the head's 16 bits, the head's norm stays apart.
        joined = mode == "float32" or (mode == "autocast" and not shared_aln)
        assert len(calls) == 2 * (2 * len(var.blocks) - 1 + joined)

    def test_training_blocks_keep_their_dropped_paths(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, var = tiny(drop_path_rate=0.5)
        var.blocks[0].drop_path = copy.deepcopy(var.blocks[1].drop_path)
        var.train()
        monkeypatch.setattr(cached, "gated_residual_layer_norm_", lambda *_: pytest.fail("the residual was joined"))
        with torch.no_grad():
            transformer = cached.CachedTransformer(var, var.class_emb(torch.tensor([1])))
            with transformer.caching():
                assert transformer(torch.randn(1, 1, var.C)).isfinite().all()

    def test_tokens_of_the_reference(self) -> None:
        _, var = tiny()
        var.init_weights(init_std=0.1, init_head=1.0, init_adaln_gamma=1.0)
        got = varkern.generate(var, 2, 1, 0)
        with use_backend("reference"):
            want = varkern.generate(var, 2, 1, 0)
        assert_same_draws(lambda model: varkern.generate(model, 2, 1, 0), var, got.tokens, want.tokens)
