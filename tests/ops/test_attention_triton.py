"""The Triton kernels of block-causal attention against float64: interpreted without a GPU, compiled on one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_order import plain
from places import TRITON
from torch import Tensor

attention: Any = pytest.importorskip("varkern.kernels.attention", reason="triton is not installed")
forward: Any = pytest.importorskip("varkern.kernels.attention.forward")
keys: Any = pytest.importorskip("varkern.kernels.attention.backward_keys")
queries: Any = pytest.importorskip("varkern.kernels.attention.backward_queries")
tiling: Any = pytest.importorskip("varkern.kernels.attention.tiles")

pytestmark = pytest.mark.usefixtures("dot_in_one_order")

NAN = float("nan")
VAR_256 = tuple(p * p for p in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
VAR_512 = tuple(p * p for p in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
VAR_1024 = tuple(p * p for p in (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))


@pytest.fixture(params=[TRITON])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass
class Problem:
    """Inputs of one attention; the defaults are VAR's: everything that the prologue can do, out of one projection."""

    lengths: tuple[int, ...] = (1, 4, 9, 16)
    B: int = 2
    H: int = 2
    D: int = 64
    dtype: torch.dtype = torch.float32
    prologue: str = "q_bias v_bias log_scale"
    bias_dtype: torch.dtype = torch.float32
    layout: str = "qkv"
    softmax_scale: float = 1.0
    magnitude: float = 1.0  # of q
    log_scale: float = 1.5  # of the first head; the next heads' are greater by one each
    device: str = "cpu"
    inputs: list[Tensor] = field(init=False)  # q, k, v (B, H, L, D)
    parameters: list[Tensor | None] = field(init=False)  # q_bias, v_bias (H, D), log_scale (H,)
    grad_out: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        B, H, L, D = self.shape
        self.inputs = [tensor.copy_(normal(B, H, L, D)) for tensor in self.like_inputs()]
        self.inputs[0] *= self.magnitude
        self.grad_out = self.like_out().copy_(normal(B, H, L, D))
        q_bias, v_bias = ((normal(H, D) * 0.5).to(self.device, self.bias_dtype) for _ in range(2))
        log_scale = (torch.arange(H) + self.log_scale).to(self.device)
        given = {"q_bias": q_bias, "v_bias": v_bias, "log_scale": log_scale}
        self.parameters = [tensor if name in self.prologue.split() else None for name, tensor in given.items()]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.B, self.H, sum(self.lengths), self.D

    @property
    def scalars(self) -> tuple[tuple[int, ...], float]:
        return self.lengths, self.softmax_scale

    def like_inputs(self) -> list[Tensor]:
        """Three tensors (B, H, L, D) full of NaN that lie in memory as the layout says."""
        B, H, L, D = self.shape
        if self.layout == "qkv":
            wide = torch.full((B, L, 3, H, D), NAN, dtype=self.dtype, device=self.device)
            return list(wide.permute(2, 0, 3, 1, 4).unbind(0))
        return [self.like_out() for _ in range(3)]

    def like_out(self) -> Tensor:
        B, H, L, D = self.shape
        if self.layout in ("qkv", "blhd"):
            return torch.full((B, L, H, D), NAN, dtype=self.dtype, device=self.device).transpose(1, 2)
        if self.layout == "lhbd":
            return torch.full((L, H, B, D), NAN, dtype=self.dtype, device=self.device).permute(2, 1, 0, 3)
        if self.layout == "odd":  # no vector of a row is aligned
            wide = torch.full((B, H + 1, L + 2, D + 3), NAN, dtype=self.dtype, device=self.device)
            return wide[:, 1:, 1:-1, 1:-2]
        assert self.layout == "bhld"
        return torch.full((B, H, L, D), NAN, dtype=self.dtype, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        return torch.full(shape, NAN, device=self.device)

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """out, lse (base 2, in two parts), norms."""
        out, lse = self.like_out(), self.floats(2, *self.shape[:3])
        norms = None if self.parameters[2] is None else self.floats(2, *self.shape[:3])
        attention.block_causal_attention_forward(*self.inputs, *self.parameters, out, lse, norms, *self.scalars)
        return out, lse, norms

    def backward(self, saved: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor | None]:
        """Gradients of q, k, v and, summed over the batch, of q_bias, v_bias and log_scale."""
        B, H, _, D = self.shape
        grads = self.like_inputs()
        shapes = ((B, H, D), (B, H, D), (B, H))
        shares = [None if x is None else self.floats(*s) for x, s in zip(self.parameters, shapes, strict=True)]
        attention.block_causal_attention_backward(
            self.grad_out, *self.inputs, *self.parameters, *saved, *grads, *shares, *self.scalars
        )
        return [*grads, *(None if share is None else share.sum(0) for share in shares)]

    def run(self) -> dict[str, Tensor]:
        saved = self.forward()
        return named(saved[0], natural(saved[1]), *self.backward(saved))

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.grad_out, *self.inputs, *self.parameters]

    def exact(self, row_grads: Tensor | None = None) -> dict[str, Tensor]:
        return self.by_autograd(torch.float64, self.tensors, row_grads)

    def by_autograd(self, dtype: torch.dtype, tensors: list[Any], row_grads: Tensor | None = None) -> dict[str, Tensor]:
        """The same in a dtype, with the mask of L x L; row_grads (B, H, L): gradients of lse, too."""
        grad_out, *leaves = (None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors)
        q, k, v, q_bias, v_bias, log_scale = leaves
        q = q if q_bias is None else q + q_bias.unsqueeze(1)
        v = v if v_bias is None else v + v_bias.unsqueeze(1)
        if log_scale is not None:
            temperature = log_scale.clamp_max(math.log(100)).exp().view(-1, 1, 1)
            q, k = F.normalize(q, dim=-1).mul(temperature), F.normalize(k, dim=-1)
        scores = (q @ k.mT * self.softmax_scale).masked_fill(self.hidden().to(q.device), -torch.inf)
        out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
        used = [leaf for leaf in leaves if leaf is not None]
        results = ([out], [grad_out]) if row_grads is None else ([out, lse], [grad_out, row_grads])
        grads = iter(torch.autograd.grad(results[0], used, results[1]))
        return named(out.detach(), lse.detach(), *(None if leaf is None else next(grads) for leaf in leaves))

    def hidden(self) -> Tensor:
        scale = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths)).to(self.device)
        return scale[:, None] < scale[None, :]


