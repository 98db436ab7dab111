"""Other people's code around the tokenizer: what is hooked, wrapped, patched or changed is called, the rest fused."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from published_tokenizer import (
    EXACT,
    Lora,
    bent,
    both,
    check_as_published,
    count,
    published,
    quantizer_results,
    replace,
    tiny,
    tokens,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from varkern.modules import autoencoder

LAYERS = (nn.Conv2d, nn.GroupNorm, nn.Identity, autoencoder.ResnetBlock, autoencoder.AttnBlock, autoencoder.Upsample2x)
LAYERS += (autoencoder.Downsample2x, autoencoder.Encoder, autoencoder.Decoder)
NAMES = [n for n, m in tiny().named_modules() if isinstance(m, LAYERS) and not n.startswith("quantize")]
# One convolution of every place that is computed otherwise.
CONVS = [
    *("encoder.conv_in", "encoder.down.1.block.0.conv1", "encoder.down.0.downsample.conv"),
    *("encoder.down.1.block.0.nin_shortcut", "encoder.mid.attn_1.qkv", "decoder.mid.block_1.conv2"),
    *("decoder.up.1.attn.0.proj_out", "decoder.up.1.upsample.conv", "decoder.conv_out", "quant_conv"),
    "post_quant_conv",
]


def test_the_tokenizer_as_published() -> None:
    vae = tiny(torch.float64)
    with torch.no_grad():
        got = both(vae)
        with published():
            torch.testing.assert_close(got, both(vae), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_a_hooked_layer_is_called(name: str) -> None:
    vae, calls = tiny(torch.float64), []
    plain, fused = both(vae), count(lambda: both(vae))
    module = vae.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: (calls.append(out), bent(out))[1])
    check_as_published(vae, plain)
    assert len(calls) == 2
    torch.testing.assert_close(calls[0], calls[1], **EXACT)
    # A hook finds the memory format that it would find anywhere.
    assert calls[0].is_contiguous()
    hooked = count(lambda: both(vae))
    lost = {"conv3x3": 1, "group_norm_silu": int(isinstance(module, nn.GroupNorm))}
    assert all(fused[op] - hooked[op] <= most for op, most in lost.items())
    handle.remove()
    assert torch.equal(both(vae), plain)
    assert count(lambda: both(vae)) == fused


class Viewing(nn.Module):
    """A wrapper that takes and sees contiguous maps only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x.view(x.shape[0], -1).view(x.shape))
        return bent(out.view(-1).view(out.shape))


@pytest.mark.parametrize("name", NAMES)
def test_a_replaced_layer_is_called(name: str) -> None:
    vae = tiny(torch.float64)
    plain = both(vae)
    replace(vae, name, Viewing(vae.get_submodule(name)))
    check_as_published(vae, plain)


