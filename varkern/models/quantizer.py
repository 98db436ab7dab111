"""`VectorQuantizer2`: the tokenizer's multi-scale residual quantizer, with the official names and results."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from varkern.models.schedule import as_patch_nums, as_sizes, phi_index
from varkern.ops import quantize as ops
from varkern.ops._library import check_floats
from varkern.ops.quantize import Size


def check_map(op: str, name: str, h: Tensor, channels: int | None, device: torch.device) -> None:
    """Raises TypeError for what is no tensor, ValueError for a map that is not (B, channels, H, W) on the device."""
    check_floats(op, (name,), (h,))
    if channels is not None and (h.ndim != 4 or h.shape[1] != channels or 0 in h.shape[2:]):
        raise ValueError(f"{op}: {name} must be (B, {channels}, H, W), got {tuple(h.shape)}")
    if h.device != device:
        raise ValueError(f"{op}: {name} are on {h.device} but the tokenizer is on {device}; move one of them")


def check_maps(name: str, maps: Sequence[Tensor], meaning: str) -> None:
    """Raises TypeError for what is no sequence of dense tensors, ValueError for none."""
    if not isinstance(maps, Sequence) or not all(isinstance(m, Tensor) and m.layout is torch.strided for m in maps):
        kinds = [type(m).__name__ for m in maps] if isinstance(maps, Sequence) else type(maps).__name__
        raise TypeError(f"{name} must be a sequence of {meaning}, dense tensors, got {kinds}")
    if not maps:
        raise ValueError(f"{name} is empty, give {meaning} of each scale")


class PhiConv(nn.Conv2d):
    """phi(h) = (1 - r) * h + r * conv3x3(h)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.resi_ratio = abs(ratio)

    def forward(self, h: Tensor) -> Tensor:
        return ops.phi_reference(h, phi_of(self))


def phi_of(module: nn.Module) -> ops.Phi:
    """What the ops need of a residual convolution, in float32; a module without weights is the identity."""
    if not isinstance(module, PhiConv):
        return ops.Phi(None, None, 0.0)
    return ops.Phi(module.weight.float(), cast(Tensor, module.bias).float(), module.resi_ratio)


def _new_phi(channels: int, ratio: float) -> nn.Module:
    return PhiConv(channels, ratio) if abs(ratio) > 1e-6 else nn.Identity()


# The banks differ in their state-dict keys alone. Indexing one by k / (K - 1) gives the convolution of scale k.
class PhiShared(nn.Module):
    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.qresi = _new_phi(channels, ratio)

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi


