"""The convolutional encoder and decoder of VAR's tokenizer, fused layer by layer where a layer is as it was built."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from varkern.modules.plain import fusable, is_plain, is_plain_conv
from varkern.ops import reference_forced
from varkern.ops._op import needs_gradient
from varkern.ops.conv import Norm, conv3x3
from varkern.ops.group_norm import group_norm_silu


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


def _recorded(*tensors: Tensor) -> bool:
    """Whether PyTorch must compute, as published: the ops have no gradient and no rule for torch.func.vmap."""
    return reference_forced() or needs_gradient(*tensors) or any(map(is_batchedtensor, tensors))


def _op_norm(norm: nn.Module, x: Tensor) -> Norm | None:
    """What the ops need of a group norm; None where it must be called instead."""
    if not (isinstance(norm, nn.GroupNorm) and is_plain(norm)) or norm.weight is None or norm.bias is None:
        return None
    return None if _recorded(x, norm.weight, norm.bias) else Norm(norm.weight, norm.bias, norm.num_groups, norm.eps)


def _op_conv(conv: nn.Module, kernel: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a convolution for the ops; None where it must be called instead."""
    if not (isinstance(conv, nn.Conv2d) and is_plain_conv(conv, kernel)) or conv.bias is None:
        return None
    return None if _recorded(x, conv.weight, conv.bias) else (conv.weight, conv.bias)


def _as_published(x: Tensor) -> Tensor:
    """The map in the memory format that other people's modules know, which the ops change to channels last."""
    return x if _recorded(x) else x.contiguous()


class _Layer(nn.Module):
    """What keeps the memory format of the ops among its like, and gives everybody else the published one."""

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return _as_published(self.compute(x))


def _call(module: nn.Module, x: Tensor) -> Tensor:
    if not is_plain(module):
        return module(_as_published(x))
    return module.compute(x) if isinstance(module, _Layer) else module(x)


def _cast(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """All in the type that autocast has for convolutions, where it is on."""
    # Autocast knows no meta tensors.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return [x.to(dtype), *(parameter.to(dtype) for parameter in parameters)]
    return [x, *parameters]


def _norm_silu_conv(
    x: Tensor,
    norm: nn.Module,
    conv: nn.Module,
    dropout: nn.Module | None = None,
    shortcut: Callable[[], Tensor] | None = None,
) -> Tensor:
    """shortcut() + conv(dropout(silu(norm(x)))), for a 3x3 convolution: in one op, or what of it must be called."""
    keeps = dropout is None or (is_plain(dropout) and not (isinstance(dropout, nn.Dropout) and dropout.training))
    taken, weights = _op_norm(norm, x), _op_conv(conv, 3, x)
    if taken is not None and weights is not None and keeps:
        return _conv3x3(x, *weights, taken, shortcut)
    if taken is not None:
        h = group_norm_silu(x, *taken, silu=True)
    else:
        # A norm that somebody else sees keeps its output, or its input where it is the identity.
        h = F.silu(_call(norm, x), inplace=is_plain(norm) and isinstance(norm, nn.GroupNorm))
    if dropout is not None and not keeps:
        h = dropout(_as_published(h))  # a mask is drawn in the order of memory
    if weights is not None and not _recorded(h):
        return _conv3x3(h, *weights, None, shortcut)
    h = _call(conv, h)
    return h if shortcut is None else shortcut() + h


def _conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor, norm: Norm | None, shortcut: Callable[[], Tensor] | None
) -> Tensor:
    x, weight, bias = _cast(x, weight, bias)
    if shortcut is None:
        return conv3x3(x, weight, bias, norm)
    residual = shortcut()
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    if residual.shape != shape or residual.dtype != x.dtype or _recorded(residual):
        return residual + conv3x3(x, weight, bias, norm)
    return conv3x3(x, weight, bias, norm, residual)


@fusable
class ResnetBlock(_Layer):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout) if dropout > 1e-6 else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut: nn.Module
        if in_channels == out_channels:
            self.nin_shortcut = nn.Identity()
        else:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def compute(self, x: Tensor) -> Tensor:
        h = _norm_silu_conv(x, self.norm1, self.conv1)
        return _norm_silu_conv(h, self.norm2, self.conv2, self.dropout, lambda: _call(self.nin_shortcut, x))


