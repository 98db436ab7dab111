"""Finding the state dict of a model in what people save: wrappers' prefixes, trainers' dicts, averaged weights."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varkern.models.files import CheckpointError

_VAR_BUFFERS = ("lvl_1L", "attn_bias_for_masking")
_VAR_EMBEDDINGS = ("pos_start", "pos_1LC", "word_embed", "class_emb", "lvl_embed")
# The first parts of all names.
_ROOTS = {
    "VAR": frozenset((*_VAR_BUFFERS, *_VAR_EMBEDDINGS, "shared_ada_lin", "blocks", "head_nm", "head")),
    "VQVAE": frozenset(("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")),
}
# Names by which a model is known, whatever stands before them.
_ANCHORS = {
    "VAR": ("pos_1LC", "pos_start", "word_embed.weight"),
    "VQVAE": ("quantize.embedding.weight", "post_quant_conv.weight"),
}
# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names, at any depth.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_COUNTERS = frozenset(("n_averaged", "num_updates", "decay", "initted", "step"))  # of averages, beside their weights
_AVERAGE = re.compile(r"(^|[._])(ema|averaged?|avg|shadow|swa)([._\d]|$)", re.IGNORECASE)
_DEPTH, _DICTS = 8, 1000  # how far nested containers are searched


@dataclass(frozen=True)
class Found:
    """The weights of one model: its kind, where in the file they are, and under which prefix."""

    kind: str
    where: str
    state: dict[str, Tensor]

    @property
    def averaged(self) -> bool:
        return _AVERAGE.search(self.where.rstrip(".")) is not None


def plain_name(name: str) -> str:
    """A name in a state dict without what wrappers added to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _tensors(value: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, entry in value.items():
        if isinstance(key, str) and isinstance(entry, Tensor):
            name = plain_name(key)
            if name in tensors:
                raise CheckpointError(f"the weights of {name} occur twice, once as {key}; save one of them")
            tensors[name] = entry
    return tensors


def _dicts(value: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every dict in nested dicts, with the path of keys that leads there."""
    seen: set[int] = set()
    level: list[tuple[str, Any]] = [("", value)]
    for _ in range(_DEPTH):
        deeper: list[tuple[str, Any]] = []
        for path, entry in level:
            if not isinstance(entry, Mapping) or id(entry) in seen or len(seen) >= _DICTS:
                continue
            seen.add(id(entry))
            yield path, entry
            deeper += [(f"{path}{key}.", inner) for key, inner in entry.items() if isinstance(inner, Mapping)]
        level = deeper


def _models(path: str, tensors: dict[str, Tensor]) -> list[Found]:
    """The models whose weights are in one flat dict, each under its own prefix."""
    count = Counter(
        (kind, name[: -len(anchor)])
        for kind, anchors in _ANCHORS.items()
        for anchor in anchors
        for name in tensors
        if name == anchor or name.endswith("." + anchor)
    )
    # One stray name makes no model where there is a whole one.
    whole = {kind for (kind, _), anchors in count.items() if anchors > 1}
    prefixes = {(kind, prefix) for (kind, prefix), anchors in count.items() if anchors > 1 or kind not in whole}
    found = []
    for kind, prefix in sorted(prefixes):
        others = {(k, p) for k, p in prefixes if (k, p) != (kind, prefix) and p.startswith(prefix)}
        state = {}
        for name, value in tensors.items():
            rest = name[len(prefix) :]
            if not name.startswith(prefix) or (rest in _COUNTERS and value.ndim == 0):
                continue
            if any(name[len(p) :].split(".")[0] in _ROOTS[k] for k, p in others if name.startswith(p)):
                continue  # of a model inside, or beside without a prefix of its own
            state[rest] = value
        found.append(Found(kind, path + prefix, state))
    return found


def models_in(value: Any) -> list[Found]:
    """Every VAR and VQVAE whose weights are somewhere in nested dicts."""
    return [found for path, entry in _dicts(value) for found in _models(path, _tensors(entry))]


def _same(a: Found, b: Found) -> bool:
    try:
        return a.state.keys() == b.state.keys() and all(torch.equal(a.state[name], b.state[name]) for name in a.state)
    except RuntimeError:  # sparse, meta, quantized ...
        return False


def unwrap(value: Any, kind: str | None, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of the one model of a kind, "VAR" or "VQVAE", and what there was to say about the choice.

    Averaged weights go before those they are the average of. Where no such model is found, the tensors of the dict
    itself, for the caller to say what they lack. Raises CheckpointError where there are none, or several models.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} holds a {type(value).__name__}, not a dict of named tensors (a state dict)")
    found = [model for model in models_in(value) if model.kind == kind]
    averaged = _distinct([model for model in found if model.averaged], where)
    last = _distinct([model for model in found if not model.averaged], where)
    if averaged is not None:
        also = f", not the last ones ({last.where.rstrip('.') or 'beside them'})" if last else ""
        note = f"{where}: the averaged weights were taken ({averaged.where.rstrip('.')}){also}"
        return {**(last.state if last else {}), **averaged.state}, [note]  # an average lacks the buffers
    if last is not None:
        return last.state, []
    tensors = _tensors(value)
    if not tensors:
        names = ", ".join(str(key) for key in list(value)[:4]) or "nothing"
        raise CheckpointError(
            f"{where} is not a flat dict of named tensors (a state dict), nor is one of {kind or 'a model'} in it; "
            f"it holds {names}"
        )
    return tensors, []


def _distinct(models: list[Found], where: str) -> Found | None:
    if not models:
        return None
    for other in models[1:]:
        if not _same(models[0], other):
            names = ", ".join(model.where.rstrip(".") or "(the top)" for model in models[:4])
            raise CheckpointError(f"{where} holds several models ({names}); save the one you want in a file of its own")
    return models[0]
