"""Attention of next-scale generation: values, whole schedules, the cache's other bits, operator checks, bad input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from in_order import assert_as_accurate, plain
from torch import Tensor

from varkern.ops import (
    backends,
    block_causal_attention_qkv,
    block_causal_attention_qkv_reference,
    cached_attention,
    cached_attention_reference,
    use_backend,
)
from varkern.ops.attention.cached import _splits

OPS = ("cached_attention",)

LENGTHS_256 = tuple(p * p for p in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


@dataclass(frozen=True)
class Case:
    n: int
    position: int
    B: int = 2
    H: int = 2
    D: int = 64
    dtype: torch.dtype = torch.float32
    spare: int = 3  # positions of the cache beyond the new ones
    q_bias: bool = True
    v_bias: bool = True
    log_scale: bool = True
    softmax_scale: float = 1.0

    def inputs(self, device: torch.device | str) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """qkv as a slice of a wider tensor, a cache with NaN at and beyond position, biases and log_scale."""
        qkv = torch.randn(self.B, self.n + 2, 3, self.H + 1, self.D)[:, 1 : self.n + 1, :, : self.H]
        cache = torch.randn(2, self.B, self.H, self.position + self.n + self.spare, self.D)
        if self.log_scale:
            cache[0] /= cache[0].norm(dim=-1, keepdim=True)
        cache[:, :, :, self.position :] = torch.nan
        present = self.q_bias, self.v_bias, self.log_scale
        tensors = torch.randn(self.H * self.D), torch.randn(self.H * self.D), torch.linspace(0.5, 5.0, self.H)
        prologue = [tensor.to(device) if is_there else None for tensor, is_there in zip(tensors, present, strict=True)]
        return qkv.to(device, self.dtype), cache.to(device, self.dtype), prologue


CASES = {
    "one_token_alone": Case(1, 0),
    "one_token": Case(1, 5, B=3),
    "one_of_many_keys": Case(1, 1300),
    "four": Case(4, 1, D=32),
    "a_tile": Case(16, 48),
    "a_tile_and_one": Case(17, 48, H=3),
    "wide_heads": Case(33, 40, D=128),
    "large_tiles": Case(130, 70, D=32, H=1),
    "split": Case(20, 1100, B=1),
    "split_wide": Case(5, 1500, B=1, H=1, D=128),
    "full_cache": Case(9, 5, spare=0),
    "one_head": Case(25, 30, B=1, H=1),
    "plain": Case(16, 14, q_bias=False, v_bias=False, log_scale=False, softmax_scale=0.125),
    "biases_only": Case(16, 14, log_scale=False, softmax_scale=0.125),
    "temperature_only": Case(16, 14, q_bias=False, v_bias=False),
    "scaled_temperature": Case(16, 14, softmax_scale=0.25),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Widths and dtypes that only the CPU's kernel takes.
NARROW = {
    "odd_heads": Case(9, 5, D=7),
    "one_channel": Case(9, 5, D=1, log_scale=False),
    "f64": Case(16, 14, D=24, dtype=torch.float64),
}


def doubles(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def compute(case: Case, device: torch.device | str) -> list[list[Tensor]]:
    """For one draw: [output, new keys and values] of the op, of plain float32 and of float64."""
    qkv, cache, prologue = case.inputs(device)
    settings, results = (case.position, case.softmax_scale), []
    end = case.position + case.n

    def plainly(*arguments: Any) -> Tensor:
        out, new = plain(lambda *args: (cached_attention_reference(*args), args[1]), *arguments)
        arguments[1].copy_(new)
        return out

    for form, dtype in ((cached_attention, None), (plainly, None), (cached_attention_reference, torch.float64)):
        tensors = [qkv, cache] if dtype is None else [qkv.double(), cache.double()]
        mine = tensors[1].clone()
        arguments = tensors[0], mine, settings[0], *(prologue if dtype is None else doubles(prologue)), settings[1]
        with torch.no_grad():
            out = form(*arguments)
        assert out.is_contiguous()
        same = mine[:, :, :, : case.position], mine[:, :, :, end:]
        for ours, before in zip(same, (tensors[1][:, :, :, : case.position], tensors[1][:, :, :, end:]), strict=True):
            assert torch.equal(ours.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))  # nothing else is written
        results.append([out, mine[:, :, :, case.position : end]])
    return results


def check(case: Case, device: torch.device | str = "cpu") -> None:
    # The largest error of a few rows is a matter of luck, so that many are drawn.
    draws = [compute(case, device) for _ in range(-(-100 // (case.n * case.B * case.H)))]
    for i, name in enumerate(("output", "cache")):
        assert_as_accurate(name, *(torch.stack([draw[form][i] for draw in draws]) for form in range(3)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.levels
def test_value_and_cache(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype), device)


@pytest.mark.parametrize("case", NARROW.values(), ids=NARROW)
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.levels
def test_value_and_cache_on_the_cpu(case: Case) -> None:
    with use_backend("cpu"):
        check(case)


def generate(lengths: tuple[int, ...], qkv: Tensor, prologue: list[Tensor | None], softmax_scale: float) -> Tensor:
    """The scales one after another, with one cache."""
    B, L, _, H, D = qkv.shape
    cache, outs, begin = torch.full((2, B, H, L, D), torch.nan, dtype=qkv.dtype, device=qkv.device), [], 0
    for n in lengths:
        outs.append(cached_attention(qkv[:, begin : begin + n], cache, begin, *prologue, softmax_scale))
        begin += n
    return torch.cat(outs, 1)


@pytest.mark.parametrize("lengths", [(1, 4, 9, 16), (7, 30, 1, 50), LENGTHS_256], ids=["small", "uneven", "256px"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_generation_is_block_causal_attention(
    device: torch.device, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    """As accurate as plain float32 over the whole sequence, and on the CPU, in float32, the bits of the training op.

    But for scales of up to four tokens, which multiply in another order.
    """
    case = Case(sum(lengths), 0, B=1, dtype=dtype)
    qkv, _, prologue = case.inputs(device)
    got = generate(lengths, qkv, prologue, 1.0)
    plainly = plain(block_causal_attention_qkv_reference, qkv, *prologue, lengths, 1.0)
    exact = block_causal_attention_qkv_reference(qkv.double(), *doubles(prologue), lengths, 1.0)
    assert_as_accurate("generation", got, plainly, exact)
    if backends.current_backend() == "cpu" and dtype == torch.float32:
        many = torch.tensor(lengths).gt(4).repeat_interleave(torch.tensor(lengths))
        assert torch.equal(got[:, many], block_causal_attention_qkv(qkv, *prologue, lengths, 1.0)[:, many])


def test_reference_is_the_formula() -> None:
    case = Case(3, 4, D=5, dtype=torch.float64)
    qkv, cache, prologue = case.inputs("cpu")
    q_bias, v_bias, log_scale = doubles(prologue)
    before = cache.clone()
    got = cached_attention_reference(qkv, cache, 4, q_bias, v_bias, log_scale, 0.7)
    for b in range(case.B):
        for h in range(case.H):
            q = qkv[b, :, 0, h] + q_bias.view(case.H, -1)[h]
            new = torch.stack([qkv[b, j, 1, h] / qkv[b, j, 1, h].norm() for j in range(3)])
            k = torch.cat((before[0, b, h, :4], new))
            v = torch.cat((before[1, b, h, :4], qkv[b, :, 2, h] + v_bias.view(case.H, -1)[h]))
            torch.testing.assert_close(cache[:, b, h, 4:7], torch.stack((k[4:], v[4:])))
            temperature = min(100.0, float(log_scale[h].exp()))
            for i in range(3):
                scores = q[i] @ k.T / q[i].norm() * temperature * 0.7
                torch.testing.assert_close(got[b, i, h], scores.softmax(0) @ v)


@pytest.mark.parametrize("size", [4.0, 30.0])
def test_large_scores(device: torch.device, size: float) -> None:
    """Scores of hundreds, without normalisation: as accurate as plain float32, and no overflow of an exponential."""
    case = Case(20, 30, dtype=torch.float16, q_bias=False, log_scale=False, softmax_scale=0.5)
    qkv, cache, prologue = case.inputs(device)
    qkv[:, :, :2] *= size
    got = cached_attention(qkv, cache.clone(), 30, *prologue, 0.5)
    plainly = plain(cached_attention_reference, qkv, cache.clone(), 30, *prologue, 0.5)
    exact = cached_attention_reference(qkv.double(), cache.double(), 30, *doubles(prologue), 0.5)
    assert_as_accurate("output", got, plainly, exact)


def test_rows_of_zeros_have_the_floor_for_a_norm(device: torch.device) -> None:
    qkv, cache, (_, v_bias, log_scale) = Case(9, 5).inputs(device)
    qkv[0, 3, :2], qkv[1, 7, 0] = 0, 1e-14
    results = []
    for form in (cached_attention, cached_attention_reference):
        mine = cache.clone()
        results.append((form(qkv, mine, 5, None, v_bias, log_scale, 1.0), mine[:, :, :, :14]))
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_is_not_a_number_is_not_lost(device: torch.device) -> None:
    qkv, cache, prologue = Case(9, 70).inputs(device)
    cache[1, 0, 1, 3, 5] = torch.nan
    out = cached_attention(qkv, cache, 70, *prologue, 1.0)
    assert out[0, :, 1, 5].isnan().all()
    assert out[1].isfinite().all()
    assert out[0, :, 0].isfinite().all()


def test_parameters_of_any_shape_and_dtype(device: torch.device) -> None:
    qkv, cache, (q_bias, v_bias, log_scale) = Case(9, 5).inputs(device)
    want = cached_attention(qkv, cache.clone(), 5, q_bias, v_bias, log_scale, 1.0)
    shaped = q_bias.view(1, 2, 64).double(), v_bias.view(2, 64), log_scale.view(1, 2, 1, 1)
    assert torch.equal(cached_attention(qkv, cache, 5, *shaped, 1.0), want)


def test_two_caches_do_not_meet(device: torch.device) -> None:
    """Two generations that take turns give what each gives alone: the op keeps nothing between calls."""
    lengths, cases = (1, 4, 9), (Case(14, 0), Case(14, 0))
    drawn = [case.inputs(device) for case in cases]
    want = [generate(lengths, qkv, prologue, 1.0) for qkv, _, prologue in drawn]
    caches, outs, begin = [torch.full((2, 2, 2, 14, 64), torch.nan, device=device) for _ in cases], ([], []), 0
    for n in lengths:
        for i, (qkv, _, prologue) in enumerate(drawn):
            outs[i].append(cached_attention(qkv[:, begin : begin + n], caches[i], begin, *prologue, 1.0))
        begin += n
    for i in range(2):
        assert torch.equal(torch.cat(outs[i], 1), want[i])


def test_deterministic(device: torch.device) -> None:
    qkv, cache, prologue = Case(20, 1100, B=1).inputs(device)
    first = cached_attention(qkv, cache.clone(), 1100, *prologue, 1.0)
    assert torch.equal(cached_attention(qkv, cache, 1100, *prologue, 1.0), first)
    # Once more at the same place: the cache holds the same again.
    before = cache.clone()
    assert torch.equal(cached_attention(qkv, cache, 1100, *prologue, 1.0), first)
    assert torch.equal(cache.nan_to_num(), before.nan_to_num())


def test_splits_fill_the_device_and_no_more() -> None:
    assert _splits(heads=32, n=256, keys=680) == 1  # d16, one image with guidance: the last scale
    assert _splits(heads=32, n=1, keys=9451) == 18
    assert _splits(heads=2, n=1024, keys=2240) == 4
    assert _splits(heads=128 * 30, n=4096, keys=9451) == 1
    assert _splits(heads=2, n=1, keys=511) == 1
