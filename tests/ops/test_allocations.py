"""No result depends on the default dtype or device or a mode in force, and nothing that is made in one outlives it."""

from __future__ import annotations

import ast
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Sample, tensors_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import varkern
from varkern import ops
from varkern._kept import kept
from varkern.ops._op import Op
from varkern.ops.attention import launch as attention_launch
from varkern.ops.attention import peers as attention_peers
from varkern.ops.attention import reference as attention_reference
from varkern.ops.backends import load
from varkern.ops.quantize import operators as quantize_operators

ROOT = Path(__file__).parents[2]
# What torch.set_default_dtype and torch.set_default_device change the result of.
FACTORIES = {"empty", "empty_strided", "empty_permuted", "zeros", "ones", "full", "eye", "arange", "range", "linspace"}
FACTORIES |= {"logspace", "tensor", "as_tensor", "asarray", "scalar_tensor", "rand", "randn", "randint", "randperm"}
FACTORIES |= {"hann_window", "hamming_window", "blackman_window", "bartlett_window", "kaiser_window"}
FACTORIES |= {"tril_indices", "triu_indices"}
BACKENDS = ("reference", "cpu", "triton")
SOURCES = sorted(p.relative_to(ROOT).as_posix() for d in ("varkern", "kernels") for p in (ROOT / d).rglob("*.py"))


# A module under construction follows the defaults, as those of torch.nn do: its parameters and buffers do, and this,
# which draws them.
CONSTRUCTION = ("Parameter", "register_buffer")
EXCEPTIONS = {("varkern/modules/transformer.py", "torch.empty(*shape)")}


