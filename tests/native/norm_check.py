"""Checks the compiled modulated layer norm against float64: python norm_check.py cpu | cuda | PATH OF A MODULE.

test_native.py runs it for each SIMD level, for the CUDA kernels under emulation, and on a GPU.

Every dtype combination, strided inputs, row lengths around the vector widths, rows with a large mean. The bound is
twice the error of plain float32 arithmetic (in_order.py), plus one rounding to the output's dtype, plus what one
float32 rounding of the mean and of a product costs: with few elements in a row plain arithmetic may be exact by luck.
"""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

from in_order import plain

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SHAPES = [(1, 1, 1), (2, 3, 5), (1, 7, 16), (3, 33, 67), (2, 70, 192), (1, 2, 1032), (2, 1, 1920)]
EMULATED_SHAPES = [(1, 7, 16), (2, 5, 520)]
CHUNKS = 4  # of the CUDA backward pass; more than some shapes have rows
LONG_SHAPE = (1, 2, 4104)  # past the rows that the CUDA kernels keep in registers

_C: ModuleType
CUDA = False
DEVICE = "cpu"


def load(name: str) -> None:
    global _C, CUDA, DEVICE
    if name == "cpu":
        from varkern import _C
    elif name == "cuda":
        from varkern import _C_cuda as _C

        CUDA, DEVICE = True, "cuda"
    else:
        spec = importlib.util.spec_from_file_location("_C_cuda", name)
        assert spec is not None
        assert spec.loader is not None
        _C = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_C)
        CUDA = True


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0


