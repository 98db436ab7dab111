"""Constructor arguments of `VAR` and `VQVAE` from the shapes of their weights, and settings compared with them.

Whatever sizes a model, its shapes tell; a configuration beside them may only repeat it. So nothing is built that is
larger than the weights are.
"""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from varkern.models.files import CheckpointError, CheckpointWarning
from varkern.models.var import VAR
from varkern.models.vqvae import VQVAE
from varkern.modules.schedule import PATCH_NUMS_256, PATCH_NUMS_512, as_patch_nums, patch_nums_of_lengths

StateDict = Mapping[str, Tensor]
Config = Mapping[str, Any]

_PUBLISHED = (PATCH_NUMS_256, PATCH_NUMS_512)
_SCALES, _SIDE = 64, 4096  # beyond, a schedule is a slip or an attack
# Settings that no shape tells: the least and the largest value.
_RANGES = {
    "drop_rate": (0, 1),
    "attn_drop_rate": (0, 1),
    "drop_path_rate": (0, 1),
    "cond_drop_rate": (0, 1),
    "norm_eps": (0, 1),
    "dropout": (0, 1),
    "beta": (0, math.inf),
    "quant_resi": (-math.inf, math.inf),
}
# What other libraries add to a config.json.
_FOREIGN = frozenset(("model_type", "architectures", "torch_dtype", "dtype", "transformers_version"))


