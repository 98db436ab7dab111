"""Runs: settings, locks, signals, what a resumed run notices, and errors of the machine."""

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
import typing

import numpy as np
import pytest
import torch
from PIL import Image

from varkern.cli import main
from varkern.data.config import resolve_device
from varkern.eval import EvaluateConfig, evaluate
from varkern.models.checkpoint import read_state
from varkern.train import TokenizerConfig, TransformerConfig, run, train_tokenizer, train_transformer
from varkern.train.run import CHECKPOINT, METRICS, Run

SMALL = {
    "image_size": 8,
    "channels": 1,
    "vocab_size": 8,
    "z_channels": 4,
    "ch": 32,
    "ch_mult": (1, 1),
    "num_res_blocks": 1,
    "patch_nums": (1, 2, 4),
    "batch_size": 8,
    "epochs": 1,
    "restart_images": 8,
    "restart_every": 1,
    "device": "cpu",
    "log_every": 1,
    "checkpoint_every": 1,
}
VAR = {"depth": 1, "width": 64, "batch_size": 8, "epochs": 1, "device": "cpu"}


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("10", "2", "1"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(rng.integers(0, 256, (9, 9), np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def settings_of(photos, **changes):
    return {**SMALL, "data": str(photos), "out": str(photos.parent / "run"), **changes}


def trained(photos, **changes):
    return train_tokenizer(TokenizerConfig(**settings_of(photos, **changes)))


def command(settings):
    """Command line of `varkern train-tokenizer`."""
    line = []
    for name, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        line += ["--" + name.replace("_", "-"), text]
    return [sys.executable, "-m", "varkern", "train-tokenizer", *line]


# ---- settings ----------------------------------------------------------------------------------------------------
def bad_numbers():
    """Of every field that is a number: NaN, infinity, -1 and values out of its documented bounds."""
    for config in (TokenizerConfig, TransformerConfig):
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            text = str(hints[field.name])
            if "int" not in text and "float" not in text:
                continue
            bad = [math.nan, math.inf, -math.inf, "3"] + ([1.5] if "float" not in text else [])
            if field.name not in ("drop_path_rate", "quant_resi"):
                bad.append(-1)
            bounds = field.metadata["bounds"]
            if bounds.startswith("(0"):
                bad.append(0)
            if bounds.endswith("1)"):
                bad.append(1)
            if bounds.endswith("1]"):
                bad.append(2)
            for value in bad:
                yield pytest.param(
                    config, field.name, (value,) if "tuple" in text else value, id=f"{field.name}={value}"
                )


@pytest.mark.parametrize(("config", "name", "value"), list(bad_numbers()))
def test_every_number_is_checked(config, name, value, tmp_path):
    more = {"tokenizer": "unused"} if config is TransformerConfig else SMALL
    with pytest.raises(ValueError, match=name) as caught:
        config(**{**more, "data": "digits", "out": str(tmp_path / "run"), name: value}).validate()
    assert "\n" not in str(caught.value)


def test_nothing_held_out_trains_without_validation_only(photos):
    with pytest.raises(ValueError, match=r"held_out is 0.*set validate_every to 0"):
        trained(photos, held_out=0)
    folder = trained(photos, held_out=0, validate_every=0)
    var = train_transformer(
        TransformerConfig(
            **VAR, data=str(photos), tokenizer=str(folder), out=str(photos.parent / "var"), held_out=0, validate_every=0
        )
    )
    assert (var / "model.safetensors").is_file()


def test_size_and_channels_come_from_the_tokenizer_and_classes_are_saved(photos, capsys):
    folder, out = trained(photos), photos.parent / "var"
    assert json.loads((folder / "classes.json").read_text()) == ["1", "2", "10"]
    line = ["train", "--data", str(photos), "--tokenizer", str(folder), "--out", str(out)]
    line += [f"--{name}={value}".replace("_", "-") for name, value in VAR.items()]
    capsys.readouterr()
    assert main(line) == 0
    assert "3 classes: 0 1, 1 2, 2 10" in capsys.readouterr().err
    assert json.loads((out / "classes.json").read_text()) == ["1", "2", "10"]
    assert main(["sample", "--checkpoint", str(out), "--class", "10", "--out", str(photos.parent / "images")]) == 0
    assert [path.name for path in (photos.parent / "images").glob("*.png")] == ["00000_class2.png"]
    for contradiction in (["--image-size", "16"], ["--channels", "3"]):
        assert main([*line, "--resume", *contradiction]) == 2
        assert "tokenizer" in capsys.readouterr().err


def test_bad_files_left_out_are_listed_in_the_run(photos):
    (photos / "1" / "0.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match="1 image file is bad"):
        trained(photos)
    assert "1/0.png" in (trained(photos, on_bad_image="skip") / "bad_images.txt").read_text()


# ---- locks and signals -------------------------------------------------------------------------------------------
def test_a_folder_takes_one_run_at_a_time(photos):
    config = TokenizerConfig(**settings_of(photos, resume=True))
    with Run(config), pytest.raises(FileExistsError, match=rf"in use by another run \(process {os.getpid()}\)"):
        Run(config)
    with Run(config):
        pass


def test_scratch_files_of_a_kill_are_tidied(photos):
    (photos.parent / "run").mkdir()
    scratch = photos.parent / "run" / f".{CHECKPOINT}.123.tmp"
    scratch.touch()
    with Run(TokenizerConfig(**settings_of(photos))):
        assert not scratch.exists()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint(signum, status, photos):
    settings = settings_of(photos, epochs=2000, checkpoint_every=10**6, validate_every=0, workers=1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(settings), env=environment, stderr=subprocess.PIPE, text=True)
    log, folder = photos.parent / "run" / METRICS, photos.parent / "run"
    end = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signum)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == status, errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"varkern: stopped by {signum.name} at step ")
    assert "Traceback" not in errors
    step = torch.load(folder / CHECKPOINT, weights_only=True)["step"]
    assert f"at step {step};" in last
    assert step > 0


# ---- resuming ----------------------------------------------------------------------------------------------------
def test_a_run_is_lengthened_and_its_rate_changed(photos):
    trained(photos)
    folder = trained(photos, epochs=2, base_lr=1e-5, warmup_epochs=1.0, resume=True)
    assert torch.load(folder / CHECKPOINT, weights_only=True)["step"] == 4
    whole = trained(photos, epochs=2, base_lr=1e-5, warmup_epochs=1.0, out=str(photos.parent / "whole"))
    rates = [
        {r["step"]: r["lr"] for r in map(json.loads, (path / METRICS).read_text().splitlines()) if "lr" in r}
        for path in (folder, whole)
    ]
    assert rates[0][4] == rates[1][4]
    with pytest.raises(ValueError, match="lengthened, not shortened"):
        trained(photos, epochs=1, resume=True)
    with pytest.raises(ValueError, match=r"made with clip = 2\.0, not 1\.0"):
        trained(photos, epochs=2, clip=1.0, resume=True)


def edited(folder, change):
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    change(state)
    torch.save(state, folder / CHECKPOINT)


def test_a_setting_unknown_to_the_checkpoint_has_its_default(photos):
    folder = trained(photos)
    edited(folder, lambda state: (state["settings"].pop("gradient_weight"), state.pop("inputs")))
    trained(photos, epochs=2, resume=True)
    edited(folder, lambda state: state["settings"].pop("gradient_weight"))
    with pytest.raises(ValueError, match=r"made with gradient_weight = 0\.0, not 1\.0"):
        trained(photos, epochs=2, gradient_weight=1.0, resume=True)


def test_other_images_are_noticed(photos):
    trained(photos)
    (photos / "1" / "0.png").rename(photos / "2" / "x.png")
    with pytest.raises(ValueError, match=r"images of .*photos have changed"):
        trained(photos, epochs=2, resume=True)


def test_another_tokenizer_at_the_same_path_is_noticed(photos):
    from varkern.models.checkpoint import save_state

    folder = trained(photos)
    settings = {**VAR, "data": str(photos), "tokenizer": str(folder), "out": str(photos.parent / "var")}
    train_transformer(TransformerConfig(**settings))
    state = read_state(folder / "vae.safetensors")
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"] + 1
    save_state(state, folder / "vae.safetensors", {})
    with pytest.raises(ValueError, match=r"weights of .*run have changed"):
        train_transformer(TransformerConfig(**{**settings, "epochs": 2}, resume=True))


def test_a_flipped_bit_is_noticed(photos):
    folder = trained(photos)
    whole = bytearray((folder / CHECKPOINT).read_bytes())
    for at in (len(whole) // 3, len(whole) // 2, 2 * len(whole) // 3):
        damaged = whole.copy()
        damaged[at] ^= 16
        (folder / CHECKPOINT).write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            trained(photos, epochs=2, resume=True)


def test_restarts_are_logged_once_after_a_kill(photos, monkeypatch):
    from varkern.train.loop import Loop

    step = Loop.train_step

    def dying(self, *args):
        if self.step == 1:
            raise MemoryError
        return step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "train_step", dying)
        with pytest.raises(MemoryError):
            trained(photos)
    lines = [json.loads(line) for line in (trained(photos, resume=True) / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines if "restarted" in line] == [0, 1]


# ---- the machine -------------------------------------------------------------------------------------------------
def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / CHECKPOINT
    path.write_bytes(b"old")

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(self.file, name)

    with pytest.raises(OSError, match=r"checkpoint\.pt cannot be written \(No space left on device\)"):
        run.atomic_write(path, lambda file: torch.save({"a": torch.ones(9)}, Full(file)))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_or_a_read_only_folder_as_out(photos, monkeypatch):
    (photos.parent / "taken").touch()
    with pytest.raises(NotADirectoryError, match="taken is a file; name a folder"):
        trained(photos, out=str(photos.parent / "taken"))

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(run, "lock", refuse)  # permissions do not bind root
    with pytest.raises(OSError, match=r"run cannot be written \(Permission denied\)"):
        trained(photos)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no CUDA device; use 'cpu'"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="not a device of torch"):
        resolve_device("gpu")


def test_evaluation_refuses_other_classes(photos):
    folder = trained(photos)
    settings = {"model": str(folder), "data": str(photos), "image_size": 8, "channels": 1, "device": "cpu"}
    assert evaluate(EvaluateConfig(**settings))["images"] == 9
    (photos / "10").rename(photos / "0")
    with pytest.raises(ValueError, match=r"not trained on the classes 0 of .*photos, but on 1, 2, 10; give"):
        evaluate(EvaluateConfig(**settings))
