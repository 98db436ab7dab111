"""The one way to find a model or a tokenizer: a weights file, the folder of a run or of a model, a Hub repository.

Architectures are read from shapes; settings that no shape tells come from the ``config.json`` beside the weights, the
metadata of the file, or the settings in a training checkpoint. They are compared with the weights before anything is
built.
"""

import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from varkern.models.checkpoint import HITS, StateDict, load_checkpoint, misfits, refuse, state_of
from varkern.models.configuration import checked_schedule, fits, var_config, vqvae_config
from varkern.models.fetch import FILES, fetch, is_hub_id
from varkern.models.files import (
    CheckpointError,
    CheckpointWarning,
    Contents,
    MissingCheckpointError,
    read_file,
    read_json,
)
from varkern.models.unwrap import models_in
from varkern.models.var import VAR
from varkern.models.vqvae import VQVAE
from varkern.modules.schedule import PATCH_NUMS_256, PATCH_NUMS_512

__all__ = ["Tokenizer", "find_model", "is_tokenizer", "load_tokenizer", "locate", "metadata_of"]

CONFIG, WEIGHTS, VAE_WEIGHTS, _ = FILES
TRAINING = "checkpoint.pt"
_SETTINGS = "varkern"  # the key of a model's settings in the metadata of a safetensors file
_WEIGHTS_SUFFIXES = frozenset((".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".th"))
PathLike = str | os.PathLike[str]
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T", bound=VAR)


@dataclass(frozen=True)
class Tokenizer:
    """A frozen tokenizer and the constructor arguments that rebuild it, all JSON-serialisable."""

    vae: VQVAE
    vae_kwargs: dict[str, Any]


def metadata_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of a safetensors file by which these settings are found again."""
    return {_SETTINGS: json.dumps(settings)}


def locate(source: PathLike, **hub: Any) -> Path:
    """The file or folder that a source names; of a Hub repository, the folder that its files were fetched into.

    Raises CheckpointError where there is none.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and is_hub_id(source):
        return fetch(source, **hub)
    if path.suffix.lower() in _WEIGHTS_SUFFIXES:
        raise MissingCheckpointError(f"there is no checkpoint file {source}")
    raise MissingCheckpointError(
        f"{source} is neither a file, nor a directory, nor a Hub id such as user/name: it does not exist"
    )


def load_tokenizer(source: PathLike, patch_nums: Sequence[int] | None = None, **hub: Any) -> Tokenizer:
    """A frozen tokenizer from a weights file, a folder of ``train_tokenizer`` or of a whole model, or the Hub.

    Args:
        source: a file may be the published one, varkern's, or a trainer's with both models in it.
        patch_nums: the schedule; by default what is told beside the weights, by ``config.json`` or the file itself,
            else the published 256 px one, with a CheckpointWarning.
        hub: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

    Raises CheckpointError saying what is missing, damaged or does not fit.
    """
    path = locate(source, **hub)
    weights = _in_folder(path, VAE_WEIGHTS) if path.is_dir() else path
    contents = read_file(weights)
    kinds = {model.kind for model in models_in(contents.value)}
    if kinds == {"VAR"}:
        raise CheckpointError(f"{weights} is not a checkpoint of VQVAE: it holds a transformer alone; name a tokenizer")
    state = state_of(contents, "VQVAE", str(weights))
    config, where = _vae_settings(weights, contents, state, strict=path.is_dir())
    if patch_nums is None:
        patch_nums = _schedule(config, where, state, weights)
    kwargs = vqvae_config(state, patch_nums, config, where)
    vae = _build(lambda: VQVAE(**{**kwargs, "test_mode": True}), lambda vae: ((vae, state, weights),), where)
    return Tokenizer(vae, kwargs)


def is_tokenizer(source: PathLike) -> bool:
    """Whether a source is a tokenizer without a transformer."""
    path = locate(source)
    if path.is_dir():
        return (path / VAE_WEIGHTS).is_file() and not (path / WEIGHTS).is_file()
    return {model.kind for model in models_in(read_file(path).value)} == {"VQVAE"}


def find_model(
    make: Callable[..., T],
    source: PathLike,
    vae: PathLike | None = None,
    patch_nums: Sequence[int] | None = None,
    changes: Mapping[str, Any] | None = None,
    **hub: Any,
) -> T:
    """``make(vae_kwargs=..., **settings)``, a `VAR` with its tokenizer, with the weights that a source holds.

    Args:
        make: the class to build, such as `VARHF`.
        source: a folder, a Hub repository, or a weights file of the transformer, which may hold the tokenizer too.
        vae: the tokenizer's weights where the source has none: a file, a folder or a Hub repository.
        patch_nums: the schedule, for weights from which it cannot be read.
        changes: settings that go before those found.
        hub: as for `load_tokenizer`.
    """
    path = locate(source, **hub)
    other = None if vae is None else locate(vae, **hub)
    weights = _model_weights(path) if path.is_dir() else path
    contents = read_file(weights)
    kinds = {model.kind for model in models_in(contents.value)}
    if kinds == {"VQVAE"}:
        raise CheckpointError(
            f"{weights} is not a checkpoint of VAR: it lacks 'pos_start'; it is a tokenizer alone: name a transformer"
        )
    state = state_of(contents, "VAR", str(weights))
    vae_weights = _tokenizer_of(source, path, weights, "VQVAE" in kinds, other)
    settings, where = _var_settings(weights, contents, state, strict=path.is_dir())
    vae_settings = settings.pop("vae_kwargs", None)
    settings.update(changes or {})
    names = inspect.signature(make).parameters
    extra = {name: settings.pop(name) for name in list(settings) if name in set(names) - set(_names(VAR))}
    settings = var_config(state, settings, patch_nums, where)
    schedule = settings["patch_nums"]

    vae_contents = contents if vae_weights == weights else read_file(vae_weights)
    vae_state = state_of(vae_contents, "VQVAE", str(vae_weights))
    if vae_settings is not None and not isinstance(vae_settings, dict):
        raise CheckpointError(f"{where} says vae_kwargs = {str(vae_settings)[:60]}, not an object of settings")
    if vae_settings is None or other is not None:
        own, where = _vae_settings(vae_weights, vae_contents, vae_state, strict=False)
        vae_settings = own or (vae_settings if vae_settings and fits(vae_state, vae_settings) else {})
    told = vae_settings.get("v_patch_nums", schedule)
    if told != schedule:
        if other is None:
            raise CheckpointError(
                f"{where} says v_patch_nums = {told}, but the transformer has {schedule}; "
                "name the tokenizer that it was trained with"
            )
        warnings.warn(
            f"{vae_weights}: the transformer's schedule {schedule} is taken, not the tokenizer's own, {told}",
            CheckpointWarning,
            stacklevel=3,
        )
    settings = {"vae_kwargs": vqvae_config(vae_state, schedule, vae_settings, where), **settings, **extra}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values()):
        settings = {name: value for name, value in settings.items() if name in names}
    return _build(
        lambda: make(**settings),
        lambda model: ((model, state, weights), (model.vae_proxy[0], vae_state, vae_weights)),
        where,
    )


def _build(
    make: Callable[[], M], parts: Callable[[M], tuple[tuple[nn.Module, StateDict, Path], ...]], where: str | Path
) -> M:
    """What ``make`` makes, with its weights; first on the meta device, where a wrong size costs no memory.

    The initial values are never drawn: the global generator stays where it is.
    """
    try:
        with torch.device("meta"), _NoDraws():
            model = make()
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"no model can be built as {where} says: {error}") from error
    for module, state, path in parts(model):
        refuse(path, module, misfits(module, state))
    if type(model).__module__.partition(".")[0] != "varkern":  # what else it has may not be among its weights
        model = make()
    for module, state, path in parts(model):
        _give_memory(module)
        load_checkpoint(module, state, str(path))
    return model


