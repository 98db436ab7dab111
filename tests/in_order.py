"""Plain float32 arithmetic, the same on every machine: what the errors of kernels are measured against.

How accurate a processor's own libraries are depends on its vectors, on blocking, on the number of threads. So a test
that asks for "at most twice the error of plain float32" computes the other side here, every operation rounded once:

- products of matrices and convolutions: a product and a sum at a time, in the order of the summed axis;
- other sums: runs of 64 numbers in order, and the sums of the runs by halves;
- exp, log, rsqrt, sigmoid and the like, running sums, and interpolation: in float64, rounded once;
- attention: scores and softmax in float32, the probabilities rounded to the dtype before the second product;
- in 16 bits: each of these from float32, its result rounded once.

float64 passes through. What nobody has put in order yet is refused, not left to the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from varkern.ops import reference_forced

aten = torch.ops.aten
RUN = 64


def total(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    """The sum over dims (None: all) in float32: runs of 64 in order, those by halves."""
    axes = sorted({d % max(x.dim(), 1) for d in dims}) if dims else list(range(x.dim()))
    kept = [d for d in range(x.dim()) if d not in axes]
    shape = [1 if d in axes else n for d, n in enumerate(x.shape)] if keepdim else [x.shape[d] for d in kept]
    if not x.numel():
        return torch.zeros(shape)
    n = x.permute(*kept, *axes).reshape(*(x.shape[d] for d in kept), -1) if x.dim() else x.view(1)
    n = F.pad(n.float(), (0, -n.shape[-1] % RUN)).unflatten(-1, (-1, RUN))
    sums = torch.from_numpy(np.add.accumulate(n.detach().numpy(), -1)[..., -1])  # prefixes: it can have no other order
    while sums.shape[-1] > 1:
        sums = F.pad(sums, (0, sums.shape[-1] % 2))
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0].reshape(shape)


def product(a: Tensor, b: Tensor) -> Tensor:
    """(..., M, K) by (..., K, N) in float32, in the order of k."""
    left, right = a.detach().float().numpy(), b.detach().float().numpy()
    out = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), np.float32)
    for k in range(a.shape[-1]):
        out += left[..., k, None] * right[..., k, None, :]
    return torch.from_numpy(out)


def rounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operation in float64, rounded once to the dtype of its first tensor."""

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = next(x.dtype for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point())
        wide = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, (args, kwargs))
        return tree_map_only(Tensor, lambda x: x.to(dtype), function(*wide[0], **wide[1]))

    return run


