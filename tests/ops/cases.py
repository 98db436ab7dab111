"""Sample calls of every registered op, which the suite over all ops runs. Imports nothing of pytest.

A sample is the arguments of a public function by name, small, of sizes that every backend takes; float32 or int64 on
the CPU by name, whatever the defaults are, unless its own name says otherwise. Calls of the registered operators, those
of backward passes among them, are what its functions make of it: ``operator_calls``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import varkern
from varkern import ops
from varkern.ops._op import Op
from varkern.ops.conv import Norm
from varkern.ops.quantize.reference import Phi
from varkern.ops.sampling import filter_logits_reference_, guided_logits_reference

SIZES = [(1, 1), (2, 2), (4, 4)]
LENGTHS = (1, 4)


@dataclass(frozen=True)
class Sample:
    """A call of a public function, and the same as a function of its tensors alone.

    ``reference`` is the function in plain PyTorch at any precision, where it is not what the backend of that name runs.
    ``differentiable``, ``writes`` and ``batch`` count the tensors of the arguments, each once: those that may need
    gradients; the one that is changed in place; the axis of images or rows of each.
    """

    public: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    differentiable: Sequence[int] = ()
    writes: int | None = None
    batch: Sequence[int | None] = ()
    reference: Callable[..., Any] | None = None

    @functools.cached_property
    def _made(self) -> tuple[list[Any], Any, list[int]]:
        """The leaves of the arguments, their tree, and of each leaf the number that it has among the tensors, or -1."""
        leaves, tree = tree_flatten(self.arguments())
        number: dict[int, int] = {}
        places = [number.setdefault(id(t), len(number)) if isinstance(t, Tensor) else -1 for t in leaves]
        return leaves, tree, places

    def fresh(self) -> list[Tensor]:
        leaves, _, places = self._made
        return [leaves[places.index(i)].clone() for i in range(max(places) + 1)]

    def named(self, *tensors: Tensor) -> dict[str, Any]:
        """The arguments of the public function with these tensors."""
        leaves, tree, places = self._made
        return tree_unflatten([leaf if i < 0 else tensors[i] for leaf, i in zip(leaves, places, strict=True)], tree)

    def function(self, *tensors: Tensor) -> Any:
        return self.public(**self.named(*tensors))

    def plain(self, *tensors: Tensor) -> Any:
        """What float64 is computed by."""
        if self.reference is not None:
            return self.reference(**self.named(*tensors))
        with varkern.use_backend("reference"):
            return self.function(*tensors)

    def results(self, *tensors: Tensor, form: Callable[..., Any] | None = None) -> list[Tensor]:
        """All that a call gives: its results and what it has written. ``form``: ``function`` unless ``plain``."""
        given = tensors_of((form or self.function)(*tensors))
        return given if self.writes is None else [*given, tensors[self.writes]]

    def gradients(
        self,
        *tensors: Tensor,
        form: Callable[..., Any] | None = None,
        change: Callable[[Tensor], Tensor] = lambda result: result,
    ) -> list[Tensor]:
        """Of a scalar of all results, changed."""
        leaves = [t.detach().clone() for t in tensors]
        varied = [leaves[i].requires_grad_() for i in self.differentiable]
        used = [t.clone() if i == self.writes else t for i, t in enumerate(leaves)]
        return list(
            torch.autograd.grad(summed([change(t) for t in tensors_of((form or self.function)(*used))]), varied)
        )


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def summed(result: Any) -> Tensor:
    """A scalar that every floating-point element of a result has its own weight in."""
    total = None
    for i, tensor in enumerate(t for t in tensors_of(result) if t.is_floating_point()):
        weights = torch.linspace(1 + i, 2 + i, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        part = (tensor.flatten() * weights).sum()
        total = part if total is None else total + part
    assert total is not None
    return total


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def indices(positions: int, B: int = 2, V: int = 16) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(9)
    return torch.randint(0, V, (B, positions), generator=generator, dtype=torch.int64, device="cpu")


def norm(
    B: int = 2, L: int = 3, C: int = 16, axes: int = 3, x: torch.dtype = torch.float32, condition: Any = torch.float32
) -> dict[str, Any]:
    shape = (B, 1, C) if axes == 3 else (B, C)
    scale, shift = (random(seed, *shape, dtype=condition) for seed in (1, 2))
    return {"x": random(0, B, L, C, dtype=x), "scale": scale, "shift": shift, "eps": 1e-6}


def gated(*size: int, h: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    inputs = norm(*size, **options)
    x, scale = inputs.pop("x"), inputs["scale"]
    return {"x": x, "h": random(3, *x.shape, dtype=h), "gate": random(4, *scale.shape, dtype=scale.dtype)} | inputs


def maps(
    shape: Sequence[int] = (2, 4, 5, 6),
    num_groups: int = 2,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
    **silu: bool,
) -> dict[str, Any]:
    x = random(0, *shape, dtype=dtype).contiguous(memory_format=memory_format)
    affine = {"weight": random(1, shape[1]), "bias": random(2, shape[1])}
    return {"x": x, **affine, "num_groups": num_groups, "eps": 1e-6} | silu


def convolution(
    B: int = 2, C: int = 4, outputs: int = 6, side: int = 16, groups: int = 2, **options: bool
) -> dict[str, Any]:
    # Enough tiles that the CPU kernel takes the first by itself: 2 * 4 * 4 of 4 x 4.
    given = {"x": random(0, B, C, side, side), "weight": random(1, outputs, C, 3, 3) / (3 * C**0.5)}
    given |= {"bias": random(2, outputs)}
    given |= {"norm": Norm(random(3, C), random(4, C), groups, 1e-6) if groups else None}
    full = side * 2 if options.get("upsample") else side
    if options.pop("residual", False):
        given["residual"] = random(5, B, outputs, full, full)
    return given | options


def heads(
    lengths: Sequence[int] = LENGTHS, B: int = 2, H: int = 2, layout: str = "BHLD", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    shape = (B, H, sum(lengths), 32) if layout == "BHLD" else (B, sum(lengths), H, 32)
    q, k, v = (random(seed, *shape, dtype=dtype) for seed in range(3))
    return {"q": q, "k": k, "v": v, "lengths": lengths, "softmax_scale": 0.3, "layout": layout}


def prologue(H: int = 2, D: int = 32) -> dict[str, Any]:
    return {"q_bias": random(1, H * D), "v_bias": random(2, H * D), "log_scale": random(3, H, 1, 1)}


NO_PROLOGUE = {"q_bias": None, "v_bias": None, "log_scale": None}


def projection(
    lengths: Sequence[int] = LENGTHS, B: int = 2, H: int = 2, dtype: torch.dtype = torch.float32, **others: Any
) -> dict[str, Any]:
    qkv = random(0, B, sum(lengths), 3, H, 32, dtype=dtype)
    return {"qkv": qkv} | prologue(H) | others | {"lengths": list(lengths), "softmax_scale": 0.3}


def cached(
    n: int = 3, position: int = 2, B: int = 2, H: int = 2, dtype: torch.dtype = torch.float32, **others: Any
) -> dict[str, Any]:
    given = {"qkv": random(0, B, n, 3, H, 32, dtype=dtype)}
    given |= {"cache": random(4, 2, B, H, position + n + 2, 32, dtype=dtype), "position": position}
    return given | prologue(H) | others | {"softmax_scale": 0.3}


def logits(guidance: float | None = 1.5, top_k: int = 9, top_p: float = 0.9, n: int = 3, V: int = 64) -> dict[str, Any]:
    return {"logits": random(0, 4, n, V), "guidance": guidance, "top_k": top_k, "top_p": top_p}


def draw(n: int = 3, V: int = 64, **settings: Any) -> dict[str, Any]:
    given = logits(n=n, V=V, **settings)
    rows = 4 * n if given["guidance"] is None else 2 * n
    return {"logits": given.pop("logits"), "noise": random(1, rows, V).abs() + 0.1} | given


def drawn(logits: Tensor, noise: Tensor, **settings: Any) -> Tensor:
    p = filtered(logits, **settings).softmax(-1)
    return (p / noise.view(p.shape)).argmax(-1)


def filtered(logits: Tensor, guidance: float | None, top_k: int, top_p: float) -> Tensor:
    guided = logits.clone() if guidance is None else guided_logits_reference(logits, guidance)
    return filter_logits_reference_(guided, top_k, top_p)


def phis(count: int, Cv: int = 4) -> list[Phi]:
    """Of two, the second one shared."""
    first, second = (Phi(random(i, Cv, Cv, 3, 3) / (3 * Cv**0.5), random(i + 1, Cv), 0.5) for i in (2, 4))
    return [first, *[second] * (count - 1)]


def codes(
    sizes: Sequence[tuple[int, int]] = tuple(SIZES), V: int = 16, Cv: int = 4, identity: bool = False, scales: int = 0
) -> dict[str, Any]:
    scales = scales or len(sizes)
    bank = [Phi(None, None, 0.0)] * scales if identity else phis(scales, Cv)
    return {"codebook": random(1, V, Cv), "phis": bank, "sizes": list(sizes)}


def quantized(B: int = 2, settings: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    given = codes(**options)
    return {"features": random(0, B, given["codebook"].shape[1], *given["sizes"][-1])} | given | (settings or {})


def dequantized(size: tuple[int, int] = (4, 4), B: int = 2, **options: Any) -> dict[str, Any]:
    given = codes(**options)
    V = len(given["codebook"])
    return {"indices": indices(sum(h * w for h, w in given["sizes"]), B, V)} | given | {"size": size}


def dequantize_plainly(indices: Tensor, codebook: Tensor, phis: list[Phi], sizes: Any, size: Any) -> list[Tensor]:
    maps = ops.quantize.code_maps_reference(indices, codebook, sizes)
    return ops.quantize.residual_dequantize_reference(maps, phis, size)


def teacher(B: int = 2, **options: Any) -> dict[str, Any]:
    sizes = options.pop("sizes", SIZES)
    given = codes(sizes, scales=len(sizes) - 1, **options)
    return {"indices": indices(sum(h * w for h, w in sizes[:-1]), B, len(given["codebook"]))} | given


def teach_plainly(indices: Tensor, codebook: Tensor, phis: list[Phi], sizes: Any) -> Tensor:
    maps = ops.quantize.code_maps_reference(indices, codebook, sizes[: len(phis)])
    return ops.quantize.teacher_forcing_input_reference(maps, phis, sizes)


def step(
    following: tuple[int, int] | None = (3, 3), B: int = 2, side: int = 4, Cv: int = 4, identity: bool = False
) -> dict[str, Any]:
    given = {"f_hat": random(0, B, Cv, side, side), "codes": random(1, B, Cv, 2, 2)}
    return given | {"phi": Phi(None, None, 0.0) if identity else phis(1, Cv)[0], "following": following}


F16, LAST, LONG = torch.float16, torch.channels_last, (1, 4, 9, 16)
WIDE, EIGHT = ((1, 1), (1, 3), (2, 4), (4, 7)), ((1, 1), (2, 2), (5, 5), (8, 8))
# All that a sample of an op has but its arguments.
KINDS: dict[str, dict[str, Any]] = {
    "modulated_layer_norm": {"differentiable": (0, 1, 2), "batch": (0, 0, 0)},
    "gated_residual_layer_norm_": {"writes": 0, "batch": (0, 0, 0, 0, 0)},
    "group_norm_silu": {"batch": (0, None, None)},
    "group_norm_affine": {"batch": (0, None, None)},
    "conv3x3": {"batch": (0, None, None, None, None, 0)},
    "block_causal_attention": {"differentiable": (0, 1, 2), "batch": (0, 0, 0)},
    "block_causal_attention_qkv": {"differentiable": (0, 1, 2, 3), "batch": (0, None, None, None)},
    "cached_attention": {"writes": 1, "batch": (0, 1, None, None, None)},
    "sample_tokens": {"batch": (0, 0), "reference": drawn},
    "filter_logits": {"batch": (0,), "reference": filtered},
    "residual_quantize": {"batch": (0, *[None] * 5), "reference": ops.quantize.residual_quantize_reference},
    "residual_quantize_train": {
        "differentiable": range(6),
        "reference": ops.quantize.residual_quantize_train_reference,
    },
    "residual_dequantize": {"differentiable": range(1, 6), "batch": (0, *[None] * 5), "reference": dequantize_plainly},
    "teacher_forcing_input": {"batch": (0, *[None] * 5), "reference": teach_plainly},
    "next_scale_input": {
        "differentiable": (0, 1, 2, 3),
        "writes": 0,
        "batch": (0, 0, None, None),
        "reference": ops.quantize.next_scale_input_reference,
    },
}
# Of each op the first is the one that takes part in every test.
ARGUMENTS: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "modulated_layer_norm": {
        "": norm,
        "odd": lambda: norm(3, 19, 33, axes=2),
        "f16_f32": lambda: norm(x=F16),
        "f16": lambda: norm(x=F16, condition=F16),
    },
    "gated_residual_layer_norm_": {
        "": gated,
        "odd": lambda: gated(3, 19, 33, axes=2),
        "f32_f16": lambda: gated(h=F16, condition=F16),
        "f16": lambda: gated(x=F16, h=F16, condition=F16),
    },
    "group_norm_silu": {
        "": maps,
        "last": lambda: maps((2, 12, 5, 6), 3, LAST, silu=False),
        "f16": lambda: maps(memory_format=LAST, dtype=F16),
    },
    "group_norm_affine": {
        "": maps,
        "last": lambda: maps((2, 12, 5, 6), 3, LAST),
        "f16": lambda: maps(memory_format=LAST, dtype=F16),
    },
    "conv3x3": {
        "": convolution,
        "plain": lambda: convolution(groups=0),
        "all": lambda: convolution(1, 8, 5, 9, groups=4, upsample=True, residual=True),
    },
    "block_causal_attention": {
        "": heads,
        "long": lambda: heads(LONG, B=1, layout="BLHD"),
        "f16": lambda: heads(dtype=F16),
    },
    "block_causal_attention_qkv": {
        "": projection,
        "long": lambda: projection(LONG, B=1, H=3),
        "plain": lambda: projection(**NO_PROLOGUE),
        "f16": lambda: projection(dtype=F16),
    },
    "cached_attention": {
        "": cached,
        "first": lambda: cached(1, 0),
        "long": lambda: cached(9, 40, H=3),
        "plain": lambda: cached(5, 9, **NO_PROLOGUE),
        "f16": lambda: cached(dtype=F16),
    },
    "sample_tokens": {
        "": draw,
        "plain": lambda: draw(guidance=None, top_k=0, top_p=0.0),
        "wide": lambda: draw(V=300, top_k=40, top_p=0.0),
    },
    "filter_logits": {
        "": logits,
        "plain": lambda: logits(guidance=None, top_k=0, top_p=0.0),
        "wide": lambda: logits(V=300, top_k=40, top_p=0.5),
    },
    "residual_quantize": {
        "": quantized,
        "cosine": lambda: quantized(settings={"cosine": True}),
        "identity": lambda: quantized(identity=True, settings={"all_f_hats": False}),
        "wide": lambda: quantized(sizes=WIDE, V=37, Cv=5),
    },
    "residual_quantize_train": {
        "": lambda: quantized(settings={"beta": 0.25}),
        "cosine": lambda: quantized(sizes=WIDE, V=37, Cv=5, settings={"beta": 0.25, "cosine": True}),
    },
    "residual_dequantize": {
        "": dequantized,
        "larger": lambda: dequantized((6, 7), V=37, Cv=5),
        "identity": lambda: dequantized(identity=True),
    },
    "teacher_forcing_input": {
        "": teacher,
        "wide": lambda: teacher(sizes=WIDE, V=37, Cv=5),
        "identity": lambda: teacher(identity=True),
    },
    "next_scale_input": {"": step, "last": lambda: step(None), "identity": lambda: step((4, 4), side=5, identity=True)},
}
# So large that threads share the work.
LARGE: dict[str, Callable[[], dict[str, Any]]] = {
    "modulated_layer_norm": lambda: norm(3, 300, 200),
    "gated_residual_layer_norm_": lambda: gated(3, 300, 200),
    "group_norm_silu": lambda: maps((1, 64, 130, 128), 32, LAST),
    "group_norm_affine": lambda: maps((1, 64, 130, 128), 32),
    "conv3x3": lambda: convolution(1, 64, 96, 24, 32, residual=True),
    "block_causal_attention": lambda: heads((1, 4, 100, 200), B=1, H=3),
    "block_causal_attention_qkv": lambda: projection((1, 4, 100, 200), B=1, H=3),
    "cached_attention": lambda: cached(200, 300, B=1, H=3),
    "sample_tokens": lambda: draw(256, 1024, top_k=100, top_p=0.96),
    "filter_logits": lambda: logits(n=256, V=1024, top_k=100, top_p=0.96),
    "residual_quantize": lambda: quantized(3, sizes=EIGHT, V=1500, Cv=32),
    "residual_quantize_train": lambda: quantized(3, settings={"beta": 0.25}, sizes=EIGHT, V=1500, Cv=32),
    "residual_dequantize": lambda: dequantized((8, 8), 3, sizes=EIGHT, V=1500, Cv=32),
    "teacher_forcing_input": lambda: teacher(3, sizes=EIGHT, V=1500, Cv=32),
    "next_scale_input": lambda: step((6, 7), 3, 8, 32),
}


def _sample(op: str, make: Callable[[], dict[str, Any]]) -> Sample:
    count = len(Sample(print, make).fresh())
    kind = dict(KINDS[op])
    kind["differentiable"] = [i for i in kind.get("differentiable", ()) if i < count]
    axes = list(kind.get("batch", ()))[:count]
    if op == "conv3x3" and count > 3:  # a residual is the last of them
        axes[-1] = 0 if "residual" in make() else None
    return Sample(getattr(ops, op), make, **kind | {"batch": axes})


# Named after the op and what is special about the sample.
SAMPLES = {
    f"{op}.{name}".rstrip("."): _sample(op, make) for op, calls in ARGUMENTS.items() for name, make in calls.items()
}
CASES = {op: SAMPLES[op] for op in ARGUMENTS}
LARGE_SAMPLES = {op: _sample(op, make) for op, make in LARGE.items()}


def op_of(name: str) -> Op:
    """The registered op that a sample's function is for."""
    op = name.partition(".")[0]
    return Op.registry["residual_quantize" if op == "residual_quantize_train" else op]


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on a device, their strides kept."""
    return [tensor.clone().to(device) for tensor in tensors]


OperatorCall = tuple[Op, list[Any]]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OperatorCall] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "varkern":
            name = func.overloadpacket.__name__
            op = Op.registry.get(name) or Op.inner[name]
            self.calls.append((op, [t.detach().clone() if isinstance(t, Tensor) else t for t in args[:-1]]))
        return func(*args, **(kwargs or {}))


def operator_calls(sample: Sample, backend: str | None, device: torch.device | None = None) -> list[OperatorCall]:
    """The operators that a sample's call and its gradients run, with all their arguments but the backend.

    What one operator leaves to another is made by ``backend``.
    """
    inputs = moved(sample.fresh(), device or torch.device("cpu"))
    with varkern.use_backend(None if backend == "reference" else backend), _Recorder() as recorder, torch.no_grad():
        sample.function(*inputs)
    calls = recorder.calls
    for op, args in list(calls):
        if op._function is None:
            continue
        leaves = [t.clone() if isinstance(t, Tensor) else t for t in args]
        leaves = [t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves]
        with _Recorder() as recorder:
            out = [t for t in tensors_of(op.operator(*leaves, backend)) if t.requires_grad]
            summed(out).backward()
        calls = [*calls, *(call for call in recorder.calls if call[0] is not op)]
    return calls


def copied(args: Sequence[Any]) -> list[Any]:
    return tree_map_only(Tensor, torch.clone, list(args))
