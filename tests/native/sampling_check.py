"""Checks the compiled token sampling: python sampling_check.py cpu | cuda | PATH OF A MODULE.

test_native.py runs it for each SIMD level, for the CUDA kernel under emulation, and on a GPU; on the CPU the filtered
logits are checked too.

The oracle is float64 throughout but for the guided logits, whose float32 rounding is part of the contract; it sorts
stably. On the CPU a row may be left undecided, but no row may be wrong, and few may be left.
"""

import importlib.util
import itertools
import sys
from types import ModuleType
from typing import NamedTuple

import torch

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
UNDECIDED, NO_DISTRIBUTION = -1, -2

_C: ModuleType
CUDA = False
DEVICE = "cpu"


class Case(NamedTuple):
    guidance: float | None
    top_k: int
    top_p: float


# Values of V: one; below, at and above the widths of vectors and warps; the models' own; longer than registers hold.
SIZES = [1, 2, 31, 33, 64, 257, 1000, 4096, 5003]
EMULATED_SIZES = [1, 33, 257, 5003]


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


def settings(logits: torch.Tensor, case: Case) -> dict[str, int | float]:
    """The last arguments of both operations."""
    layout = {"stride_b": logits.stride(0), "stride_n": logits.stride(1), "dtype": CODES[logits.dtype]}
    choice = {"top_k": case.top_k, "top_p": case.top_p, "guidance": case.guidance or 0.0}
    return {**layout, **choice, "guided": case.guidance is not None}


def sample(logits: torch.Tensor, noise: torch.Tensor, case: Case) -> tuple[torch.Tensor, list[int]]:
    """Tokens (B * n) and, on the CPU, how many are undecided and without distribution."""
    twice, n, V = logits.shape
    B = twice if case.guidance is None else twice // 2
    tokens, status = (torch.full((size,), 1 << 40, dtype=torch.int64) for size in (B * n, 2))
    logits, noise, tokens = logits.to(DEVICE), noise.to(DEVICE), tokens.to(DEVICE)
    stream = {"stream": torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0} if CUDA else {}
    pointers = [t.data_ptr() for t in (logits, noise, tokens, status)]
    _C.sample_tokens(*pointers, B=B, n=n, V=V, **settings(logits, case), **stream)
    return tokens.cpu(), status.tolist()


