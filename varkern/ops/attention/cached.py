"""Attention of next-scale generation: the tokens of one scale see those of the earlier scales, kept in a cache, and
each other, without a mask (arXiv 2404.02905, section 3.2).

    out_i = Σ_j softmax_j(q_i · k_j · softmax_scale) v_j,    j < position + n

A step starts from the qkv projection, as ``block_causal_attention_qkv`` does, and writes the keys and values of its n
tokens into memory taken once for a generation; the scales one after another give what that op gives for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varkern.ops._op import Op
from varkern.ops.attention.reference import attention_reference, normalize_qk_reference
from varkern.ops.backends import DTYPE_CODES, dense_last_axis, dtype_why_not, extension, pointer, stream

__all__ = ["cached_attention", "cached_attention_reference"]

_CODES = {**DTYPE_CODES, torch.float64: 3}
_CUDA_WIDTHS = (32, 64, 128)  # of heads, that the CUDA kernels are compiled for

# The CUDA kernels cut the keys into parts where a warp for every 16 queries would leave multiprocessors idle. A part
# has keys enough to hide what adding up the parts costs. Nothing here looks at the device: bits depend on shapes alone.
_WARPS, _WARP_QUERIES, _MIN_KEYS = 1024, 16, 512


def _example(device: torch.device, dtype: torch.dtype) -> tuple[Tensor | float | None, ...]:
    qkv, cache = (torch.zeros(s, device=device, dtype=dtype) for s in ((1, 4, 3, 1, 64), (2, 1, 1, 8, 64)))
    return qkv, cache, 4, None, None, None, 0.125


_OP = Op(
    "cached_attention(Tensor qkv, Tensor(a!) cache, SymInt position, Tensor? q_bias, Tensor? v_bias, "
    "Tensor? log_scale, float softmax_scale) -> Tensor",
    ("cuda", "cpu"),
    _example,
    no_gradient="train through block_causal_attention_qkv",
)


@_OP.reference
def cached_attention_reference(
    qkv: Tensor,
    cache: Tensor,
    position: int,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """``cached_attention`` in plain PyTorch; same arguments, effect and result."""
    n, _, H, D = qkv.shape[1:]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if q_bias is not None:
        q = q + q_bias.to(q.dtype).view(H, 1, D)
    if v_bias is not None:
        v = v + v_bias.to(v.dtype).view(H, 1, D)
    if log_scale is not None:
        q, k = normalize_qk_reference(q, k, log_scale.view(H, 1, 1))
    end = position + n
    cache[0, :, :, position:end], cache[1, :, :, position:end] = k, v
    seen = cache[:, :, :, :end]
    return attention_reference(q.to(v.dtype), seen[0], seen[1], None, softmax_scale).transpose(1, 2).contiguous()


def cached_attention(
    qkv: Tensor,
    cache: Tensor,
    position: int,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """Softmax attention of the n tokens of a scale over the cache and themselves; they are appended to the cache.

    Args:
        qkv: (B, n, 3, H, D), the projection without its bias, as ``linear(x).view(B, n, 3, H, D)``; any strides but
            for D. float32, float16, bfloat16; on the CPU float64 too.
        cache: (2, B, H, N, D), contiguous, of qkv's dtype: keys, as they are multiplied, and values, with their bias,
            of the positions before ``position``. Those of [position, position + n) are written; the rest is not read.
        position: how many tokens the cache holds; position + n is at most N.
        q_bias, v_bias: (H * D,), added to q and v; or None.
        log_scale: log of each head's temperature, H elements of any shape: q and k are divided by their L2 norms
            (at least 1e-12) and q is multiplied by ``exp(min(log_scale, log 100))``. None: neither.
        softmax_scale: of the scores.

    Returns:
        (B, n, H, D), contiguous, of qkv's dtype. Accumulation is float32 (float64 for float64). The same bits for the
        same shapes and values, whatever the device's size and the number of threads.

    For inference: raises ``RuntimeError`` where a gradient would be recorded, or where the backend asked for cannot
    serve, ``ValueError`` for shapes, dtypes or devices that do not fit. Nothing is written then.
    """
    return _OP(qkv, cache, position, q_bias, v_bias, log_scale, softmax_scale)


@_OP.check
def _check(
    qkv: Tensor,
    cache: Tensor,
    position: int,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    softmax_scale: float,
) -> None:
    if qkv.dim() != 5 or qkv.size(2) != 3 or 0 in qkv.shape[1:]:
        raise ValueError(f"cached_attention: qkv has shape {tuple(qkv.shape)}, give (B, n, 3, H, D) with n, H, D > 0.")
    B, n, _, H, D = qkv.shape
    if cache.dim() != 5 or (*cache.shape[:3], cache.size(4)) != (2, B, H, D):
        raise ValueError(
            f"cached_attention: cache has shape {tuple(cache.shape)}, give (2, {B}, {H}, N, {D}) for qkv of shape "
            f"{tuple(qkv.shape)}."
        )
    if cache.dtype != qkv.dtype or cache.device != qkv.device:
        raise ValueError(
            f"cached_attention: cache is {cache.dtype} on {cache.device} and qkv {qkv.dtype} on {qkv.device}, give "
            "them one dtype and device."
        )
    if not cache.is_contiguous():
        raise ValueError(f"cached_attention: cache has strides {cache.stride()}, give a contiguous tensor.")
    if not 0 <= position <= cache.size(3) - n:
        raise ValueError(
            f"cached_attention: position is {position}, give one from 0 to {cache.size(3) - n} for {n} tokens and a "
            f"cache of {cache.size(3)}."
        )
    for name, tensor, numel in (("q_bias", q_bias, H * D), ("v_bias", v_bias, H * D), ("log_scale", log_scale, H)):
        if tensor is None:
            continue
        if tensor.numel() != numel:
            raise ValueError(
                f"cached_attention: {name} has shape {tuple(tensor.shape)}, give {numel} elements for {H} heads of {D}."
            )
        if tensor.device != qkv.device:
            raise ValueError(f"cached_attention: {name} is on {tensor.device} and qkv on {qkv.device}, use one device.")


@_OP.limits
def _limits(backend: str, qkv: Tensor, cache: Tensor | None = None, *_: object) -> str | None:
    if backend == "cpu":
        return None if qkv.dtype == torch.float64 else dtype_why_not(qkv)
    if qkv.size(4) not in _CUDA_WIDTHS:
        return f"heads are {qkv.size(4)} wide and its kernels take {', '.join(map(str, _CUDA_WIDTHS))}"
    if cache is not None and cache.data_ptr() % 16:
        return "cache begins at an address that is no multiple of 16 bytes, and its kernels write 16 bytes at a time"
    return dtype_why_not(qkv)


@_OP.empty
def _empty(qkv: Tensor, *rest: object) -> Tensor:
    B, n, _, H, D = qkv.shape
    return qkv.new_empty((B, n, H, D))


@_OP.flops
def _flops(a: Any) -> int:
    B, n, _, H, D = a.qkv
    return 4 * B * H * D * n * (a.position + n)


@_OP.kernels
def _launch(
    backend: str,
    qkv: Tensor,
    cache: Tensor,
    position: int,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    log_scale: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    B, n, _, H, D = qkv.shape
    out, q = qkv.new_empty((B, n, H, D)), qkv.new_empty((B, H, n, D))
    if B == 0:
        return out
    qkv = _aligned(qkv) if backend == "cuda" else dense_last_axis(qkv)
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    prologue = [None if t is None else t.detach().to(wide).contiguous() for t in (q_bias, v_bias, log_scale)]
    extra: tuple[int, ...] = ()
    if backend == "cuda":
        prologue = [t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in prologue]
        splits = _splits(B * H, n, position + n)
        workspace = qkv.new_empty((splits, B * H * n, D + 2) if splits > 1 else 0, dtype=torch.float32)
        extra = workspace.data_ptr(), splits, *stream(qkv)
    extension(backend).cached_attention(
        *(qkv.data_ptr(), *map(pointer, prologue)),
        *(cache.data_ptr(), q.data_ptr(), out.data_ptr(), B, n, H, D, cache.size(3), position),
        *(qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3), _CODES[qkv.dtype], softmax_scale),
        *extra,
    )
    return out


def _aligned(qkv: Tensor) -> Tensor:
    """The tensor itself where the CUDA kernels can move its rows 16 bytes at a time, else a contiguous copy."""
    elements = 16 // qkv.element_size()
    steps = (stride for stride, size in zip(qkv.stride()[:4], qkv.shape[:4], strict=True) if size > 1)
    whole = qkv.stride(4) == 1 and qkv.data_ptr() % 16 == 0 and all(step % elements == 0 for step in steps)
    return qkv if whole else qkv.clone(memory_format=torch.contiguous_format)


def _splits(heads: int, n: int, keys: int) -> int:
    """Into how many parts the CUDA kernels cut the keys."""
    warps = heads * -(-n // _WARP_QUERIES)
    return max(1, min(_WARPS // warps, keys // _MIN_KEYS))
