"""Block-causal attention: masked SDPA, SDPA a scale at a time, FlexAttention, flash-attn and varkern.

Masked SDPA is what the reference runs. Left alone on a GPU, PyTorch takes cuDNN's for it on some devices and its own
memory-efficient kernel on others, so that both are measured there, each by its name. Rows count the arithmetic of
visible pairs only, whatever a provider computes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import shapes
import torch
import torch.nn.functional as F
from measure import results_of, settings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from varkern.ops import block_causal_attention, block_causal_attention_qkv, block_causal_attention_qkv_reference
from varkern.ops.attention.peers import peer_attention, why_not_peer

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
HEADS = 2 if settings.smoke else 16
SCHEDULES = list(shapes.some(shapes.SCHEDULES))


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def batch_of(device: torch.device, schedule: str) -> int:
    """2 on a CPU; on a GPU what gives every schedule about the same work as 64 images of 256 px."""
    if settings.smoke:
        return 1
    return 2 if device.type == "cpu" else {"256px": 64, "512px": 8, "1024px": 1}[schedule]


def skip_what_takes_minutes(device: torch.device, schedule: str) -> None:
    if device.type == "cpu" and schedule == "1024px":
        pytest.skip("takes minutes on a CPU")


def prefixes(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """SDPA without a mask, a call a scale: what one can do without a kernel."""
    outs, begin = [], 0
    for length in lengths:
        end = begin + length
        outs.append(F.scaled_dot_product_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], scale=scale))
        begin = end
    return torch.cat(outs, 2)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Flash attention over every pair, by PyTorch's own FA2; left alone, PyTorch may take cuDNN's."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def masked(device: torch.device) -> dict[str, SDPBackend | None]:
    """The kernels of masked SDPA by the names of their providers, the baseline first; None: PyTorch's choice."""
    if device.type != "cuda":
        return {"masked SDPA": None}
    return {
        "masked SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "masked SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    }


