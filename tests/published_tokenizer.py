"""The tokenizer as published (VAR, arXiv 2404.02905), every module called in order: the oracle of the drop-in tests.

And what they share: a small tokenizer, a count of operators, changes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import varkern
from varkern.modules import autoencoder, quantizer


def resnet_block(self, x: Tensor) -> Tensor:
    h = self.conv1(F.silu(self.norm1(x)))
    h = self.conv2(self.dropout(F.silu(self.norm2(h))))
    return self.nin_shortcut(x) + h


def attn_block(self, x: Tensor) -> Tensor:
    B, _, H, W = x.shape
    q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5, dim=-1)
    return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(B, -1, H, W))


def downsample(self, x: Tensor) -> Tensor:
    return self.conv(F.pad(x, (0, 1, 0, 1)))


def upsample(self, x: Tensor) -> Tensor:
    return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def mid(self, h: Tensor) -> Tensor:
    return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))


def level(self, h: Tensor) -> Tensor:
    for j, block in enumerate(self.block):
        h = block(h)
        if len(self.attn):
            h = self.attn[j](h)
    return h


def encoder(self, x: Tensor) -> Tensor:
    h = self.conv_in(x)
    for i in range(len(self.down)):
        h = level(self.down[i], h)
        if i < len(self.down) - 1:
            h = self.down[i].downsample(h)
    return self.conv_out(F.silu(self.norm_out(mid(self, h))))


def decoder(self, z: Tensor) -> Tensor:
    h = mid(self, self.conv_in(z))
    for i in reversed(range(len(self.up))):
        h = level(self.up[i], h)
        if i > 0:
            h = self.up[i].upsample(h)
    return self.conv_out(F.silu(self.norm_out(h)))


def phi(self, h: Tensor) -> Tensor:
    return h * (1 - self.resi_ratio) + nn.Conv2d.forward(self, h) * self.resi_ratio


def add_scale(self, k: int, f_hat: Tensor, codes: Tensor) -> Tensor:
    """What scale k adds to f_hat."""
    last = k == len(self.v_patch_nums) - 1
    up = codes if last else F.interpolate(codes, size=f_hat.shape[-2:], mode="bicubic")
    return self.quant_resi[k / (len(self.v_patch_nums) - 1)](up)


def quantized(self, f: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The indices (B, n_k) of each scale and f_hat after it."""
    rest, f_hat, K = f.detach().clone(), torch.zeros_like(f), len(self.v_patch_nums)
    for k, p in enumerate(self.v_patch_nums):
        z = rest if k == K - 1 else F.interpolate(rest, size=(p, p), mode="area")
        rows, codes = z.permute(0, 2, 3, 1).flatten(0, 2), self.embedding.weight.detach()
        indices = torch.cdist(rows.double(), codes.double()).argmin(1).view(f.shape[0], p, p)
        h = add_scale(self, k, f_hat, self.embedding(indices).permute(0, 3, 1, 2))
        f_hat, rest = f_hat + h, rest - h.detach()
        yield indices.flatten(1), f_hat


def quantize(self, f: Tensor, ret_usages: bool = False) -> tuple[Tensor, None, Tensor]:
    loss = f.new_zeros(())
    for _, f_hat in quantized(self, f):
        loss = loss + self.beta * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, f.detach())
    return (f_hat.detach() - f.detach()) + f, None, loss / len(self.v_patch_nums)


def f_to_idxBl_or_fhat(self, f: Tensor, to_fhat: bool, v_patch_nums=None) -> list[Tensor]:
    return [f_hat if to_fhat else indices for indices, f_hat in quantized(self, f.float())]


def embed_to_fhat(self, maps: list[Tensor], all_to_max_scale: bool = True, last_one: bool = False):
    f_hat, f_hats = torch.zeros_like(maps[-1 if all_to_max_scale else 0]), []
    for k, h in enumerate(maps):
        if not all_to_max_scale:
            f_hat = F.interpolate(f_hat, size=h.shape[-2:], mode="bicubic")
            f_hat = f_hat + self.quant_resi[k / (len(maps) - 1)](h)
        else:
            f_hat = f_hat + add_scale(self, k, f_hat, h)
        f_hats.append(f_hat)
    return f_hats[-1] if last_one else f_hats


def idxBl_to_var_input(self, tokens: list[Tensor]) -> Tensor:
    side = self.v_patch_nums[-1]
    f_hat, inputs = torch.zeros(len(tokens[0]), self.Cvae, side, side), []
    for k, p in enumerate(self.v_patch_nums[1:]):
        codes = self.embedding(tokens[k]).transpose(1, 2).unflatten(2, (self.v_patch_nums[k],) * 2)
        f_hat = f_hat + add_scale(self, k, f_hat, codes)
        inputs.append(F.interpolate(f_hat, size=(p, p), mode="area").flatten(2).transpose(1, 2))
    return torch.cat(inputs, 1)


