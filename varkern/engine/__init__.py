"""Whole-image generation."""

from varkern.engine.generate import ScaleImages, generate, generate_scales
from varkern.engine.options import Generation, Keep

__all__ = ["Generation", "Keep", "ScaleImages", "generate", "generate_scales"]
