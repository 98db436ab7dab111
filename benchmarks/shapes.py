"""The sizes that matter: those of the VAR models, in the reference's dialect (B batch, L tokens, C width)."""

from __future__ import annotations

from typing import TypeVar

from measure import settings

from varkern.modules.schedule import PATCH_NUMS_256, PATCH_NUMS_512

_Table = TypeVar("_Table", dict, list)

PATCH_NUMS_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
# What whole images are made of; in a smoke run 64 px.
PATCH_NUMS = (1, 2, 3, 4) if settings.smoke else PATCH_NUMS_256
SCHEDULES = {"256px": PATCH_NUMS_256, "512px": PATCH_NUMS_512, "1024px": PATCH_NUMS_1024}
TOKENS_256 = sum(p * p for p in PATCH_NUMS_256)  # 680


def some(table: _Table) -> _Table:
    """The table; in a smoke run only its first entry, which is to be the smallest."""
    if not settings.smoke:
        return table
    return dict(list(table.items())[:1]) if isinstance(table, dict) else table[:1]


WIDTHS = {"d16": 1024, "d20": 1280, "d24": 1536, "d30": 1920, "d36": 2304}

# (B, L, C) of AdaLN. Training: the batch of one GPU. Generation: one image, so two rows of classifier-free guidance, at
# a small, a middle and the last scale.
NORM_TRAINING = {f"d16-train-B{B}": (B, TOKENS_256, WIDTHS["d16"]) for B in ([1] if settings.smoke else [8])}
NORM_GENERATION = some({f"d16-scale-{p}x{p}": (2, p * p, WIDTHS["d16"]) for p in (1, 6, 16)})

# (B, C, H, W) of group norm, 32 groups: where the decoder of VQVAE(ch=160) normalises at 256 px.
GROUP_NORM = some(
    {
        "16x16": (1, 640, 16, 16),
        "32x32": (1, 640, 32, 32),
        "64x64": (1, 320, 64, 64),
        "128x128": (1, 320, 128, 128),
        "256x256": (1, 160, 256, 256),
    }
)
