"""Training of VAR's two stages: the multi-scale tokenizer and the transformer on its tokens."""

from varkern.train.config import TokenizerConfig, TransformerConfig
from varkern.train.tokenizer import load_tokenizer, train_tokenizer
from varkern.train.transformer import train_transformer

__all__ = ["TokenizerConfig", "TransformerConfig", "load_tokenizer", "train_tokenizer", "train_transformer"]
