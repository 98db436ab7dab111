"""The operators: one file each with the public function, its reference in plain PyTorch, schema, autograd and backends.

Every op that has a fast backend is used through the function of its file; ``_library`` chooses the backend.
"""

from varkern.ops._library import current_backend, explain, reference_forced, use_backend
from varkern.ops.norm import modulated_layer_norm, modulated_layer_norm_reference

__all__ = [
    "current_backend",
    "explain",
    "modulated_layer_norm",
    "modulated_layer_norm_reference",
    "reference_forced",
    "use_backend",
]
