"""`VectorQuantizer2`: the tokenizer's multi-scale residual quantizer, with the official names and results."""

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from varkern.modules.plain import compute_dtype, fusable, is_plain, is_plain_conv
from varkern.modules.schedule import as_patch_nums, as_sizes, nearest_tick, phi_ticks
from varkern.ops import quantize as ops
from varkern.ops.checks import check_floats
from varkern.ops.quantize import Size


def device_of(module: nn.Module) -> torch.device | None:
    """Where the input of a plain layer must be; another module has to say itself what it takes: None."""
    weight = getattr(module, "weight", None)
    return weight.device if isinstance(weight, Tensor) and is_plain(module) else None


def check_map(op: str, name: str, h: Tensor, channels: int | None, device: torch.device | None) -> None:
    """Raises TypeError for what is no tensor, ValueError for a map that is not (B, channels, H, W) on the device."""
    check_floats(op, (name,), (h,))
    if channels is not None and (h.ndim != 4 or h.shape[1] != channels or 0 in h.shape[2:]):
        raise ValueError(f"{op}: {name} must be (B, {channels}, H, W), got {tuple(h.shape)}")
    if device is not None and h.device != device:
        raise ValueError(f"{op}: {name} are on {h.device} but the tokenizer is on {device}; move one of them")


def check_maps(name: str, maps: Sequence[Tensor], meaning: str) -> None:
    """Raises TypeError for what is no sequence of dense tensors, ValueError for none."""
    if not isinstance(maps, Sequence) or not all(isinstance(m, Tensor) and m.layout is torch.strided for m in maps):
        kinds = [type(m).__name__ for m in maps] if isinstance(maps, Sequence) else type(maps).__name__
        raise TypeError(f"{name} must be a sequence of {meaning}, dense tensors, got {kinds}")
    if not maps:
        raise ValueError(f"{name} is empty, give {meaning} of each scale")


@fusable
class PhiConv(nn.Conv2d):
    """phi(h) = (1 - r) * h + r * conv3x3(h), computed in float32."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.resi_ratio = abs(ratio)

    def forward(self, h: Tensor) -> Tensor:
        wide, bias = h.float(), None if self.bias is None else self.bias.float()
        conv = self._conv_forward(wide, self.weight.float(), bias)
        return (wide.mul(1 - self.resi_ratio) + conv.mul_(self.resi_ratio)).to(h.dtype)


def _phi_of(module: nn.Module) -> ops.Phi | None:
    """What the ops need of a residual convolution, in float32; None where it must be called instead."""
    if isinstance(module, nn.Identity) and is_plain(module):
        return ops.Phi(None, None, 0.0)
    if not isinstance(module, PhiConv) or not is_plain_conv(module, 3):
        return None
    assert module.bias is not None
    return ops.Phi(module.weight.float(), module.bias.float(), module.resi_ratio)


def _called(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A residual mapping as a function from float32 to float32."""

    def phi(h: Tensor) -> Tensor:
        dtype = h.dtype if isinstance(module, PhiConv) else compute_dtype(module, h.dtype)
        return module(h.to(dtype)).float()

    return phi


def _for_ops(phis: Sequence[ops.AnyPhi]) -> TypeGuard[Sequence[ops.Phi]]:
    return all(isinstance(phi, ops.Phi) for phi in phis)


def _is_plain_embedding(module: nn.Module) -> bool:
    """Whether its codes, and their gradient, are those of its weight's rows."""
    if not (isinstance(module, nn.Embedding) and is_plain(module)):
        return False
    return module.padding_idx is None and module.max_norm is None and not (module.scale_grad_by_freq or module.sparse)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    # Autocast knows no meta tensors.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer, torch.SymInt))


