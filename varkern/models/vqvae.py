"""`VQVAE`: VAR's image tokenizer, a convolutional autoencoder around the multi-scale residual quantizer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkern.models.quantizer import VectorQuantizer2, check_map, check_maps
from varkern.models.schedule import PATCH_NUMS_256, as_sizes, patch_nums_of_lengths
from varkern.ops import reference_forced
from varkern.ops._library import check_floats, needs_gradient
from varkern.ops.conv import Norm, conv3x3
from varkern.ops.group_norm import group_norm_silu


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


def _fused(x: Tensor, layer: nn.Module) -> bool:
    """Whether the ops, which have no gradient, compute the layer; else PyTorch's, as published."""
    return not reference_forced() and not needs_gradient(x, *layer.parameters())


def _cast(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """All in the type that autocast has for convolutions, where it is on."""
    # Autocast knows no meta tensors.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return [x.to(dtype), *(parameter.to(dtype) for parameter in parameters)]
    return [x, *parameters]


def _norm_silu_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, residual: Tensor | None = None) -> Tensor:
    """conv(silu(norm(x))) + residual, for a 3x3 convolution."""
    if not (_fused(x, norm) and _fused(x, conv)):
        h = conv(F.silu(norm(x), inplace=True))
        return h if residual is None else residual + h
    assert conv.bias is not None
    x, weight, bias = _cast(x, conv.weight, conv.bias)
    if residual is not None:
        residual = residual.to(x.dtype)
    return conv3x3(x, weight, bias, Norm(norm.weight, norm.bias, norm.num_groups, norm.eps), residual)


def _layout(x: Tensor, module: nn.Module) -> Tensor:
    """Channels last where the ops run, which read it so; every layer then keeps it."""
    return x.contiguous(memory_format=torch.channels_last) if _fused(x, module) else x


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
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

    def forward(self, x: Tensor) -> Tensor:
        h = _norm_silu_conv(x, self.norm1, self.conv1)
        if self.training and isinstance(self.dropout, nn.Dropout):
            return self.nin_shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h), inplace=True)))
        return _norm_silu_conv(h, self.norm2, self.conv2, self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over the positions of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.C = channels
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.w_ratio = channels**-0.5
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        if _fused(x, self):
            return x + self._fused(x)
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, C, H * W).unbind(1)
        weights = torch.bmm(q.transpose(1, 2), k).mul_(self.w_ratio).softmax(dim=2)  # (B, query, key)
        h = torch.bmm(v, weights.transpose(1, 2)).view(B, C, H, W)
        return x + self.proj_out(h)

    def _fused(self, x: Tensor) -> Tensor:
        """The same before the residual, on rows of channels: channels last, they need no transposition."""
        B, C, H, W = x.shape
        h = group_norm_silu(x, self.norm.weight, self.norm.bias, self.norm.num_groups, self.norm.eps, silu=False)
        qkv = F.linear(h.flatten(2).transpose(1, 2), self.qkv.weight.flatten(1), self.qkv.bias)
        q, k, v = qkv.view(B, 1, H * W, 3, C).unbind(3)
        h = F.scaled_dot_product_attention(q, k, v, scale=self.w_ratio).squeeze(1)
        return F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias).transpose(1, 2).view(B, C, H, W)


