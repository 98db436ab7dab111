"""A small model with random weights, in the folder format of `VARHF.save_pretrained`: 1-channel 32 x 32, 10 classes."""

from pathlib import Path

import torch

import varkern


def save_tiny(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = {"vocab_size": 32, "z_channels": 8, "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        vae |= {"in_channels": 1, "v_patch_nums": [1, 2, 3, 4]}
        model = varkern.VARHF(vae, num_classes=10, depth=2, embed_dim=64, num_heads=1, patch_nums=(1, 2, 3, 4))
        model.init_weights(init_adaln_gamma=0.5, init_head=1.0)
    model.save_pretrained(folder)
    return folder
