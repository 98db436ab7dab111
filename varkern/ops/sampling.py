"""Drawing tokens from logits: classifier-free guidance, top-k, top-p, the draw, and the smooth relaxation.

A draw of one sample is ``argmax(p / q)`` with q ~ Exponential(1): so ``torch.multinomial`` computes it. With q drawn by
PyTorch's generator, a seed gives the same tokens whatever computes the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varkern.ops._op import Op
from varkern.ops.backends import DTYPE_CODES, dense_last_axis, dtype_why_not, extension, stream, transformed
from varkern.ops.checks import check_device

__all__ = [
    "draw_noise",
    "filter_logits",
    "filter_logits_reference_",
    "guided_logits_reference",
    "sample_tokens",
    "sample_tokens_reference",
    "smooth_codes_reference",
]

_MAX_V = 1 << 24  # as many categories as torch.multinomial takes


def _example_filter(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | float | None, ...]:
    return torch.zeros(2, 4, 64, device=device, dtype=dtype), 1.5, 3, 0.9


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | float | None, ...]:
    logits, *settings = _example_filter(device, dtype)
    return logits, torch.ones(4, 64, dtype=torch.float32, device=device), *settings


_PARAMETERS = "float? guidance, int top_k, float top_p"
_OP = Op(
    f"sample_tokens(Tensor logits, Tensor noise, {_PARAMETERS}) -> Tensor", ("cuda", "cpu"), _example, detached=True
)
_FILTER = Op(f"filter_logits(Tensor logits, {_PARAMETERS}) -> Tensor", ("cpu",), _example_filter, detached=True)


def guided_logits_reference(logits: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance: logits (2B, n, V), conditional rows first -> ``(1 + t) * cond - t * uncond``.

    guidance: t, or (B, 1, 1).
    """
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
    logits: Tensor, codebook: Tensor, ratio: float, noise: Tensor | torch.Generator | None = None
) -> Tensor:
    """``more_smooth``: a Gumbel-softmax mixture of codes in place of the drawn one (for pictures, not for metrics).

    logits (B, n, V), codebook (V, Cv) -> (B, n, Cv). ``ratio`` is k / (K - 1); the temperature falls with it. ``noise``
    as in ``sample_tokens``.
    """
    tau = max(0.27 * (1 - ratio * 0.95), 0.005)
    if not isinstance(noise, Tensor):
        B, n, V = logits.shape
        noise = draw_noise(B * n, V, logits.device, noise)
    return ((logits * (1 + ratio) - noise.view(logits.shape).log()) / tau).softmax(dim=-1) @ codebook


