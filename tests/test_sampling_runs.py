"""Runs of ``varkern sample``: seeds of their images, what they keep when they stop, and where they go on."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import save_tiny

import varkern
from varkern import cli, images, sampling


@pytest.fixture
def run(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: cli.main(["sample", *map(str, arguments), "--checkpoint", str(model), "--device", "cpu"])


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}


def pixels(folder):
    return [Image.open(path).tobytes() for path in sorted(Path(folder).glob("*.png"))]


def test_seeds_of_neighbouring_runs_share_nothing():
    seeds = [sampling.image_seed(seed, i) for seed in (0, 1, 2, 2**32, 2**63) for i in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_no_two_images_draw_the_same_noise():
    """torch's generator on the CPU sees the low 32 bits of a seed."""
    a, b = (torch.Generator().manual_seed(seed) for seed in (5, 5 + (7 << 32)))
    assert torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))
    low = [{sampling.image_seed(seed, i) % 2**32 for i in range(10_000)} for seed in (0, 1, 2, 7, 1000, 2**32, 2**63)]
    assert all(len(run) == 10_000 for run in low)
    assert len(set().union(*low)) == 70_000
    # Of all pairs of runs of 50,000 whose seeds differ by up to 10,000, from the distance of their beginnings.
    distances = [min(d, 2**32 - d) for d in (n * sampling._GOLDEN % 2**32 for n in range(1, 10_001))]
    assert min(distances) >= 50_000


def test_streams_that_are_closed_or_know_ascii_only(tmp_path):
    model = save_tiny(tmp_path / "tiny")
    command = [sys.executable, "-m", "varkern", "sample", "--checkpoint", str(model), "--num", "1", "--seed", "0"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    name = str(tmp_path / "\u00e9")
    done = subprocess.run([*command, "--out", name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert r"\xe9" in done.stdout
    closed = " ".join(map(shlex.quote, [*command, "--out", str(tmp_path / "closed")])) + " >&-"
    assert subprocess.run(["sh", "-c", closed], capture_output=True).returncode == 0
    assert len(list((tmp_path / "closed").glob("*.png"))) == 1


def test_the_reference_makes_one_image_at_a_time(run):
    with varkern.use_backend("reference"):
        assert run("--num", 3, "--seed", 4, "--out", "reference") == 0
    assert run("--num", 3, "--seed", 4, "--out", "engine") == 0
    for a, b in zip(pixels("reference"), pixels("engine"), strict=True):
        difference = np.frombuffer(a, np.uint8).astype(int) - np.frombuffer(b, np.uint8)
        assert abs(difference).max() <= 1  # a level, where a rounding falls the other way


def test_too_many_images_are_refused(run, capsys):
    assert run("--num", 10**11) == 2
    assert "a number of at most 10000000 is needed" in capsys.readouterr().err


@pytest.mark.parametrize("smooth", [[], ["--more-smooth"]])
def test_images_do_not_depend_on_the_batch_size(run, smooth):
    for size in (1, 3, 16):
        assert run("--num", 5, "--seed", 4, "--batch-size", size, "--out", f"s{size}", *smooth) == 0
    assert pixels("s1") == pixels("s3") == pixels("s16")
    assert run("--num", 5, "--seed", 5, "--out", "other", *smooth) == 0
    assert not set(pixels("other")) & set(pixels("s16"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_stopped_run_keeps_its_images_and_goes_on(run, monkeypatch, capsys, error):
    write, calls = images.write_png, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise error
        return write(*arguments)

    monkeypatch.setattr(images, "write_png", stop)
    assert run("--num", 6, "--batch-size", 2, "--out", "s") == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
    before = content("s")
    assert len(before) == 3
    monkeypatch.setattr(images, "write_png", write)
    assert run("--num", 6, "--batch-size", 4, "--out", "s") == 0
    assert "3 images, seed" in capsys.readouterr().out
    after = content("s")
    assert len(after) == 6
    assert before.items() <= after.items()
    seed = json.loads(Path("s", sampling.MANIFEST).read_text())["runs"][0]["seed"]
    assert run("--num", 6, "--seed", seed, "--out", "whole") == 0
    assert pixels("whole") == pixels("s")
    assert run("--num", 6, "--seed", seed, "--out", "s") == 0
    assert content("s") == after
    assert run("--num", 6, "--seed", seed, "--cfg", 3, "--out", "s") == 0
    assert len(content("s")) == 12
    assert after.items() <= content("s").items()


def test_a_picture_tells_how_to_make_it_again(run):
    assert run("--num", 2, "--seed", 9, "--cfg", 2, "--out", "s") == 0
    with Image.open(sorted(Path("s").glob("*.png"))[1]) as image:
        text = json.loads(image.text["varkern"])
    assert (text["seed"], text["index"], text["cfg"]) == (9, 1, 2)
    assert text["image_seed"] == sampling.image_seed(9, 1)


def test_a_grid_of_too_many_images_and_a_broken_manifest_are_errors(run, capsys):
    assert run("--num", sampling.LARGEST_GRID + 1, "--out", "g.png") == 2
    assert "name a folder" in capsys.readouterr().err
    Path("s").mkdir()
    Path("s", sampling.MANIFEST).write_text("[]")
    assert run("--num", 1, "--out", "s") == 2
    assert "is no list of runs" in capsys.readouterr().err
