"""The calls that ``test_bad_calls.py`` spoils: valid ones of all that a generation touches. Imports nothing of pytest.

A case makes a valid call: a function and its arguments by name. Ops are called through their public function and,
named ``torch.ops.*``, directly.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import varkern
from varkern import edit, ops
from varkern.engine import Keep
from varkern.ops.conv import Norm
from varkern.ops.quantize.reference import Phi

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


def _logits(rng: random.Random) -> tuple[Tensor, float | None]:
    guidance = rng.choice((None, 1.5))
    return torch.randn(4, 3, 11), guidance


def _norm() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 8), "scale": torch.randn(2, 1, 8), "shift": torch.randn(2, 1, 8), "eps": 1e-6}


def _gated() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 8), "h": torch.randn(2, 3, 8), "gate": torch.randn(2, 1, 8)} | {
        name: value for name, value in _norm().items() if name != "x"
    }


def _maps() -> dict[str, Any]:
    """Of a group norm."""
    affine = {"weight": torch.randn(8), "bias": torch.randn(8)}
    return {"x": torch.randn(2, 8, 4, 4), **affine, "num_groups": 4, "eps": 1e-6}


def _convolution(rng: random.Random) -> dict[str, Any]:
    side = rng.choice((4, 16))  # the CPU's kernel takes the larger one by itself
    upsample = rng.random() < 0.5
    return {
        "x": torch.randn(2, 4, side, side),
        "weight": torch.randn(6, 4, 3, 3),
        "bias": torch.randn(6),
        "residual": torch.randn(2, 6, side << upsample, side << upsample),
        "upsample": upsample,
    }


def _cached() -> dict[str, Any]:
    return {
        "qkv": torch.randn(2, 3, 3, 2, 8),
        "cache": torch.randn(2, 2, 2, 7, 8),
        "position": 2,
        "q_bias": torch.randn(16),
        "v_bias": torch.randn(16),
        "log_scale": torch.randn(2, 1, 1),
        "softmax_scale": 0.3,
    }


def _attention() -> dict[str, Any]:
    return {"q": torch.randn(2, 2, 5, 8), "k": torch.randn(2, 2, 5, 8), "v": torch.randn(2, 2, 5, 8)}


def _projection() -> dict[str, Any]:
    names = ("q_bias", "v_bias", "log_scale")
    return {"qkv": torch.randn(2, 5, 3, 2, 8)} | {n: torch.randn(16 if "b" in n else 2) for n in names}


def _phis(rng: random.Random, count: int) -> list[Phi]:
    return [Phi(torch.randn(4, 4, 3, 3), torch.randn(4), 0.5) for _ in range(count)]


def _bank() -> dict[str, Any]:
    return {
        "codebook": torch.randn(16, 4),
        "phi_weight": torch.randn(2, 4, 4, 3, 3),
        "phi_bias": torch.randn(2, 4),
        "ratio": 0.5,
        "phi_of_scale": [0, 1, 1],
        "sizes": [1, 1, 2, 2, 4, 4],
    }


SIZES = [(1, 1), (2, 2), (4, 4)]


def _indices(V: int = 16, n: int = 21) -> Tensor:
    return torch.randint(0, V, (2, n))


def public_ops(rng: random.Random) -> list[Callable[[], Call]]:
    def sample(which: str) -> Call:
        logits, guidance = _logits(rng)
        arguments = {"logits": logits, "guidance": guidance, "top_k": rng.choice((0, 4)), "top_p": 0.8}
        if which == "filter_logits":
            return Call(which, ops.filter_logits, arguments)
        rows = 12 if guidance is None else 6
        noise = rng.choice((torch.rand(rows, 11) + 0.1, torch.Generator()))
        return Call(which, ops.sample_tokens, {"noise": noise, **arguments})

    scales = {"phis": lambda: _phis(rng, 3), "sizes": lambda: list(SIZES)}
    return [
        lambda: Call("modulated_layer_norm", ops.modulated_layer_norm, _norm()),
        lambda: Call("gated_residual_layer_norm_", ops.gated_residual_layer_norm_, _gated()),
        lambda: Call("group_norm_silu", ops.group_norm_silu, _maps() | {"silu": True}),
        lambda: Call("group_norm_affine", ops.group_norm_affine, _maps()),
        lambda: Call(
            "conv3x3",
            ops.conv3x3,
            _convolution(rng) | {"norm": rng.choice((Norm(torch.randn(4), torch.randn(4), 2, 1e-6), None))},
        ),
        lambda: Call("cached_attention", ops.cached_attention, _cached()),
        lambda: Call(
            "block_causal_attention",
            ops.block_causal_attention,
            _attention() | rng.choice(({"patch_nums": [1, 2]}, {"lengths": [1, 4]})),
            {"softmax_scale": 0.3},
        ),
        lambda: Call(
            "block_causal_attention",
            ops.block_causal_attention,
            _attention() | {"softmax_scale": 0.3, "layout": "BHLD"},
            {"lengths": [1, 4]},
        ),
        lambda: Call(
            "block_causal_attention_qkv",
            ops.block_causal_attention_qkv,
            _projection() | {"lengths": [1, 4], "softmax_scale": 0.3},
        ),
        lambda: sample("sample_tokens"),
        lambda: sample("filter_logits"),
        lambda: Call(
            "residual_quantize",
            ops.residual_quantize,
            {"features": torch.randn(2, 4, 4, 4), "codebook": torch.randn(16, 4), "cosine": False, "all_f_hats": True}
            | {name: make() for name, make in scales.items()},
        ),
        lambda: Call(
            "residual_quantize_train",
            ops.residual_quantize_train,
            {"features": torch.randn(2, 4, 4, 4), "codebook": torch.randn(16, 4), "beta": 0.25, "cosine": False}
            | {name: make() for name, make in scales.items()},
        ),
        lambda: Call(
            "residual_dequantize",
            ops.residual_dequantize,
            {"indices": _indices(), "codebook": torch.randn(16, 4), "size": [4, 4]}
            | {name: make() for name, make in scales.items()},
        ),
        lambda: Call(
            "teacher_forcing_input",
            ops.teacher_forcing_input,
            {"indices": _indices(n=5), "codebook": torch.randn(16, 4), "phis": _phis(rng, 2), "sizes": list(SIZES)},
        ),
        lambda: Call(
            "next_scale_input",
            ops.next_scale_input,
            {"f_hat": torch.randn(2, 4, 4, 4), "codes": torch.randn(2, 4, 2, 2), "phi": _phis(rng, 1)[0]}
            | {"following": rng.choice(((4, 4), (3, 3)))},
        ),
        lambda: Call("use_backend", lambda name: varkern.use_backend(name), {"name": "cpu"}),
    ]


def direct_ops(rng: random.Random, backend: str | None) -> list[Callable[[], Call]]:
    library = torch.ops.varkern

    def call(name: str, arguments: dict[str, Any]) -> Call:
        return Call(f"torch.ops.{name}", getattr(library, name), arguments, {"backend": backend})

    def attention_backward() -> dict[str, Any]:
        a = _attention()
        saved = {"grad_out": torch.randn(2, 2, 5, 8), "out": torch.randn(2, 2, 5, 8)}
        return saved | a | {"statistics": torch.ones(4, 2, 2, 5), "lengths": [1, 4], "softmax_scale": 0.3}

    def projection_backward() -> dict[str, Any]:
        saved = {"grad_out": torch.randn(2, 5, 2, 8), "out": torch.randn(2, 5, 2, 8)}
        return saved | _projection() | {"statistics": torch.ones(4, 2, 2, 5), "lengths": [1, 4], "softmax_scale": 0.3}

    def norm_backward() -> dict[str, Any]:
        inputs = _norm()
        return {
            "grad_out": torch.randn(2, 3, 8),
            "x": inputs["x"],
            "scale": inputs["scale"],
            "statistics": torch.ones(2, 2, 3),
        }

    def sample(which: str) -> Call:
        logits, guidance = _logits(rng)
        arguments = {"logits": logits, "guidance": guidance, "top_k": rng.choice((0, 4)), "top_p": 0.8}
        if which == "sample_tokens":
            arguments["noise"] = torch.rand(12 if guidance is None else 6, 11) + 0.1
        return call(which, arguments)

    features = {"features": lambda: torch.randn(2, 4, 4, 4)}["features"]
    return [
        lambda: call("modulated_layer_norm", _norm()),
        lambda: call("modulated_layer_norm_forward", _norm()),
        lambda: call("modulated_layer_norm_backward", norm_backward()),
        lambda: call("gated_residual_layer_norm_", _gated()),
        lambda: call("group_norm_silu", _maps() | {"silu": True}),
        lambda: call("group_norm_affine", _maps()),
        lambda: call(
            "conv3x3",
            _convolution(rng) | {"norm_weight": torch.randn(4), "norm_bias": torch.randn(4), "groups": 2, "eps": 1e-6},
        ),
        lambda: call("cached_attention", _cached()),
        lambda: call("block_causal_attention", _attention() | {"lengths": [1, 4], "softmax_scale": 0.3}),
        lambda: call("block_causal_attention_backward", attention_backward()),
        lambda: call("block_causal_attention_qkv", _projection() | {"lengths": [1, 4], "softmax_scale": 0.3}),
        lambda: call("block_causal_attention_qkv_backward", projection_backward()),
        lambda: sample("sample_tokens"),
        lambda: sample("filter_logits"),
        lambda: call("residual_quantize", {"features": features(), **_bank(), "cosine": False, "all_f_hats": True}),
        lambda: call(
            "residual_quantize_backward", {"grad_f_hats": torch.randn(3, 2, 4, 4, 4), "indices": _indices(), **_bank()}
        ),
        lambda: call("residual_dequantize", {"indices": _indices(), **_bank(), "H": 4, "W": 4}),
        lambda: call("teacher_forcing_input", {"indices": _indices(n=5), **_bank(), "phi_of_scale": [0, 1]}),
        lambda: call(
            "next_scale_input",
            {"f_hat": torch.randn(2, 4, 4, 4), "codes": torch.randn(2, 4, 2, 2), "phi_weight": torch.randn(4, 4, 3, 3)}
            | {"phi_bias": torch.randn(4), "ratio": 0.5, "following": rng.choice(([4, 4], [3, 3]))},
        ),
    ]


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