def draw_noise(rows: int, V: int, device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """Exponential(1) noise (rows, V) float32: what ``torch.multinomial`` draws inside for one sample a row."""
    return torch.empty(rows, V, dtype=torch.float32, device=device).exponential_(1, generator=generator)


def sample_tokens(
    logits: Tensor,
    noise: Tensor | torch.Generator | None = None,
    guidance: float | None = None,
    top_k: int = 0,
    top_p: float = 0.0,
) -> Tensor:
    """Guidance, top-k, top-p, softmax and one categorical draw a row, without a sort or an intermediate (rows, V).

    Args:
        logits: (B, n, V), or with ``guidance`` (2B, n, V), conditional rows first; float32, float16 or bfloat16, all
            computed in float32. Any strides of the first two axes; a strided last axis is copied first. -inf excludes.
        noise: Exponential(1) noise (B * n, V) float32 from ``draw_noise``, or the generator to draw it with, or
            ``None`` for the global one. Positive.
        guidance: t in ``(1 + t) * cond - t * uncond`` (classifier-free guidance, arXiv 2207.12598), or ``None``.
        top_k: keep the logits not below the k-th largest, so equal ones too; 0 keeps all.
        top_p: then drop, in ascending order, the tail whose cumulated probability is at most ``1 - top_p``; the largest
            always stays (nucleus sampling, arXiv 1904.09751); 0 drops none.

    Returns:
        (B, n) int64, equivalent to

        >>> logits = filter_logits_reference_(guided_logits_reference(logits.float(), guidance), top_k, top_p)
        >>> tokens = sample_tokens_reference(logits, generator)

        On the CPU the tokens are the same: where rounding could decide, PyTorch does. On CUDA sums are added in another
        order, so a token may differ where two codes are equally likely within rounding. There is no gradient.

    Raises ``ValueError`` for shapes, dtypes, devices and parameters that do not fit, and ``RuntimeError`` where a row
    has no distribution (NaN, +inf, or -inf alone), as ``torch.multinomial`` does. Only the CPU looks: on CUDA, where
    looking would wait for the device, such a row gives some token in [0, V).
    """
    if not isinstance(noise, Tensor):
        # Before the generator's state changes.
        _OP.check_types((logits, logits, guidance, top_k, top_p))
        _check_parameters(logits, guidance, top_k, top_p)
        if noise is not None and not isinstance(noise, torch.Generator):
            raise TypeError(f"sample_tokens: noise is {type(noise).__name__}, give a tensor, a generator or None.")
        if noise is not None and noise.device.type != logits.device.type:
            raise ValueError(f"sample_tokens: noise is a generator on {noise.device} and logits on {logits.device}.")
        B, n, V = _shape(logits, guidance)
        noise = draw_noise(B * n, V, logits.device, noise)
    return _OP(logits, noise, guidance, top_k, top_p)


def filter_logits(logits: Tensor, guidance: float | None = None, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """The guided logits, -inf where top-k and top-p exclude them: what ``sample_tokens`` draws from.

    For what needs the distribution itself, as ``smooth_codes_reference`` does. Arguments and ``ValueError`` as in
    ``sample_tokens``. Returns (B, n, V) float32, on the CPU bit for bit

    >>> filter_logits_reference_(guided_logits_reference(logits.float(), guidance), top_k, top_p)

    without its sort; on other devices that itself. NaN is passed on. There is no gradient.
    """
    return _FILTER(logits, guidance, top_k, top_p)


def _shape(logits: Tensor, guidance: float | None) -> tuple[int, int, int]:
    """B, n and V."""
    B, n, V = logits.shape
    return B if guidance is None else B // 2, n, V


@_FILTER.check
def _check_parameters(logits: Tensor, guidance: float | None, top_k: int, top_p: float) -> None:
    if logits.dim() != 3 or not 0 < logits.shape[2] <= _MAX_V:
        raise ValueError(
            f"token sampling: logits have shape {tuple(logits.shape)}, give (B, n, V) with V from 1 to {_MAX_V}."
        )
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"token sampling: guidance is {guidance}, give a finite number, or None to use all rows.")
    if guidance is not None and logits.shape[0] % 2:
        raise ValueError(
            f"token sampling: logits have shape {tuple(logits.shape)}, with guidance give (2B, n, V), the conditional "
            "rows first."
        )
    if not 0 <= top_k <= logits.shape[2]:
        raise ValueError(f"token sampling: top_k is {top_k}, give an integer in [0, {logits.shape[2]}] (0: off).")
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"token sampling: top_p is {top_p}, give a number in [0, 1] (0: off).")


@_OP.check
def _check(logits: Tensor, noise: Tensor, guidance: float | None, top_k: int, top_p: float) -> None:
    _check_parameters(logits, guidance, top_k, top_p)
    B, n, V = _shape(logits, guidance)
    if noise.shape != (B * n, V) or noise.dtype != torch.float32:
        raise ValueError(
            f"sample_tokens: noise is {noise.dtype} {tuple(noise.shape)}, give torch.float32 {(B * n, V)} for logits "
            f"of shape {tuple(logits.shape)} {'without' if guidance is None else 'with'} guidance."
        )
    check_device("sample_tokens", "logits", logits, noise=noise)


def _raise_without_distribution(row: int, n: int) -> None:
    raise RuntimeError(
        f"sample_tokens: the logits of batch row {row // n}, position {row % n} have no distribution to draw from: "
        "NaN, +inf, or -inf alone. Look for an overflow in what computes them."
    )


