"""The demo end to end, on a tiny model: its pictures show what the library returns."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import save_tiny

import varkern
from varkern import demo, images
from varkern.data.datasets import held_out_digits

NAMES = ["samples.png", "scales.png", "reconstruction.png", "inpainting.png"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert demo.run(out, str(tiny), device="cpu") == [out / name for name in NAMES]
    return {path.name: np.asarray(Image.open(path)) for path in out.iterdir()}


def shows(picture, image):
    """Whether a picture holds an image (1, 32, 32) in [0, 1], enlarged three times, at some place."""
    cell = np.repeat(np.repeat(images.to_uint8(image)[..., 0], 3, axis=0), 3, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(picture, cell.shape[1], axis=1)
    rows = np.argwhere((windows == cell[0]).all(-1))
    return any(np.array_equal(picture[y : y + 96, x : x + 96], cell) for y, x in rows)


def test_samples_show_every_class_in_its_row(made, tiny):
    labels = [label for label in range(10) for _ in range(demo.COLUMNS)]
    sampled = varkern.generate(varkern.load(tiny), len(labels), labels, 0, **demo.SAMPLING).images
    picture = made["samples.png"]
    for label in (0, 4, 9):
        top = picture.shape[0] - (10 - label) * 100
        for column in (0, demo.COLUMNS - 1):
            assert shows(picture[top : top + 100], sampled[label * demo.COLUMNS + column])
    assert not shows(picture, sampled[0].flip(-1))


def test_scales_end_in_the_generated_image(made, tiny):
    result = varkern.generate(varkern.load(tiny), 3, [2, 3, 8], 0, **demo.SAMPLING)
    after = varkern.load(tiny).vae_proxy[0].idxBl_to_img(result.tokens, same_shape=True)
    assert len(after) == 4
    for scale in after:
        assert shows(made["scales.png"], (scale[1] + 1) / 2)
    assert shows(made["scales.png"], result.images[1])


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path / "file" / "demo")])
    with pytest.raises(SystemExit) as leaving:
        demo.main()
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert "file is a file; choose another folder" in error
    assert error.count("\n") == 1


def test_reconstruction_shows_both_of_a_pair(made, tiny):
    var = varkern.load(tiny)
    originals = varkern.generate(var, 10, list(range(10)), 0, **demo.SAMPLING).images
    rebuilt = var.vae_proxy[0].img_to_reconstructed_img(originals * 2 - 1, last_one=True)
    assert shows(made["reconstruction.png"], originals[7])
    assert shows(made["reconstruction.png"], (rebuilt[7] + 1) / 2)


def test_inpainting_shows_the_hole_and_what_fills_it(made, tiny):
    var = varkern.load(tiny)
    originals = varkern.generate(var, 10, list(range(10)), 0, **demo.SAMPLING).images
    given = (originals * 2 - 1)[: demo.EDITED]
    filled = varkern.edit.inpaint(var, given, demo.BOX, seed=0, **demo.SAMPLING).images
    as_six = varkern.edit.class_edit(var, given, 6, demo.BOX, seed=0, **demo.SAMPLING).images
    hole = originals[2].clone()
    hole[:, 16:] = demo.GREY
    for image in (originals[2], hole, filled[2], as_six[2]):
        assert shows(made["inpainting.png"], image)


def test_real_digits_are_shown_where_asked_for(tiny, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn carries the digits")
    demo.run(tmp_path, str(tiny), device="cpu", digits=True)
    digits, labels = held_out_digits(10, 32, 1)
    assert labels == list(range(10))
    picture = np.asarray(Image.open(tmp_path / "reconstruction.png"))
    assert shows(picture, (digits[4] + 1) / 2)
    assert "generated" not in capsys.readouterr().out


def test_runs_as_a_module_and_names_paths_device_and_times(tiny, tmp_path):
    command = [sys.executable, "-m", "varkern.demo", "--out", "pictures", "--checkpoint", str(tiny), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "M parameters on CPU, 1 threads" in lines[0]
    assert lines[1].startswith("originals are generated")
    for line, name in zip(lines[2:6], NAMES, strict=True):
        assert line.startswith(str(Path("pictures", name)))
        assert line.endswith(" s")
    assert lines[6].startswith("done in ")


def test_models_of_other_sizes_and_few_classes(tmp_path):
    with torch.random.fork_rng():
        vae = {"vocab_size": 16, "z_channels": 8, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}
        vae |= {"in_channels": 3, "v_patch_nums": [1, 2]}
        varkern.VARHF(vae, num_classes=2, depth=1, embed_dim=64, num_heads=1, patch_nums=(1, 2)).save_pretrained(
            tmp_path
        )
    paths = demo.run(tmp_path / "out", str(tmp_path), device="cpu")
    with Image.open(paths[0]) as samples:
        assert samples.height < samples.width  # two rows of ten
