"""Where two correct implementations may choose differently, and the proof that the choices are within rounding.

A code or token is an argmin or argmax. On other arithmetic it may be another one, but only where float64 finds the two
as near to one another as the arithmetic's error: these functions find the first difference of each image, and fail
unless it is such a tie. What follows a tie has no common history, and is not compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from in_order import InOrder
from torch import Tensor

import varkern
from varkern.engine import reference
from varkern.ops import sampling, use_backend

TOLERANCE = 2e-5  # of f_hats of size 1: sums of some 300 products over a few scales, in any order


def assert_same_codes(
    features: Tensor,
    codebook: Tensor,
    sizes: Sequence[tuple[int, int]],
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    f_hats: Sequence[Tensor],
    cosine: bool = False,
    features_off: float = 0.0,
) -> Tensor:
    """Indices (B, n_k) of each scale; which images have the same ones, (B,): the others differ first in a tie.

    The distances are taken in float64 from the residual of ``want``, whose f_hats are given. What float32 may be off:
    sums of Cv terms in any order, twice with lengths that are sums, and the residual by the tolerance of f_hats and by
    what ``got``'s features are off.
    """
    same = torch.ones(want[0].size(0), dtype=torch.bool)
    for k, size in enumerate(sizes):
        fresh = (got[k] != want[k]).any(1).cpu() & same
        for b in fresh.nonzero().flatten().tolist():
            rest = features[b : b + 1].double() - (f_hats[k - 1][b : b + 1].double() if k else 0)
            z = F.interpolate(rest, size=size, mode="area")[0].flatten(1).T
            codes, off = codebook.double(), (TOLERANCE * (k > 0) + features_off) * codebook.size(1) ** 0.5
            if cosine:
                off, z, codes = off / z.norm(dim=1), F.normalize(z), F.normalize(codes)
            a, c = (codes[idx[b]] for idx in (got[k], want[k]))
            lengths = sum((z.norm(dim=1) + code.norm(dim=1)).square() for code in (a, c))
            bound = (1 + cosine) * (codebook.size(1) + 3) * 2.0**-24 * lengths + 2 * off * (a - c).norm(dim=1)
            gap = (z - a).square().sum(1) - (z - c).square().sum(1)
            assert (gap.abs() <= bound).all(), f"image {b}, scale {k}: not a tie"
        same &= ~fresh
    return same


def justified(tokens: Tensor, x: Tensor, noise: Tensor, top_k: int, top_p: float, off: Tensor | float = 0.0) -> Tensor:
    """Which tokens (rows,) are the draw in exact arithmetic, but for codes whose place is within rounding of another's.

    x: float64 logits (rows, V) after guidance; noise: (rows, V). off, a number or (rows, 1): what each of the drawer's
    logits may be off.
    """
    drawn = tokens.reshape(-1, 1)
    error = (x.shape[1] / 2 + 128) * 2.0**-24 + 2 * off  # of a float32 sum of V terms, and of the exponentials
    kth = x.topk(top_k)[0][:, -1:] if top_k else torch.full_like(x[:, :1], -torch.inf)
    possible, certain = x >= kth - 2 * off, x >= kth + 2 * off
    if top_p:
        ascending, order = x.sort(-1)
        p = x.masked_fill(~possible, -torch.inf).softmax(-1)
        cumulated = F.pad(p.gather(-1, order).cumsum(-1), (1, 0))
        below = cumulated.gather(-1, torch.searchsorted(ascending, x - 2 * off))
        up_to = cumulated.gather(-1, torch.searchsorted(ascending, x + 2 * off, right=True))
        largest = x >= x.amax(-1, keepdim=True) - 2 * off
        possible &= (up_to * (1 + error) > 1 - top_p) | largest
        certain &= (below + p) * (1 - error) > 1 - top_p
    score = x - x.amax(-1, keepdim=True) - noise.double().log()
    ahead = score.masked_fill(~certain, -torch.inf).amax(-1, keepdim=True) - score.gather(-1, drawn)
    return (possible.gather(-1, drawn) & (ahead <= 2e-5 + 2 * off)).squeeze(1)


class _Seen(Exception):
    """A replay has come as far as it is needed."""


def _replay(run: Callable[[varkern.VAR], object], var: varkern.VAR, tokens: Sequence[Tensor], k: int) -> list[Tensor]:
    """The guided logits (B, n, V) and the noise (B * n, V) of scale k, where the tokens before are the given ones."""
    seen: list[Tensor] = []

    class Forced:
        scale = 0

        def __getattr__(self, name: str) -> object:
            return getattr(sampling, name)

        def guided_logits_reference(self, logits: Tensor, guidance: float | Tensor) -> Tensor:
            seen[:] = [sampling.guided_logits_reference(logits, guidance)]
            return seen[0].clone()

        def sample_tokens_reference(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
            B, n, V = logits.shape
            seen.append(sampling.draw_noise(B * n, V, "cpu", generator))
            if self.scale == k:
                raise _Seen
            self.scale += 1
            return tokens[self.scale - 1]

        def smooth_codes_reference(self, logits: Tensor, *rest: object) -> Tensor:
            return sampling.smooth_codes_reference(logits.float(), *rest)  # whose noise is float32's

    try:
        with use_backend("reference"), mock.patch.object(reference, "ops", Forced()):
            run(var)
    except _Seen:
        return seen
    raise AssertionError(f"there is no scale {k}")


def assert_same_draws(
    run: Callable[[varkern.VAR], object],
    var: varkern.VAR,
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    top_k: int = 0,
    top_p: float = 0.0,
) -> Tensor:
    """Tokens (B, n_k) of each scale; which images have the same ones, (B,): the others differ first in a tie.

    run: the call that drew, of any model. In a tie both drawers' tokens are justified by the logits in float64 that
    follow from their common history, each logit off by at most twice what plain float32 arithmetic is.
    """
    same = torch.ones(want[0].size(0), dtype=torch.bool)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        fresh = (a != b).any(1) & same
        if fresh.any():
            exact, noise = _replay(run, copy.deepcopy(var).double(), want, k)
            with InOrder():
                plain, _ = _replay(run, var, want, k)
            off = 2 * (plain.double() - exact).abs().amax((1, 2))
            rows = a.shape[1] * torch.arange(len(a))[:, None] + torch.arange(a.shape[1])
            for i in fresh.nonzero().flatten().tolist():
                for tokens in (a[i], b[i]):
                    is_drawn = justified(tokens, exact[i], noise[rows[i]], top_k, top_p, off[i])
                    assert is_drawn.all(), f"image {i}, scale {k}: {tokens[~is_drawn].tolist()} not within rounding"
        same &= ~fresh
    return same