class _Shapes:
    """Sizes of named tensors; what is missing or has other dimensions is a CheckpointError."""

    def __init__(self, state: StateDict, model: str) -> None:
        self.state, self.model = state, model

    def of(self, name: str, dimensions: int) -> tuple[int, ...]:
        if name not in self.state:
            raise CheckpointError(f"this is not a checkpoint of {self.model}: it lacks {name!r}")
        shape = tuple(self.state[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise CheckpointError(f"{name} is {shape}; {dimensions} dimensions, none of them 0, are needed")
        return shape

    def count(self, prefix: str) -> int:
        """How many numbered children ``prefix.0``, ``prefix.1``, ... there are."""
        names = (name[len(prefix) + 1 :] for name in self.state if name.startswith(prefix + "."))
        return len({name.split(".")[0] for name in names})


def var_config(
    state: StateDict, config: Config | None = None, patch_nums: Sequence[int] | None = None, where: str = "config.json"
) -> dict[str, Any]:
    """Constructor arguments of the `VAR` that a state dict belongs to, read from its keys and shapes.

    Args:
        config: settings found in ``where``: those that shapes tell must agree, the others are checked and taken.
        patch_nums: the schedule, for a state dict without what tells it.

    Raises CheckpointError for what does not fit together, naming the setting.
    """
    config = dict(config or {})
    shapes = _Shapes(state, "VAR")
    width = shapes.of("pos_start", 3)[-1]
    scale = "blocks.0.attn.scale_mul_1H11"
    l2_norm = scale in state
    told: dict[str, Any] = {
        "num_classes": shapes.of("class_emb.weight", 2)[0] - 1,
        "depth": shapes.count("blocks"),
        "embed_dim": width,
        "mlp_ratio": shapes.of("blocks.0.ffn.fc1.weight", 2)[0] / width,
        "shared_aln": "blocks.0.ada_gss" in state,
        "attn_l2_norm": l2_norm,
        "patch_nums": list(_var_schedule(state, shapes, config.get("patch_nums", patch_nums))),
    }
    if l2_norm:
        told["num_heads"] = shapes.of(scale, 4)[1]
    elif "num_heads" not in config:
        if width % 64:
            raise CheckpointError(
                f"nothing tells the number of heads of width {width}; "
                "name it in a config.json beside the weights, as num_heads"
            )
        config["num_heads"] = width // 64
        warnings.warn(
            f"nothing tells the number of heads; {width // 64} of size 64 are taken", CheckpointWarning, stacklevel=4
        )
    heads: Any = told.get("num_heads", config.get("num_heads"))
    if not _whole(heads) or heads < 1 or width % heads:
        raise CheckpointError(
            f"num_heads is {_short(heads)} in {where}: it does not divide the width, {width}; correct it"
        )
    merged = _merged(config, told, VAR, where, ignored=_FOREIGN)
    return {**merged, "num_heads": heads}


def _var_schedule(state: StateDict, shapes: _Shapes, given: Any) -> Sequence[int]:
    """Sides of the maps: from ``lvl_1L``, else the mask, else as given, else a published schedule of that length."""
    total, scales = shapes.of("pos_1LC", 3)[1], shapes.of("lvl_embed.weight", 2)[0]
    if "lvl_1L" in state:
        lengths = _runs(_plain(state["lvl_1L"], "lvl_1L"), "lvl_1L")
    elif "attn_bias_for_masking" in state:
        mask = _plain(state["attn_bias_for_masking"], "attn_bias_for_masking")
        if mask.ndim != 4 or tuple(mask.shape) != (1, 1, total, total):
            raise CheckpointError(f"attn_bias_for_masking is {tuple(mask.shape)}, not {(1, 1, total, total)}")
        ends = (mask == 0).sum(dim=-1).flatten()
        lengths = ends.unique_consecutive().diff(prepend=ends.new_zeros(1)).tolist()
    elif given is not None:
        lengths = [side * side for side in checked_schedule(given, "patch_nums")]
    else:
        known = [p for p in _PUBLISHED if sum(side * side for side in p) == total]
        if not known:
            raise CheckpointError(f"nothing tells the sides of {total} positions' token maps; name them (patch_nums=)")
        lengths = [side * side for side in known[0]]
    if sum(lengths) != total or len(lengths) != scales:
        raise CheckpointError(
            f"token maps of {_short(lengths)} positions do not fit a model of {total} positions and {scales} scales"
        )
    try:
        return as_patch_nums(patch_nums_of_lengths(lengths))
    except ValueError as error:
        raise CheckpointError(f"the scales of the checkpoint make no schedule of square maps: {error}") from error


def _plain(value: Tensor, name: str) -> Tensor:
    if value.is_meta or value.is_quantized or value.layout is not torch.strided or value.is_complex():
        raise CheckpointError(
            f"{name} is not a plain tensor with values ({value.layout}, {value.dtype}, {value.device})"
        )
    return value.detach().cpu()


def _runs(levels: Tensor, name: str) -> list[int]:
    """Lengths of the runs 0, 0, ..., 1, 1, ...; no memory depends on the values, which may be damaged."""
    values, lengths = levels.flatten().double().unique_consecutive(return_counts=True)
    if not torch.equal(values, torch.arange(len(values), dtype=torch.float64, device="cpu")):
        raise CheckpointError(f"{name} does not number the scales 0, 1, 2, ... in order; the checkpoint is damaged")
    return cast("list[int]", lengths.tolist())


def checked_schedule(given: Any, name: str) -> tuple[int, ...]:
    """A schedule that someone or some file gives; raises CheckpointError for one that cannot be meant."""
    try:
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"patch_nums must be a list of sides, got {_short(given)}")
        if len(given) > _SCALES or any(_whole(side) and side > _SIDE for side in given):
            raise ValueError(f"at most {_SCALES} scales of sides up to {_SIDE} are taken, got {_short(given)}")
        return as_patch_nums(given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def vqvae_config(
    state: StateDict, patch_nums: Sequence[int], config: Config | None = None, where: str = "config.json"
) -> dict[str, Any]:
    """Constructor arguments of the `VQVAE` that a state dict belongs to; the schedule is not in it.

    ``config`` as in `var_config`; its schedule does not matter. Cosine codes (``using_znorm``) leave no trace in
    shapes, nor does ``quant_resi``, taken to be 0.5 where there are such convolutions.
    """
    shapes = _Shapes(state, "VQVAE")
    codes, (ch, channels) = shapes.of("quantize.embedding.weight", 2), shapes.of("encoder.conv_in.weight", 4)[:2]
    levels, blocks = shapes.count("encoder.down"), shapes.count("encoder.down.0.block")
    if levels * blocks > len(state):
        raise CheckpointError(
            f"this is not a checkpoint of VQVAE: it names {levels} levels of {blocks} blocks, but has fewer tensors"
        )
    widths = [shapes.of(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    if any(width % ch for width in widths):
        raise CheckpointError(
            f"the encoder's widths {widths} are not multiples of the first, {ch}; the checkpoint is damaged"
        )
    shared, single = shapes.count("quantize.quant_resi.qresi_ls"), "quantize.quant_resi.qresi.weight" in state
    own = 0 if shared or single else shapes.count("quantize.quant_resi")
    told: dict[str, Any] = {
        "vocab_size": codes[0],
        "z_channels": codes[1],
        "ch": ch,
        "quant_conv_ks": shapes.of("quant_conv.weight", 4)[-1],
        "share_quant_resi": shared or int(single),
        "default_qresi_counts": own,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": blocks,
        "in_channels": channels,
    }
    config = {name: value for name, value in (config or {}).items() if name != "v_patch_nums"}
    if not own:
        del told["default_qresi_counts"]
    elif config.get("default_qresi_counts") == 0:
        config["default_qresi_counts"] = own  # 0 stands for one a scale
    if not (shared or single or own):  # phi is the identity, and how it would be shared does not matter
        told["quant_resi"] = 0.0
        config.pop("share_quant_resi", None)
    merged = _merged(config, told, VQVAE, where)
    merged.setdefault("default_qresi_counts", own)
    return {**merged, "v_patch_nums": list(checked_schedule(patch_nums, "patch_nums"))}


def fits(state: StateDict, config: Config) -> bool:
    """Whether a tokenizer's weights have the shapes of the settings."""
    try:
        vqvae_config(state, PATCH_NUMS_256, config)
    except CheckpointError:
        return False
    return True


def _merged(
    config: Config, told: dict[str, Any], model: type, where: str, ignored: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Settings of shapes, and of a configuration where they say nothing; raises where the two differ."""
    known = set(inspect.signature(model).parameters) - {"vae_local"}
    merged = dict(told)
    for name, value in config.items():
        if name in told:
            if not _agree(name, value, told):
                raise CheckpointError(
                    f"{where} says {name} = {_short(value)}, but the weights have {_short(told[name])}; "
                    "correct the setting"
                )
        elif name in known:
            merged[name] = _checked(name, value, where)
        elif name not in ignored and not name.startswith("_"):
            raise CheckpointError(
                f"{where} has a setting {_short(name)} that {model.__name__} does not know; remove it"
            )
    return merged


def _agree(name: str, value: Any, told: dict[str, Any]) -> bool:
    if name == "mlp_ratio":
        hidden = round(told["embed_dim"] * told["mlp_ratio"])
        return _number(value) and abs(told["embed_dim"] * value - hidden) <= 0.5
    if name == "quant_resi":
        return _number(value) and abs(value) <= 1e-6
    if isinstance(told[name], list):
        return isinstance(value, Sequence) and list(value) == told[name]
    return isinstance(value, int) and value == told[name]


def _checked(name: str, value: Any, where: str) -> Any:
    if name in _RANGES:
        low, high = _RANGES[name]
        right = _number(value) and low <= value <= high
    elif name in ("num_heads", "share_quant_resi", "default_qresi_counts"):
        right = _whole(value) and 0 <= value <= _SIDE
    else:  # switches
        right = isinstance(value, bool | int)
    if not right:
        raise CheckpointError(
            f"{where} says {name} = {_short(value)}, which is not a value of that setting; correct it"
        )
    return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
