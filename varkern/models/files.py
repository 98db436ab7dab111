"""Reading a weights file by what it holds, whatever its name, without running any of it; the true cause where it fails.

Tensors are mapped from the file, so that reading needs no memory of its own, however large a damaged file claims to be.
"""

import argparse
import json
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

CHECKSUM = "crc32"  # the key of `checksum` in the metadata of a safetensors file
_HEADER_LIMIT = 100_000_000  # of the safetensors format, in bytes
_CONFIG_LIMIT = 2**20
_AGAIN = "fetch or write it again"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or does not fit; the message names the file or key and the cause."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """A checkpoint, or a file of one, that is not there."""


class CheckpointWarning(UserWarning):
    """What was chosen, or looks wrong, in a checkpoint that loads."""


@dataclass(frozen=True)
class Contents:
    """What a file holds: nested containers of tensors, the metadata of a safetensors file, its size in bytes."""

    value: Any
    metadata: dict[str, str]
    size: int


def read_file(path: str | os.PathLike[str]) -> Contents:
    """The contents of a safetensors or PyTorch file, told apart by their first bytes; nothing stored there is run.

    Raises CheckpointError naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the weights file in it")
    if not path.is_file():
        raise MissingCheckpointError(f"there is no checkpoint file {path}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    foreign = _foreign(head)
    if foreign:
        raise CheckpointError(f"{path} {foreign}")
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= _HEADER_LIMIT:
        return _read_safetensors(path, size)
    if head.startswith(b"PK"):
        _check_zip(path, size)
        return Contents(_read_torch(path, mapped=True), {}, size)
    if head.startswith(b"\x80"):  # a pickle: what torch.save wrote before version 1.6
        return Contents(_read_torch(path, mapped=False), {}, size)
    raise CheckpointError(f"{path} is neither a whole safetensors file nor one of PyTorch; {_AGAIN}")


def _foreign(head: bytes) -> str:
    """What a file is, and what to do about it, where its first bytes are those of no checkpoint."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return f"is empty; {_AGAIN}"
    if not text or not head.strip(b"\0"):
        return f"holds nothing but blanks; {_AGAIN}"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights it stands for; fetch them with `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights: the download was answered with a page; download the file itself"
    if text.startswith((b"{", b"[")):
        return "is JSON text, not weights; name the weights file"
    for magic, kind in ((b"\x1f\x8b", "gzip"), (b"\xfd7zXZ", "xz"), (b"BZh", "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if head.startswith(magic):
            return f"is compressed with {kind}; unpack it first"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it and name the weights file in it"
    for magic, kind in ((b"GGUF", "a GGUF"), (b"\x89HDF", "an HDF5"), (b"\x93NUMPY", "a NumPy")):
        if head.startswith(magic):
            return f"is {kind} file; give a safetensors or PyTorch one"
    return ""


def _read_safetensors(path: Path, size: int) -> Contents:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # SafetensorError, or another of the bindings
        raise CheckpointError(f"{path} is no complete safetensors file ({_first_line(error)}); {_AGAIN}") from error
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(state, metadata):
        raise CheckpointError(f"{path} is damaged: it does not have the checksum it was written with; {_AGAIN}")
    return Contents(state, metadata, size)


def checksum(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of metadata, names, types, shapes and bytes of contiguous CPU tensors."""
    told = sorted((name, value) for name, value in metadata.items() if name != CHECKSUM)
    crc = zlib.crc32(json.dumps(told).encode())
    for name in sorted(state):
        value = state[name]
        crc = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), crc)
        if value.numel():
            crc = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _check_zip(path: Path, size: int) -> None:
    """Raises CheckpointError for an archive that is damaged, no checkpoint, or larger once unpacked.

    torch.load looks at no checksum: a flipped bit of a weight would load without a word.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not any(entry.filename.endswith("/data.pkl") for entry in entries):
                raise CheckpointError(
                    f"{path} is a zip archive, but not a checkpoint of PyTorch (it has no data.pkl); "
                    "name the weights file"
                )
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise CheckpointError(f"{path} is a TorchScript program; save the state dict of the model instead")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{path} was packed again with compression; write it with torch.save")
            if sum(entry.file_size for entry in entries) > size:
                raise CheckpointError(f"{path} is damaged: it claims to hold more than its {size} bytes; {_AGAIN}")
            # torch.serialization.set_crc32_options(False) leaves 0 in place of every checksum.
            if any(entry.CRC for entry in entries):
                for entry in entries:
                    with archive.open(entry) as file:
                        while file.read(2**20):
                            pass
    except CheckpointError:
        raise
    except Exception as error:  # BadZipFile for most damage, but also struct.error, EOFError, NotImplementedError ...
        raise CheckpointError(f"{path} is cut short or damaged ({_first_line(error)}); {_AGAIN}") from error


_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
# What training scripts leave beside the weights and cannot do harm.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    *(type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "?")),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
]


def _read_torch(path: Path, mapped: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            if path.suffix == ".safetensors":  # by which torch.load would go
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises many types, by the place where the damage shows
        unsafe = re.search(r"(?:unsupported|Unsupported global:) GLOBAL (\S+)|(unrecognized) function", str(error))
        if unsafe:
            what = f" ({unsafe[1]})" if unsafe[1] else ""
            cause = f"it holds more than tensors{what}, and running what it holds is refused"
            raise CheckpointError(f"{path} could not be read as weights: {cause}") from error
        raise CheckpointError(f"{path} is damaged or no checkpoint ({_first_line(error)}); {_AGAIN}") from error


def _first_line(error: Exception) -> str:
    text = str(error).split("WeightsUnpickler error:")[-1]  # before it torch explains weights_only
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 160 else line[:157] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file. Raises CheckpointError for anything else."""
    try:
        if path.stat().st_size > _CONFIG_LIMIT:
            raise CheckpointError(f"{path} is larger than {_CONFIG_LIMIT} bytes, and so no configuration")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({_first_line(error)}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object of settings; {_AGAIN}")
    return value