def _own(parts: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies, each of its own memory: one that is kept keeps no other."""
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _new_phi(channels: int, ratio: float) -> nn.Module:
    return PhiConv(channels, ratio) if abs(ratio) > 1e-6 else nn.Identity()


# The banks differ in their state-dict keys alone. Indexing one by k / (K - 1) gives the convolution of scale k.
class PhiShared(nn.Module):
    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.qresi = _new_phi(channels, ratio)

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi


class _Ticks:
    """The positions of several convolutions."""

    _ticks: tuple[float, ...]

    @property
    def ticks(self) -> np.ndarray:
        """(n,) float64."""
        return np.array(self._ticks, dtype=np.float64)


class PhiPartiallyShared(_Ticks, nn.Module):
    def __init__(self, channels: int, ratio: float, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(_new_phi(channels, ratio) for _ in range(count))
        self._ticks = phi_ticks(count)

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi_ls[nearest_tick(position, self._ticks)]


class PhiNonShared(_Ticks, nn.ModuleList):
    def __init__(self, channels: int, ratio: float, count: int) -> None:
        super().__init__(_new_phi(channels, ratio) for _ in range(count))
        self._ticks = phi_ticks(count)

    def __getitem__(self, position: float) -> nn.Module:  # type: ignore[override]
        return super().__getitem__(nearest_tick(position, self._ticks))


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
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.v_patch_nums), vocab_size, dtype=torch.float32))
        self.record_hit = 0
        self.embedding = nn.Embedding(vocab_size, Cvae)
        self.prog_si = -1  # progressive training: the last scale that takes part, -1 = all

    def extra_repr(self) -> str:
        return f"{self.v_patch_nums}, znorm={self.using_znorm}, beta={self.beta}, quant_resi={self.quant_resi_ratio}"

    def eini(self, eini: float) -> None:
        """Initialise the codes: from a normal distribution of this standard deviation, cut at 2 in absolute value;
        below zero uniformly in ``+-|eini| / V``; at zero leave them."""
        if eini > 0:
            nn.init.trunc_normal_(self.embedding.weight.data, std=eini)
        elif eini < 0:
            bound = -eini / self.vocab_size
            self.embedding.weight.data.uniform_(-bound, bound)

    def phis(self, num_scales: int) -> Sequence[ops.AnyPhi]:
        """phi of each of ``num_scales`` scales: what the ops take, or where one must be called a function for each."""
        modules = [self.quant_resi[k / (num_scales - 1)] for k in range(num_scales)]
        phis: list[ops.Phi] = []
        for k, module in enumerate(modules):
            shared = k > 0 and module is modules[k - 1]
            phi = phis[-1] if shared else _phi_of(module)
            # The ops have one ratio, and no identity among convolutions.
            if phi is None or (phis and (phi.ratio, phi.weight is None) != (phis[0].ratio, phis[0].weight is None)):
                return [_called(module) for module in modules]
            phis.append(phi)
        return phis

    def _codebook(self) -> Tensor:
        return self.embedding.weight.float()

    def _embed(self, indices: Tensor) -> Tensor:
        return self.embedding(indices).float()

    def _running(self, num_scales: int) -> int:
        return num_scales if self.prog_si < 0 else min(self.prog_si + 1, num_scales)

    def forward(self, f_BChw: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        """Training: features (B, Cv, H, W) -> straight-through f_hat, codebook usage in % a scale, scalar loss.

        While training under torch.distributed the hit counts are summed over processes into `ema_vocab_hit_SV`;
        the usages count codes whose average there reaches 8 % of an even share.
        """
        check_map("VectorQuantizer2", "features", f_BChw, self.Cvae, device_of(self.embedding))
        with _without_autocast(f_BChw):
            sizes = as_sizes(self.v_patch_nums)
            f_BChw, codebook, phis = f_BChw.float(), self._codebook(), self.phis(len(sizes))
            if _for_ops(phis) and _is_plain_embedding(self.embedding):
                f_hat, loss, indices = ops.residual_quantize_train(
                    f_BChw, codebook, phis, sizes, self.beta, self.using_znorm
                )
            else:
                f_hat, loss, indices = ops.residual_quantize_train_reference(
                    f_BChw, codebook, phis, sizes, self.beta, self.using_znorm, self._embed
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

        With ``all_to_max_scale=False`` the k-th f_hat has size p_k instead of p_K. Embeddings (B, Cv, h_k, w_k) of
        other maps than the schedule's are taken as they are: the last of them has the full size.
        """
        check_maps("ms_h_BChw", ms_h_BChw, "embeddings (B, Cv, p_k, p_k)")
        if len(ms_h_BChw) != len(self.v_patch_nums):
            raise ValueError(
                f"expected embeddings of {len(self.v_patch_nums)} scales {self.v_patch_nums}, got {len(ms_h_BChw)}"
            )
        for h in ms_h_BChw:
            check_map("embed_to_fhat", "embeddings", h, self.Cvae, device_of(self.embedding))
            if h.shape[0] != ms_h_BChw[0].shape[0]:
                raise ValueError(f"embeddings must have one batch size, got {[h.shape[0] for h in ms_h_BChw]}")
        with _without_autocast(ms_h_BChw[0]):
            phis, maps = self.phis(len(self.v_patch_nums)), [h.float() for h in ms_h_BChw]
            full = (maps[-1].shape[2], maps[-1].shape[3])
            if not all_to_max_scale:
                f_hats = ops.growing_dequantize_reference(maps, phis)
            elif _for_ops(phis):
                indices, vectors, sizes = ops.maps_as_codes(maps)
                f_hats = ops.residual_dequantize(indices, vectors, phis, sizes, full)
                f_hats = _own(f_hats[-1:] if last_one else f_hats)
            else:
                f_hats = ops.residual_dequantize_reference(maps, phis, full)
        return f_hats[-1] if last_one else f_hats

    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[int | Sequence[int]] | None = None
    ) -> list[Tensor]:
        """Encode features (B, Cv, H, W): the indices (B, n_k), or with ``to_fhat`` f_hat, of each scale.

        ``v_patch_nums`` may hold ints or (h, w) pairs; its last entry must be (H, W), else ValueError.
        """
        sizes = as_sizes(self.v_patch_nums if v_patch_nums is None else v_patch_nums)
        check_map("f_to_idxBl_or_fhat", "features", f_BChw, None, device_of(self.embedding))
        if f_BChw.ndim != 4 or f_BChw.shape[1] != self.Cvae or (f_BChw.shape[2], f_BChw.shape[3]) != sizes[-1]:
            raise ValueError(
                f"features must be (B, {self.Cvae}, {sizes[-1][0]}, {sizes[-1][1]}) for this schedule, got "
                f"{tuple(f_BChw.shape)}; pass v_patch_nums ending in the feature size"
            )
        run = self._running(len(sizes))
        with torch.no_grad(), _without_autocast(f_BChw):
            phis, codebook = self.phis(len(sizes))[:run], self._codebook()
            if _for_ops(phis) and _is_plain_embedding(self.embedding):
                indices, f_hats = ops.residual_quantize(
                    f_BChw, codebook, phis, sizes[:run], self.using_znorm, all_f_hats=to_fhat
                )
                return _own(f_hats if to_fhat else indices)
            indices, f_hats = ops.residual_quantize_reference(
                f_BChw.float(), codebook, phis, sizes[:run], self.using_znorm, to_fhat, self._embed
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
        device, batch = device_of(self.embedding) or ms_idx_Bl[0].device, ms_idx_Bl[0].shape[:1]
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
            maps.append(self._embed(idx).transpose(1, 2).reshape(idx.shape[0], self.Cvae, h, w))
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
        given = list(gt_ms_idx_Bl[:produced])
        self._check_tokens(given)
        with torch.no_grad(), _without_autocast(given[0]):
            phis = self.phis(len(sizes))[:produced]
            if not _for_ops(phis):
                return ops.teacher_forcing_input_reference(self.embeddings(given), phis, sizes)
            if _is_plain_embedding(self.embedding):
                indices, codebook = torch.cat(given, dim=1).long(), self._codebook()
            else:
                indices, codebook, _ = ops.maps_as_codes(self.embeddings(given))
            return ops.teacher_forcing_input(indices, codebook, phis, sizes)

    def get_next_autoregressive_input(self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Add the embeddings (B, Cv, p_k, p_k) of scale ``si`` of ``SN`` to f_hat, in place.

        Returns f_hat and its area-downsampling to p_{k+1}, both of f_hat's dtype; at the last scale both are f_hat.
        What is added is computed in float32.
        """
        scales = len(self.v_patch_nums)
        if not (_is_integer(si) and _is_integer(SN) and scales == SN and 0 <= si < scales):
            raise ValueError(
                f"si={si!r} of SN={SN!r}: give a scale in [0, {scales - 1}] and the number of all, {scales}"
            )
        for name, h in (("f_hat", f_hat), ("h_BChw", h_BChw)):
            check_map("get_next_autoregressive_input", name, h, self.Cvae, device_of(self.embedding))
        if h_BChw.shape[0] != f_hat.shape[0] or h_BChw.device != f_hat.device:
            raise ValueError(
                f"f_hat and h_BChw must have one batch size and device, got {f_hat.shape[0]} on {f_hat.device} and "
                f"{h_BChw.shape[0]} on {h_BChw.device}"
            )
        si = operator.index(si)
        following: Size | None = as_sizes(self.v_patch_nums)[si + 1] if si != scales - 1 else None
        with _without_autocast(f_hat):
            module = self.quant_resi[si / (scales - 1)]
            phi = _phi_of(module)
            if phi is not None and f_hat.dtype == torch.float32:
                return ops.next_scale_input(f_hat, h_BChw.float(), phi, following)
            return ops.next_scale_input_reference(f_hat, h_BChw.float(), phi or _called(module), following)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Hit counts of a tokenizer trained with another number of scales say nothing here: keep ours.
        key = prefix + "ema_vocab_hit_SV"
        if key in state_dict and state_dict[key].shape[:1] != self.ema_vocab_hit_SV.shape[:1]:
            own = self.ema_vocab_hit_SV
            device = state_dict[key].device
            state_dict[key] = torch.zeros(own.shape, dtype=own.dtype, device=device) if own.is_meta else own
        super()._load_from_state_dict(state_dict, prefix, *args)
