"""`VQVAE`: VAR's image tokenizer, a convolutional autoencoder around the multi-scale residual quantizer."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from varkern.modules.autoencoder import Decoder, Encoder
from varkern.modules.plain import compute_dtype, is_plain
from varkern.modules.quantizer import VectorQuantizer2, check_map, check_maps, device_of
from varkern.modules.schedule import PATCH_NUMS_256, as_sizes
from varkern.ops.checks import check_floats


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
        check_floats("VQVAE", ("images",), (img,))
        conv_in = getattr(self.encoder, "conv_in", None)
        if not (isinstance(conv_in, nn.Conv2d) and is_plain(self.encoder) and is_plain(conv_in)):
            return  # somebody else's encoder says itself what it takes
        size = as_sizes(self.quantize.v_patch_nums)[-1] if size is None else size
        want = (conv_in.in_channels, size[0] * self.downsample, size[1] * self.downsample)
        dtype, device = conv_in.weight.dtype, conv_in.weight.device
        if img.ndim != 4 or tuple(img.shape[1:]) != want:
            raise ValueError(
                f"images must be (B, {want[0]}, {want[1]}, {want[2]}) for a schedule that ends in {size[0]}x{size[1]} "
                f"(downsampling by {self.downsample}), got {tuple(img.shape)}; resize them or pass another v_patch_nums"
            )
        if img.dtype != dtype and not torch.is_autocast_enabled(img.device.type):
            raise TypeError(f"images are {img.dtype} but the tokenizer is {dtype}; convert one of them")
        if img.device != device:
            raise ValueError(f"images are on {img.device} but the tokenizer is on {device}; move one of them")

    def _features(self, img: Tensor, size: tuple[int, int]) -> Tensor:
        """Features (B, Cv, h, w) of images (B, in_channels, f * h, f * w); the size is checked."""
        self.check_images(img, size)
        return self.quant_conv(self.encoder(img))

    def _decode(self, f_hat: Tensor) -> Tensor:
        dtype = compute_dtype(self.post_quant_conv, compute_dtype(self.decoder))
        return self.decoder(self.post_quant_conv(f_hat.to(dtype)))

    def forward(self, inp: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        """Images (B, in_channels, H, W) -> reconstruction, codebook usage in % a scale or None, scalar loss."""
        features = self._features(inp, as_sizes(self.quantize.v_patch_nums)[-1])
        f_hat, usages, vq_loss = self.quantize(features, ret_usages=ret_usages)
        return self._decode(f_hat), usages, vq_loss

    def fhat_to_img(self, f_hat: Tensor) -> Tensor:
        """Quantized features (B, Cv, h, w), 16, 32 or 64 bits -> images (B, in_channels, f * h, f * w) in [-1, 1]."""
        check_map("fhat_to_img", "f_hat", f_hat, self.Cvae, device_of(self.post_quant_conv))
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
        """Token indices (B, n_k) of each scale -> the image after each scale, or the last; see `embed_to_img`.

        Raises ValueError for maps of another schedule than the tokenizer's.
        """
        check_maps("ms_idx_Bl", ms_idx_Bl, "token maps (B, n_k)")
        self.quantize.check_codes(ms_idx_Bl)
        schedule = self.quantize.v_patch_nums
        got, want = [idx.shape[1] for idx in ms_idx_Bl], [p * p for p in schedule]
        if len(got) != len(want):
            raise ValueError(
                f"got {len(got)} token maps for the {len(want)} scales {schedule} of this tokenizer; to decode another "
                f"schedule load the weights into a VQVAE with those v_patch_nums"
            )
        if got != want:
            raise ValueError(
                f"maps of {got} tokens are not of this tokenizer's schedule {schedule}, which has {want}; to decode "
                f"maps of other sizes give their embeddings as (B, {self.Cvae}, h, w) to embed_to_img"
            )
        maps = self.quantize.embeddings(ms_idx_Bl)
        return self.embed_to_img(maps, all_to_max_scale=same_shape, last_one=last_one)

    def embed_to_img(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """Embeddings (B, Cv, p_k, p_k) of each scale -> images in [-1, 1], one a scale (or the last).

        ``all_to_max_scale``: all images have the full size; else the k-th shows p_k x p_k features. Other maps than
        the schedule's, (B, Cv, h_k, w_k), make images of their own sizes.
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
