"""Golden data: inputs and outputs measured on the published implementation, and the models they belong to."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from golden_weights import golden_image, load_golden_weights
from safetensors import safe_open
from ties import assert_same_codes
from torch import Tensor

import varkern

FOLDER = Path(__file__).parent / "golden"
SMALL = ("d2", "d3-shared-adaln", "d2-cosine-nonshared-phi", "d1-one-scale-step")
ALL = (*SMALL, "d16-256")


@dataclass(frozen=True)
class Golden:
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    vae: varkern.VQVAE
    var: varkern.VAR

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def full_size(self) -> bool:
        """Of the real model: stored logits are thinned out and images area-downsampled by 4."""
        return self["image"].numel() == 0

    @property
    def image(self) -> Tensor:
        return golden_image(self.config["B"], 16 * self.config["patch_nums"][-1], self.config["salt"])

    def stored(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image, 4) if self.full_size else image

    def token_maps(self, name: str = "token_indices") -> list[Tensor]:
        return list(self[name].split([p * p for p in self.config["patch_nums"]], dim=1))

    def same_codes(self, tokens: list[Tensor], features: Tensor | None = None) -> Tensor:
        """Which images (B,) have the tokens of the file; the others differ from them first in a tie.

        features: what the tokens were chosen for, if not the file's.
        """
        want, quantizer, given = self.token_maps(), self.vae.quantize, self["encoder_features"]
        with torch.no_grad():
            f_hats = quantizer.embed_to_fhat(quantizer.embeddings(want))
        off = 0.0 if features is None else float((features - given).abs().max())
        sizes, codebook = [(p, p) for p in self.config["patch_nums"]], quantizer.embedding.weight.detach()
        return assert_same_codes(given, codebook, sizes, tokens, want, f_hats, self.config["using_znorm"], off)

    @property
    def sampling(self) -> dict[str, Any]:
        return {name: self.config[name] for name in ("cfg", "top_k", "top_p")}


@cache
def load_golden(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    vae, var = build(config)
    return Golden(config, tensors, vae, var)


def build(config: dict[str, Any], test_mode: bool = True) -> tuple[varkern.VQVAE, varkern.VAR]:
    vae = varkern.VQVAE(
        vocab_size=config["V"],
        z_channels=config["Cvae"],
        ch=config["ch"],
        using_znorm=config["using_znorm"],
        test_mode=test_mode,
        share_quant_resi=config["share_quant_resi"],
        v_patch_nums=config["patch_nums"],
    )
    depth = config["depth"]
    var = varkern.VAR(
        vae_local=vae,
        num_classes=config["num_classes"],
        depth=depth,
        embed_dim=64 * depth,
        num_heads=depth,
        drop_path_rate=0.1 * depth / 24,
        shared_aln=config["shared_aln"],
        attn_l2_norm=config["attn_l2_norm"],
        patch_nums=config["patch_nums"],
    )
    load_golden_weights(vae, "vae.", config["salt"])
    load_golden_weights(var, "", config["salt"])
    return vae.eval(), var.eval()


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
