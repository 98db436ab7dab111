"""The transformer's block: attention and feed-forward around adaptive layer norms.

Linear layers are always called, so that they may be anything (wrapped, adapted, quantized, hooked). What stands in for
other modules asks `varkern.modules.plain` first.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkern.modules.plain import fusable, is_plain, is_plain_norm
from varkern.ops import reference_forced
from varkern.ops.attention import BlockCausal, block_causal_attention_qkv
from varkern.ops.attention.cached import cached_attention
from varkern.ops.attention.peers import peer_attention
from varkern.ops.attention.reference import MAX_LOG_TEMPERATURE, attention_reference, normalize_qk_reference
from varkern.ops.checks import check_floats
from varkern.ops.norm import modulated_layer_norm


def check_block(op: str, x: Tensor, cond_BD: Tensor, C: int) -> None:
    """Raises TypeError or ValueError unless x is (B, n, C) and the condition has B rows, or one, of C."""
    check_floats(op, ("x" if op != "get_logits" else "h", "cond_BD"), (x, cond_BD))
    rows = cond_BD.shape[0] if cond_BD.dim() >= 2 else 0
    if x.dim() != 3 or x.shape[2] != C or rows not in (1, x.shape[0]) or cond_BD.shape[-1] != C:
        raise ValueError(
            f"{op}: the input has shape {tuple(x.shape)} and cond_BD {tuple(cond_BD.shape)}, give (B, n, {C}) and a "
            f"condition of B rows of {C}, or of one"
        )


def modulated_norm(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift for x (B, n, C) and scale, shift (B or 1, 1, C), by the op where it may."""
    if isinstance(norm, nn.LayerNorm) and is_plain_norm(norm, x.shape[-1]):
        rows = x.shape[0], 1, x.shape[2]
        return modulated_layer_norm(x, scale.expand(rows), shift.expand(rows), norm.eps)
    return norm(x).mul(scale.add(1)).add(shift)


@fusable
class DropPath(nn.Module):
    """Drops a sample's residual path with probability ``drop_prob`` while training (arXiv 1603.09382)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


@fusable
class FFN(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    fused_mlp_func = None  # which public code asks for

    def __init__(self, in_features: int, hidden_features: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop = nn.Dropout(drop) if drop > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class KVCache:
    """Keys and values of one block during one generation of ``length`` positions; a step appends its own.

    The memory is taken at the first step, when batch and dtype are known (under autocast they are not the weights'). It
    has no place for the last ``last`` positions, which only their own step sees: that step gets memory of its own, with
    a copy of what was kept, and gives up the cache. Of a generation's keys at 256 px this saves 38 %.
    """

    def __init__(self, length: int, last: int) -> None:
        self.kept, self.position = length - last, 0
        self.tensor: Tensor | None = None  # (2, B, H, kept, D)
        self._wide: tuple[Tensor | None, ...] | None = None

    def wide(self, prologue: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Biases and temperatures in the type that attention on dtype computes in, converted once, not at each step."""
        if self._wide is None:
            real = torch.float64 if dtype == torch.float64 else torch.float32
            self._wide = tuple(None if tensor is None else tensor.detach().to(real) for tensor in prologue)
        return self._wide

    def append(self, qkv: Tensor) -> tuple[Tensor, int]:
        """The tensor and the position at which the n new tokens of qkv (B, n, 3, H, D) go; moves on past them."""
        B, n, _, H, D = qkv.shape
        begin, self.position = self.position, self.position + n
        if self.position > self.kept:
            whole = qkv.new_empty((2, B, H, self.position, D))
            if self.tensor is not None:
                whole[:, :, :, :begin] = self.tensor[:, :, :, :begin]
                self.tensor = None
            return whole, begin
        if self.tensor is None:
            self.tensor = qkv.new_empty((2, B, H, self.kept, D))
        return self.tensor, begin


@fusable
class SelfAttention(nn.Module):
    """Multi-head self-attention; while `kv_caching` is on, each call appends its keys and values to a cache."""

    zero_k_bias: Tensor
    using_flash = using_xform = False  # which public code asks for; `varkern.use_backend` chooses here

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attn_drop: float,
        proj_drop: float,
        attn_l2_norm: bool,
        block_idx: int = 0,
    ) -> None:
        super().__init__()
        self.block_idx = block_idx
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.attn_l2_norm = attn_l2_norm
        self.scale = 1.0 if attn_l2_norm else 0.25 / self.head_dim**0.5
        if attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
            self.max_scale_mul = MAX_LOG_TEMPERATURE
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(embed_dim))
        self.v_bias = nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0 else nn.Identity()
        self.attn_drop = attn_drop
        self.caching = False
        self.cached_k: Tensor | None = None  # (B, H, N, D)
        self.cached_v: Tensor | None = None

    def kv_caching(self, enable: bool) -> None:
        """Start an empty cache, or drop it."""
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x: Tensor, attn_bias: Tensor | BlockCausal | None) -> Tensor:
        """x (B, n, C) -> (B, n, C); attn_bias: what is added to the scores, (1, 1, n, N), or who sees whom, or None."""
        if isinstance(attn_bias, BlockCausal):
            return self._projected(self._block_causal(x, attn_bias))
        q, k, v = self._split(x)
        if self.caching:
            if self.cached_k is not None and self.cached_v is not None:
                k, v = torch.cat((self.cached_k, k), dim=2), torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
        out = attention_reference(q, k, v, attn_bias, self.scale, self.dropout)
        return self._projected(out.transpose(1, 2))

    def cached(self, x: Tensor, cache: KVCache) -> Tensor:
        """The engine's form, for inference: the n positions see themselves and all in the cache, to which they go."""
        qkv = self._qkv(x)
        q_bias, v_bias, log_scale = cache.wide(self._prologue, qkv.dtype)
        return self._projected(cached_attention(qkv, *cache.append(qkv), q_bias, v_bias, log_scale, self.scale))

    @property
    def dropout(self) -> float:
        """Of the attention weights, as the module is now."""
        return self.attn_drop if self.training else 0.0

    @property
    def _prologue(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.q_bias, self.v_bias, self.scale_mul_1H11 if self.attn_l2_norm else None

    def _projected(self, out: Tensor) -> Tensor:
        """(B, n, H, D) -> (B, n, C)."""
        return self.proj_drop(self.proj(out.flatten(2)))

    def _qkv(self, x: Tensor) -> Tensor:
        """The projection (B, n, 3, H, D) without its biases."""
        return self.mat_qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, n, D), normalised where the model does."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        if is_plain(self.mat_qkv):  # as published: the bias within the product
            qkv = F.linear(x, self.mat_qkv.weight, bias).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        else:
            qkv = self._qkv(x)
            qkv = qkv + bias.to(qkv.dtype).view(qkv.shape[2:])
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.attn_l2_norm:
            q, k = normalize_qk_reference(q, k, self.scale_mul_1H11)
        return q, k, v

    def _block_causal(self, x: Tensor, visible: BlockCausal) -> Tensor:
        """x (B, L, C) -> (B, L, H, D)."""
        if self.caching:
            raise RuntimeError("A block attends over its cache without a mask: call kv_caching(False), or pass None.")
        # The kernels have no dropout of the attention weights: a model that trains with it takes the masked SDPA.
        plain = reference_forced() or (self.dropout > 0 and visible.attention == "varkern")
        if plain or visible.attention != "varkern":
            q, k, v = self._split(x)
            name = "sdpa" if plain else visible.attention
            q, k = q.to(v.dtype), k.to(v.dtype)
            return peer_attention(name, q, k, v, visible.lengths, self.scale, self.dropout).transpose(1, 2)
        return block_causal_attention_qkv(self._qkv(x), *self._prologue, visible.lengths, self.scale)