def unnamed(source: str) -> Iterator[tuple[int, str]]:
    """The line and text of each allocation that leaves its dtype or its device to the defaults."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    constructed = {
        id(inner)
        for call in calls
        if call.func.attr in CONSTRUCTION
        for inner in ast.walk(call)  # type: ignore
    }
    for node in calls:
        if id(node) in constructed:
            continue
        owner, name = node.func.value, node.func.attr
        if not (isinstance(owner, ast.Name) and owner.id == "torch" and name in FACTORIES):
            continue
        given = {keyword.arg for keyword in node.keywords}
        if not {"dtype", "device"} <= given and "out" not in given:
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES)
def test_every_allocation_names_dtype_and_device(path: str) -> None:
    """``x.new_*`` and ``torch.*_like`` take both from a tensor, and are not asked."""
    allocations = unnamed((ROOT / path).read_text())
    found = [f"{path}:{line}: {text}" for line, text in allocations if (path, text) not in EXCEPTIONS]
    assert not found, "\n".join(found)


def test_the_check_sees_what_is_missing() -> None:
    source = "torch.empty(3)\ntorch.ones(3, dtype=d)\ntorch.arange(3, device=x)\ntorch.zeros(3, dtype=d, device=x)\n"
    source += "nn.Parameter(torch.ones(3))\nself.register_buffer(name, torch.ones(3))\n"
    assert [line for line, _ in unnamed(source)] == [1, 2, 3]


def dtype_default(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    @contextlib.contextmanager
    def force() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return force()


DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "float64": lambda: dtype_default(torch.float64),
    "float16": lambda: dtype_default(torch.float16),
    "bfloat16": lambda: dtype_default(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


def computed(case: Sample) -> list[Tensor]:
    """The results of a case, what it writes, and the gradients."""
    with torch.no_grad():
        results = case.results(*case.fresh())
    if case.differentiable:
        results += case.gradients(*case.fresh())
    return [tensor.clone() for tensor in results]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.device == b.device
        assert torch.equal(a, b)


def functions() -> dict[str, Callable[[], Any]]:
    """What is no registered op, and makes tensors all the same."""
    logits, codebook = CASES["filter_logits"].fresh()[0], CASES["residual_dequantize"].fresh()[1]
    maps = [CASES["next_scale_input"].fresh()[i] for i in (1, 0)]
    phi = varkern.ops.quantize.Phi(*CASES["next_scale_input"].fresh()[2:], 0.5)
    cpu, seeded = torch.device("cpu"), lambda: torch.Generator("cpu").manual_seed(3)
    q, k, v = CASES["block_causal_attention"].fresh()
    return {
        "draw_noise": lambda: ops.sampling.draw_noise(3, 5, cpu, seeded()),
        "sample_tokens": lambda: ops.sample_tokens(logits, seeded(), None, 5),
        "sample_tokens_reference": lambda: ops.sampling.sample_tokens_reference(logits, seeded()),
        "filter_logits_reference_": lambda: ops.sampling.filter_logits_reference_(logits.clone(), 5, 0.9),
        "guided_logits_reference": lambda: ops.sampling.guided_logits_reference(logits, 1.5),
        "smooth_codes_reference": lambda: ops.sampling.smooth_codes_reference(
            logits, codebook.repeat(4, 1), 0.5, seeded()
        ),
        "block_causal_mask": lambda: attention_reference.block_causal_mask((1, 4), torch.float32, cpu),
        "maps_as_codes": lambda: ops.quantize.maps_as_codes(maps),
        "no maps_as_codes": lambda: ops.quantize.maps_as_codes([m[:0] for m in maps]),
        "growing": lambda: ops.quantize.growing_dequantize_reference(maps, [phi, phi]),
        "sdpa": lambda: attention_peers.peer_attention("sdpa", q, k, v, (1, 4), 0.3),
        **{f"example of {name}": lambda op=op: op.example(cpu, torch.float32) for name, op in Op.registry.items()},
    }


@pytest.mark.parametrize("default", DEFAULTS)
class TestDefaults:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", CASES)
    def test_ops(self, name: str, backend: str, default: str) -> None:
        with varkern.use_backend(backend):
            want = computed(CASES[name])
            with DEFAULTS[default]():
                got = computed(CASES[name])
        same(got, want)

    @pytest.mark.parametrize("name", list(functions()))
    def test_functions(self, name: str, default: str) -> None:
        function = functions()[name]
        want = tensors_of(function())
        with DEFAULTS[default]():
            attention_reference._kept_mask.cache_clear()
            got = tensors_of(function())
        same(got, want)

    def test_filtered_logits_stay_inside_their_memory(self, default: str) -> None:
        """The kernel writes float32, and a result of 16 bits would be half as long as what it writes."""
        logits = torch.randn(2, 4, 64, dtype=torch.float32)
        with varkern.use_backend("cpu"), DEFAULTS[default]():
            out = ops.filter_logits(logits, None, 5)
        assert out.dtype == torch.float32
        assert out.untyped_storage().nbytes() == logits.nbytes


def tables() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """All that is made once and kept, with arguments that no test has used before."""
    lengths, cpu = (1, 4, 11), torch.device("cpu")
    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "lengths": (attention_launch._lengths, (lengths,)),
        "mask": (attention_reference.cached_block_causal_mask, (lengths, torch.float32, cpu)),
        "flex": (attention_peers._block_mask, (lengths, cpu)),
        "schedule": (quantize_operators._scales, ((1, 1, 11, 13), (0, 0))),
    }
    if load("triton")[0] is not None:
        from varkern.kernels.attention import tiles as attention_tiles
        from varkern.kernels.quantize import maps as quantize_maps

        found |= {
            "tiles": (attention_tiles.to_device, (((0, 3), (3, 16)), cpu)),
            "bounds": (attention_tiles.scale_bounds, (lengths, cpu)),
            "plan": (quantize_maps.plan, (cpu, ((3, 5, 7, 11),))),
        }
    return found


class TestKept:
    @pytest.mark.parametrize("name", list(tables()))
    def test_nothing_of_a_mode_is_kept(self, name: str) -> None:
        """Neither a fake tensor, nor one of a transform, nor one of inference mode, nor one on the default device."""
        function, arguments = tables()[name]
        attention_reference._kept_mask.cache_clear()
        with FakeTensorMode():
            function(*arguments)
        torch.func.grad(lambda x: (function(*arguments), x.sum())[1])(torch.ones(2))
        with torch.inference_mode(), torch.device("meta"):
            function(*arguments)
        for tensor in tensors_of(function(*arguments)):
            assert type(tensor) is Tensor
            assert not isinstance(tensor, FakeTensor)
            assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            assert not tensor.is_inference()
            assert tensor.device.type == "cpu"

    @pytest.mark.parametrize("name", [name for name in tables() if name != "mask"])
    def test_what_a_graph_may_point_to_is_kept(self, name: str) -> None:
        function, arguments = tables()[name]
        first = function(*arguments)
        if name in ("lengths", "tiles", "bounds", "plan"):
            address = first.data_ptr()
            del first
            for i in range(300):  # more than any bound that there was
                function(*other_arguments(name, i))
            gc.collect()
            assert function(*arguments).data_ptr() == address
        assert function(*arguments) is function(*arguments)

    def test_masks_are_dropped(self) -> None:
        """They are large: L x L. A graph that is being captured makes its own."""
        attention_reference._kept_mask.cache_clear()
        cpu = torch.device("cpu")
        first = weakref.ref(attention_reference.cached_block_causal_mask((1, 40), torch.float32, cpu))
        assert first() is attention_reference.cached_block_causal_mask((1, 40), torch.float32, cpu)
        for i in range(4):
            attention_reference.cached_block_causal_mask((1, 41 + i), torch.float32, cpu)
        gc.collect()
        assert first() is None

    def test_a_capturing_stream_makes_its_own_mask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[torch.device] = []
        cuda = torch.device("cuda", 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(
            attention_reference, "block_causal_mask", lambda lengths, dtype, device: made.append(device) or object()
        )
        masks = [attention_reference.cached_block_causal_mask((1, 4), torch.float32, cuda) for _ in range(2)]
        assert masks[0] is not masks[1]
        assert made == [cuda, cuda]

    def test_two_threads_get_one_table(self) -> None:
        """The address of the other one would die with its call."""
        start, got = threading.Barrier(4), []

        @kept
        def table(n: int) -> Tensor:
            start.wait(timeout=10)
            return torch.zeros(n, dtype=torch.int64, device="cpu")

        threads = [threading.Thread(target=lambda: got.append(table(5))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 4
        assert all(tensor is got[0] for tensor in got)

    def test_the_schedule_of_each_position(self) -> None:
        """Counted on the device: every mask is the one of the definition."""
        for lengths in ((1,), (1, 4, 9), (3, 1, 2), (7, 7)):
            scale_of = [k for k, length in enumerate(lengths) for _ in range(length)]
            want = torch.tensor([[0.0 if a >= b else -torch.inf for b in scale_of] for a in scale_of])
            got = attention_reference.block_causal_mask(lengths, torch.float32, torch.device("cpu"))
            assert torch.equal(got, want)


def other_arguments(name: str, i: int) -> tuple[Any, ...]:
    cpu, n = torch.device("cpu"), 20 + i
    return {
        "lengths": ((1, n),),
        "tiles": (((0, n),), cpu),
        "bounds": ((1, n), cpu),
        "plan": (cpu, ((n, n, 0, 0),)),
    }[name]
