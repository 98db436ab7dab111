"""Tensors that begin at odd addresses: kernels read 16 bytes at a time only where an address allows it.

On a GPU such a read of another address is an error that ends the process's use of the device.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES, SAMPLES, moved, tensors_of
from everywhere import everywhere, quick
from torch import Tensor

import varkern
from varkern import ops
from varkern.ops import _op, backends
from varkern.ops.attention import cached

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"


def shifted(tensor: Tensor, elements: int = 1) -> Tensor:
    """The same values and strides, some elements behind an address that is a multiple of 16 bytes."""
    memory = torch.empty(tensor.numel() + 16, dtype=tensor.dtype, device=tensor.device)
    first = (-memory.data_ptr() // tensor.element_size()) % (16 // tensor.element_size()) + elements
    out = memory[first : first + tensor.numel()].view(tensor.shape)
    assert out.data_ptr() % 16 == elements * tensor.element_size() % 16
    return out.copy_(tensor)


@everywhere(SAMPLES, quick)
def test_odd_addresses_give_the_same(device: torch.device, name: str) -> None:
    """Each input in turn, and all of them."""
    sample = SAMPLES[name]
    inputs = moved(sample.fresh(), device)
    tolerance = 2e-3 if torch.float16 in {t.dtype for t in inputs} else 1e-5
    with torch.no_grad():
        want = tensors_of(sample.function(*moved(inputs, device)))
        for which in (*({i} for i in range(len(inputs))), set(range(len(inputs)))):
            if name.startswith("cached_attention") and 1 in which and backends.current_backend() == "cuda":
                continue  # refused, below
            odd = [shifted(t) if i in which else t.clone() for i, t in enumerate(inputs)]
            for a, b in zip(tensors_of(sample.function(*odd)), want, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class TestDecode:
    """What the CUDA launch is given, seen on the CPU: its kernels read the biases and the cache 16 bytes at a time."""

    @pytest.fixture
    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        seen: list[tuple[Any, ...]] = []
        kernels = SimpleNamespace(cached_attention=lambda *arguments: seen.append(arguments))
        monkeypatch.setitem(_op._ABSENT, "cuda", lambda tensor: None)
        monkeypatch.setattr(cached, "extension", lambda backend: kernels)
        return seen

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("which", [(0,), (2,), (3,), (4,), (0, 2, 3, 4)], ids=str)
    def test_every_pointer_is_aligned(self, launches, which, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
        inputs = [t.to(dtype if i < 2 else bias_dtype) for i, t in enumerate(CASES["cached_attention"].fresh())]
        inputs = [shifted(t) if i in which else t for i, t in enumerate(inputs)]
        with varkern.use_backend("cuda"):
            ops.cached_attention(inputs[0], inputs[1], 2, *inputs[2:], 0.3)
        (arguments,) = launches
        qkv, q_bias, v_bias, log_scale, cache, q, out = arguments[:7]
        assert all(pointer and pointer % 16 == 0 for pointer in (qkv, q_bias, v_bias, log_scale, cache, q, out))
        assert cache == inputs[1].data_ptr()

    def test_a_cache_at_an_odd_address_is_refused(self, launches) -> None:
        qkv, cache, *rest = CASES["cached_attention"].fresh()
        odd, before = shifted(cache), cache.clone()
        with varkern.use_backend("cuda"), pytest.raises(RuntimeError, match="cache begins at an address that is no"):
            ops.cached_attention(qkv, odd, 2, *rest, 0.3)
        assert torch.equal(odd, before)
        assert "cache begins" in (cached._OP.why_not("cuda", qkv, odd) or "")
        assert cached._OP.why_not("cuda", qkv, cache) is None
        assert not launches

    def test_an_aligned_call_copies_nothing(self, launches) -> None:
        qkv, cache, *rest = CASES["cached_attention"].fresh()
        with varkern.use_backend("cuda"):
            ops.cached_attention(qkv, cache, 2, *rest, 0.3)
        assert launches[0][:5] == tuple(t.data_ptr() for t in (qkv, *rest, cache))


def test_the_other_cuda_kernels_look_for_themselves() -> None:
    """Whoever loads or stores packs of 16 bytes asks for the address of what it is given first, or its op has."""
    users = [p.name for p in sorted(CUDA.iterdir()) if re.search(r"\b(load|store)_pack\(", p.read_text())]
    assert users == ["cached_attention.cu", "gated_norm.cu", "group_norm.cu", "norm.cu"]
    for name in users[1:]:
        source = (CUDA / name).read_text()
        assert re.search(r"\baligned\(", source), name


def test_triton_is_told_no_alignment() -> None:
    """Its launches look at every address by themselves, unless a kernel claims to know."""
    claims = re.compile(r"tl\.(multiple_of|max_contiguous|make_tensor_descriptor|make_block_ptr)")
    for path in (CUDA.parent.parent / "kernels").rglob("*.py"):
        assert not claims.search(path.read_text()), path
