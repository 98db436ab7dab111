"""What the tests of checkpoints share: a tiny model in a folder, and when two models are the same."""

from collections.abc import Mapping
from pathlib import Path

import torch
from tiny_model import save_tiny

import varkern


def save_told(folder: Path) -> Path:
    """The tiny model, but with an L2 norm, so that its shapes tell everything."""
    settings = {**varkern.load(save_tiny(folder))._hub_mixin_config, "attn_l2_norm": True}
    torch.manual_seed(0)
    varkern.VARHF(**settings).save_pretrained(folder)
    return folder


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def assert_both(loaded: varkern.VAR, model: varkern.VAR) -> None:
    assert_same(loaded.state_dict(), model.state_dict())
    assert_same(loaded.vae_proxy[0].state_dict(), model.vae_proxy[0].state_dict())
