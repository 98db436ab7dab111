"""The folder of a training run: atomic checkpoint, metrics log, random states."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from varkern.train.config import LoopConfig

__all__ = ["CHECKPOINT", "METRICS", "Run", "atomic_write", "random_state", "restore_random_state"]

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
FORMAT = 1
# Settings that may differ between a run and its continuation: they do not change what is computed.
FREE_SETTINGS = frozenset({"out", "resume", "workers", "device", "log_every", "checkpoint_every"})


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write ``path`` so that a reader, or a power cut, finds the whole old file or the whole new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Global generator states of the CPU and, on CUDA, of ``device``."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Run:
    """Opens ``config.out``: new, or with ``config.resume`` at its checkpoint.

    Raises ``FileExistsError`` rather than overwrite another run's checkpoint, and ``ValueError`` when the checkpoint
    is damaged or was made with other settings.
    """

    def __init__(self, config: LoopConfig) -> None:
        self.config, self.folder = config, Path(config.out)
        self.checkpoint, self.metrics = self.folder / CHECKPOINT, self.folder / METRICS
        self.settings = json.loads(json.dumps(dataclasses.asdict(config)))
        if self.checkpoint.exists() and not config.resume:
            raise FileExistsError(
                f"{self.checkpoint} is the checkpoint of another run; resume it, or choose another output folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The checkpoint to continue from, or None for a fresh start; the log is cut back to its step."""
        if not self.checkpoint.exists():
            self.metrics.unlink(missing_ok=True)
            return None
        try:
            # weights_only: a checkpoint from elsewhere must not be able to run code.
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{self.checkpoint} is not a readable checkpoint ({reason}); "
                "restore a copy, or delete it to start afresh"
            ) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(
                f"{self.checkpoint} is not a varkern training checkpoint of format {FORMAT}; choose another folder"
            )
        if state["kind"] != type(self.config).__name__:
            raise ValueError(
                f"{self.checkpoint} belongs to a run with {state['kind']}, not {type(self.config).__name__}"
            )
        saved = state["settings"]
        for name, value in self.settings.items():
            if name not in FREE_SETTINGS and saved.get(name) != value:
                raise ValueError(
                    f"{self.checkpoint} was made with {name} = {saved.get(name)!r}, not {value!r}; "
                    "resume with the same settings"
                )
        self.cut_log(state["step"])
        return state

    def save(self, state: dict[str, Any]) -> None:
        state = {"format": FORMAT, "kind": type(self.config).__name__, "settings": self.settings, **state}
        atomic_write(self.checkpoint, lambda file: torch.save(state, file))

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Append one JSON line."""
        line = {k: round(v, 6) if isinstance(v, float) else v for k, v in {"step": step, **record}.items()}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop lines after ``step``, which will be written again, and a line cut short by a kill."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
        atomic_write(self.metrics, lambda file: file.write("".join(kept).encode()))