def _columns(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    return F.unfold(x.double(), weight.shape[2:], padding=padding, stride=stride).float()  # moves, no sums


def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> Tensor:
    assert not transposed
    assert groups == 1
    assert set(dilation) == {1}
    height, width = (
        (n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    )
    out = product(weight.flatten(1), _columns(x, weight, stride, padding)).unflatten(-1, (height, width))
    return (out if bias is None else out + bias.float().view(-1, 1, 1)).to(x.dtype)


def convolution_backward(grad, x, weight, bias_sizes, stride, padding, *rest) -> tuple[Tensor | None, ...]:
    assert set(stride) == {1}
    dilation, transposed, output_padding, groups, mask = rest
    back = [k - 1 - p for k, p in zip(weight.shape[2:], padding, strict=True)]
    flipped = weight.transpose(0, 1).flip(2, 3)
    settings = stride, back, dilation, transposed, output_padding, groups
    grad_x = convolution(grad, flipped, None, *settings) if mask[0] else None
    rows = grad.flatten(2).transpose(0, 1).flatten(1)
    columns = _columns(x, weight, stride, padding).transpose(0, 1).flatten(1)
    grad_weight = product(rows, columns.T).view(weight.shape).to(weight.dtype) if mask[1] else None
    return grad_x, grad_weight, total(grad, (0, 2, 3)).to(grad.dtype) if mask[2] else None


def mean(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    out = total(x, dims, keepdim)
    return (out / (x.numel() / max(out.numel(), 1))).to(dtype or x.dtype)


def moments(x: Tensor, dims: Sequence[int] | None, keepdim: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and variance in float32, in two passes."""
    x = x.float()
    centre = mean(x, dims, True)
    variance = mean((x - centre).square(), dims, keepdim)
    return variance, centre.reshape(variance.shape)


def var_mean(x: Tensor, dims: Sequence[int] | None = None, *, correction: int = 1, keepdim: bool = False) -> Any:
    assert correction == 0
    return tuple(t.to(x.dtype) for t in moments(x, dims, keepdim))


def reciprocal_root(variance: Tensor, eps: float) -> Tensor:
    return (variance + eps).double().rsqrt().float()


def layer_norm(x: Tensor, shape: Sequence[int], weight: None, bias: None, eps: float) -> tuple[Tensor, ...]:
    assert weight is None
    assert bias is None
    assert len(shape) == 1
    variance, centre = moments(x, (-1,))
    rstd = reciprocal_root(variance, eps)
    return ((x.float() - centre) * rstd).to(x.dtype), centre, rstd


def layer_norm_backward(grad, x, shape, centre, rstd, weight, bias, mask) -> tuple[Tensor, None, None]:
    normed, g = (x.float() - centre) * rstd, grad.float()
    grad_x = rstd * (g - mean(g, (-1,), True) - normed * mean(g * normed, (-1,), True))
    return grad_x.to(x.dtype), None, None


def group_norm(x, weight, bias, N, C, HxW, groups, eps) -> tuple[Tensor, ...]:
    cut = x.float().reshape(N, groups, -1)
    variance, centre = moments(cut, (-1,))
    rstd = reciprocal_root(variance, eps)
    out = ((cut - centre) * rstd).view(N, C, -1)
    out = out if weight is None else out * weight.float().view(-1, 1) + bias.float().view(-1, 1)
    out = (
        out.view(x.shape)
        .to(x.dtype)
        .contiguous(memory_format=torch.channels_last if _is_last(x) else torch.contiguous_format)
    )
    return out, centre.view(N, groups), rstd.view(N, groups)


def _is_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    wide = x.float()
    p = (wide - wide.amax(dim, keepdim=True)).double().exp().float()
    return (p / total(p, (dim,), True)).to(x.dtype)


def softmax_backward(grad: Tensor, out: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    g, p = grad.float(), out.float()
    return (p * (g - total(g * p, (dim,), True))).to(dtype)


def logsumexp(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    most = x.float().amax(dims, keepdim=True)
    out = most + total((x.float() - most).double().exp().float(), dims, True).double().log().float()
    return (out if keepdim else out.squeeze(tuple(dims))).to(x.dtype)


def norm(x: Tensor, order: float = 2, dims: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Tensor:
    assert order == 2
    return total(x.float().square(), dims, keepdim).sqrt().to(x.dtype)


def mse_loss(a: Tensor, b: Tensor, reduction: int = 1) -> Tensor:
    assert reduction == 1
    return mean((a.float() - b.float()).square()).to(a.dtype)


def add_product(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = product(a, b)
    return ((c.float() if beta == 1 else c.float() * beta) + (out if alpha == 1 else out * alpha)).to(c.dtype)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.sum.default: lambda x, dtype=None: total(x).to(dtype or x.dtype),
    aten.sum.dim_IntList: lambda x, d, keepdim=False, dtype=None: total(x, d, keepdim).to(dtype or x.dtype),
    aten.mean.default: lambda x, dtype=None: mean(x, dtype=dtype),
    aten.mean.dim: mean,
    aten.var_mean.correction: var_mean,
    aten.linalg_vector_norm.default: norm,
    aten.mm.default: lambda a, b: product(a, b).to(a.dtype),
    aten.bmm.default: lambda a, b: product(a, b).to(a.dtype),
    aten.addmm.default: add_product,
    aten.addmm_.default: lambda c, a, b, **scales: c.copy_(add_product(c, a, b, **scales)),
    aten.baddbmm.default: add_product,
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.native_layer_norm.default: layer_norm,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten.native_group_norm.default: group_norm,
    aten._softmax.default: softmax,
    aten._softmax_backward_data.default: softmax_backward,
    aten.logsumexp.default: logsumexp,
    aten.mse_loss.default: mse_loss,
}
ROUNDED_ONCE = {
    *("exp", "exp_", "log", "log_", "rsqrt", "sigmoid", "sigmoid_backward", "silu", "silu_", "silu_backward", "gelu"),
    *("gelu_backward", "tanh", "tanh_backward", "pow", "upsample_bicubic2d", "upsample_bicubic2d_backward"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "embedding_dense_backward", "mse_loss_backward"),
    *("cumsum", "cumsum_"),
}
# What IEEE 754 rounds correctly, so that it has the same bits everywhere; but see _fuses.
CORRECTLY_ROUNDED = {"add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "sqrt", "reciprocal"}
# Neither sums nor rounds.
MOVES = {
    *("neg", "abs", "sign", "sgn", "relu", "where", "maximum", "minimum", "clamp", "clamp_", "clamp_min", "clamp_max"),
    *("clamp_min_", "eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isnan", "logical_not", "masked_fill"),
    *("masked_fill_", "_to_copy", "clone", "copy_", "fill_", "zero_", "cat", "stack", "index", "index_select", "flip"),
    *("zeros", "zeros_like", "ones_like", "new_zeros", "new_empty", "empty", "empty_like", "full", "full_like"),
    *("arange", "scalar_tensor", "constant_pad_nd", "_unsafe_view", "embedding", "argmin", "argmax", "amax", "amin"),
    *("max", "min", "any", "all", "topk", "sort", "gather", "scatter", "select_backward", "slice_backward", "repeat"),
    *("upsample_nearest2d", "_local_scalar_dense", "new_empty_strided", "lift_fresh", "detach", "detach_"),
    *("as_strided_", "squeeze_", "unsqueeze_", "exponential_"),
}


def _fuses(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether an addition multiplies, too: with one rounding or with two, as the processor's vectors have it."""
    return name in ("add", "add_", "sub", "sub_", "rsub") and kwargs.get("alpha", 1) not in (1, -1)


class _Sums(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and importing the compiler takes two seconds of each process

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        floats = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        if not floats or any(x.dtype == torch.float64 for x in floats):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func in TABLE:
            return TABLE[func](*args, **kwargs)
        if name in ROUNDED_ONCE:
            if name.endswith("_"):
                return args[0].copy_(rounded(getattr(aten, name[:-1]))(*args, **kwargs))
            return rounded(func)(*args, **kwargs)
        if func.is_view or name in MOVES or (name in CORRECTLY_ROUNDED and not _fuses(name, kwargs)):
            return func(*args, **kwargs)
        raise AssertionError(f"{func} is left to the library's order: give it one in {__file__}")


class _Attention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and args[0].dtype != torch.float64:
            return attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None) -> Tensor:
    assert dropout_p == 0
    assert not is_causal
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = (scores if attn_mask is None else scores + attn_mask.float()).softmax(-1)
    return (p.to(v.dtype).float() @ v.float()).to(v.dtype)


class InOrder:
    """A context in which CPU tensors of float32 and 16 bits are computed as the module says."""

    def __enter__(self) -> InOrder:
        self._modes = _Attention(), _Sums()
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def plain(function: Callable[..., Any], *args: Any) -> Any:
    """The function of the arguments by plain arithmetic, on the CPU; its results where the tensors were."""
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    device = tensors[0].device
    moved = tree_map_only(Tensor, lambda x: x.cpu(), args)
    with InOrder():
        result = function(*moved)
    return tree_map_only(Tensor, lambda x: x.to(device), result)


def assert_as_accurate(
    name: str, got: Tensor, plainly: Tensor, exact: Tensor, largest_term: Tensor | float = 0.0
) -> None:
    """At most twice the error of plain arithmetic, one rounding of the largest result and one of a float32 term.

    The reference is this machine's own library: of it the formula is tested, which a wrong term misses by far more
    than 16 times.
    """
    assert got.dtype == plainly.dtype, name
    assert got.shape == plainly.shape == exact.shape, name
    if not got.numel():
        return
    error, plains = (got.double() - exact).abs().max(), (plainly.double() - exact).abs().max()
    rounding = torch.finfo(got.dtype).eps * exact.abs().max() + torch.finfo(torch.float32).eps * largest_term
    factor = 16 if reference_forced() else 2
    assert error <= factor * plains + rounding, (
        f"{name}: error {error:.3g}, plain arithmetic's {plains:.3g}, rounding {rounding:.3g}"
    )
