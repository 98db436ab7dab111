"""Measures of tokenizers and models: reconstruction, codebook usage, token loss, and quality of generated digits."""

from varkern.eval.evaluate import EvaluateConfig, evaluate
from varkern.eval.metrics import frechet_distance, gaussian_of, psnr

__all__ = ["EvaluateConfig", "evaluate", "frechet_distance", "gaussian_of", "psnr"]
