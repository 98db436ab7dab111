"""Drawing tokens from logits: classifier-free guidance, top-k, top-p, the draw, and the smooth relaxation."""

import torch
from torch import Tensor


def guided_logits_reference(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: logits (2B, n, V), conditional rows first -> ``(1 + t) * cond - t * uncond``."""
    cond, uncond = logits.chunk(2)
    return (1 + guidance) * cond - guidance * uncond


def filter_logits_reference_(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Set to -inf, in place, what top-k and then nucleus filtering exclude from logits (..., V).

    top_k > 0 keeps the logits not below the k-th largest. top_p > 0 drops, in ascending order, the tail whose
    cumulated probability is at most ``1 - top_p``; the largest always stays (nucleus sampling, arXiv 1904.09751).
    """
    if top_k > 0:
        kth = logits.topk(top_k, largest=True, sorted=False, dim=-1)[0].amin(dim=-1, keepdim=True)
        logits.masked_fill_(logits < kth, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1, descending=False)
        drop = ascending.softmax(dim=-1).cumsum_(dim=-1) <= (1 - top_p)
        drop[..., -1] = False
        logits.masked_fill_(drop.scatter(-1, order, drop), -torch.inf)
    return logits


def sample_tokens_reference(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One categorical draw a row: logits (B, n, V) -> (B, n) int64.

    The draw of one sample is ``argmax(p / q)`` with q ~ Exponential(1) over the whole (B * n, V) matrix, in the
    generator's order; that fixes which tokens a seed gives.
    """
    B, n, V = logits.shape
    p = logits.softmax(dim=-1).view(B * n, V)
    return torch.multinomial(p, num_samples=1, replacement=True, generator=generator).view(B, n)


def smooth_codes_reference(
    logits: Tensor, codebook: Tensor, ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """``more_smooth``: a Gumbel-softmax mixture of codes in place of the drawn one (for pictures, not for metrics).

    logits (B, n, V), codebook (V, Cv) -> (B, n, Cv). ``ratio`` is k / (K - 1); the temperature falls with it.
    """
    tau = max(0.27 * (1 - ratio * 0.95), 0.005)
    gumbel = -torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_(generator=generator).log()
    return ((logits * (1 + ratio) + gumbel) / tau).softmax(dim=-1) @ codebook
