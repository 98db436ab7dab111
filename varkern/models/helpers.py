"""Drawing tokens as code written for the published models does it by hand, in plain PyTorch."""

import torch
from torch import Tensor

from varkern.ops.sampling import filter_logits_reference_

__all__ = ["gumbel_softmax_with_rng", "sample_with_top_k_top_p_"]


def sample_with_top_k_top_p_(
    logits_BlV: Tensor, top_k: int = 0, top_p: float = 0.0, rng: torch.Generator | None = None, num_samples: int = 1
) -> Tensor:
    """Draw from logits (B, l, V), which are filtered in place -> tokens (B, l, abs(num_samples)) int64.

    top_k keeps the k largest, top_p then the smallest set of at least that probability; values <= 0 are off. A negative
    ``num_samples`` draws without replacement. rng: the generator, None for the global one.
    """
    B, n, V = logits_BlV.shape
    filter_logits_reference_(logits_BlV, top_k, top_p)
    p, count = logits_BlV.softmax(dim=-1).view(B * n, V), abs(num_samples)
    return torch.multinomial(p, count, replacement=num_samples >= 0, generator=rng).view(B, n, count)


def gumbel_softmax_with_rng(
    logits: Tensor,
    tau: float = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    rng: torch.Generator | None = None,
) -> Tensor:
    """`torch.nn.functional.gumbel_softmax` with noise from a generator; None: the global one (arXiv 1611.01144).

    softmax((logits + g) / tau), g = -log(Exponential(1)); with ``hard`` its one-hot maximum, with the gradient of the
    soft result. ``eps`` has no effect.
    """
    noise = torch.empty_like(logits, memory_format=torch.legacy_contiguous_format).exponential_(generator=rng)
    soft = ((logits - noise.log()) / tau).softmax(dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(logits, memory_format=torch.legacy_contiguous_format)
    one_hot.scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft
