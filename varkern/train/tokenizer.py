"""Training of the multi-scale VQVAE tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from varkern.atomic import atomic_write
from varkern.data.datasets import Part, batches, load_split
from varkern.models import VQVAE
from varkern.models.checkpoint import save_state
from varkern.models.find import CONFIG, VAE_WEIGHTS, load_tokenizer, metadata_of
from varkern.train.codebook import count_codes, restart_unused_codes, usage_of
from varkern.train.config import TokenizerConfig
from varkern.train.loop import Loop
from varkern.train.losses import psnr, reconstruction_loss
from varkern.train.run import Run

__all__ = ["TokenizerLoop", "load_tokenizer", "train_tokenizer"]


class TokenizerLoop(Loop):
    """Squared error of the image, plus the quantizer's codebook and commitment losses, plus the optional terms."""

    config: TokenizerConfig
    model: VQVAE

    def __init__(self, config: TokenizerConfig, run: Run, vae: VQVAE, train: Part, held_out: Part) -> None:
        super().__init__(config, run, vae, train, held_out)
        self.held_out = held_out

    def before_step(self) -> dict[str, Any]:
        config = self.config
        due = config.restart_every and self.step % config.restart_every == 0
        if not due or self.step >= config.restart_until * self.total_steps:
            return {}
        # Images and draw depend on (seed, step) alone, so that resuming repeats them.
        order = np.random.default_rng((config.seed, self.step, 1)).permutation(len(self.train_images))
        count = min(config.restart_images, len(order))
        images = torch.cat([images for images, _ in batches(self.train_images, order[:count], 256)]).to(self.device)
        seed = int(np.random.SeedSequence((config.seed, self.step)).generate_state(1, np.uint32)[0])
        generator = torch.Generator().manual_seed(seed)
        usage, moved = restart_unused_codes(self.model, images, generator, self.optimizer)
        return {"usage": usage.overall, "usage_scales": [round(u, 2) for u in usage.scales], "restarted": moved}

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        config = self.config
        output, _, vq_loss = self.model(images)
        image_loss = reconstruction_loss(output.float(), images, config.l1_weight, config.gradient_weight)
        metrics = {
            "image_loss": image_loss.item(),
            "vq_loss": vq_loss.item(),
            "psnr": psnr(output.detach().float().clamp(-1, 1), images).mean().item(),
        }
        return image_loss + vq_loss, metrics

    def validate(self) -> dict[str, float]:
        return tokenizer_metrics(self.model, self.held_out, self.config.batch_size, self.device)


def tokenizer_metrics(vae: VQVAE, images: Part, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Mean PSNR (dB) of the reconstructions and codebook usage (%) of ``images``."""
    scales = len(vae.quantize.v_patch_nums)
    values, hits = [], torch.zeros(scales, vae.vocab_size, dtype=torch.int64, device="cpu")
    with torch.no_grad():
        for batch, _ in batches(images, range(len(images)), batch_size):
            batch = batch.to(device)
            tokens = vae.img_to_idxBl(batch)
            output = cast(torch.Tensor, vae.idxBl_to_img(tokens, same_shape=True, last_one=True))
            values.append(psnr(output, batch).cpu())
            hits += count_codes(tokens, vae.vocab_size).cpu()
    usage = usage_of(hits)
    return {
        "psnr": torch.cat(values).mean().item(),
        "usage": usage.overall,
        "usage_touched": usage.touched,
        "usage_scales": [round(u, 2) for u in usage.scales],
        "perplexity": usage.perplexity,
    }


def train_tokenizer(config: TokenizerConfig) -> Path:
    """Train a tokenizer; returns ``config.out``, which then holds ``vae.safetensors`` and ``config.json``.

    Raises ``ValueError`` for settings that cannot work, ``FileExistsError`` for an occupied output folder.
    """
    config.validate()
    with Run(config) as run:
        train, held_out = load_split(config, config.seed)
        run.take(config.data, train)
        torch.manual_seed(config.seed)
        vae = VQVAE(**config.vae_kwargs(), test_mode=False)
        loop = TokenizerLoop(config, run, vae, train, held_out)
        loop.fit()
        with loop.exported():
            save_tokenizer(vae, config.vae_kwargs(), run.folder)
        run.write_classes(train.classes)
    return run.folder


def save_tokenizer(vae: VQVAE, vae_kwargs: dict[str, Any], folder: Path) -> None:
    save_state(vae.state_dict(), folder / VAE_WEIGHTS, metadata_of({"vae_kwargs": vae_kwargs}))
    text = json.dumps({"vae_kwargs": vae_kwargs}, indent=2) + "\n"
    atomic_write(folder / CONFIG, lambda file: file.write(text.encode()))
