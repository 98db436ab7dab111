"""The folder of a training run: atomic checkpoint, metrics log, random states."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import sys
import weakref
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from varkern.atomic import atomic_write, unwritable
from varkern.data.datasets import Part
from varkern.train.config import LoopConfig

__all__ = ["CHECKPOINT", "METRICS", "Run", "Stopped", "random_state", "restore_random_state"]

CHECKPOINT = "checkpoint.pt"
CLASSES = "classes.json"
LOCK = ".lock"
SKIPPED = "bad_images.txt"
METRICS = "metrics.jsonl"
FORMAT = 1
# Settings that may differ between a run and its continuation: they do not change what is computed.
FREE_SETTINGS = frozenset({"out", "resume", "workers", "device", "log_every", "checkpoint_every", "on_bad_image"})
# Settings of the schedule, which is a function of the step and is computed anew.
SCHEDULE_SETTINGS = frozenset({"base_lr", "warmup_epochs", "epochs"})


class Stopped(KeyboardInterrupt):
    """A signal stopped the run after its checkpoint was written; ``status`` is the exit status, 128 + the signal."""

    def __init__(self, signum: int, folder: Path, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} at step {step}; {folder / CHECKPOINT} holds it, so that the "
            "run can be resumed"
        )
        self.status = 128 + signum


_locks: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def _close_locks() -> None:
    for file in _locks:
        file.close()


# A worker that outlives a killed run for a moment must not keep its lock.
os.register_at_fork(after_in_child=_close_locks)


def lock(folder: Path, name: str = LOCK, wait: bool = False) -> BinaryIO:
    """Open and lock a file of ``folder``, which then holds this process's id; closing it lets go.

    Raises FileExistsError where another process has it, unless it is to be waited for.
    """
    file = open(folder / name, "a+b")  # noqa: SIM115 (held as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.seek(0)
        pid = file.read().decode(errors="replace").strip()
        file.close()
        raise FileExistsError(
            f"{folder} is in use by another run (process {pid}); wait for it, or choose another output folder"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n".encode())
    file.flush()
    _locks.add(file)
    return file


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
    """Opens and locks ``config.out``: new, or with ``config.resume`` at its checkpoint.

    A context manager, which lets go of the folder. Raises ``FileExistsError`` rather than overwrite another run's
    checkpoint or share a folder with a run that goes on, ``NotADirectoryError`` for a file, ``OSError`` where nothing
    can be written, and ``ValueError`` when the checkpoint is damaged or was made with other settings or inputs.
    """

    def __init__(self, config: LoopConfig) -> None:
        self.config, self.folder = config, Path(config.out)
        self.checkpoint, self.metrics = self.folder / CHECKPOINT, self.folder / METRICS
        self.settings = json.loads(json.dumps(dataclasses.asdict(config)))
        self.inputs: dict[str, str] = {}  # digests of what the settings name, such as the images
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; name a folder for the run")
        if self.checkpoint.exists() and not config.resume:
            raise FileExistsError(
                f"{self.checkpoint} is the checkpoint of another run; resume it, or choose another output folder"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder)
        except FileExistsError:
            raise
        except OSError as error:
            raise unwritable(self.folder, error) from error
        for scratch in self.folder.glob(".*.tmp"):  # of a run that was killed while writing
            scratch.unlink(missing_ok=True)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.close()

    def take(self, data: str, train: Part) -> None:
        """Note what is trained on, tell its classes on stderr, and list the bad files left out."""
        self.inputs[f"images of {data}"] = train.whole.digest()
        print(train.describe(), file=sys.stderr)
        skipped = getattr(train.whole, "skipped", [])
        if skipped:
            text = "".join(f"{fault}\n" for fault in skipped)
            atomic_write(self.folder / SKIPPED, lambda file: file.write(text.encode()))

    def write_classes(self, classes: list[str]) -> None:
        """Write the names of the classes in their order, which ``varkern sample`` reads."""
        text = json.dumps(classes, indent=0, ensure_ascii=False) + "\n"
        atomic_write(self.folder / CLASSES, lambda file: file.write(text.encode(errors="backslashreplace")))

    def load(self) -> dict[str, Any] | None:
        """The checkpoint to continue from, or None for a fresh start; the log is cut back to its step."""
        if not self.checkpoint.exists():
            self.metrics.unlink(missing_ok=True)
            return None
        try:
            with zipfile.ZipFile(self.checkpoint) as archive:  # torch writes checksums and does not read them
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
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
                f"{self.checkpoint} belongs to a run with {state['kind']}, not {type(self.config).__name__}; "
                "choose another folder"
            )
        # A setting that the checkpoint does not know yet had the effect of its default.
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        saved = json.loads(json.dumps({k: v for k, v in defaults.items() if v is not dataclasses.MISSING}))
        saved |= state["settings"]
        for name, value in self.settings.items():
            if name not in FREE_SETTINGS | SCHEDULE_SETTINGS and saved.get(name) != value:
                raise ValueError(
                    f"{self.checkpoint} was made with {name} = {saved.get(name)!r}, not {value!r}; "
                    "resume with the same settings"
                )
        if self.settings["epochs"] < saved["epochs"]:
            raise ValueError(
                f"{self.checkpoint} was made with epochs = {saved['epochs']}, not {self.settings['epochs']}; "
                "a run can be lengthened, not shortened"
            )
        for name, digest in state.get("inputs", {}).items():
            if self.inputs.get(name, digest) != digest:
                raise ValueError(
                    f"the {name} have changed since {self.checkpoint} was made; restore them, or start another run"
                )
        self.cut_log(state["step"])
        return state

    def save(self, state: dict[str, Any]) -> None:
        kind = type(self.config).__name__
        state = {"format": FORMAT, "kind": kind, "settings": self.settings, "inputs": self.inputs, **state}
        atomic_write(self.checkpoint, lambda file: torch.save(state, file))

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Append one JSON line."""
        line = {k: round(v, 6) if isinstance(v, float) else v for k, v in {"step": step, **record}.items()}
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise unwritable(self.metrics, error) from error

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
            # Restarts are noted before their step, so those at ``step`` come again.
            if record["step"] < step + ("restarted" not in record):
                kept.append(line + "\n")
        atomic_write(self.metrics, lambda file: file.write("".join(kept).encode()))
