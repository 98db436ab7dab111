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


def start(folder, *arguments):
    command = [sys.executable, "-m", "varkern", "sample", "--checkpoint", "tiny", "--device", "cpu", "--out", folder]
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def runs_of(folder):
    return json.loads(Path(folder, sampling.MANIFEST).read_text())["runs"]


@pytest.mark.parametrize("seeded", [True, False])
def test_two_processes_share_a_folder(run, seeded):
    made = [start("s", "--num", "4", *(["--seed", str(i)] if seeded else [])) for i in (1, 2)]
    for process in made:
        assert process.wait(120) == 0, process.stderr.read()
    runs = runs_of("s")
    assert sorted(entry["first"] for entry in runs) == [0, 4]
    assert len({entry["seed"] for entry in runs}) == 2
    assert len(content("s")) == 8
    for entry in runs:
        assert run("--num", 4, "--seed", entry["seed"], "--out", f"alone{entry['seed']}") == 0
        assert pixels(f"alone{entry['seed']}") == pixels("s")[entry["first"] : entry["first"] + 4]
    assert not list(Path("s").glob(f".{sampling.MANIFEST}.?.lock"))


def test_the_list_of_runs_is_read_under_the_lock(run):
    """A record that another process writes just before the lock is had is kept."""
    from varkern.train.run import lock

    assert run("--num", 1, "--seed", 1, "--out", "s") == 0
    with lock(Path("s"), sampling.LOCK):
        waiting = start("s", "--num", "1", "--seed", "2")
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(8)
        (entry,) = runs_of("s")
        Path("s", sampling.MANIFEST).write_text(json.dumps({"runs": [entry, entry | {"seed": 7, "first": 1}]}))
    assert waiting.wait(60) == 0
    assert [(entry["seed"], entry["first"]) for entry in runs_of("s")] == [(1, 0), (7, 1), (2, 2)]


def test_a_run_that_another_process_makes_is_not_made_twice(run, capsys):
    from varkern.train.run import lock

    assert run("--num", 2, "--seed", 1, "--out", "s") == 0
    sorted(Path("s").glob("*.png"))[0].unlink()
    with lock(Path("s"), f".{sampling.MANIFEST}.0.lock"):
        assert run("--num", 2, "--seed", 1, "--out", "s") == 2
        assert f"s is in use by another run (process {os.getpid()}); wait for it" in capsys.readouterr().err
        assert run("--num", 2, "--out", "s") == 0
    assert [entry["first"] for entry in runs_of("s")] == [0, 2]
    assert run("--num", 2, "--seed", 1, "--out", "s") == 0
    assert len(content("s")) == 4


def test_other_weights_are_another_run(run, tmp_path, capsys):
    assert run("--num", 3, "--seed", 4, "--out", "s") == 0
    before = content("s")
    sorted(Path("s").glob("*.png"))[2].unlink()
    capsys.readouterr()
    for part, name in enumerate(("var", "vae")):
        model = varkern.load(tmp_path / "tiny")
        weights = (model if name == "var" else model.vae_proxy[0]).state_dict()
        with torch.no_grad():
            next(value for value in weights.values() if value.is_floating_point()).add_(0.01)
        model.save_pretrained(tmp_path / "tiny")
        assert run("--num", 3, "--seed", 4, "--out", "s") == 0
        assert "the weights have changed since the runs of these settings in s: a new run" in capsys.readouterr().err
        assert [entry["first"] for entry in runs_of("s")] == [0, 3, 6][: 2 + part]
        assert len(content("s")) == 2 + 3 * (part + 1)
    assert {name: content("s")[name] for name in list(before)[:2]} == dict(list(before.items())[:2])
    assert run("--num", 3, "--seed", 4, "--out", "s") == 0
    assert "weights have changed" not in capsys.readouterr().err
    assert len(content("s")) == 8


@pytest.mark.parametrize("name", ["a b", "a\nb", b"a\xffb", "\u00e9" * 100, "a" * 250, "-x"])
def test_folders_of_any_name(run, capsys, name):
    name = os.fsdecode(name)
    assert run("--num", 1, "--seed", 4, f"--out={name}") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert len(content(name)) == 1
    if len(os.fsencode(name)) < 250:
        assert run("--num", 1, "--seed", 4, f"--out={name}.png") == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        assert Path(f"{name}.png").exists()


def test_a_folder_that_cannot_be_written(run, capsys, monkeypatch):
    Path("file").touch()
    assert run("--num", 1, "--out", "file/s") == 2
    assert "file/s cannot be written: file is a file; choose another folder" in capsys.readouterr().err.replace(
        f"{Path.cwd()}/", ""
    )
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not bind root
    for out in ("s", "s/a.png"):
        assert run("--num", 1, "--out", out) == 2
        assert "s cannot be written: " in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
    assert not Path("s").exists()


def test_a_grid_of_too_many_images_and_a_broken_manifest_are_errors(run, capsys):
    assert run("--num", sampling.LARGEST_GRID + 1, "--out", "g.png") == 2
    assert "name a folder" in capsys.readouterr().err
    Path("s").mkdir()
    Path("s", sampling.MANIFEST).write_text("[]")
    assert run("--num", 1, "--out", "s") == 2
    assert "is no list of runs" in capsys.readouterr().err
