"""The transformer's block: attention and feed-forward around adaptive layer norms."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkern.ops import reference_forced
from varkern.ops._library import check_floats
from varkern.ops.attention import BlockCausal, block_causal_attention_qkv
from varkern.ops.attention_peers import peer_attention
from varkern.ops.attention_reference import attention_reference, normalize_qk_reference
from varkern.ops.decode import cached_attention
from varkern.ops.norm import modulated_layer_norm


def check_block(op: str, x: Tensor, cond_BD: Tensor, C: int) -> None:
    """Raises TypeError or ValueError unless x is (B, n, C) and the condition has its batch and a last axis of C."""
    check_floats(op, ("x" if op != "get_logits" else "h", "cond_BD"), (x, cond_BD))
    if x.dim() != 3 or x.shape[2] != C or cond_BD.dim() < 2 or cond_BD.shape[0] != x.shape[0] or cond_BD.shape[-1] != C:
        raise ValueError(
            f"{op}: the input has shape {tuple(x.shape)} and cond_BD {tuple(cond_BD.shape)}, give (B, n, {C}) and a "
            f"condition of B rows of {C}"
        )


class DropPath(nn.Module):
    """Drops a sample's residual path with probability ``drop_prob`` while training (arXiv 1603.09382)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class FFN(nn.Module):
    """Linear, GELU (tanh form), Linear."""

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


class SelfAttention(nn.Module):
    """Multi-head self-attention; while `kv_caching` is on, each call appends its keys and values to a cache."""

    zero_k_bias: Tensor

    def __init__(self, embed_dim: int, num_heads: int, attn_drop: float, proj_drop: float, attn_l2_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.attn_l2_norm = attn_l2_norm
        self.scale = 1.0 if attn_l2_norm else 0.25 / self.head_dim**0.5
        if attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
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

    def forward(self, x: Tensor, attn_bias: Tensor | BlockCausal | KVCache | None) -> Tensor:
        """x (B, n, C) -> (B, n, C); attn_bias: what is added to the scores, (1, 1, n, N), or who sees whom, or None.

        With a `KVCache` the n positions see themselves and all that are in the cache, where they are appended.
        """
        B, n, C = x.shape
        if isinstance(attn_bias, BlockCausal):
            out = self._block_causal(x, attn_bias)
        elif isinstance(attn_bias, KVCache):
            qkv = F.linear(x, self.mat_qkv.weight).view(B, n, 3, self.num_heads, self.head_dim)
            q_bias, v_bias, log_scale = attn_bias.wide(self._prologue, qkv.dtype)
            out = cached_attention(qkv, *attn_bias.append(qkv), q_bias, v_bias, log_scale, self.scale)
        else:
            q, k, v = self._split(x)
            if self.caching:
                if self.cached_k is not None and self.cached_v is not None:
                    k, v = torch.cat((self.cached_k, k), dim=2), torch.cat((self.cached_v, v), dim=2)
                self.cached_k, self.cached_v = k, v
            out = attention_reference(q, k, v, attn_bias, self.scale, self._dropout).transpose(1, 2)
        return self.proj_drop(self.proj(out.reshape(B, n, C)))

    @property
    def _prologue(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.q_bias, self.v_bias, self.scale_mul_1H11 if self.attn_l2_norm else None

    @property
    def _dropout(self) -> float:
        return self.attn_drop if self.training else 0.0

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, n, D), normalised where the model does."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.attn_l2_norm:
            q, k = normalize_qk_reference(q, k, self.scale_mul_1H11)
        return q, k, v

    def _block_causal(self, x: Tensor, visible: BlockCausal) -> Tensor:
        """x (B, L, C) -> (B, L, H, D)."""
        if self.caching:
            raise RuntimeError("A block attends over its cache without a mask: call kv_caching(False), or pass None.")
        # The kernels have no dropout of the attention weights: a model that trains with it takes the masked SDPA.
        plain = reference_forced() or (self._dropout > 0 and visible.attention == "varkern")
        if plain or visible.attention != "varkern":
            q, k, v = self._split(x)
            name = "sdpa" if plain else visible.attention
            q, k = q.to(v.dtype), k.to(v.dtype)
            return peer_attention(name, q, k, v, visible.lengths, self.scale, self._dropout).transpose(1, 2)
        qkv = F.linear(x, self.mat_qkv.weight).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        return block_causal_attention_qkv(qkv, *self._prologue, visible.lengths, self.scale)


class SharedAdaLin(nn.Linear):
    """The AdaLN projection shared by all blocks: (B, D) -> (B, 1, 6, C)."""

    def forward(self, cond_BD: Tensor) -> Tensor:
        return super().forward(cond_BD).view(-1, 1, 6, self.weight.shape[0] // 6)


class AdaLNSelfAttn(nn.Module):
    """A transformer block whose condition scales, shifts and gates it (AdaLN, arXiv 2212.09748)."""

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
    ) -> None:
        super().__init__()
        self.C, self.norm_eps, self.shared_aln = embed_dim, norm_eps, shared_aln
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.attn = SelfAttention(embed_dim, num_heads, attn_drop, drop, attn_l2_norm)
        self.ffn = FFN(embed_dim, round(embed_dim * mlp_ratio), drop)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, embed_dim) / embed_dim**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 6 * embed_dim))

    @property
    def projection(self) -> nn.Linear:
        return cast(nn.Linear, self.ada_lin[-1])

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | BlockCausal | None) -> Tensor:
        """x (B, n, C); cond_BD (B, D), or with shared AdaLN the shared projection (B, 1, 6, C) -> (B, n, C)."""
        check_block("AdaLNSelfAttn", x, cond_BD, self.C)
        return self.modulated(x, self.modulation(cond_BD), attn_bias)

    def modulation(self, cond_BD: Tensor) -> Tensor:
        """What the condition does to the block: gates, scales and shifts (B, 1, 6, C)."""
        if self.shared_aln:
            return self.ada_gss + cond_BD
        return self.ada_lin(cond_BD).view(-1, 1, 6, self.C)

    def modulated(self, x: Tensor, modulation: Tensor, attn_bias: Tensor | BlockCausal | KVCache | None) -> Tensor:
        """`forward` with the modulation (B, 1, 6, C) computed before: it is the same for all scales of an image."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        h = self.attn(modulated_layer_norm(x, scale1, shift1, self.norm_eps), attn_bias)
        x = x + self.drop_path(h.mul_(gamma1))
        h = self.ffn(modulated_layer_norm(x, scale2, shift2, self.norm_eps))
        return x + self.drop_path(h.mul(gamma2))


class AdaLNBeforeHead(nn.Module):
    """The modulated layer norm before the head."""

    def __init__(self, embed_dim: int, cond_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.C, self.norm_eps = embed_dim, norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * embed_dim))

    @property
    def projection(self) -> nn.Linear:
        return cast(nn.Linear, self.ada_lin[-1])

    def forward(self, x_BLC: Tensor, cond_BD: Tensor) -> Tensor:
        return self.modulated(x_BLC, self.modulation(cond_BD))

    def modulation(self, cond_BD: Tensor) -> Tensor:
        """Scale and shift (B, 1, 2, C)."""
        return self.ada_lin(cond_BD).view(-1, 1, 2, self.C)

    def modulated(self, x_BLC: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.unbind(2)
        return modulated_layer_norm(x_BLC, scale, shift, self.norm_eps)
