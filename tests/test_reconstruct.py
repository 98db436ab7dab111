"""``varkern reconstruct``: a batch of images in memory at a time, written as they come."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_run import made_files, pixels
from PIL import Image

from varkern import images


def photographs(count):
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(name)
    return names


def test_images_are_read_a_batch_at_a_time_and_written_as_they_come(run, monkeypatch):
    names, read, events = photographs(7), images.read_image, []
    write = images.write_png
    monkeypatch.setattr(images, "read_image", lambda *arguments: events.append("read") or read(*arguments))
    monkeypatch.setattr(images, "write_png", lambda *arguments: events.append("write") or write(*arguments))
    assert run("reconstruct", *names, "--batch-size", 3, "--out", "r")[0] == 0
    assert events == (["read"] * 3 + ["write"] * 3) * 2 + ["read", "write"]
    assert list(made_files("r")) == [f"{i:05d}_{i}.png" for i in range(7)]


def test_what_was_made_stays_and_the_rest_is_made_again(run, monkeypatch):
    names, write, calls = photographs(5), images.write_png, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(images, "write_png", full)
    status, _, err = run("reconstruct", *names, "--batch-size", 2, "--out", "r")
    assert (status, "No space left on device" in err) == (2, True)
    before = made_files("r")
    assert len(before) == 3
    monkeypatch.setattr(images, "write_png", write)
    status, out, _ = run("reconstruct", *names, "--batch-size", 2, "--out", "r")
    assert (status, "wrote 2 images" in out) == (0, True)
    assert len(made_files("r")) == 5
    assert made_files("r").items() >= before.items()
    assert run("reconstruct", *names, "--batch-size", 2, "--out", "r")[0] == 0
    assert len(made_files("r")) == 10


def test_a_bad_file_is_told_before_anything_is_made(run):
    names = photographs(3)
    content = Path(names[2]).read_bytes()
    Path(names[2]).write_bytes(content[: len(content) // 2])
    status, _, err = run("reconstruct", *names, "--batch-size", 1, "--out", "r")
    assert (status, "2.png cannot be read as an image" in err) == (2, True)
    assert not Path("r").exists()


@pytest.mark.parametrize("name", ["a b", "a\nb", b"a\xffb", "\u00e9" * 120, "a" * 251, "  "])
def test_files_of_any_name(run, name):
    name = f"{os.fsdecode(name)}.png"
    shutil.move(photographs(1)[0], name)
    for _ in range(2):
        status, out, err = run("reconstruct", name, "--out", "r")
        assert status == 0, err
        assert len(out.splitlines()) == 3
    assert len(made_files("r")) == 2
    status, _, err = run("reconstruct", f"{name[-10:]}x", "--out", "r")
    assert (status, err.count("\n")) == (2, 1)


def test_pairs_of_several_rows(run):
    names = photographs(10)
    assert run("reconstruct", *names, "--batch-size", 4, "--out", "pairs.png")[0] == 0
    shown = pixels("pairs.png")
    assert shown.shape == (4 + 4 * 36, 4 + 8 * 36)
    for i, name in enumerate(names):
        y, x = 4 + 72 * (i // 8), 4 + 36 * (i % 8)
        original = images.to_uint8(images.read_image(name, 32, 1).add(1).div(2))[..., 0]
        np.testing.assert_array_equal(shown[y : y + 32, x : x + 32], original)
    assert run("reconstruct", *names, "--batch-size", 4, "--out", "r")[0] == 0
    for i, content in enumerate(made_files("r")):
        y, x = 4 + 72 * (i // 8) + 36, 4 + 36 * (i % 8)
        np.testing.assert_array_equal(shown[y : y + 32, x : x + 32], pixels(f"r/{content}"))
