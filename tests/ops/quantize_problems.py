"""Small quantizers with a batch each, for the tests of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ties import assert_same_codes
from torch import Tensor

from varkern.ops.quantize import reference

kernels: Any = pytest.importorskip("varkern.kernels.quantize", reason="triton is not installed")

Size = tuple[int, int]


@dataclass
class Problem:
    """One quantizer and a batch for it; the defaults are an ordinary small one."""

    sizes: tuple[Size, ...] = ((1, 1), (3, 3), (4, 4))
    full: Size = (4, 4)
    B: int = 2
    Cv: int = 8
    V: int = 50
    phis: int = 2
    ratio: float = 0.5
    cosine: bool = False
    scale: float = 1.0
    strided: bool = False
    device: str = "cpu"
    features: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        if self.strided:
            wide = normal(self.B, self.full[1] + 2, self.full[0], self.Cv + 3)
            features = wide.to(self.device)[:, 1:-1, :, 2 : 2 + self.Cv].permute(0, 3, 2, 1)
            assert features.shape == (self.B, self.Cv, *self.full)
        else:
            features = normal(self.B, self.Cv, *self.full).to(self.device)
        self.features = features * self.scale if not self.strided else features
        self.codebook = (normal(self.V, self.Cv) * self.scale).to(self.device)
        self.weight = (normal(self.phis, self.Cv, self.Cv, 3, 3) / (3 * self.Cv**0.5)).to(self.device)
        self.bias = (normal(self.phis, self.Cv) * 0.1 * self.scale).to(self.device)
        K = len(self.sizes)
        self.phi_of_scale = [k * self.phis // K for k in range(K)] if self.phis else [0] * K

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.codebook, self.weight, self.bias, self.ratio, self.phi_of_scale

    @property
    def reference_phis(self) -> list[reference.Phi]:
        if self.phis == 0:
            return [reference.Phi(None, None, 0.0)] * len(self.sizes)
        return [reference.Phi(self.weight[i], self.bias[i], self.ratio) for i in self.phi_of_scale]

    def run(self, all_f_hats: bool = True) -> tuple[Tensor, Tensor]:
        return kernels.residual_quantize(self.features, *self.arguments, list(self.sizes), self.cosine, all_f_hats)

    def reference(self) -> tuple[Tensor, Tensor]:
        indices, f_hats = reference.residual_quantize_reference(
            self.features.contiguous(), self.codebook, self.reference_phis, list(self.sizes), self.cosine
        )
        return torch.cat(indices, 1), torch.stack(f_hats)

    def same(self, got: Tensor, want: Tensor, f_hats: Tensor) -> Tensor:
        got, want = (indices.cpu().split([h * w for h, w in self.sizes], 1) for indices in (got, want))
        features, codebook = self.features.cpu() / self.scale, self.codebook.cpu() / self.scale
        return assert_same_codes(features, codebook, self.sizes, got, want, f_hats.cpu() / self.scale, self.cosine)

    def maps(self, indices: Tensor) -> list[Tensor]:
        parts = indices.split([h * w for h, w in self.sizes], 1)
        return [
            F.embedding(part, self.codebook).transpose(1, 2).reshape(len(part), self.Cv, h, w)
            for part, (h, w) in zip(parts, self.sizes, strict=True)
        ]

    def indices(self) -> Tensor:
        L = sum(h * w for h, w in self.sizes)
        generator = torch.Generator().manual_seed(6)
        return torch.randint(self.V, (self.B, L), generator=generator).to(self.device)


PROBLEMS: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "cosine": {"cosine": True},
    "identity_phi": {"phis": 0},
    "identity_phi_cosine": {"phis": 0, "cosine": True},
    "one_phi": {"phis": 1},
    "four_phis_of_five": {"phis": 4, "sizes": ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5)), "full": (5, 5)},
    "a_phi_each": {"phis": 4, "ratio": 0.25},
    "ratio_one": {"ratio": 1.0},
    "rectangles": {"sizes": ((1, 2), (2, 3), (3, 3), (4, 7)), "full": (4, 7), "B": 3},
    "tall": {"sizes": ((2, 1), (5, 2), (9, 3)), "full": (9, 3), "Cv": 16},
    "cut_before_the_last": {"sizes": ((1, 1), (2, 2), (4, 4)), "full": (7, 7)},
    "cut_after_the_first": {"sizes": ((1, 1),), "full": (3, 3), "phis": 1},
    "one_scale": {"sizes": ((4, 4),), "full": (4, 4), "phis": 1},
    "the_same_scale_again": {"sizes": ((4, 4), (2, 2), (4, 4)), "full": (4, 4)},
    "one_image": {"B": 1, "Cv": 32, "V": 129},
    "three_images": {"B": 3, "Cv": 16, "V": 64},
    "few_codes": {"V": 3},
    "one_code": {"V": 1},
    "odd_channels": {"Cv": 5},
    "widest_channels": {"Cv": 64, "V": 70},
    "many_positions": {"sizes": ((3, 3), (9, 9), (11, 11)), "full": (11, 11), "Cv": 8, "V": 130},
    "large_values": {"scale": 1e3},
    "small_values": {"scale": 1e-3},
    "strided": {"strided": True},
    "strided_rectangle": {"strided": True, "sizes": ((1, 2), (3, 5)), "full": (3, 5)},
}
