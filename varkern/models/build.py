"""Building models: by size, from a checkpoint, or the one that comes with the package."""

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

from varkern.models.checkpoint import CheckpointError, load_checkpoint, read_state, var_config, vqvae_config
from varkern.models.hub import VARHF
from varkern.models.schedule import PATCH_NUMS_256
from varkern.models.var import VAR
from varkern.models.vqvae import VQVAE


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
    """The published models by depth: ``depth`` heads of size 64, the tokenizer frozen, weights initialised."""
    with torch.device(device):
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
) -> VARHF:
    """A model ready to generate, in eval mode, its tokenizer in ``.vae_proxy[0]``.

    Args:
        checkpoint: a directory written by ``save_pretrained``; a ``.pth`` or ``.safetensors`` file of the transformer
            (its configuration is read from the shapes), together with ``vae``; a Hub repository id; or None: the
            bundled model of handwritten digits.
        vae: the tokenizer's weights, ``.pth`` or ``.safetensors``, where ``checkpoint`` is a single file.
        device, dtype: where to put both, and in which floating-point type.

    Raises CheckpointError where a file is missing, damaged or does not fit.
    """
    if checkpoint is None:
        checkpoint = str(files("varkern") / "assets")
    path = Path(checkpoint)
    if path.is_file():
        if vae is None:
            raise CheckpointError(f"{path} holds the transformer alone; name the tokenizer's weights too (vae=...)")
        state, vae_state = read_state(path), read_state(vae)
        config = var_config(state)
        model = VARHF(vae_kwargs=vqvae_config(vae_state, config["patch_nums"]), **config)
        load_checkpoint(model, state)
        load_checkpoint(model.vae_proxy[0], vae_state)
    elif vae is not None:
        raise CheckpointError(f"vae={vae} goes with a checkpoint file; {checkpoint} brings its own tokenizer")
    elif path.is_dir() or (path.suffix not in (".pth", ".pt", ".safetensors") and str(checkpoint).count("/") == 1):
        model = VARHF.from_pretrained(str(checkpoint))
    else:
        raise CheckpointError(f"{checkpoint} is neither a file, nor a directory, nor a Hub id such as user/name")
    model.vae_proxy[0].to(device=device, dtype=dtype)
    model = model.to(device=device, dtype=dtype).eval()
    return model