@_FILTER.reference
def _filter_reference(logits: Tensor, guidance: float | None, top_k: int, top_p: float) -> Tensor:
    """The reference ops: (B, n, V) float32."""
    logits = logits.to(torch.float32, copy=guidance is None)  # the filter works in place
    if guidance is not None:
        logits = guided_logits_reference(logits, guidance)
    return filter_logits_reference_(logits, top_k, top_p)


@_OP.reference
def _draw_reference(logits: Tensor, noise: Tensor, guidance: float | None, top_k: int, top_p: float) -> Tensor:
    """The reference ops with noise that has been drawn; (B, n) int64."""
    p = _filter_reference(logits, guidance, top_k, top_p).softmax(dim=-1)
    looks = p.device.type == "cpu" and not transformed()  # a batched value cannot be looked at
    if looks and bool((nan := p.amax(dim=-1).isnan().view(-1)).any()):
        _raise_without_distribution(int(nan.nonzero()[0]), p.shape[1])
    return (p / noise.view(p.shape)).argmax(dim=-1)


def _rows(logits: Tensor, guidance: float | None, rows: Tensor) -> Tensor:
    """What the given rows of the result are made of: (rows, 1, V), or with guidance (2 * rows, 1, V)."""
    B, n, _ = _shape(logits, guidance)
    b, i = rows // n, rows % n
    chosen = logits[b, i] if guidance is None else torch.cat((logits[b, i], logits[b + B, i]))
    return chosen.unsqueeze(1)


@_OP.limits
@_FILTER.limits
def _limits(backend: str, logits: Tensor, *_: object) -> str | None:
    return dtype_why_not(logits)


@_OP.empty
def _empty(logits: Tensor, noise: Tensor, guidance: float | None, top_k: int, top_p: float) -> Tensor:
    return logits.new_empty(_shape(logits, guidance)[:2], dtype=torch.int64)


@_FILTER.empty
def _empty_filter(logits: Tensor, guidance: float | None, top_k: int, top_p: float) -> Tensor:
    return logits.new_empty(_shape(logits, guidance), dtype=torch.float32)


@_OP.kernels
def _launch(backend: str, logits: Tensor, noise: Tensor, guidance: float | None, top_k: int, top_p: float) -> Tensor:
    tokens = _empty(logits, noise, guidance, top_k, top_p)
    if tokens.numel() == 0:
        return tokens
    B, n, V = _shape(logits, guidance)
    logits, noise = dense_last_axis(logits), noise.contiguous()
    status = torch.zeros(2, dtype=torch.int64, device="cpu")  # filled by the CPU's kernel alone
    extension(backend).sample_tokens(
        *(logits.data_ptr(), noise.data_ptr(), tokens.data_ptr(), status.data_ptr(), B, n, V),
        *(logits.stride(0), logits.stride(1), top_k, guidance or 0.0, top_p),
        *(DTYPE_CODES[logits.dtype], guidance is not None),
        *stream(logits),
    )
    undecided, without_distribution = status.tolist()
    if without_distribution:
        _raise_without_distribution(int((tokens.view(-1) == -2).nonzero()[0]), n)
    if undecided:
        rows = (tokens.view(-1) < 0).nonzero().view(-1)
        drawn = _draw_reference(_rows(logits, guidance, rows), noise[rows], guidance, top_k, top_p)
        tokens.view(-1)[rows] = drawn.view(-1)
    return tokens


@_FILTER.kernels
def _launch_filter(backend: str, logits: Tensor, guidance: float | None, top_k: int, top_p: float) -> Tensor:
    out = _empty_filter(logits, guidance, top_k, top_p)
    if out.numel() == 0:
        return out
    logits = dense_last_axis(logits)
    B, n, V = _shape(logits, guidance)
    undecided = logits.new_empty(B * n, dtype=torch.bool)
    extension(backend).filter_logits(
        *(logits.data_ptr(), out.data_ptr(), undecided.data_ptr(), B, n, V, logits.stride(0), logits.stride(1)),
        *(top_k, guidance or 0.0, top_p, DTYPE_CODES[logits.dtype], guidance is not None),
    )
    if (rows := undecided.nonzero().view(-1)).numel():
        out.view(B * n, V)[rows] = _filter_reference(_rows(logits, guidance, rows), guidance, top_k, top_p).squeeze(1)
    return out
