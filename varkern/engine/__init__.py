"""Whole-image generation."""

from varkern.engine.generate import ScaleImages, generate, generate_scales
from varkern.engine.graphs import clear_graphs
from varkern.engine.options import Generation, Keep

__all__ = ["Generation", "Keep", "ScaleImages", "clear_graphs", "generate", "generate_scales"]