def masked_by(
    kernel: SDPBackend | None, lengths: tuple[int, ...], scale: float, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
        return peer_attention("sdpa", q, k, v, lengths, scale)


def runs(function: Attention, q: Tensor) -> bool:
    """Whether a kernel takes such tensors, and has their gradients: what is not built, or too old, raises."""
    try:
        out = function(q, q, q)
        if q.requires_grad:
            torch.autograd.grad(out.sum(), q)
    except torch.cuda.OutOfMemoryError:
        return True  # it does: the record is to say so
    except RuntimeError:
        return False
    return True


def providers(q: Tensor, lengths: tuple[int, ...], scale: float) -> dict[str, Attention]:
    """On a CPU FlexAttention, which has to compile first, only where --compile asks for it."""
    functions: dict[str, Attention] = {}
    for name, kernel in masked(q.device).items():
        function = functools.partial(masked_by, kernel, lengths, scale)
        if runs(function, q):
            functions[name] = function
    functions["SDPA a scale"] = lambda q, k, v: prefixes(q, k, v, lengths, scale)
    for name in ("flex", "flash"):
        slow = name == "flex" and q.device.type == "cpu" and not settings.compile
        if why_not_peer(name, q) is None and not slow:
            functions[name] = lambda q, k, v, name=name: peer_attention(name, q, k, v, lengths, scale)
    if q.device.type == "cuda":  # computes every pair, seen or not
        functions["dense SDPA"] = lambda q, k, v: dense(q, k, v, scale)
    functions["varkern"] = lambda q, k, v: block_causal_attention(q, k, v, lengths=lengths, softmax_scale=scale)
    return functions


# Of the longest path from an element of the projection to one of its gradient, in the dtype of the tensors, as eager
# PyTorch rounds: bias, norm, quotient, temperature, p, out (for its product with the gradient), gradient of the scores,
# of q, then back through temperature, quotient (2) and norm (4). Kernels round less often.
ROUNDINGS = 15


def check(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Results of work in dtype beside those of float32, relatively in the Euclidean norm.

    Every rounding is off by at most half of dtype's eps, and they are independent, so that their sum is far less than
    this bound, which adds them up. That holds for the gradients of biases and temperatures as well, which are float32
    but sums of what was rounded: both a sum of independent terms and its error grow with the root of their number n.
    Sums in float32 are off by sqrt(n) roundings of that. What is compared with is so, too.
    """
    terms = max(t.numel() // t.size(-1) for t in want)  # positions of all heads: no sum has more
    bound = ROUNDINGS * torch.finfo(dtype).eps / 2 + 2 * math.sqrt(terms) * 2.0**-24
    for a, b in zip(got, want, strict=True):
        error, size = (float(torch.linalg.vector_norm(t.double())) for t in (a.double() - b.double(), b))
        assert error <= bound * size, f"off by {error / size:.2e} of its norm, {bound:.2e} at most"


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in tensors]


ATTENTION_SHAPE = (2, 16, "512px")


def training_attention(shape: tuple[int, int, str], backend: str | None) -> Callable[[], list[Tensor]]:
    """Forward and backward on a CPU for (B, H, schedule); under "reference" by masked SDPA."""
    B, H, schedule = shape
    lengths = tuple(p * p for p in shapes.SCHEDULES[schedule])
    torch.manual_seed(0)
    inputs = [t.requires_grad_() for t in torch.randn(3, B, H, sum(lengths), 64).unbind(0)]
    grad = torch.randn_like(inputs[0])

    def call() -> list[Tensor]:
        if backend == "reference":
            out = peer_attention("sdpa", *inputs, lengths, 0.125)
        else:
            out = block_causal_attention(*inputs, lengths=lengths, softmax_scale=0.125)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    return call


@pytest.mark.benchmark(group="block-causal attention")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_attention(compare: Any, device: torch.device, schedule: str, backward: bool) -> None:
    skip_what_takes_minutes(device, schedule)
    lengths, (H, D) = tuple(p * p for p in shapes.SCHEDULES[schedule]), (HEADS, 64)
    B, L, scale = batch_of(device, schedule), sum(lengths), 0.125
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, L, D, device=device, dtype=dtype_of(device)).unbind(0)
    if backward:
        q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    grad = torch.randn_like(q)
    functions = providers(q, lengths, scale)

    def timed(function: Attention, inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], Any]:
        if not backward:
            return lambda: (function(*inputs),)
        return lambda: torch.autograd.grad(function(*inputs), inputs, grad)

    calls = {name: timed(function, (q, k, v), grad) for name, function in functions.items()}
    exact = timed(functools.partial(masked_by, None, lengths, scale), wide((q, k, v)), grad.float())
    want = exact()
    for name, got in results_of(calls).items():
        if name != "dense SDPA":
            check(got, want, q.dtype)
    del got, want
    pairs = sum(n * sum(lengths[: i + 1]) for i, n in enumerate(lengths))
    flop = 4 * D * B * H * pairs * (3.5 if backward else 1)
    with torch.inference_mode(not backward):
        compare(calls, moved=(12 if backward else 4) * q.nbytes, flop=flop, shape=(B, H, L, D), dtype=str(q.dtype))


@pytest.mark.benchmark(group="block-causal attention from the qkv projection, forward and backward")
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "1024px"])
def test_from_the_projection(compare: Any, device: torch.device, schedule: str) -> None:
    """With biases, L2 norms and temperature: what a block of a published model runs."""
    lengths, (H, D) = tuple(p * p for p in shapes.SCHEDULES[schedule]), (HEADS, 64)
    B, L = batch_of(device, schedule), sum(lengths)
    torch.manual_seed(0)
    qkv = torch.randn(B, L, 3, H, D, device=device, dtype=dtype_of(device))
    q_bias, v_bias = torch.randn(2, H * D, device=device).unbind(0)
    log_scale = torch.full((H,), 4.0, device=device).log()
    inputs = [tensor.requires_grad_() for tensor in (qkv, q_bias, v_bias, log_scale)]
    grad = torch.randn(B, L, H, D, device=device, dtype=qkv.dtype)

    def timed(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*inputs, lengths, 1.0), inputs, grad)

    functions = {"reference": block_causal_attention_qkv_reference, "varkern": block_causal_attention_qkv}
    calls = {name: timed(function, inputs, grad) for name, function in functions.items()}
    want = timed(block_causal_attention_qkv_reference, wide(inputs), grad.float())()
    for got in results_of(calls).values():
        check(got, want, qkv.dtype)
    del got, want
    pairs = sum(n * sum(lengths[: i + 1]) for i, n in enumerate(lengths))
    compare(calls, moved=4 * qkv.nbytes, flop=14 * D * B * H * pairs, shape=(B, H, L, D), dtype=str(qkv.dtype))
