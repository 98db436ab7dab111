"""`VARHF`: a `VAR` that owns its tokenizer's configuration and travels through the Hugging Face Hub."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from varkern.models.checkpoint import load_checkpoint, save_state
from varkern.models.plain import fusable
from varkern.models.schedule import PATCH_NUMS_256
from varkern.models.var import VAR
from varkern.models.vqvae import VQVAE

WEIGHTS, VAE_WEIGHTS = "model.safetensors", "vae.safetensors"


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
    tokenizer (``vae.safetensors``); ``from_pretrained`` reads a directory or Hub repository, strictly. A repository
    without tokenizer weights gives a warning and a tokenizer as initialised.
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
        save_state(self.state_dict(), save_directory / WEIGHTS)
        save_state(self.vae_proxy[0].state_dict(), save_directory / VAE_WEIGHTS)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **model_kwargs: Any,
    ) -> "VARHF":
        if not strict:
            raise ValueError("checkpoints are loaded strictly; load_state_dict(..., strict=False) takes a partial one")

        def find(name: str) -> Path | None:
            if Path(model_id).is_dir():
                path = Path(model_id) / name
                return path if path.is_file() else None
            try:
                return Path(
                    hf_hub_download(
                        repo_id=model_id,
                        filename=name,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                    )
                )
            except EntryNotFoundError:
                return None

        weights, vae_weights = find(WEIGHTS), find(VAE_WEIGHTS)
        if weights is None:
            raise FileNotFoundError(f"{model_id} has no {WEIGHTS}; is it a directory or repository of VARHF?")
        model = cls(**model_kwargs)
        load_checkpoint(model, weights)
        if vae_weights is not None:
            load_checkpoint(model.vae_proxy[0], vae_weights)
        else:
            warnings.warn(
                f"{model_id} has no {VAE_WEIGHTS}: load the tokenizer's weights into .vae_proxy[0] before generating",
                stacklevel=2,
            )
        model.vae_proxy[0].to(map_location)
        return model.to(map_location).eval()
