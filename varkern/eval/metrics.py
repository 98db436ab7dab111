"""Image metrics that need numpy and torch alone."""

from __future__ import annotations

import numpy as np

from varkern.train.losses import psnr

__all__ = ["frechet_distance", "gaussian_of", "nearest_distances", "psnr"]


def gaussian_of(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and unbiased covariance (d, d), float64, of ``features`` (n, d)."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs at least two feature rows (n, d), got shape {features.shape}")
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    (C1 C2)^(1/2) has the eigenvalues of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric, so two symmetric
    eigen-decompositions give the trace (Dowson & Landau 1982; Heusel et al. 2017).
    """
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(middle).sum())


def nearest_distances(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Euclidean distance (n,) of each row of ``images`` (n, d) to its nearest row of ``references`` (m, d)."""
    a, b = images.astype(np.float64), references.astype(np.float64)
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(squared.min(1).clip(min=0))
