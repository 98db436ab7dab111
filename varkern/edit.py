"""Zero-shot editing with a class-conditional model: in-painting, out-painting, class-conditional editing.

A part of an image is kept, the rest is generated; no training is involved (VAR, arXiv 2404.02905, section 5.3).

>>> import varkern
>>> var = varkern.load()
>>> edited = varkern.edit.inpaint(var, images, box=(0.25, 0.25, 0.75, 0.75), seed=0).images
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

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

    Edges are rounded to whole tokens; a box too small for one marks those it touches. Raises ValueError where the box
    is empty or leaves the image.
    """
    side = check_integer("side", side, 1, 2**15)
    rows, columns = box_cells(side, side, box)
    mask = torch.zeros(side, side, dtype=torch.float32, device="cpu")
    mask[rows, columns] = 1
    return mask


def box_cells(height: int, width: int, box: Box) -> tuple[slice, slice]:
    """The rows and columns of a plane that a box, checked as by `box_mask`, marks."""
    edges = list(box) if isinstance(box, Iterable) else []
    if len(edges) != 4 or not all(isinstance(edge, int | float | np.integer | np.floating) for edge in edges):
        raise ValueError(f"box must be four numbers (top, left, bottom, right), fractions of the image; got {box!r}")
    top, left, bottom, right = edges
    if not (all(-1 <= edge <= 1 for edge in edges) and 0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(
            f"box must be (top, left, bottom, right) with 0 <= top < bottom <= 1, and left < right; got {box}"
        )
    return _cells(top, bottom, height), _cells(left, right, width)


def _cells(low: float, high: float, side: int) -> slice:
    """Edges rounded to whole cells; the cells touched where that leaves none."""
    first, last = round(low * side), round(high * side)
    return slice(first, last) if first < last else slice(math.floor(low * side), math.ceil(high * side))


def touched(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., H, W) in [0, 1] -> (..., *size), 1 where a cell holds a part of a pixel of at least 0.5."""
    planes = (mask.reshape(-1, 1, *mask.shape[-2:]) >= 0.5).float()
    return F.adaptive_max_pool2d(planes, size).reshape(*mask.shape[:-2], *size)


def _regions_of(var: VAR, box: Box | None, mask: Tensor | None, outside: bool = False) -> tuple[Tensor, Tensor]:
    """What is generated anew, in [0, 1]: of the last token map (..., p_K, p_K), and of the image (..., H, W)."""
    check_model(var)
    side = var.patch_nums[-1]
    if (box is None) == (mask is None):
        raise ValueError("name the region by either box=(top, left, bottom, right) or mask, not both")
    pixels = side * var.vae_proxy[0].downsample
    if box is not None:
        device = var.lvl_1L.device
        cells, exact = box_mask(side, box).to(device), box_mask(pixels, box).to(device)
        if outside and bool(cells.all()):
            raise ValueError(f"box {box} leaves nothing to generate outside of it; make it smaller")
        return (1 - cells, 1 - exact) if outside else (cells, exact)
    if not isinstance(mask, Tensor) or mask.layout is not torch.strided or mask.is_complex() or mask.is_meta:
        raise TypeError(f"mask must be a dense tensor of numbers, got {described(mask)}")
    if mask.ndim not in (2, 3) or max(mask.shape, default=0) > 2**15:
        raise ValueError(f"mask must be (H, W) or (B, H, W), got {tuple(mask.shape)}")
    region = mask.to(device=var.lvl_1L.device, dtype=torch.float32)
    if region.numel() == 0 or not bool(((region >= 0) & (region <= 1)).all()):
        raise ValueError("mask values must be in [0, 1], 1 inside the region")
    if outside:
        region = 1 - region
    cells = region if region.shape[-2:] == (side, side) else touched(region, (side, side))
    if not bool((cells > 0).flatten(-2).any(-1).all()):
        raise ValueError("the mask leaves nothing to generate; mark a part of the image by 1 and the rest by 0")
    if bool((region == 1).flatten(-2).all(-1).any()):
        raise ValueError("the mask leaves nothing to keep; mark a part of the image by 1 and the rest by 0")
    return cells, touched(region, (pixels, pixels))


def _edit(
    var: VAR,
    images: Tensor,
    regions: tuple[Tensor, Tensor],
    label: int | Tensor,
    seed: int | Sequence[int] | None,
    cfg: float,
    top_k: int,
    top_p: float,
    more_smooth: bool,
    paste_back: bool,
) -> Generation:
    cells, pixels = regions
    made = regenerate(var, images, cells, label, seed, cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth)
    if not paste_back:
        return made
    inside = pixels.unsqueeze(-3) > 0
    return replace(made, images=torch.where(inside, made.images, images.to(made.images).add(1).div(2)))


def regenerate(
    var: VAR,
    images: Tensor,
    cells: Tensor,
    label: int | Tensor,
    seed: int | Sequence[int] | None,
    *,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
) -> Generation:
    """Generate as class ``label`` the tokens of the last map marked by 1 in ``cells``, (p_K, p_K) or (B, p_K, p_K).

    Other arguments as for `inpaint`.
    """
    check_model(var)
    keep, vae = 1 - cells, var.vae_proxy[0]
    vae.check_images(images)
    if keep.ndim == 3 and keep.shape[0] != images.shape[0]:
        raise ValueError(f"mask holds {keep.shape[0]} regions for {images.shape[0]} images; pass one, or one an image")
    if images.numel() and not (images.min() >= -1 and images.max() <= 1):  # nor NaN
        raise ValueError(
            f"images must be in [-1, 1], got {images.min():.3g} to {images.max():.3g}; "
            "scale those in [0, 1] by images * 2 - 1"
        )
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
    seed: int | Sequence[int] | None = None,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
    paste_back: bool = False,
) -> Generation:
    """Generate the inside of a region anew, without a class, and keep the outside.

    Args:
        images: (B, in_channels, H, W) in [-1, 1], of the model's size.
        box: (top, left, bottom, right), fractions of the image in [0, 1].
        mask: instead of a box, (H, W) or (B, H, W) in [0, 1], 1 inside the region, of any size; any token
            whose cell holds a part of what is to be generated is generated.
        seed, cfg, top_k, top_p, more_smooth: see `varkern.generate`.
        paste_back: pixels outside what is generated are those of ``images``.

    Raises ValueError where an argument is outside its domain.
    """
    regions = _regions_of(var, box, mask)
    return _edit(var, images, regions, var.num_classes, seed, cfg, top_k, top_p, more_smooth, paste_back)


def outpaint(
    var: VAR,
    images: Tensor,
    box: Box | None = None,
    mask: Tensor | None = None,
    *,
    seed: int | Sequence[int] | None = None,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
    paste_back: bool = False,
) -> Generation:
    """Keep the inside of a region and generate the outside anew, without a class; arguments as for `inpaint`."""
    regions = _regions_of(var, box, mask, outside=True)
    return _edit(var, images, regions, var.num_classes, seed, cfg, top_k, top_p, more_smooth, paste_back)


def class_edit(
    var: VAR,
    images: Tensor,
    label: int | Tensor,
    box: Box | None = None,
    mask: Tensor | None = None,
    *,
    seed: int | Sequence[int] | None = None,
    cfg: float = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
    paste_back: bool = False,
) -> Generation:
    """Generate the inside of a region anew as class ``label`` (an int, or (B,)); other arguments as for `inpaint`."""
    regions = _regions_of(var, box, mask)
    return _edit(var, images, regions, label, seed, cfg, top_k, top_p, more_smooth, paste_back)
