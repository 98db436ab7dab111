"""Reading and writing weights: official ``.pth`` and safetensors files, strictly, without running what they hold."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from varkern.models.schedule import patch_nums_of_lengths

StateDict = Mapping[str, Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or does not fit; the message names the file or key and the cause."""


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file, or a ``.pth``/``.pt``/``.bin`` file read with ``weights_only=True``.

    Raises CheckpointError naming the file where it is missing, damaged, or holds anything but named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no complete safetensors file ({error}); fetch or write it again") from error
    except Exception as error:  # torch.load raises many types, by the place where the damage shows
        unsafe = "weights_only" in str(error) or "Unsupported global" in str(error)
        cause = (
            "it holds more than tensors, and running what it holds is refused" if unsafe else str(error).split("\n")[0]
        )
        raise CheckpointError(f"{path} could not be read as weights: {cause}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{path} is not a flat dict of named tensors (a state dict)")
    return state


def save_state(state: StateDict, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write a state dict as safetensors, atomically: a reader sees the old file or the whole new one."""
    path = Path(path)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_checkpoint(module: nn.Module, source: StateDict | str | os.PathLike[str]) -> None:
    """Load weights strictly; the module is unchanged unless every key and shape fits.

    Raises CheckpointError naming the first keys that are missing, unknown, or of another shape.
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else read_state(source)
    own = module.state_dict()
    problems = []
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if unknown:
        problems.append(f"the model has no {_some(unknown)}")
    for name in own.keys() & state.keys():
        # Hit counts follow the schedule of their own training; `VectorQuantizer2` keeps its own where they differ.
        if own[name].shape != state[name].shape and not name.endswith("ema_vocab_hit_SV"):
            problems.append(f"{name} is {tuple(state[name].shape)} where the model has {tuple(own[name].shape)}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{where} does not fit {type(module).__name__}: " + "; ".join(sorted(problems)[:3]) + more
        )
    module.load_state_dict(state, strict=True)


def _some(names: set[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more keys" if len(first) > 3 else "")


def _count(state: StateDict, prefix: str) -> int:
    """How many numbered children ``prefix.0``, ``prefix.1``, ... a state dict has."""
    return len({name[len(prefix) + 1 :].split(".")[0] for name in state if name.startswith(prefix + ".")})


def var_config(state: StateDict) -> dict[str, Any]:
    """Constructor arguments of the `VAR` that a state dict belongs to, read from its keys and shapes."""
    try:
        width = state["pos_start"].shape[-1]
        l2_norm = "blocks.0.attn.scale_mul_1H11" in state
        return {
            "num_classes": state["class_emb.weight"].shape[0] - 1,
            "depth": _count(state, "blocks"),
            "embed_dim": width,
            "num_heads": state["blocks.0.attn.scale_mul_1H11"].shape[1] if l2_norm else width // 64,
            "mlp_ratio": state["blocks.0.ffn.fc1.weight"].shape[0] / width,
            "shared_aln": "blocks.0.ada_gss" in state,
            "attn_l2_norm": l2_norm,
            "patch_nums": list(patch_nums_of_lengths(state["lvl_1L"].flatten().bincount().tolist())),
        }
    except KeyError as error:
        raise CheckpointError(f"this is not a checkpoint of VAR: it lacks {error}") from error


def vqvae_config(state: StateDict, patch_nums: list[int]) -> dict[str, Any]:
    """Constructor arguments of the `VQVAE` that a state dict belongs to; the schedule is not in it."""
    try:
        codes, ch = state["quantize.embedding.weight"].shape, state["encoder.conv_in.weight"].shape[0]
        levels = _count(state, "encoder.down")
        widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        shared = _count(state, "quantize.quant_resi.qresi_ls")
        single = "quantize.quant_resi.qresi.weight" in state
        return {
            "vocab_size": codes[0],
            "z_channels": codes[1],
            "ch": ch,
            "quant_conv_ks": state["quant_conv.weight"].shape[-1],
            "share_quant_resi": shared or int(single),
            "default_qresi_counts": 0 if shared or single else _count(state, "quantize.quant_resi"),
            "v_patch_nums": patch_nums,
            "ch_mult": [width // ch for width in widths],
            "num_res_blocks": _count(state, "encoder.down.0.block"),
            "in_channels": state["encoder.conv_in.weight"].shape[1],
        }
    except KeyError as error:
        raise CheckpointError(f"this is not a checkpoint of VQVAE: it lacks {error}") from error
