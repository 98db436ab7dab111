"""Whole-image generation."""

from varkern.engine.generate import Generation, Keep, generate

__all__ = ["Generation", "Keep", "generate"]