def strided(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, pad: int) -> torch.Tensor:
    """Last axis contiguous, the others with gaps; pad shifts the start, a multiple of 8 keeps it aligned."""
    *outer, last = shape
    full = torch.randn(*(n + 1 for n in outer), last + 2 * pad, generator=generator).to(dtype).to(DEVICE)
    return full[tuple(slice(0, n) for n in outer)][..., pad : pad + last]


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def forward(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, L, C = x.shape
    out = poison(B, L, C, dtype=torch.promote_types(x.dtype, scale.dtype))
    mean, rstd = poison(B * L), poison(B * L)
    pointers = [t.data_ptr() for t in (x, scale, shift, out, mean, rstd)]
    strides = {"x_stride_b": x.stride(0), "x_stride_l": x.stride(1)}
    strides |= {"scale_stride_b": scale.stride(0), "shift_stride_b": shift.stride(0)}
    codes = {"x_dtype": CODES[x.dtype], "cond_dtype": CODES[scale.dtype], "out_dtype": CODES[out.dtype]}
    extra = {"stream": stream()} if CUDA else {}
    _C.modulated_layer_norm_forward(*pointers, B=B, L=L, C=C, **strides, **codes, eps=eps, **extra)
    return out, mean, rstd


def backward(
    grad_out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, L, C = x.shape
    grad_x, grad_scale, grad_shift = poison(B, L, C, dtype=x.dtype), poison(B, C), poison(B, C)
    pointers = [t.data_ptr() for t in (grad_out, x, scale, mean, rstd, grad_x, grad_scale, grad_shift)]
    strides = {"grad_out_stride_b": grad_out.stride(0), "grad_out_stride_l": grad_out.stride(1)}
    strides |= {"x_stride_b": x.stride(0), "x_stride_l": x.stride(1), "scale_stride_b": scale.stride(0)}
    codes = {"x_dtype": CODES[x.dtype], "cond_dtype": CODES[scale.dtype], "out_dtype": CODES[grad_out.dtype]}
    workspace = poison(2, B, CHUNKS, C)
    extra = {"workspace": workspace.data_ptr(), "chunks": CHUNKS, "stream": stream()} if CUDA else {}
    _C.modulated_layer_norm_backward(*pointers, B=B, L=L, C=C, **strides, **codes, **extra)
    return grad_x, grad_scale, grad_shift


def reference(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, grad_out: torch.Tensor, eps: float, dtype: torch.dtype
) -> list[torch.Tensor]:
    """[out, grad_x, grad_scale, grad_shift] by PyTorch in dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, scale, shift)]
    h = torch.nn.functional.layer_norm(leaves[0], x.shape[-1:], eps=eps)
    out = h * (1 + leaves[1][:, None]) + leaves[2][:, None]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))]


def check(name: str, ours: torch.Tensor, plainly: torch.Tensor, exact: torch.Tensor, rounding: float) -> None:
    plainly = plainly.to(ours.dtype).double()  # the reference rounds to the same dtype
    size = exact.abs().max().item()
    bound = 2 * (plainly - exact).abs().max().item() + torch.finfo(ours.dtype).eps * size + rounding
    error = (ours.double() - exact).abs().max().item()
    assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}, values up to {size:.3g}"


def roundings(x: torch.Tensor, scale: torch.Tensor, grad_out: torch.Tensor, eps: float) -> list[float]:
    """What one float32 rounding of each row's mean and of its products changes in out and the three gradients."""
    x, factor, g = x.double(), 1 + scale.double()[:, None], grad_out.double()
    rstd = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    h = (x.mean(-1, keepdim=True) * rstd).abs() + 1
    terms = (h * factor.abs(), h * rstd * (g * factor).abs().amax(-1, keepdim=True), (h * g.abs()).sum(1), g.abs())
    return [torch.finfo(torch.float32).eps * term.max().item() for term in terms]


def check_case(shape: tuple[int, int, int], x_dtype: torch.dtype, cond_dtype: torch.dtype, odd: bool) -> None:
    """odd: unaligned starts and strides, one condition for the whole batch, a large mean. Otherwise all aligned."""
    generator = torch.Generator().manual_seed(0)
    B, _, C = shape
    pad = 3 if odd else 8
    x = strided(shape, x_dtype, generator, pad)
    if odd:
        x.add_(30.0)
    cond = strided((1 if odd else B, 2 * C), cond_dtype, generator, pad).expand(B, 2 * C)
    scale, shift = cond.split(C, dim=1)
    grad_out = strided(shape, torch.promote_types(x_dtype, cond_dtype), generator, pad)
    exact = reference(x, scale, shift, grad_out, 1e-6, torch.float64)
    plainly = plain(reference, x, scale, shift, grad_out, 1e-6, torch.float32)
    out, mean, rstd = forward(x, scale, shift, 1e-6)
    ours = [out, *backward(grad_out, x, scale, mean, rstd)]
    names = ("out", "grad_x", "grad_scale", "grad_shift")
    for part in zip(names, ours, plainly, exact, roundings(x, scale, grad_out, 1e-6), strict=True):
        check(f"shape={shape} x={x_dtype} cond={cond_dtype} odd={odd} {part[0]}", *part[1:])


def check_threads() -> None:
    """More threads, same bits: the order of the sums depends on the shape alone."""
    x, grad_out, scale = torch.randn(3, 250, 512), torch.randn(3, 250, 512), torch.randn(3, 512)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out, mean, rstd = forward(x, scale, scale, 1e-6)
        results.append([out, *backward(grad_out, x, scale, mean, rstd)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), "depends on the thread count"


def main(name: str) -> None:
    load(name)
    emulated = CUDA and DEVICE == "cpu"
    combinations = list(itertools.product(CODES, CODES))
    for shape in EMULATED_SHAPES if emulated else SHAPES:
        for x_dtype, cond_dtype in combinations:
            check_case(shape, x_dtype, cond_dtype, odd=False)
            if not emulated or shape == EMULATED_SHAPES[-1]:
                check_case(shape, x_dtype, cond_dtype, odd=True)
    check_case(LONG_SHAPE, torch.bfloat16, torch.bfloat16, odd=False)
    if CUDA:
        print("cuda", _C.architectures())
    else:
        check_threads()
        print(_C.simd_level())


if __name__ == "__main__":
    main(sys.argv[1])
