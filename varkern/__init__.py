"""varkern: fast kernels and a drop-in engine for Visual AutoRegressive (VAR) image models.

>>> import varkern
>>> var = varkern.load()  # the bundled model of handwritten digits
>>> images = var.autoregressive_infer_cfg(B=8, label_B=3, g_seed=0)  # (8, 1, 32, 32) in [0, 1]
"""

# torch is imported first, by every submodule below: its OpenMP runtime then also serves the extension.
from varkern import edit
from varkern._version import __version__
from varkern.engine import Generation, generate, generate_scales
from varkern.models import VAR, VARHF, VQVAE, CheckpointError, CheckpointWarning, VectorQuantizer2, build_vae_var, load
from varkern.ops import block_causal_attention, current_backend, modulated_layer_norm, use_backend

__all__ = [
    "VAR",
    "VARHF",
    "VQVAE",
    "CheckpointError",
    "CheckpointWarning",
    "Generation",
    "VectorQuantizer2",
    "__version__",
    "block_causal_attention",
    "build_vae_var",
    "current_backend",
    "edit",
    "generate",
    "generate_scales",
    "load",
    "modulated_layer_norm",
    "use_backend",
]
