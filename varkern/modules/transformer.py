"""`Transformer`: VAR's next-scale prediction (arXiv 2404.02905), with the official names, shapes and results.

It is all of `varkern.VAR` but generation, which the engine adds from above.

Shapes: B batch, L = sum of p_k^2 positions, C width, V codes, Cv code width. ``cond_BD`` is the class embedding.
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from varkern.modules.blocks import AdaLNBeforeHead, AdaLNSelfAttn, SharedAdaLin, check_block
from varkern.modules.plain import compute_dtype, runs_as_built
from varkern.modules.quantizer import VectorQuantizer2
from varkern.modules.schedule import PATCH_NUMS_256, as_patch_nums
from varkern.modules.vqvae import VQVAE
from varkern.ops.attention import BlockCausal
from varkern.ops.attention.peers import check_attention
from varkern.ops.attention.reference import block_causal_mask, cached_block_causal_mask
from varkern.ops.checks import check_floats, check_tensors

T = TypeVar("T")


def _trunc_normal(*shape: int, std: float) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), mean=0.0, std=std)


class Transformer(nn.Module):
    """Visual AutoRegressive transformer over the token maps of ``vae_local``.

    The tokenizer is held beside the module tree: its weights are in neither `state_dict` nor `parameters`.

    Args:
        vae_local: the tokenizer; its code width and vocabulary set this model's.
        num_classes: class ``num_classes`` means "no class" (unconditional).
        depth, embed_dim, num_heads, mlp_ratio: size of the transformer.
        drop_rate, attn_drop_rate, drop_path_rate: dropout after projections, of attention weights, of residual paths
            (growing linearly with depth).
        norm_eps: of the LayerNorms.
        shared_aln: one AdaLN projection for all blocks.
        cond_drop_rate: probability that `forward` replaces a label by "no class".
        attn_l2_norm: L2-normalise q and k, with a learned temperature a head.
        patch_nums: side lengths of the token maps, increasing.
        flash_if_available, fused_if_available: accepted for compatibility; `varkern.use_backend` chooses backends and
            the attribute `attention` what computes attention in training.
    """

    pos_start: nn.Parameter
    pos_1LC: nn.Parameter
    lvl_1L: Tensor

    def __init__(
        self,
        vae_local: VQVAE,
        num_classes: int = 1000,
        depth: int = 16,
        embed_dim: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = False,
        patch_nums: Sequence[int] = PATCH_NUMS_256,
        flash_if_available: bool = True,
        fused_if_available: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is not divisible by num_heads={num_heads}; choose a multiple")
        self.patch_nums = as_patch_nums(patch_nums)
        if self.patch_nums != vae_local.quantize.v_patch_nums:
            raise ValueError(
                f"patch_nums {self.patch_nums} differ from the tokenizer's {vae_local.quantize.v_patch_nums}; "
                "build both with one schedule"
            )
        self.Cvae, self.V = vae_local.Cvae, vae_local.vocab_size
        self.depth, self.C, self.D, self.num_heads = depth, embed_dim, embed_dim, num_heads
        self.num_classes, self.cond_drop_rate = num_classes, cond_drop_rate
        self.drop_path_rate = drop_path_rate
        self.attn_l2_norm, self.shared_aln = attn_l2_norm, shared_aln
        self.using_fused_add_norm_fn = False
        self.prog_si = -1  # progressive training: the last scale that takes part, -1 = all
        self._attention = "varkern"
        ends = [0]
        for p in self.patch_nums:
            ends.append(ends[-1] + p * p)
        self.begin_ends = list(itertools.pairwise(ends))
        self.L, self.first_l = ends[-1], self.patch_nums[0] ** 2
        self.num_stages_minus_1 = len(self.patch_nums) - 1
        self._rng: torch.Generator | None = None
        self._mask: Tensor | None = None  # assigned in place of the block-causal one
        # A tuple hides them from nn.Module's registration.
        self.vae_proxy: tuple[VQVAE] = (vae_local,)
        self.vae_quant_proxy: tuple[VectorQuantizer2] = (vae_local.quantize,)

        std = math.sqrt(1 / embed_dim / 3)
        self.word_embed = nn.Linear(self.Cvae, embed_dim)
        self.class_emb = nn.Embedding(num_classes + 1, embed_dim)
        nn.init.trunc_normal_(self.class_emb.weight, std=std)
        self.pos_start = nn.Parameter(_trunc_normal(1, self.first_l, embed_dim, std=std))
        self.pos_1LC = nn.Parameter(_trunc_normal(1, self.L, embed_dim, std=std))
        self.lvl_embed = nn.Embedding(len(self.patch_nums), embed_dim)
        nn.init.trunc_normal_(self.lvl_embed.weight, std=std)

        self.shared_ada_lin: nn.Module = nn.Identity()
        if shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(embed_dim, 6 * embed_dim))
        drop_paths = torch.linspace(0, drop_path_rate, depth, dtype=torch.float32, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            AdaLNSelfAttn(
                embed_dim=embed_dim,
                cond_dim=embed_dim,
                shared_aln=shared_aln,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path,
                norm_eps=norm_eps,
                attn_l2_norm=attn_l2_norm,
                block_idx=i,
                last_drop_p=drop_paths[i - 1] if i else 0.0,
            )
            for i, drop_path in enumerate(drop_paths)
        )
        scale_of = [k for k, p in enumerate(self.patch_nums) for _ in range(p * p)]
        self.register_buffer("lvl_1L", torch.tensor([scale_of], dtype=torch.int64))
        self.head_nm = AdaLNBeforeHead(embed_dim, embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, self.V)

    def extra_repr(self) -> str:
        return f"depth={self.depth}, width={self.C}, heads={self.num_heads}, patch_nums={self.patch_nums}"

    @property
    def attention(self) -> str:
        """What computes attention in `forward`: "varkern" (the default), or a peer, "sdpa", "flex" or "flash".

        With attention dropout "varkern" leaves the work to "sdpa": its kernels have none. A peer that cannot serve the
        model's tensors raises RuntimeError, saying why.
        """
        return self._attention

    @attention.setter
    def attention(self, name: str) -> None:
        self._attention = check_attention(name)

    @property
    def attn_bias_for_masking(self) -> Tensor:
        """(1, 1, L, L): 0 where a query sees a key, else -inf. Made at each access and in the state dict.

        Attention as built needs none; a block that was replaced, wrapped or hooked is given its part. Another mask may
        be assigned: then `forward` attends with it, densely, and generation, as published, without any.
        """
        if self._mask is not None:
            self._mask = self._mask.to(self.pos_1LC.device)
            return self._mask
        mask = block_causal_mask(self.scale_lengths, self.pos_1LC.dtype, self.pos_1LC.device)
        return mask.view(1, 1, self.L, self.L)

    @attn_bias_for_masking.setter
    def attn_bias_for_masking(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or tuple(mask.shape) != (1, 1, self.L, self.L):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attn_bias_for_masking must be a tensor {(1, 1, self.L, self.L)}, got {got}")
        own = block_causal_mask(self.scale_lengths, torch.float32, mask.device).view(mask.shape)
        self._mask = None if not mask.is_meta and torch.equal(mask.float(), own) else mask

    @property
    def scale_lengths(self) -> tuple[int, ...]:
        """The number of positions of each scale."""
        return tuple(p * p for p in self.patch_nums)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "attn_bias_for_masking"] = self.attn_bias_for_masking

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, strict, missing, unexpected, errors = args
        levels = state_dict.get(prefix + "lvl_1L")
        if levels is not None and levels.device.type != "meta" and levels.shape == self.lvl_1L.shape:
            right = torch.arange(len(self.patch_nums), dtype=torch.int64, device=levels.device).repeat_interleave(
                torch.tensor(self.scale_lengths, dtype=torch.int64, device=levels.device)
            )
            if not torch.equal(levels[0].double(), right.double()):
                errors.append(f"{prefix}lvl_1L does not number the scales of patch_nums {self.patch_nums}")
            state_dict[prefix + "lvl_1L"] = right.view(1, -1)  # integers, though the dict may be cast as a whole
        super()._load_from_state_dict(state_dict, prefix, *args)
        key = prefix + "attn_bias_for_masking"
        mask = state_dict.get(key)
        if mask is None:
            if strict:
                missing.append(key)
            return
        if key in unexpected:
            unexpected.remove(key)
        if mask.shape != (1, 1, self.L, self.L):
            errors.append(f"size mismatch for {key}: {tuple(mask.shape)} where the model has {(1, 1, self.L, self.L)}")
        elif not mask.is_meta and not torch.equal(
            mask.float(), block_causal_mask(self.scale_lengths, torch.float32, mask.device).view(mask.shape)
        ):
            errors.append(
                f"{key} is not the block-causal mask of patch_nums {self.patch_nums}, the only one that serves"
            )

    @property
    def rng(self) -> torch.Generator:
        """A generator on the model's device, for code that draws by it; it may be replaced. `generate` has its own."""
        device = self.lvl_1L.device
        if self._rng is None or self._rng.device != device:
            self._rng = torch.Generator(device=device)
        return self._rng

    @rng.setter
    def rng(self, generator: torch.Generator) -> None:
        self._rng = generator

    @rng.deleter
    def rng(self) -> None:
        self._rng = None

    @property
    def uniform_prob(self) -> Tensor:
        """(1, num_classes) float32: from what classes are drawn where none are given."""
        shape = 1, self.num_classes
        return torch.full(shape, 1.0 / self.num_classes, dtype=torch.float32, device=self.lvl_1L.device)

    def get_logits(self, h: Tensor, cond_BD: Tensor) -> Tensor:
        """Hidden states (B, n, C), condition (B, C) -> logits (B, n, V) float32."""
        check_block("get_logits", h, cond_BD, self.C)
        return self.head(self.head_nm(h.float(), cond_BD).to(compute_dtype(self.head))).float()

    def forward(self, label_B: Tensor, x_BLCv_wo_first_l: Tensor) -> Tensor:
        """Teacher forcing: labels (B,) and the inputs of scales 2..K (B, L - n_1, Cv) -> logits (B, L, V) float32.

        Each label becomes "no class" with probability ``cond_drop_rate``, drawn from the global generator also in
        eval mode. With ``prog_si`` >= 0 only the positions up to the end of that scale run.
        """
        end = self.L if self.prog_si < 0 else self.begin_ends[self.prog_si][1]
        self._check_forward(label_B, x_BLCv_wo_first_l, end - self.first_l)
        B = label_B.shape[0]
        with torch.autocast(label_B.device.type, enabled=False):
            dropped = torch.rand(B, dtype=torch.float32, device=label_B.device) < self.cond_drop_rate
            label_B = torch.where(dropped, self.num_classes, label_B)
            cond_BD = self.class_emb(label_B)
            x_BLC = cond_BD.unsqueeze(1).expand(B, self.first_l, -1) + self.pos_start.expand(B, self.first_l, -1)
            if self.prog_si != 0:
                words = self.word_embed(x_BLCv_wo_first_l.to(compute_dtype(self.word_embed)))
                x_BLC = torch.cat((x_BLC, words), dim=1)
            else:  # every parameter must get a gradient, or data-parallel training waits for it
                unused = [p.sum() for p in self.word_embed.parameters() if p.requires_grad]
                x_BLC = x_BLC + 0 * sum(unused)
            x_BLC = x_BLC + (self.lvl_embed(self.lvl_1L[:, :end].expand(B, -1)) + self.pos_1LC[:, :end])
        cond_BD_or_gss = self.shared_ada_lin(cond_BD)
        # Under autocast the blocks run in its type from the first residual on.
        if torch.is_autocast_enabled(x_BLC.device.type):
            dtype = torch.get_autocast_dtype(x_BLC.device.type)
        else:
            dtype = x_BLC.dtype
        x_BLC, cond_BD_or_gss = x_BLC.to(dtype), cond_BD_or_gss.to(dtype)
        scales = len(self.patch_nums) if self.prog_si < 0 else self.prog_si + 1
        visible = BlockCausal(self.scale_lengths[:scales], self.attention)
        dense: Tensor | None = None
        for block in self.blocks:
            if self._mask is None and runs_as_built(block) and runs_as_built(cast(nn.Module, block.attn)):
                x_BLC = block(x=x_BLC, cond_BD=cond_BD_or_gss, attn_bias=visible)
            else:  # somebody's, who expects the published argument
                dense = self._dense_mask(end, dtype, x_BLC.device) if dense is None else dense
                x_BLC = block(x=x_BLC, cond_BD=cond_BD_or_gss, attn_bias=dense)
        return self.get_logits(x_BLC, cond_BD)

    def _dense_mask(self, end: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(1, 1, end, end)."""
        if self._mask is not None:
            return self.attn_bias_for_masking[:, :, :end, :end].to(dtype)
        return cached_block_causal_mask(self.scale_lengths, dtype, device)[None, None, :end, :end]

    def _check_forward(self, labels: Tensor, x: Tensor, inputs: int) -> None:
        check_tensors("VAR.forward", ("label_B",), (labels,))
        if labels.ndim != 1 or labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"label_B must be (B,) integers, got {tuple(labels.shape)} {labels.dtype}")
        # Reading values would wait for an accelerator, and break a graph that is being compiled.
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high > self.num_classes:
                raise ValueError(
                    f"labels must be in [0, {self.num_classes}], {self.num_classes} = no class; got {low}..{high}"
                )
        if self.prog_si == 0:
            return
        check_floats("VAR.forward", ("x_BLCv_wo_first_l",), (x,))
        want = (labels.shape[0], inputs, self.Cvae)
        if tuple(x.shape) != want:
            raise ValueError(f"x_BLCv_wo_first_l must be {want} for {labels.shape[0]} labels, got {tuple(x.shape)}")
        if not labels.device == x.device == self.pos_start.device:
            raise ValueError(
                f"labels on {labels.device}, inputs on {x.device}, model on {self.pos_start.device}; move them together"
            )

    def run_gathered(self, call: Callable[[], T]) -> T:
        """``call()``, for a model that `fully_shard` has sharded: as a whole, or in its blocks.

        The model's own parameters are gathered as in a forward pass; blocks, which are called, gather theirs.
        """
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")
        sharded = [] if fsdp is None else [module for module in self.modules() if isinstance(module, fsdp.FSDPModule)]
        if not sharded:
            return call()
        if "_run" not in vars(self):
            fsdp.register_fsdp_forward_method(self, "_run")
        try:
            return self._run(call)
        finally:  # a forward pass leaves that to the backward pass, and until then `parameters` gives copies
            for module in sharded:
                module.reshard()

    def _run(self, call: Callable[[], T]) -> T:
        return call()

    @torch.no_grad()
    def init_weights(
        self,
        init_adaln: float = 0.5,
        init_adaln_gamma: float = 1e-5,
        init_head: float = 0.02,
        init_std: float = 0.02,
        conv_std_or_gain: float = 0.02,
    ) -> None:
        """Initialise for training: truncated normals of ``init_std`` (negative: sqrt(1 / C / 3)), biases zero.

        ``init_head`` multiplies the head, ``init_adaln`` the AdaLN projections, ``init_adaln_gamma`` their gates;
        residual projections are divided by sqrt(2 * depth). ``conv_std_or_gain`` is accepted for compatibility: the
        transformer has no convolution.
        """
        if init_std < 0:
            init_std = math.sqrt(1 / self.C / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        if init_head >= 0:
            self.head.weight.mul_(init_head)
        cast(nn.Linear, self.head_nm.ada_lin[-1]).weight.mul_(init_adaln)
        for block in cast("list[AdaLNSelfAttn]", list(self.blocks)):
            block.attn.proj.weight.div_(math.sqrt(2 * self.depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * self.depth))
            if block.shared_aln:
                block.ada_gss[:, :, 2:].mul_(init_adaln)
                block.ada_gss[:, :, :2].mul_(init_adaln_gamma)
            else:
                weight = cast(Tensor, block.ada_lin[-1].weight)
                weight[2 * self.C :].mul_(init_adaln)
                weight[: 2 * self.C].mul_(init_adaln_gamma)