def get_next_autoregressive_input(self, si: int, SN: int, f_hat: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    f_hat.add_(add_scale(self, si, f_hat, h))
    if si == SN - 1:
        return f_hat, f_hat
    p = self.v_patch_nums[si + 1]
    return f_hat, F.interpolate(f_hat, size=(p, p), mode="area")


_FORWARDS = {
    autoencoder.ResnetBlock: resnet_block,
    autoencoder.AttnBlock: attn_block,
    autoencoder.Downsample2x: downsample,
    autoencoder.Upsample2x: upsample,
    autoencoder.Encoder: encoder,
    autoencoder.Decoder: decoder,
    quantizer.PhiConv: phi,
    varkern.VectorQuantizer2: quantize,
}
_METHODS = (f_to_idxBl_or_fhat, embed_to_fhat, idxBl_to_var_input, get_next_autoregressive_input)


@contextmanager
def published() -> Iterator[None]:
    """All tokenizers are computed as published; what hangs on an instance stays."""
    patches = [mock.patch.object(kind, "forward", forward) for kind, forward in _FORWARDS.items()]
    patches += [mock.patch.object(varkern.VectorQuantizer2, method.__name__, method) for method in _METHODS]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


SCHEDULE = (1, 2, 3, 4)


def tiny(dtype: torch.dtype = torch.float32, **options) -> varkern.VQVAE:
    """Weights that keep a signal's size, codes far apart."""
    vae = varkern.VQVAE(16, 8, 32, v_patch_nums=SCHEDULE, ch_mult=(1, 2), num_res_blocks=1, **options)
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.dim() == 4:
                nn.init.kaiming_normal_(parameter)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return vae.to(dtype)


class Ops(TorchDispatchMode):
    """Counts varkern's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "varkern":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], object]) -> Counter[str]:
    with Ops() as ops, torch.no_grad():
        call()
    return ops.count


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, 8, 8, dtype=dtype) * 2 - 1


def tokens(vae: varkern.VQVAE) -> list[Tensor]:
    return [torch.randint(vae.vocab_size, (2, p * p)) for p in SCHEDULE]


def replace(vae: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(vae.get_submodule(parent), child, module)


# In float64 the operators compute what PyTorch does, so that one bound serves every machine: a thousand operations a
# value, 2e-16 each, with room.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def bent(x: Tensor) -> Tensor:
    """A change that no norm takes away."""
    return x + 0.5 * x.flip(1)


def both(vae: varkern.VQVAE) -> Tensor:
    """Features of images and an image of features, in one tensor."""
    torch.manual_seed(1)
    dtype = vae.quantize.embedding.weight.dtype
    features = vae.quant_conv(vae.encoder(images(dtype)))
    return torch.cat([features.flatten(), vae.decoder(vae.post_quant_conv(torch.randn_like(features))).flatten()])


def check_as_published(vae: varkern.VQVAE, plain: Tensor, changes: bool = True) -> None:
    with torch.no_grad():
        got = both(vae)
        with published():
            want = both(vae)
    torch.testing.assert_close(got, want, **EXACT)
    assert not (changes and torch.allclose(got, plain, atol=1e-4)), "the change changes nothing"


class Lora(nn.Module):
    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        options = {"kernel_size": base.kernel_size, "stride": base.stride, "padding": base.padding}
        self.down = nn.Conv2d(base.in_channels, 2, **options, bias=False, dtype=base.weight.dtype)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Conv2d:
        merged = copy.deepcopy(self.base)
        with torch.no_grad():
            merged.weight += torch.einsum("or,rikl->oikl", self.up.weight[:, :, 0, 0], self.down.weight)
        return merged


def quantizer_results(vae: varkern.VQVAE) -> dict[str, Tensor]:
    quantize, found = vae.quantize, {}
    torch.manual_seed(2)
    f, idx = torch.randn(2, 8, 4, 4), tokens(vae)
    maps = [torch.randn(2, 8, p, p) for p in SCHEDULE]
    found["tokens"] = torch.cat(quantize.f_to_idxBl_or_fhat(f, to_fhat=False), 1)
    found["f_hats"] = torch.stack(quantize.f_to_idxBl_or_fhat(f, to_fhat=True))
    found["decoded"] = torch.stack(quantize.embed_to_fhat(maps))
    found["grown"] = quantize.embed_to_fhat(maps, all_to_max_scale=False, last_one=True)
    found["var_input"] = quantize.idxBl_to_var_input(idx)
    found["loss"] = quantize(f)[2]
    found["image"] = vae.idxBl_to_img(idx, same_shape=True, last_one=True)
    f_hat = torch.zeros(2, 8, 4, 4)
    for k in range(4):
        f_hat, found[f"next {k}"] = quantize.get_next_autoregressive_input(k, 4, f_hat, maps[k])
    return found
