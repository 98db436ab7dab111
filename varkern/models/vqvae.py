"""`VQVAE`, under the name of the official layout."""

from varkern.modules.vqvae import VQVAE

__all__ = ["VQVAE"]
