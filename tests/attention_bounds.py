"""What values and gradients of attention are compared by: plain arithmetic, and the roundings of flash attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from in_order import assert_as_accurate
from torch import Tensor


def value_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    present = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, present, grad.to(out.dtype))]


NAMES = ("value", "gradient of qkv", "gradient of q_bias", "gradient of v_bias", "gradient of log_scale")


def assert_all_as_accurate(
    got: list[Tensor], plainly: list[Tensor], exact: list[Tensor], beside: list[float] | None = None
) -> None:
    for name, a, b, c, more in zip(NAMES, got, plainly, exact, beside or [0.0] * 5, strict=False):
        assert_as_accurate(name, a, b, c, more / torch.finfo(torch.float32).eps)


def beside_plain(
    heads: Callable[..., tuple[Tensor, Tensor]],
    doubles: list[Tensor],
    terms: Tensor,
    eps: float,
    mask: Tensor,
    scale: float,
) -> list[float]:
    """What flash attention's backward pass rounds that plain attention does not, in value (0) and gradients.

    Its delta_i = grad_out_i . out_i stands for the sum over j of P_ij dP_ij. What it is off by, independent roundings
    of the elements of out and those of a float32 sum of ``terms`` (B, H, L, D), is multiplied by P_i in the gradient
    of the scores; P_i is the gradient of lse_i, so that it shows in the results as if it were the gradient of lse_i.
    heads: (q, k) of the doubles, (B, H, L, D); mask: (L, L), which is added; scale: of the scores before it.
    """
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in doubles]
    q, k = heads(*leaves)
    lse = (q @ k.mT * scale + mask).logsumexp(-1)
    off = eps * terms.norm(dim=-1) + torch.finfo(torch.float32).eps * terms.abs().sum(-1)
    present = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(lse, present, off.to(lse.dtype), allow_unused=True)
    return [0.0, *(0.0 if grad is None else float(grad.abs().max()) for grad in grads)]
