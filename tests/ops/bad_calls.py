"""The calls that ``test_bad_calls.py`` spoils: valid ones of all that a generation touches. Imports nothing of pytest.

A case makes a valid call: a function and its arguments by name. Ops are called through their public function and,
named ``torch.ops.*``, directly.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import SAMPLES, OperatorCall, Sample, copied, operator_calls
from torch import Tensor

import varkern
from varkern import edit, ops
from varkern.engine import Keep
from varkern.ops._op import Op

PATCH_NUMS = (1, 2, 4)
OPTIONS = {"cfg": 1.5, "top_k": 5, "top_p": 0.9, "more_smooth": False}


@dataclass
class Call:
    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)  # what is not spoiled

    @property
    def comparable(self) -> bool:
        """Whether the reference gives the same: what attention keeps for its backward pass is the backend's own."""
        return not self.name.endswith("backward")

    def compared(self, result: Any) -> Any:
        """What the reference gives the same of: the statistics that attention keeps are the backend's own."""
        return result[0] if self.name.startswith("torch.ops.block_causal_attention") and result else result

    def run(self) -> Any:
        return self.function(**self.arguments, **self.fixed)


def tiny_model() -> varkern.VAR:
    """1-channel 16 x 16 images, 4 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = varkern.VQVAE(
            16, 4, 32, v_patch_nums=PATCH_NUMS, ch_mult=(1, 1, 1), num_res_blocks=1, in_channels=1, share_quant_resi=4
        )
        var = varkern.VAR(
            vae, num_classes=4, depth=1, embed_dim=16, num_heads=2, attn_l2_norm=True, patch_nums=PATCH_NUMS
        )
        var.init_weights(init_std=0.3, init_head=1.0, init_adaln_gamma=1.0)
    return var.eval()


WIDE = {
    name: sample
    for name, sample in SAMPLES.items()
    if all(t.dtype in (torch.float32, torch.int64) for t in sample.fresh())
}


def public_ops(rng: random.Random) -> list[Callable[[], Call]]:
    """Every sample of every op by its public function, and what no sample has."""

    def of(name: str, sample: Sample) -> Callable[[], Call]:
        return lambda: Call(name.partition(".")[0], sample.public, sample.named(*sample.fresh()))

    def drawn_inside() -> Call:
        arguments = SAMPLES["sample_tokens"].named(*SAMPLES["sample_tokens"].fresh())
        return Call("sample_tokens", ops.sample_tokens, arguments | {"noise": torch.Generator()})

    def by_sides() -> Call:
        q, k, v = SAMPLES["block_causal_attention"].fresh()
        return Call(
            "block_causal_attention", ops.block_causal_attention, {"q": q, "k": k, "v": v, "patch_nums": [1, 2]}
        )

    return [
        *(of(name, sample) for name, sample in WIDE.items()),
        drawn_inside,
        by_sides,
        lambda: Call("use_backend", lambda name: varkern.use_backend(name), {"name": "cpu"}),
    ]


@functools.cache
def _operator_calls() -> list[OperatorCall]:
    return [call for sample in WIDE.values() for call in operator_calls(sample, "cpu")]


def direct_ops(rng: random.Random, backend: str | None) -> list[Callable[[], Call]]:
    """Every operator of the library, those of backward passes too."""

    def of(op: Op, args: list[Any]) -> Callable[[], Call]:
        function = getattr(torch.ops.varkern, op.name)
        return lambda: Call(
            f"torch.ops.{op.name}", function, dict(zip(op.names, copied(args), strict=True)), {"backend": backend}
        )

    return [of(op, args) for op, args in _operator_calls()]


def model_calls(rng: random.Random, var: varkern.VAR) -> list[Callable[[], Call]]:
    vae, B = var.vae_proxy[0], 2
    quantize, Cv, V, C, p, L = vae.quantize, var.Cvae, var.V, var.C, var.patch_nums[-1], var.L

    def labels() -> Any:
        return rng.choice((1, [1, 2], torch.tensor([1, 2]), None))

    def seed() -> Any:
        return rng.choice((3, [3, 4]))

    def keep() -> Keep:
        maps = [torch.randint(0, V, (B, q * q)) for q in var.patch_nums]
        return Keep(maps, torch.rand(p, p).round())

    def generate_kept(tokens: Any, mask: Any) -> Any:
        return varkern.generate(var, B, 1, 3, keep=Keep(tokens, mask))

    def first_scale(**arguments: Any) -> Any:
        steps = varkern.generate_scales(**arguments)
        step = next(steps)
        steps.close()
        return step.tokens

    def maps(count: int = len(var.patch_nums)) -> list[Tensor]:
        return [torch.randint(0, V, (B, q * q)) for q in var.patch_nums[:count]]

    def vectors() -> list[Tensor]:
        return [torch.randn(B, Cv, q, q) for q in var.patch_nums]

    side = p * vae.downsample

    def images() -> Tensor:
        return torch.rand(B, vae.in_channels, side, side) * 2 - 1

    def edit_call(name: str) -> Call:
        arguments = {"images": images(), "seed": 3, **OPTIONS}
        arguments |= rng.choice(({"box": (0.25, 0.25, 0.75, 0.75)}, {"mask": torch.rand(B, p, p).round()}))
        if name == "class_edit":
            arguments["label"] = rng.choice((1, torch.tensor([1, 2])))
        return Call(f"edit.{name}", getattr(edit, name), arguments, {"var": var})

    block = var.blocks[0]
    return [
        lambda: Call(
            "generate", varkern.generate, {"var": var, "batch": B, "labels": labels(), "seed": seed(), **OPTIONS}
        ),
        lambda: Call(
            "generate", varkern.generate, {"batch": B, "labels": labels(), "max_batch": 1, "keep": keep()}, {"var": var}
        ),
        lambda: Call("generate(keep)", generate_kept, {"tokens": maps(), "mask": torch.rand(p, p).round()}),
        lambda: Call(
            "generate_scales", first_scale, {"batch": B, "labels": labels(), "seed": seed(), **OPTIONS}, {"var": var}
        ),
        lambda: Call(
            "autoregressive_infer_cfg",
            var.autoregressive_infer_cfg,
            {"B": B, "label_B": labels(), "g_seed": 3, **OPTIONS},
        ),
        lambda: Call(
            "VAR.forward",
            var.forward,
            {"label_B": torch.tensor([1, 2]), "x_BLCv_wo_first_l": torch.randn(B, L - 1, Cv)},
        ),
        lambda: Call(
            "blocks[0]", block.forward, {"x": torch.randn(B, 4, C), "cond_BD": torch.randn(B, C)}, {"attn_bias": None}
        ),
        lambda: Call("get_logits", var.get_logits, {"h": torch.randn(B, 4, C), "cond_BD": torch.randn(B, C)}),
        lambda: Call(
            "get_next_autoregressive_input",
            quantize.get_next_autoregressive_input,
            {"si": 1, "SN": len(var.patch_nums), "f_hat": torch.randn(B, Cv, p, p), "h_BChw": torch.randn(B, Cv, 2, 2)},
        ),
        lambda: Call("fhat_to_img", vae.fhat_to_img, {"f_hat": torch.randn(B, Cv, p, p)}),
        lambda: Call(
            "img_to_idxBl", vae.img_to_idxBl, {"inp_img_no_grad": images(), "v_patch_nums": list(var.patch_nums)}
        ),
        lambda: Call("VQVAE.forward", vae.forward, {"inp": images(), "ret_usages": True}),
        lambda: Call("idxBl_to_img", vae.idxBl_to_img, {"ms_idx_Bl": maps(), "same_shape": True, "last_one": True}),
        lambda: Call(
            "embed_to_img", vae.embed_to_img, {"ms_h_BChw": vectors(), "all_to_max_scale": True}, {"last_one": True}
        ),
        lambda: Call(
            "img_to_reconstructed_img",
            vae.img_to_reconstructed_img,
            {"x": images(), "v_patch_nums": list(var.patch_nums)},
            {"last_one": True},
        ),
        lambda: Call("idxBl_to_var_input", quantize.idxBl_to_var_input, {"gt_ms_idx_Bl": maps()}),
        lambda: Call(
            "embed_to_fhat", quantize.embed_to_fhat, {"ms_h_BChw": vectors(), "all_to_max_scale": rng.random() < 0.5}
        ),
        lambda: Call(
            "f_to_idxBl_or_fhat",
            quantize.f_to_idxBl_or_fhat,
            {"f_BChw": torch.randn(B, Cv, p, p), "to_fhat": False, "v_patch_nums": list(var.patch_nums)},
        ),
        lambda: edit_call("inpaint"),
        lambda: edit_call("outpaint"),
        lambda: edit_call("class_edit"),
        lambda: Call("edit.box_mask", edit.box_mask, {"side": 8, "box": (0.25, 0.25, 0.75, 0.75)}),
    ]
