"""What FlopCounterMode counts of the ops and of whole calls: the reference's products, and no others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from cases import CASES, LENGTHS, SIZES
from test_models import tiny
from torch.utils.flop_counter import FlopCounterMode

import varkern
from varkern.ops import flops
from varkern.ops._op import Op, library

aten = torch.ops.aten
WITHOUT_PRODUCTS = {"modulated_layer_norm", "gated_residual_layer_norm_", "group_norm_silu", "group_norm_affine"}
WITHOUT_PRODUCTS |= {"sample_tokens", "filter_logits"}


def attention(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    B, H, n, D = q
    return 4 * B * H * n * k[2] * D


def attention_backward(grad_out: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return attention(q, k, v) * 5 // 2


def addmm_(out: Any, a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


# What PyTorch has no formula for.
MISSING = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten.addmm_: addmm_,
}


def counts(call: Callable[[], Any], backend: str | None = None) -> dict[str, int]:
    with varkern.use_backend(backend), FlopCounterMode(display=False, custom_mapping=MISSING) as counter:
        call()
    return {str(op): count for op, count in counter.get_flop_counts().get("Global", {}).items()}


def total(call: Callable[[], Any], backend: str | None = None) -> int:
    return sum(counts(call, backend).values())


def training(name: str) -> Callable[[], Any]:
    return lambda: CASES[name].gradients(*CASES[name].fresh())


def test_every_operator_has_a_formula_or_no_products() -> None:
    operators = {name.split("::")[1].split(".")[0] for name in library._op_defs}
    without = {f"{name}{suffix}" for name in WITHOUT_PRODUCTS for suffix in ("", "_forward", "_backward")}
    counted = {op.name for op in (*Op.registry.values(), *Op.inner.values()) if op.formula is not None}
    assert operators - without == counted
    assert not without & counted


class TestOps:
    @pytest.mark.parametrize("name", CASES)
    def test_forward(self, name: str) -> None:
        case = CASES[name]

        def call() -> None:
            with torch.no_grad():
                case.function(*case.fresh())

        got, reference = total(call), total(call, "reference")
        if name.startswith("block_causal"):  # B H L D = 2 2 5 32
            assert got == 4 * 2 * 2 * 32 * (1 * 1 + 4 * 5)
            assert reference == 4 * 2 * 2 * 32 * 5 * 5
        else:
            assert got == reference
        assert (got == 0) == (name in WITHOUT_PRODUCTS)

    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.differentiable])
    def test_backward(self, name: str) -> None:
        got, reference = total(training(name)), total(training(name), "reference")
        if name.startswith("block_causal"):
            assert got == 14 * 2 * 2 * 32 * (1 * 1 + 4 * 5)
            assert reference == 14 * 2 * 2 * 32 * 5 * 5
        else:
            assert got == reference


def test_formulas_by_hand() -> None:
    assert flops.visible_pairs((1, 4, 9)) == 1 + 4 * 5 + 9 * 14
    assert flops.visible_pairs((7,)) == 49
    got = counts(lambda: CASES["residual_quantize"].function(*CASES["residual_quantize"].fresh()))
    B, V, Cv, side = 2, 16, 4, 4
    search = 2 * B * sum(h * w for h, w in SIZES) * V * Cv
    assert got == {"varkern.residual_quantize": search + len(SIZES) * 2 * B * side * side * Cv * Cv * 9}
    (conv,) = counts(lambda: CASES["conv3x3"].function(*CASES["conv3x3"].fresh())).values()
    assert conv == 2 * 2 * 16 * 16 * 6 * 4 * 9
    assert LENGTHS == (1, 4)


def test_upsampled_convolutions_and_identities() -> None:
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
    with torch.no_grad():

        def up() -> None:
            varkern.ops.conv3x3(x, weight, None, upsample=True)

        assert total(up) == total(up, "reference") == 2 * 2 * 16 * 16 * 6 * 4 * 9
        f_hat, codes = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 2, 2)
        phi = varkern.ops.quantize.Phi(None, None, 0.0)
        assert total(lambda: varkern.ops.next_scale_input(f_hat, codes, phi, (3, 3))) == 0
        features, codebook = torch.randn(2, 4, 4, 4), torch.randn(16, 4)

        def quantize() -> None:
            varkern.ops.residual_quantize(features, codebook, [phi] * 3, SIZES)

        assert total(quantize) == total(quantize, "reference") == 2 * 2 * 21 * 16 * 4


class TestModels:
    def test_generation(self) -> None:
        """All but what the engine does once or for half of the rows: the conditions' products and the head's."""
        _, var = tiny()
        B, K, C = 2, len(var.patch_nums), var.C
        got = counts(lambda: varkern.generate(var, B, 1, 3))
        reference = sum(counts(lambda: varkern.generate(var, B, 1, 3), "reference").values())
        once = (K - 1) * (len(var.blocks) * 2 * 2 * B * C * 6 * C + 2 * 2 * B * C * 2 * C)
        half = 2 * B * var.L * C * var.V
        assert sum(got.values()) == reference - once - half
        lengths = [p * p for p in var.patch_nums]
        seen = sum(n * end for n, end in zip(lengths, accumulate(lengths), strict=True))
        assert got["varkern.cached_attention"] == len(var.blocks) * 4 * 2 * B * C * seen
        assert "varkern.conv3x3" in got
        assert "varkern.next_scale_input" in got

    def test_training_step_of_the_transformer(self) -> None:
        _, var = tiny()
        labels, x = torch.tensor([1, 2]), torch.randn(2, var.L - 1, var.Cvae)

        def step() -> None:
            var(labels, x).square().mean().backward()

        got, reference = counts(step), counts(step, "reference")
        ours = {name: got.pop(name) for name in list(got) if name.startswith("varkern.")}
        dense = sum(reference.pop(name) for name in list(reference) if "scaled_dot_product" in name)
        assert sum(got.values()) == sum(reference.values())
        L, seen = var.L, flops.visible_pairs([p * p for p in var.patch_nums])
        each = len(var.blocks) * 2 * var.C
        assert ours == {
            "varkern.block_causal_attention_qkv": each * 4 * seen,
            "varkern.block_causal_attention_qkv_backward": each * 10 * seen,
        }
        assert dense == each * 14 * L * L

    def test_training_step_of_the_tokenizer(self) -> None:
        vae, _ = tiny()
        vae.requires_grad_()
        vae.train()
        side = vae.quantize.v_patch_nums[-1] * vae.downsample
        images = torch.rand(2, vae.in_channels, side, side) * 2 - 1

        def step() -> None:
            reconstructed, _, loss = vae(images)
            ((reconstructed - images).square().mean() + loss).backward()

        got = counts(step)
        assert {"varkern.residual_quantize", "varkern.residual_quantize_backward"} <= set(got)
        assert sum(got.values()) == total(step, "reference")


class TestRegistration:
    SHOW = "import torch.utils.flop_counter as f; print(torch.ops.varkern.cached_attention in f.flop_registry)"

    @pytest.mark.parametrize("first", ["import varkern", "import torch.utils.flop_counter, varkern"])
    def test_either_may_be_imported_first(self, first: str) -> None:
        code = f"{first}; import torch; {self.SHOW}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "True"

    def test_varkern_does_not_import_the_counter(self) -> None:
        code = (
            "import sys, varkern; print('torch.utils.flop_counter' in sys.modules, 'triton' in sys.modules); "
            f"import torch; {self.SHOW}; print(any('flops' in type(f).__module__ for f in sys.meta_path))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "False", "True", "False"]