class PhiPartiallyShared(nn.Module):
    def __init__(self, channels: int, ratio: float, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(_new_phi(channels, ratio) for _ in range(count))

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi_ls[phi_index(position, len(self.qresi_ls))]


class PhiNonShared(nn.ModuleList):
    def __init__(self, channels: int, ratio: float, count: int) -> None:
        super().__init__(_new_phi(channels, ratio) for _ in range(count))

    def __getitem__(self, position: float) -> nn.Module:  # type: ignore[override]
        return super().__getitem__(phi_index(position, len(self)))


class VectorQuantizer2(nn.Module):
    """Multi-scale residual vector quantizer (VAR, arXiv 2404.02905, section 3.2).

    Args:
        vocab_size: number of codes V.
        Cvae: code width Cv.
        using_znorm: choose codes by cosine similarity instead of Euclidean distance.
        beta: weight of the commitment term.
        default_qresi_counts: with ``share_quant_resi=0``, how many phi convolutions (0: one a scale).
        v_patch_nums: side lengths of the token maps, increasing.
        quant_resi: the ratio r of phi(h) = (1 - |r|) h + |r| conv(h); below 1e-6 phi is the identity.
        share_quant_resi: 0: one phi a scale; 1: one for all; n: n shared by neighbouring scales.
    """

    ema_vocab_hit_SV: Tensor

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] | None = None,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ) -> None:
        super().__init__()
        if v_patch_nums is None:
            raise ValueError("VectorQuantizer2 needs v_patch_nums, the side lengths of the token maps")
        self.vocab_size, self.Cvae = vocab_size, Cvae
        self.using_znorm, self.beta = using_znorm, beta
        self.v_patch_nums = as_patch_nums(v_patch_nums)
        self.quant_resi_ratio = quant_resi
        self.quant_resi: PhiShared | PhiPartiallyShared | PhiNonShared
        if share_quant_resi == 0:
            self.quant_resi = PhiNonShared(Cvae, quant_resi, default_qresi_counts or len(self.v_patch_nums))
        elif share_quant_resi == 1:
            self.quant_resi = PhiShared(Cvae, quant_resi)
        else:
            self.quant_resi = PhiPartiallyShared(Cvae, quant_resi, share_quant_resi)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.v_patch_nums), vocab_size))
        self.record_hit = 0
        self.embedding = nn.Embedding(vocab_size, Cvae)
        self.prog_si = -1  # progressive training: the last scale that takes part, -1 = all

    def extra_repr(self) -> str:
        return f"{self.v_patch_nums}, znorm={self.using_znorm}, beta={self.beta}, quant_resi={self.quant_resi_ratio}"

    def phis(self, num_scales: int) -> list[ops.Phi]:
        """phi of each of ``num_scales`` scales."""
        return [phi_of(self.quant_resi[k / (num_scales - 1)]) for k in range(num_scales)]

    def _codebook(self) -> Tensor:
        return self.embedding.weight.float()

    def _running(self, num_scales: int) -> int:
        return num_scales if self.prog_si < 0 else min(self.prog_si + 1, num_scales)

    def forward(self, f_BChw: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        """Training: features (B, Cv, H, W) -> straight-through f_hat, codebook usage in % a scale, scalar loss.

        While training under torch.distributed the hit counts are summed over processes into `ema_vocab_hit_SV`;
        the usages count codes whose average there reaches 8 % of an even share.
        """
        check_map("VectorQuantizer2", "features", f_BChw, self.Cvae, self.embedding.weight.device)
        with torch.autocast(f_BChw.device.type, enabled=False):
            sizes = as_sizes(self.v_patch_nums)
            f_BChw = f_BChw.float()
            f_hat, loss, indices = ops.residual_quantize_train(
                f_BChw, self._codebook(), self.phis(len(sizes)), sizes, self.beta, self.using_znorm
            )
            if self.training and dist.is_initialized():
                self._record_hits(indices)
            if not ret_usages:
                return f_hat, None, loss
            world = dist.get_world_size() if dist.is_initialized() else 1
            margin = world * (f_BChw.numel() / f_BChw.shape[1]) / self.vocab_size * 0.08
            usages = (self.ema_vocab_hit_SV >= margin).float().mean(dim=1).mul(100).tolist()
            return f_hat, usages, loss

    @torch.no_grad()
    def _record_hits(self, indices: list[Tensor]) -> None:
        for k, idx in enumerate(indices):
            hits = idx.flatten().bincount(minlength=self.vocab_size).float()
            dist.all_reduce(hits)
            if self.record_hit == 0:
                self.ema_vocab_hit_SV[k].copy_(hits)
            else:
                decay = 0.9 if self.record_hit < 100 else 0.99
                self.ema_vocab_hit_SV[k].mul_(decay).add_(hits, alpha=1 - decay)
            self.record_hit += 1

    def embed_to_fhat(
        self, ms_h_BChw: Sequence[Tensor], all_to_max_scale: bool = True, last_one: bool = False
    ) -> list[Tensor] | Tensor:
        """f_hat after each scale (or the last) from embeddings (B, Cv, p_k, p_k) of all scales.

        With ``all_to_max_scale=False`` the k-th f_hat has size p_k instead of p_K.
        """
        check_maps("ms_h_BChw", ms_h_BChw, "embeddings (B, Cv, p_k, p_k)")
        if len(ms_h_BChw) != len(self.v_patch_nums):
            raise ValueError(
                f"expected embeddings of {len(self.v_patch_nums)} scales {self.v_patch_nums}, got {len(ms_h_BChw)}"
            )
        for h in ms_h_BChw:
            check_map("embed_to_fhat", "embeddings", h, self.Cvae, self.embedding.weight.device)
            if h.shape[0] != ms_h_BChw[0].shape[0]:
                raise ValueError(f"embeddings must have one batch size, got {[h.shape[0] for h in ms_h_BChw]}")
        with torch.autocast(ms_h_BChw[0].device.type, enabled=False):
            phis, maps = self.phis(len(self.v_patch_nums)), [h.float() for h in ms_h_BChw]
            if all_to_max_scale:
                full = as_sizes(self.v_patch_nums)[-1]
                indices, vectors, sizes = ops.maps_as_codes(maps)
                f_hats = ops.residual_dequantize(indices, vectors, phis, sizes, full)
            else:
                f_hats = ops.growing_dequantize_reference(maps, phis)
        return f_hats[-1] if last_one else f_hats

    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[int | Sequence[int]] | None = None
    ) -> list[Tensor]:
        """Encode features (B, Cv, H, W): the indices (B, n_k), or with ``to_fhat`` f_hat, of each scale.

        ``v_patch_nums`` may hold ints or (h, w) pairs; its last entry must be (H, W), else ValueError.
        """
        sizes = as_sizes(self.v_patch_nums if v_patch_nums is None else v_patch_nums)
        check_map("f_to_idxBl_or_fhat", "features", f_BChw, None, self.embedding.weight.device)
        if f_BChw.ndim != 4 or f_BChw.shape[1] != self.Cvae or (f_BChw.shape[2], f_BChw.shape[3]) != sizes[-1]:
            raise ValueError(
                f"features must be (B, {self.Cvae}, {sizes[-1][0]}, {sizes[-1][1]}) for this schedule, got "
                f"{tuple(f_BChw.shape)}; pass v_patch_nums ending in the feature size"
            )
        run = self._running(len(sizes))
        with torch.no_grad(), torch.autocast(f_BChw.device.type, enabled=False):
            phis = self.phis(len(sizes))
            indices, f_hats = ops.residual_quantize(
                f_BChw, self._codebook(), phis[:run], sizes[:run], self.using_znorm, all_f_hats=to_fhat
            )
        return f_hats if to_fhat else indices

    def _check_tokens(self, ms_idx_Bl: Sequence[Tensor]) -> None:
        check_maps("token maps", ms_idx_Bl, "indices (B, n_k)")
        for idx, (h, w) in zip(ms_idx_Bl, as_sizes(self.v_patch_nums), strict=False):
            if idx.ndim != 2 or idx.shape[1] != h * w:
                raise ValueError(f"the tokens of a {h}x{w} map must be (B, {h * w}), got {tuple(idx.shape)}")
        self.check_codes(ms_idx_Bl)

    def check_codes(self, ms_idx_Bl: Sequence[Tensor]) -> None:
        """Raises TypeError, ValueError or, on the CPU alone, IndexError for tokens that are no codes of ours."""
        device, batch = self.embedding.weight.device, ms_idx_Bl[0].shape[:1]
        for idx in ms_idx_Bl:
            if idx.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"tokens are {idx.dtype}, give int64")
            if idx.ndim != 2 or idx.shape[:1] != batch or idx.shape[1] == 0 or idx.device != device:
                raise ValueError(
                    f"tokens must be (B, n_k) with one B on {device}, got {tuple(idx.shape)} on {idx.device} after "
                    f"{tuple(ms_idx_Bl[0].shape)}"
                )
            # Reading values would wait for an accelerator, and break a graph that is being compiled.
            if device.type == "cpu" and idx.numel() and not torch.compiler.is_compiling():
                low, high = int(idx.min()), int(idx.max())
                if low < 0 or high >= self.vocab_size:
                    raise IndexError(f"tokens must be in [0, {self.vocab_size - 1}], got {low}..{high}")

    def embeddings(self, ms_idx_Bl: Sequence[Tensor]) -> list[Tensor]:
        """Code embeddings (B, Cv, p_k, p_k) float32 of the indices (B, n_k) of the first scales."""
        self._check_tokens(ms_idx_Bl)
        maps = []
        for idx, (h, w) in zip(ms_idx_Bl, as_sizes(self.v_patch_nums), strict=False):
            maps.append(self.embedding(idx).float().transpose(1, 2).reshape(idx.shape[0], self.Cvae, h, w))
        return maps

    def idxBl_to_var_input(self, gt_ms_idx_Bl: Sequence[Tensor]) -> Tensor | None:
        """Teacher-forcing input (B, L - n_1, Cv) float32 from the indices (B, n_k) of each scale.

        With ``prog_si`` >= 0 only the inputs of scales up to it; None where there are none.
        """
        sizes = as_sizes(self.v_patch_nums)
        produced = len(sizes) - 1 if self.prog_si < 0 else min(self.prog_si, len(sizes) - 1)
        if produced == 0:
            return None
        check_maps("gt_ms_idx_Bl", gt_ms_idx_Bl, "token maps (B, n_k)")
        if len(gt_ms_idx_Bl) < produced:
            raise ValueError(f"the input of scale {produced + 1} needs {produced} token maps, got {len(gt_ms_idx_Bl)}")
        self._check_tokens(gt_ms_idx_Bl[:produced])
        with torch.no_grad(), torch.autocast(gt_ms_idx_Bl[0].device.type, enabled=False):
            indices, phis = torch.cat(list(gt_ms_idx_Bl[:produced]), dim=1), self.phis(len(sizes))
            return ops.teacher_forcing_input(indices, self._codebook(), phis[:produced], sizes)

    def get_next_autoregressive_input(self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Add the embeddings (B, Cv, p_k, p_k) of scale ``si`` of ``SN`` to f_hat, in place.

        Returns f_hat and its area-downsampling to p_{k+1}; at the last scale both are f_hat.
        """
        scales = len(self.v_patch_nums)
        if not (isinstance(si, int) and isinstance(SN, int) and scales == SN and 0 <= si < scales):
            raise ValueError(
                f"si={si!r} of SN={SN!r}: give a scale in [0, {scales - 1}] and the number of all, {scales}"
            )
        for name, h in (("f_hat", f_hat), ("h_BChw", h_BChw)):
            check_map("get_next_autoregressive_input", name, h, self.Cvae, self.embedding.weight.device)
        following: Size | None = as_sizes(self.v_patch_nums)[si + 1] if si != SN - 1 else None
        with torch.autocast(f_hat.device.type, enabled=False):
            phi = phi_of(self.quant_resi[si / (SN - 1)])
            return ops.next_scale_input(f_hat, h_BChw.float(), phi, following)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Hit counts of a tokenizer trained with another number of scales say nothing here: keep ours.
        key = prefix + "ema_vocab_hit_SV"
        if key in state_dict and state_dict[key].shape[:1] != self.ema_vocab_hit_SV.shape[:1]:
            own = self.ema_vocab_hit_SV
            state_dict[key] = torch.zeros(own.shape, device=state_dict[key].device) if own.is_meta else own
        super()._load_from_state_dict(state_dict, prefix, *args)
