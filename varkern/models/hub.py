"""`VARHF`: a `VAR` that owns its tokenizer's configuration and travels through the Hugging Face Hub."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin

from varkern.models.checkpoint import save_state
from varkern.models.find import VAE_WEIGHTS, WEIGHTS, find_model, metadata_of
from varkern.models.var import VAR
from varkern.models.vqvae import VQVAE
from varkern.modules.plain import fusable
from varkern.modules.schedule import PATCH_NUMS_256


@fusable
class VARHF(
    VAR,
    PyTorchModelHubMixin,
    library_name="varkern",
    tags=["image-generation", "var"],
    paper_url="https://arxiv.org/abs/2404.02905",
):
    """`VAR` built together with ``VQVAE(**vae_kwargs)``; the other arguments are those of `VAR`.

    ``save_pretrained`` and ``push_to_hub`` write the configuration, the transformer (``model.safetensors``) and the
    tokenizer (``vae.safetensors``); ``from_pretrained`` reads a directory or Hub repository, strictly. Where it has no
    tokenizer's weights, ``vae`` must name them.
    """

    def __init__(
        self,
        vae_kwargs: dict[str, Any],
        num_classes: int = 1000,
        depth: int = 16,
        embed_dim: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = False,
        patch_nums: Sequence[int] = PATCH_NUMS_256,
        flash_if_available: bool = True,
        fused_if_available: bool = True,
    ) -> None:
        super().__init__(
            vae_local=VQVAE(**vae_kwargs),
            num_classes=num_classes,
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
            shared_aln=shared_aln,
            cond_drop_rate=cond_drop_rate,
            attn_l2_norm=attn_l2_norm,
            patch_nums=patch_nums,
            flash_if_available=flash_if_available,
            fused_if_available=fused_if_available,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        config = dict(cast("dict[str, Any]", self._hub_mixin_config))
        own = {"vae_kwargs": config.pop("vae_kwargs")}
        save_state(self.state_dict(), save_directory / WEIGHTS, metadata_of(config))
        save_state(self.vae_proxy[0].state_dict(), save_directory / VAE_WEIGHTS, metadata_of(own))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        vae: str | os.PathLike[str] | None = None,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **changes: Any,
    ) -> "VARHF":
        """A model in eval mode from a directory, Hub repository or weights file; ``changes`` go before its settings.

        Args:
            vae: the tokenizer's weights where there are none: a file, directory or repository.
            map_location: the device to put both on.
            force_download, token, cache_dir, local_files_only, revision: as in ``huggingface_hub``.

        Raises CheckpointError in one sentence, ValueError for ``strict=False``.
        """
        if not strict:
            raise ValueError("checkpoints are loaded strictly; load_state_dict(..., strict=False) takes a partial one")
        model = find_model(
            cls,
            pretrained_model_name_or_path,
            vae,
            changes=changes,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        model.vae_proxy[0].to(map_location)
        return model.to(map_location).eval()
