"""Reading and writing weights: what people save, strictly, without running what it holds.

`files` reads a file, `unwrap` finds the model in it, `configuration` reads the model's arguments from the shapes.
"""

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from varkern.atomic import atomic_write
from varkern.models.configuration import var_config, vqvae_config
from varkern.models.files import (
    CHECKSUM,
    CheckpointError,
    CheckpointWarning,
    Contents,
    MissingCheckpointError,
    checksum,
    read_file,
)
from varkern.models.unwrap import models_in, plain_name, unwrap
from varkern.models.var import VAR
from varkern.ops.attention.reference import block_causal_mask

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "MissingCheckpointError",
    "load_checkpoint",
    "misfits",
    "read_state",
    "refuse",
    "save_state",
    "state_of",
    "var_config",
    "vqvae_config",
]

StateDict = Mapping[str, Tensor]

MASK, LEVELS, HITS = "attn_bias_for_masking", "lvl_1L", "quantize.ema_vocab_hit_SV"
_ZERO = re.compile(r"blocks\.\d+\.attn\.zero_k_bias")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_state(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Tensor]:
    """The state dict in a safetensors or PyTorch file; ``kind`` "VAR" or "VQVAE" chooses where the file holds both.

    Prefixes of wrappers and the dicts of trainers are taken off; a CheckpointWarning says so where averaged weights
    were chosen. The tensors are mapped from the file. Raises CheckpointError naming the file where it is missing,
    damaged, or holds anything but named tensors.
    """
    contents = read_file(path)
    kinds = {model.kind for model in models_in(contents.value)}
    return state_of(contents, kind or (kinds.pop() if len(kinds) == 1 else None), str(path))


def state_of(contents: Contents, kind: str | None, where: str) -> dict[str, Tensor]:
    """As `read_state`, of a file that was read."""
    state, notes = unwrap(contents.value, kind, where)
    claimed = sum(value.numel() * value.element_size() for value in state.values())
    # Twice: two names may share one tensor. What is beyond is a view that repeats its memory.
    if claimed > 2 * contents.size + 2**20:
        raise CheckpointError(
            f"{where} claims to hold {claimed} bytes of weights in a file of {contents.size}; "
            "it is damaged, get it again"
        )
    for note in notes:
        warnings.warn(note, CheckpointWarning, stacklevel=3)
    return state