@fusable
class SharedAdaLin(nn.Linear):
    """The AdaLN projection shared by all blocks: (B, D) -> (B, 1, 6, C)."""

    def forward(self, cond_BD: Tensor) -> Tensor:
        return super().forward(cond_BD).view(-1, 1, 6, self.weight.shape[0] // 6)


@fusable
class AdaLNSelfAttn(nn.Module):
    """A transformer block whose condition scales, shifts and gates it (AdaLN, arXiv 2212.09748)."""

    fused_add_norm_fn = None  # which public code asks for

    def __init__(
        self,
        embed_dim: int,
        cond_dim: int,
        shared_aln: bool,
        num_heads: int,
        mlp_ratio: float,
        drop: float,
        attn_drop: float,
        drop_path: float,
        norm_eps: float,
        attn_l2_norm: bool,
        block_idx: int = 0,
        last_drop_p: float = 0.0,
    ) -> None:
        super().__init__()
        self.block_idx, self.last_drop_p = block_idx, last_drop_p  # the drop path of the block before
        self.C, self.D, self.norm_eps, self.shared_aln = embed_dim, cond_dim, norm_eps, shared_aln
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.attn = SelfAttention(embed_dim, num_heads, attn_drop, drop, attn_l2_norm, block_idx)
        self.ffn = FFN(embed_dim, round(embed_dim * mlp_ratio), drop)
        self.ln_wo_grad = nn.LayerNorm(embed_dim, eps=norm_eps, elementwise_affine=False)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, embed_dim) / embed_dim**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 6 * embed_dim))

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | BlockCausal | None) -> Tensor:
        """x (B, n, C); cond_BD (B, D), or with shared AdaLN the shared projection (B, 1, 6, C) -> (B, n, C)."""
        check_block("AdaLNSelfAttn", x, cond_BD, self.C)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation(cond_BD).unbind(2)
        h = self.attn(modulated_norm(self.ln_wo_grad, x, scale1, shift1), attn_bias=attn_bias)
        x = x + self.drop_path(h.mul_(gamma1))
        h = self.ffn(modulated_norm(self.ln_wo_grad, x, scale2, shift2))
        return x + self.drop_path(h.mul(gamma2))

    def modulation(self, cond_BD: Tensor) -> Tensor:
        """What the condition does to the block: gates, scales and shifts (B, 1, 6, C)."""
        if self.shared_aln:
            return self.ada_gss + cond_BD
        return self.ada_lin(cond_BD).view(-1, 1, 6, self.C)


@fusable
class AdaLNBeforeHead(nn.Module):
    """The modulated layer norm before the head."""

    def __init__(self, embed_dim: int, cond_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.C, self.D, self.norm_eps = embed_dim, cond_dim, norm_eps
        self.ln_wo_grad = nn.LayerNorm(embed_dim, eps=norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * embed_dim))

    def forward(self, x_BLC: Tensor, cond_BD: Tensor) -> Tensor:
        return self.modulated(x_BLC, self.modulation(cond_BD))

    def modulation(self, cond_BD: Tensor) -> Tensor:
        """Scale and shift (B, 1, 2, C)."""
        return self.ada_lin(cond_BD).view(-1, 1, 2, self.C)

    def modulated(self, x_BLC: Tensor, modulation: Tensor) -> Tensor:
        """`forward` with the modulation (B, 1, 2, C) computed before: it is the same for all scales of an image."""
        scale, shift = modulation.unbind(2)
        return modulated_norm(self.ln_wo_grad, x_BLC, scale, shift)