@fusable
class AttnBlock(_Layer):
    """Single-head self-attention over the positions of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.C = channels
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.w_ratio = channels**-0.5
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def compute(self, x: Tensor) -> Tensor:
        norm, qkv, proj_out = _op_norm(self.norm, x), _op_conv(self.qkv, 1, x), _op_conv(self.proj_out, 1, x)
        h = _call(self.norm, x) if norm is None else group_norm_silu(x, *norm, silu=False)
        if norm is not None and qkv is not None and proj_out is not None:
            return x + self._on_rows(h, qkv, proj_out)
        B, C, H, W = x.shape
        q, k, v = _call(self.qkv, h).reshape(B, 3, C, H * W).unbind(1)
        weights = torch.bmm(q.transpose(1, 2), k).mul_(self.w_ratio).softmax(dim=2)  # (B, query, key)
        h = torch.bmm(v, weights.transpose(1, 2)).view(B, C, H, W)
        return x + _call(self.proj_out, h)

    def _on_rows(self, h: Tensor, qkv: tuple[Tensor, Tensor], proj_out: tuple[Tensor, Tensor]) -> Tensor:
        """The same between norm and residual, on rows of channels: channels last, they need no transposition."""
        B, C, H, W = h.shape
        rows = h.flatten(2).transpose(1, 2)
        q, k, v = F.linear(rows, qkv[0].flatten(1), qkv[1]).view(B, 1, H * W, 3, C).unbind(3)
        rows = F.scaled_dot_product_attention(q, k, v, scale=self.w_ratio).squeeze(1)
        return F.linear(rows, proj_out[0].flatten(1), proj_out[1]).transpose(1, 2).view(B, C, H, W)


@fusable
class Downsample2x(_Layer):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def compute(self, x: Tensor) -> Tensor:
        return _call(self.conv, F.pad(x, (0, 1, 0, 1)))


@fusable
class Upsample2x(_Layer):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def compute(self, x: Tensor) -> Tensor:
        weights = _op_conv(self.conv, 3, x)
        if weights is None:
            return _call(self.conv, F.interpolate(x, scale_factor=2, mode="nearest"))
        x, weight, bias = _cast(x, *weights)
        return conv3x3(x, weight, bias, upsample=True)


class _Level(nn.Module):
    """Residual blocks, each followed by attention where there is some, and a resampling under its official name."""

    def __init__(self, blocks: list[nn.Module], attns: list[nn.Module], name: str, resample: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attns)
        if resample is not None:
            self.add_module(name, resample)


def _layers(levels: Iterable[nn.Module], resample: str) -> Iterator[nn.Module]:
    """Of levels, in order. Who calls them one after another holds no map but the last."""
    for level in cast("Iterable[_Level]", levels):
        for i, block in enumerate(level.block):
            yield block
            if len(level.attn):
                yield level.attn[i]
        if hasattr(level, resample):
            yield getattr(level, resample)


def _through(layers: Iterable[nn.Module], h: Tensor) -> Tensor:
    for layer in layers:
        h = _call(layer, h)
    return h


def _conv_in(conv: nn.Module, x: Tensor) -> Tensor:
    """Channels last where the ops run, which read it so; every layer then keeps it."""
    return _call(conv, x) if _op_conv(conv, 3, x) is None else conv(x.contiguous(memory_format=torch.channels_last))


def _call_mid(mid: nn.Module, h: Tensor) -> Tensor:
    return _through(mid, h) if isinstance(mid, nn.Sequential) and is_plain(mid) else _call(mid, h)


def _mid(channels: int, dropout: float) -> nn.Sequential:
    mid = nn.Sequential()
    mid.add_module("block_1", ResnetBlock(channels, channels, dropout))
    mid.add_module("attn_1", AttnBlock(channels))
    mid.add_module("block_2", ResnetBlock(channels, channels, dropout))
    return mid


@fusable
class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> features (B, z_channels, H / f, W / f), f = 2 ** (levels - 1)."""

    def __init__(
        self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, dropout: float, in_channels: int, z_channels: int
    ) -> None:
        super().__init__()
        self.ch, self.num_res_blocks, self.in_channels = ch, num_res_blocks, in_channels
        self.num_resolutions = len(ch_mult)
        self.downsample_ratio = 2 ** (self.num_resolutions - 1)
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels, last = ch, len(ch_mult) - 1
        for i, mult in enumerate(ch_mult):
            blocks: list[nn.Module] = []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(channels, ch * mult, dropout))
                channels = ch * mult
            attns: list[nn.Module] = [AttnBlock(channels) for _ in blocks] if i == last else []
            self.down.append(_Level(blocks, attns, "downsample", Downsample2x(channels) if i < last else None))
        self.mid = _mid(channels, dropout)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = _through(_layers(self.down, "downsample"), _conv_in(self.conv_in, x))
        return _norm_silu_conv(_call_mid(self.mid, h), self.norm_out, self.conv_out).contiguous()


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> images (B, in_channels, f * h, f * w)."""

    def __init__(
        self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, dropout: float, in_channels: int, z_channels: int
    ) -> None:
        super().__init__()
        self.ch, self.num_res_blocks, self.in_channels = ch, num_res_blocks, in_channels
        self.num_resolutions = len(ch_mult)
        last = self.num_resolutions - 1
        channels = ch * ch_mult[last]
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = _mid(channels, dropout)
        levels: list[nn.Module] = []
        for i in range(last, -1, -1):
            blocks: list[nn.Module] = []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(channels, ch * ch_mult[i], dropout))
                channels = ch * ch_mult[i]
            attns: list[nn.Module] = [AttnBlock(channels) for _ in blocks] if i == last else []
            levels.insert(0, _Level(blocks, attns, "upsample", Upsample2x(channels) if i > 0 else None))
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = _call_mid(self.mid, _conv_in(self.conv_in, z))
        h = _through(_layers(reversed(self.up), "upsample"), h)
        return _norm_silu_conv(h, self.norm_out, self.conv_out).contiguous()