def _give_memory(module: nn.Module) -> None:
    """Memory for what is on the meta device, zeros in buffers. (`to_empty` takes a second of imports to do it.)"""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and value.is_meta:
                empty = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                part._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")


class _NoDraws(TorchFunctionMode):
    """Leaves initial values out: on the meta device they have no effect but to import modules for a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")  # as torch.nn.init passes it
        fills = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        return filled if fills and isinstance(filled, Tensor) else func(*args, **kwargs)


def _names(model: type) -> list[str]:
    return list(inspect.signature(model).parameters)


def _in_folder(folder: Path, name: str) -> Path:
    """A file of a folder; where it is missing, an error that says what is there instead."""
    path = folder / name
    if path.is_file():
        return path
    if (folder / TRAINING).is_file():
        raise MissingCheckpointError(
            f"{folder} has no {name}: its training has not ended; name {folder / TRAINING} to take what it has so far"
        )
    there = sorted(p.name for p in folder.iterdir() if p.suffix in _WEIGHTS_SUFFIXES)
    hint = f"; it has {', '.join(there[:4])}: name the file" if there else ""
    raise MissingCheckpointError(f"{folder} has no {name}{hint}")


def _model_weights(folder: Path) -> Path:
    if not (folder / WEIGHTS).is_file() and (folder / VAE_WEIGHTS).is_file():
        raise MissingCheckpointError(
            f"{folder} has no {WEIGHTS}: it is the folder of a tokenizer alone; name that of a transformer"
        )
    return _in_folder(folder, WEIGHTS)


def _tokenizer_of(source: PathLike, path: Path, weights: Path, inside: bool, other: Path | None) -> Path:
    """The file of the tokenizer that goes with a transformer's weights."""
    own = weights if inside else weights.parent / VAE_WEIGHTS
    has_own = inside or ((path.is_dir() or weights.name == WEIGHTS) and own.is_file())
    if other is None:
        if has_own:
            return own
        if path.is_dir():
            raise MissingCheckpointError(f"{source} has no {VAE_WEIGHTS}; name the tokenizer's weights (vae=...)")
        raise CheckpointError(f"{path} holds the transformer alone; name the tokenizer's weights too (vae=...)")
    if path.is_dir() and has_own:
        raise CheckpointError(f"vae={other} goes with a checkpoint file; {source} brings its own tokenizer")
    return _in_folder(other, VAE_WEIGHTS) if other.is_dir() else other


