"""Measures of generated digits against scikit-learn's real ones.

All features come from the images pooled to 8 x 8, the resolution of the scans. The classifier is a support vector
machine fitted on the training digits; the Frechet distance is taken in the space of the first 24 principal components
of the training digits, and again in the classifier-like space of a linear discriminant analysis (9 dimensions).
Both are deterministic. The distance is biased by sample size, so model and real data are compared at the same size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from varkern.eval.metrics import frechet_distance, gaussian_of, nearest_distances

__all__ = ["DigitMeasures", "frechet"]

COMPONENTS = 24
REAL_SPLITS = 20  # random pairs of disjoint real samples whose distance is averaged


def pooled(images: torch.Tensor) -> np.ndarray:
    """(n, 64) float64 in [0, 1] from images (n, c, s, s) in [-1, 1]."""
    grey = images.float().cpu().mean(1, keepdim=True)
    return ((F.adaptive_avg_pool2d(grey, 8).flatten(1).double() + 1) / 2).numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to feature rows ``a`` (n, d) and ``b`` (m, d)."""
    return frechet_distance(*gaussian_of(a), *gaussian_of(b))


@dataclass
class DigitMeasures:
    """Classifier and feature spaces, fitted on the training digits only.

    Args:
        train, train_labels: training images (n, c, s, s) in [-1, 1] and their digits.
        held_out, held_out_labels: images no model has seen.
    """

    train: torch.Tensor
    train_labels: np.ndarray
    held_out: torch.Tensor
    held_out_labels: np.ndarray

    def __post_init__(self) -> None:
        try:
            from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
            from sklearn.svm import SVC
        except ImportError as error:
            raise ImportError(
                "measuring digits needs scikit-learn; install it with: pip install 'varkern[train]'"
            ) from error
        self.train_rows, self.held_out_rows = pooled(self.train), pooled(self.held_out)
        self.classifier = SVC(C=10.0, gamma="scale").fit(self.train_rows, self.train_labels)
        self.discriminant = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.1)
        self.discriminant.fit(self.train_rows, self.train_labels)
        self.centre = self.train_rows.mean(0)
        _, _, components = np.linalg.svd(self.train_rows - self.centre, full_matrices=False)
        self.components = components[:COMPONENTS].T

    def pca(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self.centre) @ self.components

    def lda(self, rows: np.ndarray) -> np.ndarray:
        return self.discriminant.transform(rows)

    def accuracy(self, images: torch.Tensor, labels: np.ndarray) -> float:
        """Share (%) of ``images`` that the classifier takes for ``labels``."""
        return float((self.classifier.predict(pooled(images)) == labels).mean() * 100)

    def measure(self, generated: torch.Tensor, labels: np.ndarray) -> dict[str, Any]:
        """Accuracy (%), Frechet distances and nearest-neighbour distances of ``generated`` (n, c, s, s) in [-1, 1].

        ``frechet_*`` compares ``n`` generated images with the held-out ones; ``frechet_*_real`` is the mean over 20
        seeded random splits of all real digits into disjoint parts of the same two sizes.
        """
        rows = pooled(generated)
        real = np.concatenate([self.train_rows, self.held_out_rows])
        n, m = len(rows), len(self.held_out_rows)
        if n + m > len(real):
            raise ValueError(
                f"{n} generated images cannot be compared: at most {len(real) - m} fit beside {m} held-out ones"
            )
        result: dict[str, Any] = {
            "generated": n,
            "held_out": m,
            "accuracy": self.accuracy(generated, labels),
            "accuracy_real_held_out": self.accuracy(self.held_out, self.held_out_labels),
        }
        for name, project in (("pca", self.pca), ("lda", self.lda)):
            projected = project(real)
            splits = []
            for seed in range(REAL_SPLITS):
                order = np.random.default_rng(seed).permutation(len(real))
                splits.append(frechet(projected[order[:n]], projected[order[n : n + m]]))
            result[f"frechet_{name}"] = frechet(project(rows), project(self.held_out_rows))
            result[f"frechet_{name}_real"] = float(np.mean(splits))
            result[f"frechet_{name}_ratio"] = result[f"frechet_{name}"] / result[f"frechet_{name}_real"]
        near, near_real = (
            nearest_distances(rows, self.train_rows),
            nearest_distances(self.held_out_rows, self.train_rows),
        )
        result["nearest_train"] = float(np.median(near))
        result["nearest_train_held_out"] = float(np.median(near_real))
        # A copy is an image closer to a training image than 99 % of the unseen real digits are.
        result["copies"] = float((near < np.quantile(near_real, 0.01)).mean() * 100)
        return result