def save_state(state: StateDict, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write a state dict as safetensors, atomically: a reader sees the old file or the whole new one.

    A checksum goes into the metadata, by which `read_state` knows a damaged file.
    """
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    metadata = {"format": "pt", **(metadata or {})}
    metadata[CHECKSUM] = checksum(tensors, metadata)

    def write(file: BinaryIO) -> None:
        try:
            save_file(tensors, file.name, metadata=metadata)
        except SafetensorError as error:  # what becomes of a full disk there
            raise OSError(str(error)) from error

    atomic_write(path, write)


def load_checkpoint(
    module: nn.Module, source: StateDict | str | os.PathLike[str], name: str = "the state dict"
) -> None:
    """Load weights strictly, from a state dict or a file; the module is unchanged unless everything fits.

    Prefixes and wrapping dicts are taken off, as by `read_state`. What follows from the schedule (``lvl_1L``,
    ``attn_bias_for_masking``, ``zero_k_bias``) may be missing, and must be right where it is there; so may the hit
    counts ``ema_vocab_hit_SV``, whose number of scales may differ: the module then keeps its own. Weights may be
    float16, bfloat16, float32 or float64. A CheckpointWarning names weights that are not finite.

    Raises CheckpointError naming the first keys that are missing, unknown, of another shape, or no plain tensors.
    ``name`` is what a state dict is called there.
    """
    own = _own(module)
    kind = "VAR" if "pos_1LC" in own else "VQVAE" if "quantize.embedding.weight" in own else None
    if isinstance(source, Mapping):
        state, notes = unwrap(source, kind, name)
        for note in notes:
            warnings.warn(note, CheckpointWarning, stacklevel=2)
    else:
        name = str(source)
        state = state_of(read_file(source), kind, name)
    problems = misfits(module, state)
    unready = [key for key, value in own.items() if not _plain(value)]
    if unready:
        problems.append(
            f"the model's own {unready[0]} is {_described(own[unready[0]])}: load before it is sharded or quantized, "
            "and after to_empty(device=...)"
        )
    refuse(name, module, problems)
    _copy(own, {**_derived(module, own), **state})
    broken = [key for key in own if key in state and key != HITS and not _finite(state[key])]
    if broken:
        warnings.warn(
            f"{name}: {_some(broken)} hold NaN or infinity, which spoil what is computed from them",
            CheckpointWarning,
            stacklevel=2,
        )


def refuse(name: object, module: nn.Module, problems: list[str]) -> None:
    """Raises CheckpointError with the first of the problems, where there are any."""
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{name} does not fit {type(module).__name__}: " + "; ".join(problems[:3]) + more)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names without wrappers, as in a state dict, none made for it."""
    own: dict[str, Tensor] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        persistent = {n: b for n, b in part._buffers.items() if n not in part._non_persistent_buffers_set}
        for name, value in {**part._parameters, **persistent}.items():
            if value is not None:
                own[plain_name(f"{prefix}.{name}" if prefix else name)] = value
    return own


def _transformer(module: nn.Module) -> VAR | None:
    return next((part for part in module.modules() if isinstance(part, VAR)), None)


def _derived(module: nn.Module, own: StateDict) -> dict[str, Tensor]:
    """What a state dict may lack, made from the module's settings: on the CPU, whatever the module's device."""
    var = _transformer(module)
    if var is None or LEVELS not in own:
        return {}
    lengths = torch.tensor(var.scale_lengths, dtype=torch.int64, device="cpu")
    levels = torch.arange(len(lengths), dtype=torch.int64, device="cpu").repeat_interleave(lengths).view(1, -1)
    shapes = {name: value.shape for name, value in own.items() if _ZERO.fullmatch(name)}
    zeros = {name: torch.zeros(shape, dtype=torch.float32, device="cpu") for name, shape in shapes.items()}
    return {LEVELS: levels, **zeros}


def misfits(module: nn.Module, state: StateDict) -> list[str]:
    """What keeps a state dict from being this module's, whose own tensors may be on the meta device.

    Values are looked at only where names and shapes are right.
    """
    own = _own(module)
    derived, var = _derived(module, own), _transformer(module)
    known, optional = set(own), {*derived, HITS}
    if LEVELS in derived:
        known.add(MASK)
        optional.add(MASK)
    missing, unknown = own.keys() - state.keys() - optional, state.keys() - known
    problems = [f"it lacks {_some(missing)}"] if missing else []
    problems += [f"the model has no {_some(unknown)}"] if unknown else []
    for name in sorted(own.keys() & state.keys()):
        given = tuple(state[name].shape) if isinstance(state[name], Tensor) else None
        if given is not None and given != tuple(own[name].shape) and name != HITS:
            problems.append(f"{name} is {given} where the model has {tuple(own[name].shape)}")
    if problems:
        return problems
    for name in sorted(known & state.keys()):
        value = state[name]
        if not isinstance(value, Tensor) or not _plain(value):
            problems.append(f"{name} is {_described(value)}; a plain tensor with its values is needed")
        elif name == MASK and var is not None:
            problems += _wrong_mask(value, var)
        elif name in derived:
            if value.is_complex() or not torch.equal(value.cpu().double(), derived[name].double()):
                right = f"the scales of patch_nums {var.patch_nums}" if name == LEVELS and var else "zero"
                problems.append(f"{name} is not {right}, as it must be")
        elif own[name].is_floating_point() and value.dtype not in _FLOATS:
            problems.append(f"{name} is {value.dtype} where the model has {own[name].dtype}")
        elif not own[name].is_floating_point() and (
            value.is_complex() or not torch.equal(value, value.to(own[name].dtype).to(value.dtype))
        ):
            problems.append(f"{name} has values that {own[name].dtype} cannot hold")
    return problems


def _wrong_mask(mask: Tensor, var: VAR) -> list[str]:
    if tuple(mask.shape) != (1, 1, var.L, var.L):
        return [f"{MASK} is {tuple(mask.shape)} where the model has {(1, 1, var.L, var.L)}"]
    right = block_causal_mask(var.scale_lengths, torch.float32, torch.device("cpu")).view(mask.shape)
    if mask.dtype in _FLOATS and torch.equal(mask.cpu().float(), right):
        return []
    return [f"{MASK} is not the block-causal mask of patch_nums {var.patch_nums}, the only one that serves"]


def _plain(value: Tensor) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and not value.is_meta
        and not value.is_quantized
    )


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_meta:
        return "on the meta device, without values,"
    if value.is_quantized:
        return f"quantized ({value.dtype})"
    if value.layout is not torch.strided:
        return f"sparse ({value.layout})"
    return f"a {type(value).__name__}"


def _copy(own: StateDict, state: StateDict) -> None:
    """Copy what was checked. Values that lie in the module's own memory are set aside, not to be overwritten first."""
    memory = {value.untyped_storage().data_ptr() for value in own.values()}
    given = {
        name: value.detach().clone() if value.untyped_storage().data_ptr() in memory else value.detach()
        for name, value in state.items()
        if name in own and value is not own[name] and value.shape == own[name].shape
    }
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    value = value.detach()
    if value.sum().isfinite():  # the quicker test, but a sum may overflow
        return True
    low, high = value.aminmax()  # both are NaN where one value is
    return bool(low.isfinite() & high.isfinite())


def _some(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more keys" if len(first) > 3 else "")