def _told(contents: Contents) -> dict[str, Any]:
    """Settings in the metadata of a safetensors file."""
    try:
        told = json.loads(contents.metadata.get(_SETTINGS, "{}"))
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _trained(contents: Contents, kind: str) -> dict[str, Any]:
    """Settings in a checkpoint of varkern's training, of one kind."""
    value = contents.value
    if not isinstance(value, Mapping) or value.get("kind") != kind or not isinstance(value.get("settings"), dict):
        return {}
    settings: dict[str, Any] = value["settings"]
    return settings


def _vae_settings(weights: Path, contents: Contents, state: StateDict, strict: bool) -> tuple[dict[str, Any], str]:
    """Constructor arguments told beside a tokenizer's weights, and where; with ``strict`` they must fit."""
    config_file = weights.parent / CONFIG
    if config_file.is_file():
        try:
            kwargs = read_json(config_file).get("vae_kwargs")
        except CheckpointError:
            if strict:
                raise
            kwargs = None
        if strict and kwargs is not None and not isinstance(kwargs, dict):
            raise CheckpointError(f"{config_file} says vae_kwargs = {str(kwargs)[:60]}, not an object of settings")
        if isinstance(kwargs, dict) and (strict or fits(state, kwargs)):
            return kwargs, str(config_file)
    kwargs = _told(contents).get("vae_kwargs")
    if isinstance(kwargs, dict):
        return kwargs, str(weights)
    settings = _trained(contents, "TokenizerConfig")
    kwargs = {name: settings[name] for name in ("dropout", "beta", "quant_resi") if name in settings}
    if "patch_nums" in settings:
        kwargs["v_patch_nums"] = settings["patch_nums"]
    return kwargs, str(weights)


def _var_settings(weights: Path, contents: Contents, state: StateDict, strict: bool) -> tuple[dict[str, Any], str]:
    """The same of a transformer's weights."""
    config_file = weights.parent / CONFIG
    if config_file.is_file() and (strict or weights.name == WEIGHTS):
        return read_json(config_file), str(config_file)
    told = _told(contents)
    settings = _trained(contents, "TransformerConfig")
    if "heads" in settings:
        told["num_heads"] = settings["heads"] or state["pos_start"].shape[-1] // 64
    return told, str(weights)


def _schedule(config: Mapping[str, Any], where: str, state: StateDict, weights: Path) -> Sequence[int]:
    """The schedule of a tokenizer by itself; only the number of its scales may be in its shapes."""
    rows = state[HITS].shape[0] if HITS in state and state[HITS].ndim == 2 else None
    if "v_patch_nums" in config:
        schedule = checked_schedule(config["v_patch_nums"], where)
        if rows not in (None, len(schedule)):
            raise CheckpointError(
                f"{where} has {len(schedule)} scales, {schedule}, but {weights} counts hits of {rows}"
            )
        return schedule
    if rows not in (None, len(PATCH_NUMS_256)):
        raise CheckpointError(
            f"{weights} is of {rows} scales, but nothing tells their sides; name them (patch_nums=...)"
        )
    warnings.warn(
        f"{weights} does not tell its schedule; the published one of 256 px is taken, {PATCH_NUMS_256} "
        f"(that of 512 px: patch_nums={PATCH_NUMS_512})",
        CheckpointWarning,
        stacklevel=3,
    )
    return PATCH_NUMS_256
