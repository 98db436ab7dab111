"""Building models: by size, from a checkpoint, or the one that comes with the package."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from varkern.models.find import find_model
from varkern.models.hub import VARHF
from varkern.models.var import VAR
from varkern.models.vqvae import VQVAE
from varkern.modules.schedule import PATCH_NUMS_256

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d
_QUIET: tuple[Any, ...] = (nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, *_CONVOLUTIONS)
_building = threading.RLock()


@contextlib.contextmanager
def _quiet_initialisation(device: torch.device) -> Iterator[None]:
    """Within the block the default initialisation of these layers leaves the global generators where they are.

    The published constructor switches it off, so that a seed gives what its own draws give and nothing else. Here the
    layers are initialised all the same, lest a convolution keep what was in its memory.
    """
    devices = [device] if device.type == "cuda" else []

    def quiet(reset: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def reset_parameters(self: nn.Module) -> None:
            with torch.random.fork_rng(devices):
                reset(self)

        return reset_parameters

    with _building:
        resets = {kind: kind.reset_parameters for kind in _QUIET}
        own = {kind for kind in _QUIET if "reset_parameters" in vars(kind)}  # others inherit it
        try:
            for kind, reset in resets.items():
                kind.reset_parameters = quiet(reset)
            yield
        finally:
            for kind, reset in resets.items():
                if kind in own:
                    kind.reset_parameters = reset
                else:
                    del kind.reset_parameters


def build_vae_var(
    device: torch.device | str,
    patch_nums: Sequence[int] = PATCH_NUMS_256,
    V: int = 4096,
    Cvae: int = 32,
    ch: int = 160,
    share_quant_resi: int = 4,
    num_classes: int = 1000,
    depth: int = 16,
    shared_aln: bool = False,
    attn_l2_norm: bool = True,
    flash_if_available: bool = True,
    fused_if_available: bool = True,
    init_adaln: float = 0.5,
    init_adaln_gamma: float = 1e-5,
    init_head: float = 0.02,
    init_std: float = -1,
) -> tuple[VQVAE, VAR]:
    """The published models by depth: ``depth`` heads of size 64, the tokenizer frozen, weights initialised.

    After ``torch.manual_seed`` the transformer's weights and the codebook are those of the published constructor, and
    so is what the global generator gives next. The tokenizer's convolutions, which it leaves uninitialised, have
    PyTorch's default initialisation.
    """
    with torch.device(device), _quiet_initialisation(torch.device(device)):
        vae = VQVAE(
            vocab_size=V,
            z_channels=Cvae,
            ch=ch,
            test_mode=True,
            share_quant_resi=share_quant_resi,
            v_patch_nums=patch_nums,
        )
        var = VAR(
            vae_local=vae,
            num_classes=num_classes,
            depth=depth,
            embed_dim=64 * depth,
            num_heads=depth,
            drop_path_rate=0.1 * depth / 24,
            norm_eps=1e-6,
            shared_aln=shared_aln,
            cond_drop_rate=0.1,
            attn_l2_norm=attn_l2_norm,
            patch_nums=patch_nums,
            flash_if_available=flash_if_available,
            fused_if_available=fused_if_available,
        )
        var.init_weights(
            init_adaln=init_adaln, init_adaln_gamma=init_adaln_gamma, init_head=init_head, init_std=init_std
        )
    return vae, var


def load(
    checkpoint: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    patch_nums: Sequence[int] | None = None,
) -> VARHF:
    """A model ready to generate, in eval mode, its tokenizer in ``.vae_proxy[0]``.

    Args:
        checkpoint: a directory written by ``save_pretrained``; a weights file of the transformer (``.pth``,
            safetensors, or a trainer's checkpoint; its configuration is read from the shapes); a Hub repository id; or
            None: the bundled model of handwritten digits.
        vae: the tokenizer where ``checkpoint`` has none: a weights file, a directory of tokenizer training or of a
            model, or a Hub repository.
        device, dtype: where to put both, and in which floating-point type.
        patch_nums: the schedule, for weights that do not tell it.

    Raises CheckpointError where a file is missing, damaged or does not fit. A CheckpointWarning tells a choice.
    """
    if checkpoint is None:
        checkpoint = str(files("varkern") / "assets")
    model = find_model(VARHF, checkpoint, vae, patch_nums)
    model.vae_proxy[0].to(device=device, dtype=dtype)
    return model.to(device=device, dtype=dtype).eval()