def natural(lse: Tensor) -> Tensor:
    """The natural logarithm, from the two parts of that in base 2."""
    return (lse.double().sum(0) * math.log(2)).float()


def named(*tensors: Tensor | None) -> dict[str, Tensor]:
    names = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_q_bias", "grad_v_bias", "grad_log_scale")
    return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}


def check(problem: Problem) -> None:
    """At most twice the error of plain arithmetic in the same dtype, and the roundings of flash attention beside.

    Its backward pass starts from out and lse, where plain attention keeps the probabilities P:

    - delta_i = grad_out_i . (out_i - v_bias) stands for the sum over j of P_ij dP_ij. What it is off by, independent
      roundings of the elements of out and those of float32 sums, is multiplied by P_i in the gradient of the scores;
      P_i is the gradient of lse_i, so that it shows in the results as if it were the gradient of lse_i.
    - P = exp(S - lse): in 16 bits lse is rounded once. In float32 it comes in two parts, and nothing is granted.
    """
    got, plainly, exact = problem.run(), plain(problem.by_autograd, problem.dtype, problem.tensors), problem.exact()
    assert set(got) == set(exact)
    eps, single = torch.finfo(problem.dtype).eps, torch.finfo(torch.float32).eps
    terms = problem.grad_out * exact["out"]
    rounded = problem.exact(eps * terms.norm(dim=-1) + single * terms.abs().sum(-1))
    for name, value in exact.items():
        assert got[name].shape == value.shape, name
        size = value.abs().max()
        error, plains = ((tensor[name] - value).abs().max() for tensor in (got, plainly))
        of_lse = 0.0 if problem.dtype == torch.float32 else single * exact["lse"].abs().max()
        rounding = (eps + of_lse) * size + (rounded[name] - value).abs().max()
        assert error <= 2 * plains + rounding, f"{name}: error {error:.3g}, plainly {plains:.3g}, beside {rounding:.3g}"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short schedules have many tiles, too."""
    for module, (BLOCK_M, BLOCK_N) in ((forward, (32, 16)), (keys, (16, 32)), (queries, (32, 16))):
        for key in module.CONFIGS:
            monkeypatch.setitem(module.CONFIGS, key, tiling.Config(BLOCK_M, BLOCK_N, num_warps=4, num_stages=2))


PROBLEMS: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "one_position": {"lengths": (1,)},
    "one_scale": {"lengths": (16,)},
    "one_scale_of_whole_tiles": {"lengths": (128,)},
    "not_square": {"lengths": (1, 6, 15)},
    "not_increasing": {"lengths": (40, 7, 90, 3, 30), "B": 1},
    "all_scales_alike": {"lengths": (64, 64, 64), "B": 1},
    "ones": {"lengths": (1,) * 20},
    "many_tiles": {"lengths": (1, 4, 9, 16, 25, 36, 64, 100), "B": 1},
    "one_head": {"H": 1, "B": 3},
    "narrow": {"D": 32, "lengths": (1, 4, 9, 16, 25, 36)},
    "wide": {"D": 128, "lengths": (1, 4, 9, 16, 25, 36)},
    "plain": {"prologue": "", "softmax_scale": 0.25 / 8},
    "plain_not_increasing": {"prologue": "", "softmax_scale": 0.125, "lengths": (40, 7, 90, 3, 30), "B": 1},
    "q_bias": {"prologue": "q_bias", "softmax_scale": 0.125},
    "v_bias": {"prologue": "v_bias", "softmax_scale": 0.125},
    "biases": {"prologue": "q_bias v_bias", "softmax_scale": 0.125},
    "log_scale": {"prologue": "log_scale"},
    "log_scale_and_softmax_scale": {"prologue": "log_scale v_bias", "softmax_scale": 0.5},
    "q_bias_and_log_scale": {"prologue": "q_bias log_scale"},
    "rounded_biases": {"bias_dtype": torch.float16},
    "bhld": {"layout": "bhld"},
    "blhd": {"layout": "blhd"},
    "lhbd": {"layout": "lhbd"},
    "odd_strides": {"layout": "odd"},
    "odd_strides_plain": {"layout": "odd", "prologue": "", "softmax_scale": 0.125},
    "hot": {"log_scale": 3.6},
}
problems = pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS)
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@problems
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.usefixtures("nan_in_empty")
def test_value_and_gradient(device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter does not round to bfloat16")
    check(Problem(**options, dtype=dtype, device=device))


@pytest.mark.parametrize("name", ["ordinary", "not_square", "not_increasing", "ones", "plain", "many_tiles"])
@pytest.mark.usefixtures("small_tiles", "nan_in_empty")
def test_small_tiles(device: str, name: str) -> None:
    check(Problem(**{"H": 1, **PROBLEMS[name], "B": 1}, device=device))


@pytest.mark.usefixtures("nan_in_empty")
def test_schedule_of_256_pixels(device: str) -> None:
    check(Problem(lengths=VAR_256, B=1, H=1, dtype=torch.float16, device=device))


def test_deterministic(device: str) -> None:
    problem = Problem(lengths=(1, 9, 90, 100), dtype=torch.float16, device=device)
    first, second = problem.run(), problem.run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_head_is_computed_alone(device: str) -> None:
    """Of a batch of heads each has, bit for bit, the result that it has alone."""
    problem = Problem(B=2, H=3, device=device)
    together = problem.run()
    for b, h in product(range(2), range(3)):
        alone = replace(problem, B=1, H=1)
        alone.inputs = [x[b : b + 1, h : h + 1] for x in problem.inputs]
        alone.parameters = [None if x is None else x[h : h + 1] for x in problem.parameters]
        alone.grad_out = problem.grad_out[b : b + 1, h : h + 1]
        result = alone.run()
        for name in ("out", "lse", "grad_q", "grad_k", "grad_v"):
            assert torch.equal(result[name][0, 0], together[name][b, h]), name


def test_expanded_gradient(device: str) -> None:
    problem = Problem(device=device)
    problem.grad_out = torch.ones(1, 1, 1, problem.D, device=device).expand(problem.shape)
    check(problem)


# The interpreter computes in numpy, which warns of infinities.
overflow = pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN):RuntimeWarning")


@overflow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_rows_without_length(device: str, dtype: torch.dtype) -> None:
    problem = Problem(prologue="v_bias log_scale", dtype=dtype, device=device)
    q, k, _ = problem.inputs
    q[:, :, 3], k[:, :, 0], k[:, :, 5] = 0, 0, 0
    got, exact = problem.run(), problem.exact()
    for name, value in exact.items():
        # Gradients of such rows are those of their unit rows times 1e12, which float16 cannot hold.
        huge = value.abs() > torch.finfo(dtype).max
        assert huge.any() == (dtype == torch.float16 and name in ("grad_q", "grad_k")), name
        assert torch.isinf(got[name][huge]).all(), name
        error = ((got[name] - value).abs() / (value.abs().amax(-1, keepdim=True) + 1e-30))[~huge].max()
        assert error <= (1e-4 if dtype == torch.float32 else 2e-2), f"{name}: relative error {error:.3g}"


def test_log_scale_is_bounded_by_log_100(device: str) -> None:
    problem, bounded = (Problem(log_scale=value, device=device) for value in (4.2, 4.2))
    bounded.parameters[2] = problem.parameters[2].clamp_max(math.log(100))
    assert problem.parameters[2][1] > math.log(100)
    got, want = problem.run(), bounded.run()
    for name in set(got) - {"grad_log_scale"}:
        assert torch.equal(got[name], want[name]), name
    assert got["grad_log_scale"][0] == want["grad_log_scale"][0] != 0
    assert got["grad_log_scale"][1] == 0
    check(problem)


@overflow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_scores_that_would_overflow(device: str, dtype: torch.dtype, sign: int) -> None:
    """Scores near 1e5 of either sign: every exponential is 0, or 1 at the greatest score of a row."""
    problem = Problem(lengths=(1, 6, 90, 80), B=1, prologue="", dtype=dtype, device=device)
    q, k, v = problem.inputs
    q.copy_(q.abs() * 40 + 8)
    k.copy_(sign * (k.abs() * 40 + 8))
    got, exact = problem.run(), problem.exact()
    assert all(torch.isfinite(tensor).all() for tensor in got.values())
    assert exact["lse"].abs().min() > 5e4
    torch.testing.assert_close(got["lse"].double(), exact["lse"], rtol=1e-6, atol=0)
    # Rows whose two greatest scores a rounding of float32 could exchange are left out.
    scores = (q.double() @ k.double().mT).masked_fill(problem.hidden(), -torch.inf)
    greatest = scores.topk(2, -1).values
    certain = greatest[..., 0] - greatest[..., 1] > 20
    certain[:, :, 0] = True  # alone
    assert certain.float().mean() > 0.9
    winner = v.gather(2, scores.argmax(-1, keepdim=True).expand(-1, -1, -1, problem.D))
    torch.testing.assert_close(got["out"][certain], winner[certain], rtol=1e-6, atol=1e-6)


def test_zero_softmax_scale_is_the_mean(device: str) -> None:
    check(Problem(prologue="v_bias", softmax_scale=0.0, device=device))


ROWS = (1, 9, 40, 100, 130)


@overflow
@pytest.mark.parametrize("prologue", ["v_bias log_scale", ""], ids=["prologue", "plain"])
def test_keys_beyond_the_last_visible_scale_are_not_read(device: str, prologue: str) -> None:
    """With NaN in all keys and values that no query of a tile sees, the tile's results stay the same, bit for bit.

    A masked score would not do: a probability of zero times a value of NaN is NaN, and so is the sum.
    """
    problem = Problem(lengths=ROWS, B=1, H=1, prologue=prologue, device=device)
    saved = problem.forward()
    want = named(saved[0], natural(saved[1]), *problem.backward(saved))
    clean = [x.clone() for x in problem.inputs]
    ends = list(accumulate(ROWS))
    for module, names in ((forward, ("out", "lse")), (queries, ("grad_q",))):
        config = module.CONFIGS[4, 64]
        tiles = tiling.query_tiles(ROWS, config.BLOCK_M, config.BLOCK_N)
        assert len(tiles) > 3
        for start, stop in tiles:
            last = next(end for end in ends if end >= stop)
            if last == ends[-1]:
                continue
            problem.inputs = [x.clone() for x in clean]
            for x in problem.inputs[1:]:
                x[:, :, last:] = NAN
            if module is forward:
                out, lse, _ = problem.forward()
                got = {"out": out, "lse": natural(lse)}
            else:
                got = {"grad_q": problem.backward(saved)[0]}
            for name in names:
                assert torch.equal(got[name][:, :, start:stop], want[name][:, :, start:stop]), (name, start, stop)
                assert got[name][:, :, last:].isnan().any()  # where they are visible, they do show


@pytest.mark.parametrize("prologue", ["v_bias log_scale", ""], ids=["prologue", "plain"])
def test_queries_of_scales_before_are_not_read(device: str, prologue: str) -> None:
    """With NaN in all queries that see no key of a tile, the tile's gradients stay the same, bit for bit."""
    problem = Problem(lengths=ROWS, B=1, H=1, prologue=prologue, device=device)
    saved = problem.forward()
    want = named(saved[0], natural(saved[1]), *problem.backward(saved))
    clean = (problem.inputs[0].clone(), problem.grad_out.clone())
    config = keys.CONFIGS[4, 64]
    tiles = tiling.key_tiles(ROWS, config.BLOCK_M, config.BLOCK_N)
    assert len(tiles) > 3
    begins = [0, *accumulate(ROWS)]
    for start, stop in tiles:
        first = max(begin for begin in begins if begin <= start)
        problem.inputs[0], problem.grad_out = (x.clone() for x in clean)
        problem.inputs[0][:, :, :first] = NAN
        problem.grad_out[:, :, :first] = NAN
        _, grad_k, grad_v, *_ = problem.backward(saved)
        for name, got in (("grad_k", grad_k), ("grad_v", grad_v)):
            assert torch.equal(got[:, :, start:stop], want[name][:, :, start:stop]), (name, start, stop)
            assert first == 0 or got[:, :, :first].isnan().any()


