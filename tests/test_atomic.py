"""`varkern.atomic`: whole files or none, whoever writes them."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from varkern.atomic import atomic_write
from varkern.images import write_png
from varkern.models.checkpoint import save_state


def test_a_writer_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, lambda file: file.write(b"old"))

    def fail(file) -> None:
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_written_under_the_name_counts(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", lambda file: Path(file.name).write_bytes(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new"


def test_several_write_one_file_at_once(tmp_path: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: atomic_write(tmp_path / "file", lambda file: file.write(content)), contents))
    assert (tmp_path / "file").read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o027], ids=oct)
def test_readers_are_whom_the_mask_allows(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_png(Image.new("L", (2, 2)), tmp_path / "a.png")
        save_state({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_png(Image.new("L", (2, 2)), path),
        lambda path: save_state({"a": torch.zeros(1)}, path),
        lambda path: atomic_write(path, lambda file: file.write(b"")),
    ],
    ids=["png", "weights", "bytes"],
)
def test_the_error_names_the_file(tmp_path: Path, write) -> None:
    path = tmp_path / "taken"
    path.mkdir()
    with pytest.raises(OSError, match=r"taken cannot be written \(Is a directory\); free some space or choose"):
        write(path)
    assert os.listdir(tmp_path) == ["taken"]