class Negated(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return bent(super().forward(x))


class Bent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return bent(x)


class Bending(Tensor):
    """A weight that is no plain tensor: it changes what is convolved with it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        return bent(out) if func is F.conv2d or func is torch.conv2d else out


def subclass(vae, name, conv):
    conv.__class__ = Negated


def patched(vae, name, conv):
    conv.forward = lambda x, forward=conv.forward: bent(forward(x))


def weight_subclass(vae, name, conv):
    conv._parameters["weight"] = conv.weight.data.as_subclass(Bending)


CHANGES = {
    "pre-hook": lambda vae, name, conv: conv.register_forward_pre_hook(lambda m, args: (bent(args[0]),)),
    "forward": patched,
    "subclass": subclass,
    "own LoRA": lambda vae, name, conv: replace(vae, name, Lora(conv)),
    "sequence": lambda vae, name, conv: replace(vae, name, nn.Sequential(conv, Bent())),
    "padding": lambda vae, name, conv: setattr(conv, "padding_mode", "circular"),
    "no bias": lambda vae, name, conv: setattr(conv, "bias", None),
    "parametrization": lambda vae, name, conv: parametrize.register_parametrization(conv, "weight", Bent()),
    "weight_norm": lambda vae, name, conv: parametrizations.weight_norm(conv).parametrizations.weight.original0.exp_(),
    "old weight_norm": lambda vae, name, conv: nn.utils.weight_norm(conv).weight_g.exp_(),
    "spectral_norm": lambda vae, name, conv: parametrizations.spectral_norm(conv),
    "old spectral_norm": lambda vae, name, conv: nn.utils.spectral_norm(conv),
    "pruned": lambda vae, name, conv: prune.random_unstructured(conv, "weight", 0.5),
    "weight subclass": weight_subclass,
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_changed_convolution_is_called(change: str, name: str) -> None:
    vae = tiny(torch.float64)
    plain = both(vae)
    with torch.no_grad():
        CHANGES[change](vae, name, vae.get_submodule(name))
    if change == "padding" and vae.get_submodule(name).padding == (0, 0):
        pytest.skip("is not padded")
    vae.eval()
    check_as_published(vae, plain, changes="spectral" not in change)  # a factor, which a norm takes away


def test_settings_of_a_norm_are_read() -> None:
    vae = tiny(torch.float64)
    plain = both(vae)
    vae.decoder.mid.block_1.norm1 = nn.GroupNorm(8, 64, affine=False)
    vae.decoder.up[0].block[1].norm2.eps = 0.1
    vae.decoder.mid.attn_1.norm.num_groups = 4
    vae.decoder.norm_out = nn.Identity()
    check_as_published(vae, plain)


def test_dropout_alone_in_training_mode_drops() -> None:
    vae = tiny(torch.float64, dropout=0.5)
    plain = both(vae)
    for module in vae.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    check_as_published(vae, plain)


def test_global_hooks_and_patched_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, seen = tiny(torch.float64), Counter()
    plain = both(vae)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.update([type(m).__name__]))
    try:
        torch.testing.assert_close(both(vae), plain, **EXACT)
    finally:
        handle.remove()
    want = Counter(type(m).__name__ for n, m in vae.named_modules() if not n.startswith("quantize"))
    assert all(seen[kind] == want[kind] for kind in ("Conv2d", "GroupNorm", "Identity", "ResnetBlock", "AttnBlock"))
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: bent(forward(self, x)))
    check_as_published(vae, plain)


def test_a_plain_tokenizer_is_fused_and_a_hooked_one_everywhere_else() -> None:
    vae = tiny()
    f_hat = torch.randn(2, 8, 4, 4)
    norms = sum(isinstance(m, nn.GroupNorm) for m in vae.decoder.modules())
    attns = sum(isinstance(m, autoencoder.AttnBlock) for m in vae.decoder.modules())
    fused = count(lambda: vae.fhat_to_img(f_hat))
    assert fused == {"conv3x3": norms - attns + 1, "group_norm_silu": attns}
    vae.decoder.up[0].block[0].conv1.register_forward_hook(lambda *_: None)
    # Its norm has an operator of its own.
    assert count(lambda: vae.fhat_to_img(f_hat)) == {"conv3x3": fused["conv3x3"] - 1, "group_norm_silu": attns + 1}
    vae.quantize.quant_resi.qresi_ls[0].register_forward_hook(lambda *_: None)
    idx = tokens(vae)
    for call in (vae.quantize.idxBl_to_var_input, lambda idx: vae.quantize(f_hat)):
        assert not count(lambda call=call: call(idx))
        assert sum(count(lambda call=call: tiny().quantize(f_hat)).values()) == 1


# --- the quantizer


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 1.3


PHI = "quantize.quant_resi.qresi_ls.1"
QUANTIZER_CHANGES = {
    "hooked phi": lambda vae: vae.get_submodule(PHI).register_forward_hook(lambda m, args, out: out * 1.3),
    "wrapped phi": lambda vae: replace(vae, PHI, Scaled(vae.get_submodule(PHI))),
    "LoRA": lambda vae: replace(vae, PHI, Lora(vae.get_submodule(PHI))),
    "another convolution": lambda vae: replace(vae, PHI, nn.Conv2d(8, 8, 5, padding=2)),
    "identity": lambda vae: replace(vae, PHI, nn.Identity()),
    "ratio": lambda vae: setattr(vae.get_submodule(PHI), "resi_ratio", 0.2),
    "padding": lambda vae: setattr(vae.get_submodule(PHI), "padding_mode", "replicate"),
    "parametrization": lambda vae: parametrize.register_parametrization(vae.get_submodule(PHI), "weight", Bent()),
    "hooked codes": lambda vae: vae.quantize.embedding.register_forward_hook(lambda m, args, out: out * 1.3),
    "wrapped codes": lambda vae: replace(vae, "quantize.embedding", Scaled(vae.quantize.embedding)),
    "short codes": lambda vae: setattr(vae.quantize.embedding, "max_norm", 1.0),
}


@pytest.mark.parametrize("share", [0, 1, 4])
@pytest.mark.parametrize("change", [None, *QUANTIZER_CHANGES])
def test_a_changed_quantizer_calls_its_modules(change: str | None, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PHI", {0: "quantize.quant_resi.1", 1: "quantize.quant_resi.qresi"}.get(share, PHI))
    vae = tiny(share_quant_resi=share)
    plain = torch.no_grad()(quantizer_results)(vae)
    if change is not None:
        QUANTIZER_CHANGES[change](vae)
    got = torch.no_grad()(quantizer_results)(copy.deepcopy(vae))
    with published():
        want = torch.no_grad()(quantizer_results)(copy.deepcopy(vae))
    for name in want:
        # Sums of at most 4 scales of 72 products, of values up to 20, in float32; an image is normalised.
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")
    if change is not None:
        assert any(not torch.allclose(got[name], plain[name], atol=1e-2) for name in plain if name != "tokens")
