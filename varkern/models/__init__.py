"""The models, with the official parameter names."""

from varkern.models.build import build_vae_var, load
from varkern.models.checkpoint import CheckpointError, CheckpointWarning
from varkern.models.find import load_tokenizer
from varkern.models.hub import VARHF
from varkern.models.var import VAR
from varkern.models.vqvae import VQVAE
from varkern.modules.quantizer import VectorQuantizer2

__all__ = [
    "VAR",
    "VARHF",
    "VQVAE",
    "CheckpointError",
    "CheckpointWarning",
    "VectorQuantizer2",
    "build_vae_var",
    "load",
    "load_tokenizer",
]