def filter_rows(logits: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The filtered logits (B * n, V), and which rows are undecided."""
    twice, n, V = logits.shape
    B = twice if case.guidance is None else twice // 2
    out, undecided = torch.full((B * n, V), torch.nan), torch.empty(B * n, dtype=torch.bool)
    pointers = [logits.data_ptr(), out.data_ptr(), undecided.data_ptr()]
    _C.filter_logits(*pointers, B=B, n=n, V=V, **settings(logits, case))
    return out, undecided


def exactly_filtered(logits: torch.Tensor, case: Case) -> torch.Tensor:
    x = logits.float()
    if case.guidance is not None:
        cond, uncond = x.chunk(2)
        x = (1 + case.guidance) * cond - case.guidance * uncond
    x = x.double().reshape(-1, x.shape[-1])
    if case.top_k:
        x = x.masked_fill(x < x.sort(dim=-1)[0][:, -case.top_k, None], -torch.inf)
    if case.top_p:
        ascending, order = x.sort(dim=-1, stable=True)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= torch.tensor(1 - case.top_p).float().double()
        drop[:, -1] = False
        x = x.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return x


def strided(B: int, n: int, V: int, scale: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """(B, n, V) out of a larger tensor: an odd start and gaps between rows."""
    full = torch.randn(B, n + 1, V + 5, generator=generator) * scale
    return full.to(dtype)[:, 1:, 3 : V + 3]


def check(name: str, logits: torch.Tensor, noise: torch.Tensor, case: Case, ties: bool = False) -> None:
    tokens, status = sample(logits, noise, case)
    left = tokens == UNDECIDED
    kept = exactly_filtered(logits, case)
    wrong = (tokens != (kept.softmax(dim=-1) / noise.double()).argmax(dim=-1)) & ~left
    assert not wrong.any(), f"{name}: wrong tokens in rows {wrong.nonzero().view(-1).tolist()}"
    if CUDA:
        assert not left.any(), f"{name}: token {UNDECIDED} on CUDA"
    else:
        assert status == [int(left.sum()), 0], f"{name}: status {status}"
        assert ties or left.sum() <= 1, f"{name}: {int(left.sum())} of {len(left)} rows undecided"
        out, undecided = filter_rows(logits, case)
        assert torch.equal(out[~undecided].double(), kept[~undecided]), f"{name}: wrong filtered logits"


def check_random(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = itertools.count()
    for V, dtype in itertools.product(sizes, CODES):
        for guidance, top_k, top_p in itertools.product((None, 0.0, 1.5), (0, 1, V // 4), (0.0, 0.05, 0.6, 0.96)):
            # A few of the products each time: all of them are seen over the sizes and dtypes.
            if len(sizes) * V > 500 and next(numbers) % 7:
                continue
            case = Case(guidance, top_k, top_p)
            B, n, scale = 2, 3, (0.5, 3.0, 12.0)[next(numbers) % 3]
            logits = strided(B if guidance is None else 2 * B, n, V, scale, dtype, generator)
            noise = torch.empty(B * n, V).exponential_(1, generator=generator)
            # Halves and small values are equal here and there; the oracle then assumes one order of several.
            check(f"V={V} {dtype} {case} scale={scale}", logits, noise, case, ties=dtype != torch.float32)


def check_hard(V: int) -> None:
    """Rows on which a search for a threshold has a hard time, and rows without a choice."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, V, generator=generator)
    x[1] = 2.5  # all equal
    x[2] = (x[2] * 2).round() / 2  # groups of equals
    x[3, 0], x[3, 1:] = 1e30, x[3, 1:] - 1e30  # far outliers on both sides
    x[4, ::2] = -torch.inf
    x[5] = torch.linspace(-1e-40, 1e-40, V)  # subnormal
    x[6], x[6, V // 2] = -torch.inf, 0.0
    x[7] = torch.linspace(3.0, 3.0 + V * 2.0**-22, V).flip(0)  # neighbouring floats
    noise = torch.empty(8, V).exponential_(1, generator=generator)
    for top_k, top_p in itertools.product((0, 1, 5, V // 3, V - 1, V), (0.0, 1e-9, 0.3, 1.0)):
        case = Case(None, top_k, top_p)
        check(f"hard V={V} {case}", x[:, None], noise, case, ties=True)


def check_ties() -> None:
    """Equal logits at the border of top-p: CUDA keeps those with the greatest indices, the CPU leaves the row."""
    x = torch.zeros(1, 1, 10)
    noise = torch.full((1, 10), 100.0)
    for drawn in range(10):
        noise[0, drawn] = 1.0
        tokens, _ = sample(x, noise, Case(None, 0, 0.55))  # drops 0.45: the first four of ten
        expected = UNDECIDED if not CUDA else drawn if drawn >= 4 else 4
        assert tokens.item() == expected, f"drawn {drawn}: {tokens.item()}, expected {expected}"
        noise[0, drawn] = 100.0


def check_bad_rows() -> None:
    x = torch.randn(5, 1, 300)
    x[0, 0, 299], x[1, 0, 7], x[2] = torch.nan, torch.inf, -torch.inf
    for case in (Case(None, 0, 0.0), Case(None, 20, 0.9)):
        tokens, status = sample(x, torch.ones(5, 300), case)
        if CUDA:
            assert ((tokens >= 0) & (tokens < 300)).all(), tokens
        else:
            assert tokens[:3].eq(NO_DISTRIBUTION).all(), tokens
            assert tokens[3:].ge(UNDECIDED).all(), tokens
            assert status[1] == 3, status


def main(name: str) -> None:
    load(name)
    emulated = CUDA and DEVICE == "cpu"
    check_random(EMULATED_SIZES if emulated else SIZES)
    check_hard(257 if emulated else 5000)
    check_ties()
    check_bad_rows()
    print("cuda", _C.architectures()) if CUDA else print(_C.simd_level())


if __name__ == "__main__":
    main(sys.argv[1])
