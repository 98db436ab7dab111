"""Attention: block-causal for training, over a cache for generation, and what else can take the former's place."""

from varkern.ops.attention.block_causal import (
    BlockCausal,
    block_causal_attention,
    block_causal_attention_qkv,
    block_causal_attention_qkv_reference,
    block_causal_attention_reference,
)
from varkern.ops.attention.cached import cached_attention, cached_attention_reference

__all__ = [
    "BlockCausal",
    "block_causal_attention",
    "block_causal_attention_qkv",
    "block_causal_attention_qkv_reference",
    "block_causal_attention_reference",
    "cached_attention",
    "cached_attention_reference",
]