class Downsample2x(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample2x(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not _fused(x, self):
            return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        assert self.conv.bias is not None
        x, weight, bias = _cast(x, self.conv.weight, self.conv.bias)
        return conv3x3(x, weight, bias, upsample=True)


class _Level(nn.Module):
    """Residual blocks, each followed by attention where ``attention``, and a resampling under its official name."""

    def __init__(self, blocks: list[nn.Module], attns: list[nn.Module], name: str, resample: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attns)
        self._resample = name
        if resample is not None:
            self.add_module(name, resample)

    def layers(self) -> Iterator[nn.Module]:
        """In order. Who calls them one after another holds no map but the last; a `forward` here would hold its own."""
        for i, block in enumerate(self.block):
            yield block
            if len(self.attn):
                yield self.attn[i]
        resample = getattr(self, self._resample, None)
        if resample is not None:
            yield resample


def _mid(channels: int, dropout: float) -> nn.Sequential:
    mid = nn.Sequential()
    mid.add_module("block_1", ResnetBlock(channels, channels, dropout))
    mid.add_module("attn_1", AttnBlock(channels))
    mid.add_module("block_2", ResnetBlock(channels, channels, dropout))
    return mid


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> features (B, z_channels, H / f, W / f), f = 2 ** (levels - 1)."""

    def __init__(
        self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, dropout: float, in_channels: int, z_channels: int
    ) -> None:
        super().__init__()
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
        h = self.conv_in(_layout(x, self))
        for level in cast("Iterable[_Level]", self.down):
            for layer in level.layers():
                h = layer(h)
        return _norm_silu_conv(self.mid(h), self.norm_out, self.conv_out).contiguous()


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> images (B, in_channels, f * h, f * w)."""

    def __init__(
        self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, dropout: float, in_channels: int, z_channels: int
    ) -> None:
        super().__init__()
        last = len(ch_mult) - 1
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
        h = self.mid(self.conv_in(_layout(z, self)))
        for level in cast("Iterable[_Level]", reversed(self.up)):
            for layer in level.layers():
                h = layer(h)
        return _norm_silu_conv(h, self.norm_out, self.conv_out).contiguous()


class VQVAE(nn.Module):
    """Image tokenizer (VAR, arXiv 2404.02905, section 3.2): images in [-1, 1] <-> K maps of codes.

    Args:
        vocab_size: number of codes V.
        z_channels: code width Cv.
        ch: base width of the convolutions (the official checkpoint has 160); ``ch * ch_mult[i]`` must be a multiple
            of 32, the number of normalisation groups.
        dropout: in the residual blocks.
        beta, using_znorm, quant_resi, share_quant_resi, default_qresi_counts, v_patch_nums: see `VectorQuantizer2`.
        quant_conv_ks: kernel size of the convolutions around the quantizer.
        test_mode: eval mode, and no parameter requires a gradient.
        ch_mult: width multiplier of each level; an image is ``2 ** (len(ch_mult) - 1)`` times its feature map.
        num_res_blocks: residual blocks a level (the decoder has one more).
        in_channels: of the images.
    """

    def __init__(
        self,
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 128,
        dropout: float = 0.0,
        beta: float = 0.25,
        using_znorm: bool = False,
        quant_conv_ks: int = 3,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] = PATCH_NUMS_256,
        test_mode: bool = True,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        for mult in (1, *ch_mult):
            if (ch * mult) % 32:
                raise ValueError(f"every width must be a multiple of 32 (GroupNorm): ch={ch} times {mult} is not")
        self.test_mode = test_mode
        self.V = self.vocab_size = vocab_size
        self.Cvae = z_channels
        self.in_channels = in_channels
        widths = (ch, tuple(ch_mult), num_res_blocks, dropout, in_channels, z_channels)
        self.encoder = Encoder(*widths)
        self.decoder = Decoder(*widths)
        self.downsample = 2 ** (len(ch_mult) - 1)
        self.quantize = VectorQuantizer2(
            vocab_size=vocab_size,
            Cvae=z_channels,
            using_znorm=using_znorm,
            beta=beta,
            default_qresi_counts=default_qresi_counts,
            v_patch_nums=v_patch_nums,
            quant_resi=quant_resi,
            share_quant_resi=share_quant_resi,
        )
        self.quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        if test_mode:
            self.eval()
            self.requires_grad_(False)

    def check_images(self, img: Tensor, size: tuple[int, int] | None = None) -> None:
        """Raises TypeError or ValueError for what are no images of a feature size, by default the schedule's last."""
        size = as_sizes(self.quantize.v_patch_nums)[-1] if size is None else size
        want = (self.in_channels, size[0] * self.downsample, size[1] * self.downsample)
        weight = self.encoder.conv_in.weight
        check_floats("VQVAE", ("images",), (img,))
        if img.ndim != 4 or tuple(img.shape[1:]) != want:
            raise ValueError(
                f"images must be (B, {want[0]}, {want[1]}, {want[2]}) for a schedule that ends in {size[0]}x{size[1]} "
                f"(downsampling by {self.downsample}), got {tuple(img.shape)}; resize them or pass another v_patch_nums"
            )
        if img.dtype != weight.dtype and not torch.is_autocast_enabled(img.device.type):
            raise TypeError(f"images are {img.dtype} but the tokenizer is {weight.dtype}; convert one of them")
        if img.device != weight.device:
            raise ValueError(f"images are on {img.device} but the tokenizer is on {weight.device}; move one of them")

    def _features(self, img: Tensor, size: tuple[int, int]) -> Tensor:
        """Features (B, Cv, h, w) of images (B, in_channels, f * h, f * w); the size is checked."""
        self.check_images(img, size)
        return self.quant_conv(self.encoder(img))

    def _decode(self, f_hat: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(f_hat.to(self.post_quant_conv.weight.dtype)))

    def forward(self, inp: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        """Images (B, in_channels, H, W) -> reconstruction, codebook usage in % a scale or None, scalar loss."""
        features = self._features(inp, as_sizes(self.quantize.v_patch_nums)[-1])
        f_hat, usages, vq_loss = self.quantize(features, ret_usages=ret_usages)
        return self._decode(f_hat), usages, vq_loss

    def fhat_to_img(self, f_hat: Tensor) -> Tensor:
        """Quantized features (B, Cv, h, w) -> images (B, in_channels, f * h, f * w), clamped to [-1, 1]."""
        check_map("fhat_to_img", "f_hat", f_hat, self.Cvae, self.post_quant_conv.weight.device)
        return self._decode(f_hat).clamp_(-1, 1)

    def img_to_idxBl(
        self, inp_img_no_grad: Tensor, v_patch_nums: Sequence[int | Sequence[int]] | None = None
    ) -> list[Tensor]:
        """Images -> token indices (B, n_k) int64 of each scale."""
        sizes = as_sizes(self.quantize.v_patch_nums if v_patch_nums is None else v_patch_nums)
        features = self._features(inp_img_no_grad, sizes[-1])
        return self.quantize.f_to_idxBl_or_fhat(features, to_fhat=False, v_patch_nums=sizes)

    def idxBl_to_img(
        self, ms_idx_Bl: Sequence[Tensor], same_shape: bool, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Token indices (B, n_k) of each scale -> the image after each scale, or the last; see `embed_to_img`."""
        check_maps("ms_idx_Bl", ms_idx_Bl, "token maps (B, n_k)")
        self.quantize.check_codes(ms_idx_Bl)
        maps = []
        for idx, p in zip(ms_idx_Bl, patch_nums_of_lengths([i.shape[1] for i in ms_idx_Bl]), strict=True):
            maps.append(self.quantize.embedding(idx).transpose(1, 2).reshape(idx.shape[0], self.Cvae, p, p))
        return self.embed_to_img(maps, all_to_max_scale=same_shape, last_one=last_one)

    def embed_to_img(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Embeddings (B, Cv, p_k, p_k) of each scale -> images in [-1, 1], one a scale (or the last).

        ``all_to_max_scale``: all images have the full size; else the k-th shows p_k x p_k features.
        """
        f_hats = self.quantize.embed_to_fhat(ms_h_BChw, all_to_max_scale=all_to_max_scale, last_one=last_one)
        if last_one:
            return self.fhat_to_img(cast(Tensor, f_hats))
        return [self.fhat_to_img(f_hat) for f_hat in f_hats]

    def img_to_reconstructed_img(
        self, x: Tensor, v_patch_nums: Sequence[int | Sequence[int]] | None = None, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Images -> their reconstruction after each scale, or the last, in [-1, 1]."""
        sizes = as_sizes(self.quantize.v_patch_nums if v_patch_nums is None else v_patch_nums)
        f_hats = self.quantize.f_to_idxBl_or_fhat(self._features(x, sizes[-1]), to_fhat=True, v_patch_nums=sizes)
        return self.fhat_to_img(f_hats[-1]) if last_one else [self.fhat_to_img(f_hat) for f_hat in f_hats]
