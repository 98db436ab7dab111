"""What an op says of arguments that do not fit: one sentence with the value and the fix.

Whichever backend was asked for, before anything is written. What is spoiled at random: ``test_bad_calls``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SAMPLES
from torch import Tensor

import varkern
from varkern.ops.quantize import Phi

Change = Callable[[Any], Any]


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def to(value: Any) -> Change:
    return lambda _: value


NAN = float("nan")
GROUPS: dict[str, tuple[dict[str, Change], str]] = {
    "three_axes": ({"x": lambda x: x[0]}, "x has shape (4, 5, 6), give (B, C, H, W)"),
    "no_pixels": ({"x": lambda x: x[:, :, :0]}, "x has shape (2, 4, 0, 6), give (B, C, H, W) with C, H, W > 0"),
    "uneven_groups": ({"num_groups": to(3)}, "num_groups is 3, give a divisor of the 4 channels"),
    "no_groups": ({"num_groups": to(0)}, "num_groups is 0, give a divisor of the 4 channels"),
    "short_weight": ({"weight": lambda w: w[:3]}, "weight has shape (3,), give (4,) for 4 channels"),
    "bias_of_two_axes": ({"bias": lambda b: b[None]}, "bias has shape (1, 4), give (4,)"),
    "another_device": ({"bias": meta}, "bias is on meta and x on cpu, use one device"),
    "two_dtypes": ({"bias": Tensor.half}, "weight is torch.float32 and bias torch.float16"),
    "integers": ({"x": Tensor.int}, "x is torch.int32"),
}
LOGITS: dict[str, tuple[dict[str, Change], str]] = {
    "two_axes": ({"logits": lambda x: x[0]}, "logits have shape (3, 64), give (B, n, V)"),
    "integers": ({"logits": Tensor.int}, "logits is torch.int32, give a floating-point"),
    "odd_batch": ({"logits": lambda x: x[:3]}, "logits have shape (3, 3, 64), with guidance give (2B, n, V)"),
    "guidance_nan": ({"guidance": to(NAN)}, "guidance is nan, give a finite number"),
    "top_k_negative": ({"top_k": to(-1)}, "top_k is -1, give an integer in [0, 64]"),
    "top_k_too_large": ({"top_k": to(65)}, "top_k is 65, give an integer in [0, 64]"),
    "top_p_too_large": ({"top_p": to(1.5)}, "top_p is 1.5, give a number in [0, 1]"),
    "top_p_nan": ({"top_p": to(NAN)}, "top_p is nan, give a finite number"),
}
QUANTIZE: dict[str, tuple[dict[str, Change], str]] = {
    "features_of_three_axes": ({"features": lambda f: f[0]}, "features have shape (4, 4, 4), give (B, 4, H, W)"),
    "other_channels": ({"features": lambda f: f[:, :3]}, "features have shape (2, 3, 4, 4), give (B, 4, H, W)"),
    "integer_features": ({"features": Tensor.long}, "features is torch.int64, give a floating-point"),
    "integer_codebook": ({"codebook": Tensor.long}, "codebook is torch.int64"),
    "codebook_of_one_axis": ({"codebook": lambda c: c[0]}, "codebook has shape (4,), give (V, Cv)"),
    "no_codes": ({"codebook": lambda c: c[:0]}, "codebook has shape (0, 4), give (V, Cv) with 1 to"),
    "fewer_phis": ({"phis": lambda p: p[:2]}, "2 phis for 3 sizes"),
    "two_ratios": ({"phis": lambda p: [*p[:2], p[0]._replace(ratio=0.25)]}, "phis with ratios [0.25, 0.5]"),
    "an_identity_among_weights": ({"phis": lambda p: [*p[:2], Phi(None, None, 0.5)]}, "or all no weights"),
    "phi_of_other_channels": (
        {"phis": to([Phi(torch.zeros(9, 9, 3, 3), torch.zeros(9), 0.5)] * 3)},
        "phi has weights (9, 9, 3, 3)",
    ),
    "a_side_of_zero": ({"sizes": lambda s: [(0, 1), *s[1:]]}, "have a side below 1"),
    "another_device": ({"features": meta}, "features are on meta and codebook on cpu"),
}
INDICES: dict[str, tuple[dict[str, Change], str]] = {
    "too_large": ({"indices": lambda i: torch.where(i == i.max(), 16, i)}, "to 16, give 0 to 15 for a codebook of 16"),
    "negative": ({"indices": lambda i: torch.where(i == i.max(), -1, i)}, "indices from -1 to "),
}
NORM: dict[str, tuple[dict[str, Change], str]] = {
    "scale_of_another_width": (
        {"scale": lambda s: s[..., :4]},
        "scale has shape (2, 1, 4), give (2, 1, 16) or (2, 16)",
    ),
    "shift_of_another_batch": ({"shift": lambda s: s[:1]}, "shift has shape (1, 1, 16), give (2, 1, 16) or (2, 16)"),
    "scale_a_row_each": ({"scale": lambda s: s.expand(2, 3, 16)}, "scale has shape (2, 3, 16)"),
    "integers": ({"x": Tensor.int}, "x is torch.int32, give a floating-point tensor"),
    "x_of_two_axes": ({"x": lambda x: x[0]}, "x has shape (3, 16), give (B, L, C)"),
    "another_device": ({"shift": meta}, "shift is on meta and x on cpu, use one device"),
}
BAD: dict[str, dict[str, tuple[dict[str, Change], str]]] = {
    "modulated_layer_norm": NORM
    | {
        "two_forms": ({"shift": lambda s: s[:, 0]}, "give them one dtype and shape"),
        "two_dtypes": ({"shift": Tensor.half}, "scale is torch.float32 (2, 1, 16) and shift torch.float16"),
    },
    "gated_residual_layer_norm_": NORM
    | {
        "x_strided": ({"x": lambda x: x.mT.contiguous().mT}, "x has strides (48, 1, 3), give a contiguous tensor"),
        "h_of_another_length": ({"h": lambda h: h[:, :2]}, "h has shape (2, 2, 16), give x's, (2, 3, 16)"),
        "gate_of_another_width": (
            {"gate": lambda g: g[..., :4]},
            "gate has shape (2, 1, 4), give (2, 1, 16) or (2, 16)",
        ),
        "two_forms": ({"scale": lambda s: s[:, 0]}, "scale is torch.float32 (2, 16) and gate torch.float32"),
        "two_dtypes": ({"shift": Tensor.half}, "shift is torch.float16 (2, 1, 16) and gate"),
        "integer_h": ({"h": Tensor.int}, "h is torch.int32, give a floating-point tensor"),
    },
    "group_norm_silu": GROUPS,
    "group_norm_affine": GROUPS,
    "conv3x3": {
        "x_of_three_axes": ({"x": lambda x: x[0]}, "x has shape (4, 16, 16), give (B, C, H, W)"),
        "no_rows": ({"x": lambda x: x[:, :, :0]}, "give (B, C, H, W) with C, H, W > 0"),
        "other_channels": ({"x": lambda x: x[:, :3]}, "weight has shape (6, 4, 3, 3), give (Cout, 3, 3, 3)"),
        "five_by_five": ({"weight": lambda w: F.pad(w, (1, 1, 1, 1))}, "weight has shape (6, 4, 5, 5)"),
        "no_outputs": ({"weight": lambda w: w[:0]}, "weight has shape (0, 4, 3, 3)"),
        "bias": ({"bias": lambda b: b[:3]}, "bias has shape (3,), give (6,)"),
        "norm": ({"norm": lambda n: n._replace(weight=n.weight[:3])}, "norm: weight has shape (3,), give (4,)"),
        "half_a_norm": ({"norm": lambda n: n._replace(bias=None)}, "both of norm's weight and bias"),
        "groups": ({"norm": lambda n: n._replace(groups=3)}, "norm: num_groups is 3, give a divisor of the 4"),
        "no_groups": ({"norm": lambda n: n._replace(groups=0)}, "norm: num_groups is 0"),
        "dtypes": ({"weight": Tensor.half}, "weight is torch.float16 on cpu and x torch.float32 on cpu"),
        "devices": ({"bias": meta}, "bias is torch.float32 on meta and x torch.float32 on cpu"),
        "integers": ({"x": Tensor.int, "weight": Tensor.int, "bias": Tensor.int}, "x is torch.int32"),
    },
    "conv3x3.all": {
        "residual_channels": ({"residual": lambda r: r[:, :1]}, "residual has shape (1, 1, 18, 18)"),
        "residual_size": ({"residual": lambda r: r[..., :4]}, "shape (1, 5, 18, 4), give the result's, (1, 5, 18, 18)"),
    },
    "block_causal_attention": {
        "three_axes": ({"q": lambda q: q[0]}, "q has shape (2, 5, 32), give (B, H, L, D)"),
        "another_shape": ({"k": lambda k: k[:, :, :4]}, "k is torch.float32 (2, 2, 4, 32) on cpu and q"),
        "another_dtype": ({"v": Tensor.half}, "v is torch.float16"),
        "another_device": ({"k": meta}, "k is torch.float32 (2, 2, 5, 32) on meta"),
        "integers": (dict.fromkeys("qkv", Tensor.int), "q is torch.int32, give a floating-point"),
        "no_positions": ({name: lambda t: t[:, :, :0] for name in "qkv"}, "with H, L, D > 0"),
        "other_lengths": ({"lengths": to((1, 3))}, "scales have (1, 3) positions, give positive"),
        "an_empty_scale": ({"lengths": to((1, 0, 4))}, "that sum to L = 5"),
        "both": ({"patch_nums": to((1, 2))}, "give patch_nums or lengths"),
        "neither": ({"lengths": to(None)}, "give patch_nums or lengths"),
        "layout": ({"layout": to("LBHD")}, "layout is 'LBHD'"),
    },
    "block_causal_attention_qkv": {
        "four_axes": ({"qkv": lambda t: t[0]}, "qkv has shape (5, 3, 2, 32), give (B, L, 3, H, D)"),
        "not_three": ({"qkv": lambda t: t[:, :, :2]}, "qkv has shape (2, 5, 2, 2, 32)"),
        "short_bias": ({"q_bias": lambda q: q[:5]}, "q_bias has shape (5,), give 64 elements for 2 heads of 32"),
        "heads": ({"log_scale": to(torch.zeros(3))}, "log_scale has shape (3,), give 2 elements"),
        "device": ({"v_bias": meta}, "v_bias is on meta and qkv on cpu"),
        "integers": ({"q_bias": Tensor.long}, "q_bias is torch.int64, give a floating-point"),
    },
    "cached_attention": {
        "four_axes": ({"qkv": lambda t: t[0]}, "qkv has shape (3, 3, 2, 32), give (B, n, 3, H, D)"),
        "not_three": ({"qkv": lambda t: t[:, :, :2]}, "qkv has shape (2, 3, 2, 2, 32)"),
        "no_tokens": ({"qkv": lambda t: t[:, :0]}, "with n, H, D > 0"),
        "another_batch": ({"cache": lambda t: t[:, :1]}, "cache has shape (2, 1, 2, 7, 32), give (2, 2, 2, N"),
        "keys_alone": ({"cache": lambda t: t[0]}, "cache has shape (2, 2, 7, 32)"),
        "another_dtype": ({"cache": Tensor.half}, "cache is torch.float16 on cpu and qkv torch.float32"),
        "another_device": ({"cache": meta}, "cache is torch.float32 on meta"),
        "not_contiguous": ({"cache": lambda t: t[:, :, :, :6]}, "give a contiguous tensor"),
        "negative": ({"position": to(-1)}, "position is -1, give one from 0 to 4 for 3 tokens and a cache of 7"),
        "cache_too_short": ({"position": to(5)}, "position is 5, give one from 0 to 4"),
        "short_bias": ({"q_bias": lambda q: q[:5]}, "q_bias has shape (5,), give 64 elements for 2 heads"),
        "heads": ({"log_scale": to(torch.zeros(3))}, "log_scale has shape (3,), give 2 elements"),
        "bias_elsewhere": ({"v_bias": meta}, "v_bias is on meta and qkv on cpu"),
        "integers": ({"q_bias": Tensor.long}, "q_bias is torch.int64, give a floating-point tensor"),
    },
    "filter_logits": LOGITS,
    "sample_tokens": LOGITS
    | {
        "no_codes": (
            {"logits": lambda x: x[..., :0], "noise": lambda q: q[:, :0]},
            "logits have shape (4, 3, 0), give (B, n, V) with V from 1",
        ),
        "noise_of_all_rows": (
            {"noise": lambda q: q.repeat(2, 1)},
            "noise is torch.float32 (12, 64), give torch.float32 (6, 64)",
        ),
        "noise_unguided": ({"guidance": to(None)}, "without guidance"),
        "noise_half": ({"noise": Tensor.half}, "noise is torch.float16 (6, 64)"),
        "noise_elsewhere": ({"noise": meta}, "noise is on meta and logits on cpu, use one device"),
    },
    "residual_quantize": QUANTIZE,
    "residual_quantize_train": QUANTIZE,
    "residual_quantize.identity": {
        "wide": ({"codebook": lambda c: c[:, :1].expand(16, 2**45)}, "(16, 35184372088832), give (V, Cv) with at most"),
    },
    "residual_dequantize": INDICES
    | {
        "fewer_indices": ({"indices": lambda i: i[:, 1:]}, "indices have shape (2, 20), give (B, 21)"),
        "int32": ({"indices": Tensor.int}, "indices are torch.int32, give int64"),
    },
    "teacher_forcing_input": INDICES
    | {
        "phis": ({"phis": lambda p: [*p, p[1]]}, "3 phis for 3 sizes, give one for each scale that has indices"),
    },
    "next_scale_input": {
        "f_hat_of_float64": ({"f_hat": Tensor.double}, "f_hat is torch.float64 (2, 4, 4, 4), give"),
        "other_channels": ({"codes": lambda c: c[:, :3]}, "codes have shape (2, 3, 2, 2), give (2, 4, h, w)"),
        "half": ({"codes": Tensor.half}, "codes: torch.float16 on cpu, give float32"),
    },
}
CASES = [(name, kind) for name, kinds in BAD.items() for kind in kinds]


@pytest.mark.parametrize("backend", ["reference", "cpu", None])
@pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_message(name: str, kind: str, backend: str | None) -> None:
    changes, message = BAD[name][kind]
    sample = SAMPLES[name]
    arguments = sample.named(*sample.fresh())
    for argument, change in changes.items():
        arguments[argument] = change(arguments.get(argument))
    before = {
        n: t.clone() for n, t in arguments.items() if isinstance(t, Tensor) and t.numel() < 2**20 and not t.is_meta
    }
    kind_of = IndexError if "indices from" in message or "a codebook of" in message else ValueError
    with varkern.use_backend(backend), pytest.raises(kind_of, match=re.escape(message)):
        sample.public(**arguments)
    assert all(torch.equal(arguments[n], t) for n, t in before.items())


def test_with_gradients_the_same() -> None:
    """What autograd would record is checked as what it would not."""
    for name in BAD:
        sample = SAMPLES[name]
        for changes, message in BAD[name].values():
            leaves = [t.requires_grad_() if i in sample.differentiable else t for i, t in enumerate(sample.fresh())]
            arguments = sample.named(*leaves)
            for argument, change in changes.items():
                arguments[argument] = change(arguments.get(argument))
            with pytest.raises((ValueError, IndexError), match=re.escape(message)):
                sample.public(**arguments)