def visible_end(lengths: tuple[int, ...], row: int) -> int:
    return next(end for end in accumulate(lengths) if end > row)


def query_cost(lengths: tuple[int, ...], tiles: tiling.Tiles, block: int) -> int:
    return sum(1 + math.ceil(visible_end(lengths, stop - 1) / block) for _, stop in tiles)


def key_cost(lengths: tuple[int, ...], tiles: tiling.Tiles, block: int) -> int:
    begins = [0, *accumulate(lengths)]
    return sum(1 + math.ceil((sum(lengths) - max(b for b in begins if b <= start)) / block) for start, _ in tiles)


def all_tilings(L: int, block: int, start: int = 0) -> list[tuple[tuple[int, int], ...]]:
    if start == L:
        return [()]
    return [
        ((start, stop), *rest)
        for stop in range(start + 1, min(start + block, L) + 1)
        for rest in all_tilings(L, block, stop)
    ]


@pytest.mark.parametrize(
    "lengths", [(1,), (9,), (1, 3, 5), (5, 3, 1), (4, 4, 4), (2, 1, 6, 2), (1, 1, 1, 1, 7)], ids=str
)
def test_tiles_are_the_cheapest_of_all(lengths: tuple[int, ...]) -> None:
    candidates = all_tilings(sum(lengths), 4)
    for BLOCK in (2, 3):
        tiles = tiling.query_tiles(lengths, 4, BLOCK)
        assert tuple(sorted(tiles)) in candidates
        assert query_cost(lengths, tiles, BLOCK) == min(query_cost(lengths, each, BLOCK) for each in candidates)
        tiles = tiling.key_tiles(lengths, BLOCK, 4)
        assert tuple(sorted(tiles)) in candidates
        assert key_cost(lengths, tiles, BLOCK) == min(key_cost(lengths, each, BLOCK) for each in candidates)


