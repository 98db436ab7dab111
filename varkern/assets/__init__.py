"""The bundled model: handwritten digits at 32 x 32 pixels, small enough to travel with the package."""

from pathlib import Path

__all__ = ["bundled_model"]


def bundled_model() -> Path:
    """Folder of the bundled model, for ``VARHF.from_pretrained``; raises ``FileNotFoundError`` when it is missing."""
    folder = Path(__file__).parent
    missing = [n for n in ("config.json", "model.safetensors", "vae.safetensors") if not (folder / n).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the bundled model lacks {', '.join(missing)} in {folder}; reinstall varkern, or train it again with: "
            f"python -m varkern.assets.recipe --out {folder}"
        )
    return folder
