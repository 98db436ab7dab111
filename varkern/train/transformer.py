"""Training of the class-conditional VAR transformer on a frozen tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from varkern.data.config import check, resolve_device
from varkern.data.datasets import Part, batches, load_split
from varkern.models import VAR, VARHF, VQVAE
from varkern.models.checkpoint import load_checkpoint
from varkern.train.config import TransformerConfig
from varkern.train.encode import Encoded, draw_tokens, encode_all, features_of, teacher_forcing_input, tokens_of
from varkern.train.loop import Loop
from varkern.train.losses import token_loss, token_metrics
from varkern.train.run import Run
from varkern.train.tokenizer import load_tokenizer

__all__ = ["TransformerLoop", "token_metrics_on", "train_transformer"]


class TransformerLoop(Loop):
    """Teacher-forced cross-entropy over all positions of all scales.

    ``train`` holds images, or what `encode_all` made of them: tokens, or features where codes are drawn.
    """

    config: TransformerConfig
    model: VAR

    def __init__(
        self, config: TransformerConfig, run: Run, var: VAR, vae: VQVAE, train: Part | Encoded, held_out: Encoded
    ) -> None:
        super().__init__(config, run, var, train, held_out)
        self.vae, self.held_out, self.on_the_fly = vae, held_out, isinstance(train, Part)

    def encode(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets (B, L) and input (B, L - n_1, Cv) of a training batch."""
        if self.config.code_temperature > 0:
            features = features_of(self.vae, batch) if self.on_the_fly else batch
            return draw_tokens(self.vae, features, self.config.code_temperature)
        tokens = tokens_of(self.vae, batch) if self.on_the_fly else batch
        return tokens, teacher_forcing_input(self.vae, tokens)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        tokens, inputs = self.encode(images)
        logits = self.model(labels, inputs)
        metrics = token_metrics(logits.detach(), tokens, self.model.patch_nums)
        return token_loss(logits, tokens, self.config.label_smoothing), metrics

    def validate(self) -> dict[str, float]:
        return token_metrics_on(self.model, self.vae, self.held_out, self.config.batch_size, self.device)


@torch.no_grad()
def token_metrics_on(var: VAR, vae: VQVAE, data: Encoded, batch_size: int, device: torch.device) -> dict[str, float]:
    """Metrics of `token_metrics` over the tokens of ``data``, each image weighted equally."""
    totals: dict[str, float] = {}
    for tokens, labels in batches(data, range(len(data)), batch_size):
        tokens, labels = tokens.to(device), labels.to(device)
        logits = var(labels, teacher_forcing_input(vae, tokens))
        for name, value in token_metrics(logits, tokens, var.patch_nums).items():
            totals[name] = totals.get(name, 0.0) + value * len(tokens) / len(data)
    return totals


def train_transformer(config: TransformerConfig) -> Path:
    """Train a transformer; returns ``config.out``, which ``VARHF.from_pretrained`` then reads.

    Images are encoded once unless they are augmented; then each batch is encoded as it comes.
    Raises ``ValueError`` for settings that cannot work, ``FileExistsError`` for an occupied output folder.
    """
    config.validate()
    tokenizer = load_tokenizer(config.tokenizer, config.patch_nums)
    channels = tokenizer.vae.in_channels
    patch_nums = tuple(tokenizer.vae.quantize.v_patch_nums)
    size = patch_nums[-1] * tokenizer.vae.downsample
    check(
        config.channels in (0, channels),
        f"channels is {config.channels} but tokenizer {config.tokenizer} has {channels}; leave it at 0 to take that",
    )
    check(
        config.image_size in (0, size),
        f"image_size is {config.image_size} but the tokenizer takes {size} pixels; leave it at 0 to take that",
    )
    config = replace(config, image_size=size, channels=channels)
    with Run(config) as run:
        train, held_out = load_split(config, config.seed)
        run.take(config.data, train)
        run.inputs[f"weights of {config.tokenizer}"] = digest_of_weights(tokenizer.vae)
        torch.manual_seed(config.seed)
        var = VARHF(vae_kwargs=tokenizer.vae_kwargs, **config.var_kwargs(len(train.classes), patch_nums))
        var.init_weights(init_adaln=0.5, init_adaln_gamma=1e-5, init_head=0.02, init_std=-1)
        vae, device = var.vae_proxy[0], resolve_device(config.device)
        load_checkpoint(vae, tokenizer.vae.state_dict())
        vae.to(device).eval().requires_grad_(False)

        data: Part | Encoded = train
        if not (config.augment or config.flip):
            drawn = config.code_temperature > 0
            data = encode_all(vae, train, config.batch_size, device, features=drawn, workers=config.workers)
        held = encode_all(vae, held_out, config.batch_size, device, workers=config.workers)
        loop = TransformerLoop(config, run, var, vae, data, held)
        loop.fit()
        with loop.exported():
            var.save_pretrained(run.folder)
        run.write_classes(train.classes)
    return run.folder


def digest_of_weights(module: torch.nn.Module) -> str:
    """Hash of names, types, shapes and values of a module's state."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