@pytest.mark.parametrize(
    "lengths", [VAR_256, VAR_512, VAR_1024, (40, 7, 90, 3, 300)], ids=["256", "512", "1024", "other"]
)
def test_tiles_cover_every_row_once_and_cost_less_than_a_grid(lengths: tuple[int, ...]) -> None:
    L = sum(lengths)
    grid = tuple((start, min(start + 128, L)) for start in range(0, L, 128))
    for tiles, cost in (
        (tiling.query_tiles(lengths, 128, 64), query_cost),
        (tiling.key_tiles(lengths, 64, 128), key_cost),
    ):
        assert sorted(row for start, stop in tiles for row in range(start, stop)) == list(range(L))
        assert all(stop - start <= 128 for start, stop in tiles)
        assert cost(lengths, tiles, 64) <= cost(lengths, grid, 64)
    assert tiling.query_tiles(lengths, 128, 64)[0][1] == L  # the last queries, with most keys, first
    assert tiling.key_tiles(lengths, 64, 128)[0][0] == 0


def test_scale_bounds(device: str) -> None:
    bounds = tiling.scale_bounds((1, 3, 2), torch.device(device))
    assert bounds.tolist() == [[0, 1, 1, 1, 4, 4], [1, 4, 4, 4, 6, 6]]
    assert tiling.scale_bounds((1, 3, 2), torch.device(device)) is bounds
