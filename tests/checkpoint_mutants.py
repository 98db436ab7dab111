"""Mutants of a tiny model's files, tried in a process of little memory; see `test_checkpoint_fuzz.py`.

``python checkpoint_mutants.py FOLDER COUNT`` prints a JSON line for each kind of mutant: how many loaded, how many were
refused; and leaves with an error at the first that did neither rightly.
"""

import json
import math
import random
import resource
import shutil
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import varkern
from varkern.models import load_tokenizer
from varkern.models.checkpoint import load_checkpoint

SCHEDULE = (1, 2, 3)
VAE = {"vocab_size": 16, "z_channels": 4, "ch": 32, "v_patch_nums": SCHEDULE, "ch_mult": (1, 1), "num_res_blocks": 1}
VAR = {"depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 3, "attn_l2_norm": True, "patch_nums": SCHEDULE}
ROOM = 256 * 2**20  # bytes that may be taken beyond what the process has when it starts; the files have 1.5 MB
DERIVED = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")
HUGE = (0, -1, 1, 2, 3, 63, 64, 10**6, 10**9, 2**31, 2**63, 10**30, 0.5, -0.5, math.inf, math.nan, 1e300)
ODD = (*HUGE, None, True, False, "", "x", [], [1], [1, 2], [1, 2, 3], [3, 2, 1], [1, 2, 10**9], [[1]], {}, {"a": 1})

State = dict[str, torch.Tensor]


class Wrong(Exception):
    pass


def flip(content: bytes, rng: random.Random) -> bytes:
    """A bit or some, half of them in the first or last 4096 bytes, where the structure is."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if content else 0):
        end = rng.randrange(min(4096, len(changed)))
        at = rng.choice((rng.randrange(len(changed)), end, -1 - end))
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    end = rng.choice((rng.randrange(len(content)), rng.randrange(64), len(content) - rng.randrange(1, 64)))
    return content[:end] + bytes(rng.choice((0, 0, 9)))


def change_header(content: bytes, rng: random.Random) -> bytes:
    """Another type, shape, place or name in the header of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    match rng.randrange(5):
        case 0:
            entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I32", "I64", "BOOL", "U8", "F8_E4M3", "C64", "Q4", ""))
        case 1:
            entry["shape"] = rng.choice(([], [0], [2**40, 2**40], [*entry["shape"], 1], entry["shape"][::-1], [-1]))
        case 2:
            entry["data_offsets"][rng.randrange(2)] = rng.choice((0, 1, 2**40, 10**30, -1))
        case 3:
            header[rng.choice((name + "x", "module." + name, name.upper()))] = header.pop(name)
        case _:
            del header[name][rng.choice(list(entry))]
    text = json.dumps(header).encode()
    return struct.pack("<Q", rng.choice((len(text), len(text), len(text) + 1, 2**62))) + text + content[8 + length :]


def change_tensor(state: State, rng: random.Random) -> State | None:
    """A dict with one thing wrong that must be refused, or None where nothing is."""
    state = dict(state)
    name = rng.choice(sorted(state))
    value = state[name]
    optional = name.endswith(DERIVED)
    kinds: list[Callable[[], Any]] = [
        lambda: value[None],
        lambda: value.reshape(-1)[: value.numel() // 2],
        lambda: value.to(torch.complex64),
        lambda: value.to_sparse(),
        lambda: value.to("meta"),
        lambda: value.new_zeros(1).expand(2**40) if value.ndim else value[None],
        lambda: value.to(torch.float8_e4m3fn) if not optional else value.to(torch.complex64),
        lambda: torch.tensor(1.0),
        lambda: torch.zeros(0),
    ]
    kind = rng.randrange(len(kinds) + 2)
    hits = name.endswith("hit_SV")
    if kind < len(kinds):
        if hits and kind in (0, 1, 5, 7, 8):  # another number of scales is right
            return None
        state[name] = kinds[kind]()
    elif kind == len(kinds):
        if optional:
            return None
        del state[name]
    else:
        state[rng.choice(("extra", name + "_", "encoder.x", "blocks.7.x"))] = value
    return state


def change_levels(state: State, rng: random.Random) -> State:
    state = dict(state)
    name = rng.choice(("lvl_1L", "attn_bias_for_masking"))
    value = state[name].clone()
    at = rng.randrange(value.numel())
    if name == "lvl_1L":
        value.view(-1)[at] ^= 1 << rng.randrange(63)
    else:
        flat = value.view(-1)
        flat[at] = rng.choice((1.0, math.nan, -1.0)) if flat[at] == 0 else rng.choice((0.0, -1e9, math.inf))
    state[name] = value
    return state


def same_values(state: State, rng: random.Random) -> Any:
    """The same model in another guise: wrappers, prefixes, types, what can be derived left out, layouts."""
    state = {name: v for name, v in state.items() if not (name.endswith(DERIVED[1:3]) and rng.random() < 0.3)}
    for _ in range(rng.randrange(3)):
        prefix = rng.choice(("module.", "_orig_mod.", "model.", "transformer.", "net."))
        state = {prefix + name: value for name, value in state.items()}
    if rng.random() < 0.3:
        state = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in state.items()}
    if rng.random() < 0.3:
        state = {name: value.double() for name, value in state.items()}
    value: Any = state
    for _ in range(rng.randrange(4)):
        value = {rng.choice(("model", "state_dict", "trainer", "net", "module")): value, "step": 3, "note": [1, "a"]}
    return value


def change_config(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    config = json.loads(json.dumps(config))
    part = config["vae_kwargs"] if rng.random() < 0.5 else config
    name = rng.choice(sorted(part))
    if rng.random() < 0.15:
        part[name + rng.choice(("s", "_", "x"))] = part.pop(name)
    else:
        part[name] = rng.choice(ODD)
    return config


class Trial:
    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        torch.manual_seed(0)
        self.model = varkern.VARHF(vae_kwargs=VAE, **VAR)
        self.model.save_pretrained(folder / "model")
        self.var = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.vae = {name: value.clone() for name, value in self.model.vae_proxy[0].state_dict().items()}
        self.victim = varkern.VARHF(vae_kwargs=VAE, **VAR)
        self.before = self.tensors(self.victim)

    @staticmethod
    def tensors(model: varkern.VAR) -> State:
        vae = {"vae." + name: value.clone() for name, value in model.vae_proxy[0].state_dict().items()}
        return vae | {name: value.clone() for name, value in model.state_dict().items()}

    def copy(self) -> Path:
        target = Path(tempfile.mkdtemp(dir=self.folder)) / "m"
        shutil.copytree(self.folder / "model", target)
        return target

    def right(self, got: varkern.VAR | varkern.VQVAE) -> bool:
        if isinstance(got, varkern.VQVAE):
            own = got.state_dict()
            return own.keys() == self.vae.keys() and all(
                torch.equal(own[n], v) for n, v in self.vae.items() if not n.endswith("hit_SV")
            )
        own = got.state_dict()
        return (
            own.keys() == self.var.keys()
            and all(torch.equal(own[name], value) for name, value in self.var.items())
            and self.right(got.vae_proxy[0])
        )

    def attempt(self, what: str, call: Callable[[], varkern.VAR | varkern.VQVAE]) -> bool:
        """Whether it loaded, to the right weights; raises Wrong for any other end than a sentence."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                got = call()
            except varkern.CheckpointError as error:
                text = str(error)
                if "\n" in text or len(text) > 1200 or "allocate" in text or "Cannot" in text:
                    raise Wrong(f"{what}: {text}") from error
                return False
            except Exception as error:
                raise Wrong(f"{what}: {type(error).__name__}: {error}") from error
        if not self.right(got):
            raise Wrong(f"{what}: it loaded with other weights")
        return True

    def unchanged(self, what: str, source: Any) -> bool:
        """`load_checkpoint` into a model that must be as before, or hold the weights."""

        def call() -> varkern.VAR:
            load_checkpoint(self.victim, source)
            load_checkpoint(self.victim.vae_proxy[0], self.vae)
            return self.victim

        loaded = self.attempt(what, call)
        now = self.tensors(self.victim)
        if loaded:
            self.victim.load_state_dict({k: v for k, v in self.before.items() if not k.startswith("vae.")})
            self.victim.vae_proxy[0].load_state_dict({k[4:]: v for k, v in self.before.items() if k.startswith("vae.")})
        elif not all(torch.equal(now[name], value) for name, value in self.before.items()):
            raise Wrong(f"{what}: refused, but the model was changed")
        return loaded

    # ---- kinds of mutants: each says whether it loaded ----------------------------------------------------------
    def folder_bytes(self) -> bool:
        folder, change = self.copy(), self.rng.choice((flip, cut))
        path = folder / self.rng.choice(("model.safetensors", "vae.safetensors", "config.json"))
        path.write_bytes(change(path.read_bytes(), self.rng))
        return self.attempt(f"{change.__name__} {path.name}", lambda: varkern.load(folder))

    def folder_header(self) -> bool:
        folder = self.copy()
        path = folder / self.rng.choice(("model.safetensors", "vae.safetensors"))
        path.write_bytes(change_header(path.read_bytes(), self.rng))
        return self.attempt(f"header of {path.name}", lambda: varkern.load(folder))

    def folder_config(self) -> bool:
        folder = self.copy()
        config = change_config(json.loads((folder / "config.json").read_text()), self.rng)
        (folder / "config.json").write_text(json.dumps(config))
        return self.attempt(f"config {config}", lambda: varkern.load(folder))

    def tokenizer_bytes(self) -> bool:
        folder, change = self.copy(), self.rng.choice((flip, cut))
        path = folder / self.rng.choice(("vae.safetensors", "config.json"))
        path.write_bytes(change(path.read_bytes(), self.rng))
        source = self.rng.choice((folder, folder / "vae.safetensors"))
        return self.attempt(f"tokenizer {path.name}", lambda: load_tokenizer(source).vae)

    def pth_bytes(self) -> bool:
        path, change = self.copy().parent / "var.pth", self.rng.choice((flip, cut))
        torch.save(self.var, path)
        path.write_bytes(change(path.read_bytes(), self.rng))
        return self.unchanged(f"{change.__name__} of a .pth", path)

    def old_pth_bytes(self) -> bool:
        """Without checksums: what loads may have other weights, but a model is never changed by halves."""
        path = self.copy().parent / "var.pth"
        torch.save(self.var, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        at = self.rng.randrange(1, 4096)  # the pickle
        broken = cut(content, self.rng) if self.rng.random() < 0.5 else flip(content[:at], self.rng) + content[at:]
        path.write_bytes(broken)
        try:
            return self.unchanged("an old .pth", path)
        except Wrong as error:
            if "other weights" not in str(error):
                raise
            self.victim.load_state_dict({k: v for k, v in self.before.items() if not k.startswith("vae.")})
            self.victim.vae_proxy[0].load_state_dict({k[4:]: v for k, v in self.before.items() if k.startswith("vae.")})
            return True

    def wrong_tensor(self) -> bool:
        state = None
        while state is None:
            state = change_tensor(self.var, self.rng)
        if self.unchanged("a wrong tensor", self.stored(state)):
            raise Wrong(f"a wrong tensor loaded: {[k for k in state if state[k] is not self.var.get(k)]}")
        path = self.copy().parent / "var.pth"
        torch.save(state, path)
        vae = self.folder / "model" / "vae.safetensors"
        return self.attempt("a wrong tensor in a file", lambda: varkern.load(path, vae=vae))

    def wrong_levels(self) -> bool:
        state = change_levels(self.var, self.rng)
        if self.unchanged("a wrong schedule", self.stored(state)):
            raise Wrong("a wrong schedule loaded")
        path = self.copy().parent / "var.safetensors"
        path.write_bytes(save(state))
        vae = self.folder / "model" / "vae.safetensors"
        if self.attempt("a wrong schedule in a file", lambda: varkern.load(path, vae=vae)):
            raise Wrong("a wrong schedule in a file loaded")
        return False

    def wrong_tokenizer(self) -> bool:
        state = None
        while state is None:
            state = change_tensor(self.vae, self.rng)
        path = self.copy().parent / "vae.pth"
        torch.save(state, path)
        if self.attempt("a wrong tokenizer", lambda: load_tokenizer(path, SCHEDULE).vae):
            raise Wrong("a wrong tokenizer loaded")
        return False

    def guise(self) -> bool:
        if not self.unchanged("another guise", self.stored(same_values(self.var, self.rng))):
            raise Wrong("another guise was refused")
        path = self.copy().parent / "both.ckpt"
        torch.save({"var": same_values(self.var, self.rng), "vae": same_values(self.vae, self.rng)}, path)
        if not self.attempt("another guise in a file", lambda: varkern.load(path)):
            raise Wrong("another guise in a file was refused")
        return True

    def stored(self, value: Any) -> Any:
        """In memory, or in a file."""
        if self.rng.random() < 0.5:
            return value
        path = self.copy().parent / "stored.pth"
        torch.save(value, path, _use_new_zipfile_serialization=self.rng.random() < 0.8)
        return path


KINDS = (
    (Trial.folder_bytes, 4), (Trial.folder_header, 2), (Trial.folder_config, 3), (Trial.tokenizer_bytes, 2),
    (Trial.pth_bytes, 3), (Trial.old_pth_bytes, 1), (Trial.wrong_tensor, 3), (Trial.wrong_levels, 1),
    (Trial.wrong_tokenizer, 1), (Trial.guise, 1),
)  # fmt: skip


def main(folder: Path, count: int, seed: int = 0) -> None:
    torch.set_num_threads(1)
    trial = Trial(folder, random.Random(seed))
    trial.guise()  # what is made once is made before memory is counted
    varkern.load(folder / "model")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))
    kinds = [kind for kind, share in KINDS for _ in range(share)]
    ends: Counter[tuple[str, bool]] = Counter()
    for i in range(count):
        kind = kinds[i % len(kinds)]
        trial.rng = random.Random(f"{seed} {i}")
        try:
            ends[kind.__name__, kind(trial)] += 1
        except Wrong as error:
            raise SystemExit(f"mutant {i} ({kind.__name__}), {error}") from error
        for path in folder.iterdir():
            if path.name != "model":
                shutil.rmtree(path)
    for kind, _ in KINDS:
        name = kind.__name__
        print(json.dumps({"kind": name, "loaded": ends[name, True], "refused": ends[name, False]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:]))
