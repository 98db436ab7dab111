"""Zero-shot editing with a class-conditional model: in-painting, out-painting, class-conditional editing.

A part of an image is kept, the rest is generated; no training is involved (VAR, arXiv 2404.02905, section 5.3).

>>> import varkern
>>> var = varkern.load()
>>> edited = varkern.edit.inpaint(var, images, box=(0.25, 0.25, 0.75, 0.75), seed=0).images
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varkern.engine import Generation, Keep, generate
from varkern.engine.arguments import check_integer, check_model, described
from varkern.models.var import VAR

Box = tuple[float, float, float, float]

__all__ = ["Box", "box_mask", "class_edit", "inpaint", "outpaint"]


def box_mask(side: int, box: Box) -> Tensor:
    """(side, side) float mask, 1 inside ``box`` = (top, left, bottom, right), fractions of the image in [0, 1].

    Edges are rounded to whole tokens. Raises ValueError where the box is empty or leaves the image.
    """
    side = check_integer("side", side, 1, 2**15)
    edges = list(box) if isinstance(box, Iterable) else []
    if len(edges) != 4 or not all(isinstance(edge, int | float | np.integer | np.floating) for edge in edges):
        raise ValueError(f"box must be four numbers (top, left, bottom, right), fractions of the image; got {box!r}")
    top, left, bottom, right = edges
    if not (all(-1 <= edge <= 1 for edge in edges) and 0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(
            f"box must be (top, left, bottom, right) with 0 <= top < bottom <= 1, and left < right; got {box}"
        )
    rows, columns = slice(round(top * side), round(bottom * side)), slice(round(left * side), round(right * side))
    mask = torch.zeros(side, side, dtype=torch.float32, device="cpu")
    mask[rows, columns] = 1
    if not mask.any():
        raise ValueError(f"box {box} holds no token of a {side}x{side} map; make it larger")
    return mask


def _region(var: VAR, box: Box | None, mask: Tensor | None) -> Tensor:
    """The region (p_K, p_K) or (B, p_K, p_K) that a box or a mask of any size marks, in [0, 1]."""
    check_model(var)
    side = var.patch_nums[-1]
    if (box is None) == (mask is None):
        raise ValueError("name the region by either box=(top, left, bottom, right) or mask, not both")
    if box is not None:
        return box_mask(side, box).to(var.lvl_1L.device)
    if not isinstance(mask, Tensor) or mask.layout is not torch.strided or mask.is_complex() or mask.is_meta:
        raise TypeError(f"mask must be a dense tensor of numbers, got {described(mask)}")
    if mask.ndim not in (2, 3) or max(mask.shape, default=0) > 2**15:
        raise ValueError(f"mask must be (H, W) or (B, H, W), got {tuple(mask.shape)}")
    region = mask.to(device=var.lvl_1L.device, dtype=torch.float32)
    if region.numel() == 0 or not bool(((region >= 0) & (region <= 1)).all()):
        raise ValueError("mask values must be in [0, 1], 1 inside the region")
    if region.shape[-2:] == (side, side):
        return region
    planes = region.reshape(-1, 1, *region.shape[-2:])
    planes = F.interpolate(planes, size=(side, side), mode="area")
    return planes.reshape(*region.shape[:-2], side, side)


def _edit(
    var: VAR,
    images: Tensor,
    keep: Tensor,
    label: int | Tensor,
    seed: int | None,
    cfg: float,
    top_k: int,
    top_p: float,
    more_smooth: bool,
) -> Generation:
    vae = var.vae_proxy[0]
    vae.check_images(images)
    if keep.ndim == 3 and keep.shape[0] != images.shape[0]:
        raise ValueError(f"mask holds {keep.shape[0]} regions for {images.shape[0]} images; pass one, or one an image")
    if images.numel() and not (images.min() >= -1 and images.max() <= 1):  # nor NaN
        raise ValueError(f"images must be in [-1, 1], got {images.min():.3g} to {images.max():.3g}")
    with torch.no_grad():
        tokens = vae.img_to_idxBl(images)
    return generate(
        var,
        images.shape[0],
        label,
        seed,
        cfg=cfg,
        top_k=top_k,
        top_p=top_p,
        more_smooth=more_smooth,
        keep=Keep(tokens, keep),
    )


def inpaint(
    var: VAR,
    images: Tensor,
    box: Box | None = None,
    mask: Tensor | None = None,
    *,
    seed: int | None = None,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
) -> Generation:
    """Generate the inside of a region anew, without a class, and keep the outside.

    Args:
        images: (B, in_channels, H, W) in [-1, 1], of the model's size.
        box: (top, left, bottom, right), fractions of the image in [0, 1].
        mask: instead of a box, (H, W) or (B, H, W) in [0, 1], 1 inside the region, of any size.
        seed, cfg, top_k, top_p, more_smooth: see `VAR.autoregressive_infer_cfg`.

    Raises ValueError where an argument is outside its domain.
    """
    keep = 1 - _region(var, box, mask)
    return _edit(var, images, keep, var.num_classes, seed, cfg, top_k, top_p, more_smooth)


def outpaint(
    var: VAR,
    images: Tensor,
    box: Box | None = None,
    mask: Tensor | None = None,
    *,
    seed: int | None = None,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
) -> Generation:
    """Keep the inside of a region and generate the outside anew, without a class; arguments as for `inpaint`."""
    keep = _region(var, box, mask)
    return _edit(var, images, keep, var.num_classes, seed, cfg, top_k, top_p, more_smooth)


def class_edit(
    var: VAR,
    images: Tensor,
    label: int | Tensor,
    box: Box | None = None,
    mask: Tensor | None = None,
    *,
    seed: int | None = None,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
) -> Generation:
    """Generate the inside of a region anew as class ``label`` (an int, or (B,)); other arguments as for `inpaint`."""
    keep = 1 - _region(var, box, mask)
    return _edit(var, images, keep, label, seed, cfg, top_k, top_p, more_smooth)
