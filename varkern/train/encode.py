"""From images, features or tokens to what the transformer trains on: targets and teacher-forcing input.

With a code temperature the tokens are drawn instead of taking the nearest code: p(code) is proportional to
exp(-distance^2 / (temperature * mean smallest distance^2 of the scale)). Every later scale encodes what the drawn codes
left over, so the same image has many token sequences that decode to nearly itself. A small data set is seen in
many guises, and the transformer learns to correct at fine scales what sampling got wrong at coarse ones. (Stochastic
code sampling: Lee et al., RQ-Transformer, CVPR 2022, section 3.2.) The last scale has no one to correct it and always
takes the nearest code.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from tqdm import tqdm

from varkern.data.datasets import Labelled, Part, batches
from varkern.models import VQVAE

__all__ = ["Encoded", "draw_tokens", "encode_all", "features_of", "teacher_forcing_input", "tokens_of"]


def features_of(vae: VQVAE, images: torch.Tensor) -> torch.Tensor:
    """Features (B, Cv, h, w) float32 that the quantizer encodes, of images (B, c, H, W)."""
    with torch.no_grad():
        return vae.quant_conv(vae.encoder(images)).float()


def tokens_of(vae: VQVAE, images: torch.Tensor) -> torch.Tensor:
    """Indices (B, L) int64 of the nearest codes, scales one after another, of images (B, c, H, W)."""
    with torch.no_grad():
        return torch.cat(vae.img_to_idxBl(images), dim=1)


@torch.no_grad()
def teacher_forcing_input(vae: VQVAE, tokens: torch.Tensor) -> torch.Tensor:
    """Input (B, L - n_1, Cv) float32 of the transformer for indices (B, L)."""
    inputs = vae.quantize.idxBl_to_var_input(tokens.split([p * p for p in vae.quantize.v_patch_nums], dim=1))
    assert inputs is not None  # a schedule has two scales or more
    return inputs


@torch.no_grad()
def draw_tokens(vae: VQVAE, features: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn indices (B, L) and their teacher-forcing input (B, L - n_1, Cv), of features (B, Cv, h, w) float32.

    Draws from the global generator. Temperature 0 gives the nearest codes.
    """
    quantizer = vae.quantize
    codebook, sides = quantizer.embedding.weight.float(), quantizer.v_patch_nums
    f_hat = torch.zeros_like(features)
    tokens, inputs = [], []
    with torch.autocast(features.device.type, enabled=False):
        for k, side in enumerate(sides):
            z = F.interpolate(features - f_hat, size=(side, side), mode="area").permute(0, 2, 3, 1)
            scores = -torch.cdist(z.reshape(-1, codebook.shape[1]), codebook).square()
            if temperature > 0 and k < len(sides) - 1:
                noise = torch.empty_like(scores).exponential_().log_()  # Gumbel-max draw
                scores = scores / (-temperature * scores.amax(1).mean()).clamp_min(1e-12) - noise
            index = scores.argmax(1).view(len(features), side, side)
            tokens.append(index.flatten(1))
            code_map = codebook[index].permute(0, 3, 1, 2)
            f_hat, following = quantizer.get_next_autoregressive_input(k, len(sides), f_hat, code_map)
            if k < len(sides) - 1:
                inputs.append(following.flatten(2).transpose(1, 2))
    return torch.cat(tokens, dim=1), torch.cat(inputs, dim=1)


class Encoded(Labelled):
    """Images encoded once: items ``(indices (L,) int64 or features (Cv, h, w) float32, label)``."""

    def __init__(self, images: Part, data: torch.Tensor) -> None:
        self.classes, self.labels, self.data = images.classes, images.labels, data

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.data[index], int(self.labels[index])


def encode_all(
    vae: VQVAE, images: Part, batch_size: int, device: torch.device, *, features: bool = False, workers: int = 0
) -> Encoded:
    """Tokens, or with ``features`` the features, of all images, on the CPU."""
    encode = features_of if features else tokens_of
    loader = batches(images, range(len(images)), batch_size, workers=workers)
    total = -(-len(images) // batch_size)
    parts = [
        encode(vae, batch.to(device)).cpu() for batch, _ in tqdm(loader, total=total, desc="encoding", leave=False)
    ]
    return Encoded(images, torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32, device="cpu"))
