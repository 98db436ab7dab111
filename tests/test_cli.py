"""The command line: every command in process on a tiny model, its pictures, its errors, and the installed script."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_run import expected, pixels
from PIL import Image

import varkern
from varkern import cli, images
from varkern.sampling import image_seed

COMMANDS = ("sample", "reconstruct", "edit", "train-tokenizer", "train", "evaluate", "bench", "info")


# --- sample -------------------------------------------------------------------------------------------------------


def test_sample_writes_what_generate_returns(run, tiny, tmp_path):
    status, out, _ = run(
        "sample", "--class", "3,none", "--class", "5", "--num", 4, "--seed", 7, "--top-k", 9, "--out", "s"
    )
    assert status == 0
    assert "seed 7" in out
    names = sorted(path.name for path in Path("s").glob("*.png"))
    assert names == ["00000_class3.png", "00001_none.png", "00002_class5.png", "00003_class3.png"]
    made = varkern.generate(varkern.load(tiny), 4, [3, 10, 5, 3], [image_seed(7, i) for i in range(4)], top_k=9).images
    for i, name in enumerate(names):
        np.testing.assert_array_equal(pixels(Path("s") / name), expected(made[i]))


def test_sample_takes_classes_in_turn_and_each_image_has_its_seed(run, tiny):
    assert run("sample", "--num", 12, "--seed", 1, "--batch-size", 5, "--out", "s")[0] == 0
    paths = sorted(Path("s").glob("*.png"))
    assert [path.stem[-1] for path in paths] == list("012345678901")
    last = varkern.generate(varkern.load(tiny), 2, [0, 1], [image_seed(1, 10), image_seed(1, 11)]).images
    np.testing.assert_array_equal(pixels(paths[10]), expected(last[0]))
    np.testing.assert_array_equal(pixels(paths[11]), expected(last[1]))


def test_seed_decides_and_no_seed_gives_a_new_one_that_is_printed(run):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("sample", "--class", 4, "--seed", seed, "--out", f"{name}.png")[0] == 0
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    seeds = [run("sample", "--class", 4, "--out", "d.png")[1].split("seed ")[1].split(",")[0] for _ in range(2)]
    assert seeds[0] != seeds[1]
    drawn = Path("d.png").read_bytes()
    run("sample", "--class", 4, "--seed", seeds[1], "--out", "e.png")
    assert Path("e.png").read_bytes() == drawn


def test_folders_are_added_to_and_a_png_is_replaced_and_said_so(run):
    run("sample", "--class", "1,2", "--seed", 0, "--out", "s")
    first = {path.name: path.read_bytes() for path in Path("s").glob("*.png")}
    _, out, _ = run("sample", "--class", "1", "--seed", 5, "--out", "s")
    assert "beside 2" in out
    (Path("s") / "100000_class0.png").touch()
    run("sample", "--class", "2", "--seed", 5, "--out", "s")
    (Path("s") / "100000_class0.png").unlink()
    (Path("s") / "100001_class2.png").unlink()
    assert sorted(path.name for path in Path("s").glob("*.png")) == [*sorted(first), "00002_class1.png"]
    assert all((Path("s") / name).read_bytes() == content for name, content in first.items())
    assert run("sample", "--seed", 0, "--out", "g.png")[1].splitlines()[0] == "wrote g.png"
    assert run("sample", "--seed", 0, "--out", "g.png")[1].splitlines()[0] == "replaced g.png"
    assert pixels("g.png").shape == (4 + 3 * 36, 4 + 4 * 36)  # ten images, four a row, 4 pixels apart
    assert sorted(path.name for path in Path().iterdir()) == ["g.png", "s"]  # no scratch file stays


def test_class_names_of_the_checkpoint(run, tiny, tmp_path):
    named = shutil.copytree(tiny, tmp_path / "named")
    (named / "classes.json").write_text(json.dumps([f"cat {i}" for i in range(9)] + ["3"]))
    arguments = ["sample", "--checkpoint", named, "--class", "Cat 2,3,4", "--seed", 0, "--out", "s"]
    assert run(*arguments, model=False)[0] == 0
    assert [path.stem for path in sorted(Path("s").glob("*.png"))] == ["00000_class2", "00001_class9", "00002_class4"]
    for content, sentence in (("{", "classes.json is not JSON"), ('["a"]', "must be a JSON list of 10 names")):
        (named / "classes.json").write_text(content)
        status, _, err = run(*arguments, model=False)
        assert (status, sentence in err) == (2, True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(run, dtype):
    arguments = ["--num", 2, "--batch-size", 1, "--seed", 0, "--dtype", dtype]
    assert run("sample", *arguments, "--out", "s.png")[0] == 0
    assert run("edit", "s.png", "--box", "0,0,1,0.5", *arguments, "--out", "e.png")[0] == 0
    assert run("reconstruct", "s.png", "--dtype", dtype, "--out", "r.png")[0] == 0


def test_more_smooth_and_guidance_change_the_images(run, tiny):
    run("sample", "--class", 3, "--seed", 0, "--more-smooth", "--out", "smooth.png")
    made = varkern.generate(varkern.load(tiny), 1, [3], image_seed(0, 0), more_smooth=True).images
    np.testing.assert_array_equal(pixels("smooth.png"), expected(made[0]))
    run("sample", "--class", 3, "--seed", 0, "--cfg", 9, "--top-p", 0.4, "--out", "guided.png")
    made = varkern.generate(varkern.load(tiny), 1, [3], [image_seed(0, 0)], cfg=9, top_p=0.4).images
    np.testing.assert_array_equal(pixels("guided.png"), expected(made[0]))


# --- reconstruct --------------------------------------------------------------------------------------------------


def test_reconstruct_files(run, tiny, picture):
    status, out, _ = run("reconstruct", picture, picture, "--batch-size", 1, "--out", "r")
    assert status == 0
    image = images.read_image(picture, 32, 1)
    made = varkern.load(tiny).vae_proxy[0].img_to_reconstructed_img(image[None], last_one=True)
    psnr = 10 * torch.log10(4 / (made - image).square().mean()).item()
    assert out.count(f"photo.png: PSNR {psnr:.2f} dB") == 2
    assert f"mean of 2: PSNR {psnr:.2f} dB" in out
    assert [path.name for path in sorted(Path("r").glob("*.png"))] == ["00000_photo.png", "00001_photo.png"]
    np.testing.assert_array_equal(pixels("r/00000_photo.png"), expected((made[0] + 1) / 2))


def test_reconstruct_pairs_originals_with_results(run, picture):
    run("reconstruct", picture, "--out", "pair.png")
    pair = pixels("pair.png")
    assert pair.shape == (4 + 2 * 36, 4 + 36)
    original = expected((images.read_image(picture, 32, 1) + 1) / 2)
    np.testing.assert_array_equal(pair[4:36, 4:36], original)
    assert np.abs(pair[40:72, 4:36].astype(int) - original).mean() > 1


def test_held_out_digits_are_real_balanced_and_of_the_held_out_part():
    pytest.importorskip("sklearn", reason="scikit-learn carries the digits")
    from varkern.data.config import DataConfig
    from varkern.data.datasets import held_out_digits, load_split

    digits, labels = held_out_digits(25, 32, 1)
    assert labels == [*range(10), *range(10), *range(5)]
    train, held_out = load_split(DataConfig(data="digits", image_size=32, channels=1))
    held = torch.stack([held_out[i][0] for i in range(len(held_out))])
    seen = torch.stack([train[i][0] for i in range(len(train))])
    for digit in digits:
        assert (held == digit).flatten(1).all(1).any()
        assert not (seen == digit).flatten(1).all(1).any()


# --- train, evaluate, info ----------------------------------------------------------------------------------------


def test_train_both_stages_and_evaluate(run, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("noise", "dark"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            noise = rng.integers(0, 256 if name == "noise" else 60, (36, 36), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / name / f"{i}.png")
    data = ["--data", "data", "--image-size", 32, "--channels", 1, "--device", "cpu"]
    loop = ["--batch-size", 4, "--epochs", 1, "--validate-every", 0]
    shape = ["--ch", 32, "--ch-mult", "1,1,1,1", "--num-res-blocks", 1, "--patch-nums", "1,2,3,4", "--vocab-size", 16]
    status, out, err = run("train-tokenizer", *data, *loop, *shape, "--z-channels", 8, "--out", "tok", model=False)
    assert (status, out.splitlines()[-1]) == (0, "wrote the tokenizer to tok"), err
    small = ["--depth", 1, "--width", 64, "--no-attn-l2-norm"]
    status, out, err = run("train", *data, *loop, *small, "--tokenizer", "tok", "--out", "var", model=False)
    assert (status, out.splitlines()[-1]) == (0, "wrote the model to var"), err
    assert json.loads(Path("var/config.json").read_text())["attn_l2_norm"] is False
    status, out, err = run("evaluate", "--model", "var", *data, "--batch-size", 3, "--out", "r.json", model=False)
    assert status == 0, err
    assert json.loads(out) == json.loads(Path("r.json").read_text())
    assert json.loads(out)["images"] == 4  # a third of six, twice
    assert run("sample", "--checkpoint", "var", "--class", "1", "--out", "s.png", model=False)[0] == 0


def test_training_options_are_the_fields_of_the_config():
    from varkern.train import TokenizerConfig

    line = "train-tokenizer --data d --out o --patch-nums 1,2,4 --weight-decay-end none --flip --no-resume --epochs 3"
    options = cli.build_parser().parse_args(line.split())
    config = varkern.commands._config(TokenizerConfig, options)
    assert config == TokenizerConfig(
        data="d", out="o", patch_nums=(1, 2, 4), weight_decay_end=None, flip=True, resume=False, epochs=3
    )
    ended = cli.build_parser().parse_args(
        ["train", "--data=d", "--out=o", "--tokenizer=t", "--weight-decay-end", "0.2"]
    )
    assert ended.weight_decay_end == 0.2


def test_info_is_the_report(run):
    from varkern import info

    status, out, _ = run("info", "--json", model=False)
    assert status == 0
    assert json.loads(out)["ops"].keys() == info.report()["ops"].keys()
    status, out, _ = run("info", model=False)
    assert varkern.__version__ in out
    assert "modulated_layer_norm" in out


# --- help and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main([command, "--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out.split("examples:")[1]
    shown = re.sub(r" +\\\n +", " ", shown)  # an example that goes on
    examples = [re.split(" {3,}", line.strip())[0] for line in shown.strip().splitlines()]  # without what it does
    assert examples
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["varkern", command]
        options = cli.build_parser().parse_args(words[1:])
        assert options.run.__module__ == "varkern.commands"


ERRORS = {
    "no command": ([], "COMMAND"),
    "unknown option": (["sample", "--classes", "3"], "unrecognized arguments: --classes"),
    "class too large": (["sample", "--class", "10"], "--class 10 is not a class: give a number in 0..9, or none"),
    "class unknown": (["sample", "--class", "cat"], "--class cat is not a class"),
    "class negative": (["sample", "--class=-1"], "--class -1 is not a class"),
    "top-k above the codebook": (["sample", "--top-k", "33"], "top_k must be"),
    "cfg": (["sample", "--cfg", "nan"], "cfg must be a finite number"),
    "num": (["sample", "--num", "0"], "--num: a number of at least 1 is needed, got '0'"),
    "seed": (["sample", "--seed", "x"], "a seed of at least 0 is needed, got 'x'"),
    "out is no PNG": (["sample", "--out", "a.jpg"], "--out a.jpg: pictures are written as PNG"),
    "out is a file": (["sample", "--out", "notes"], "--out notes is a file"),
    "no such image": (["reconstruct", "none.png"], "there is no image file none.png"),
    "not an image": (["reconstruct", "notes"], "notes cannot be read as an image"),
    "digits with another model": (["reconstruct"], "there is nothing to reconstruct: name image files"),
    "no region": (["edit", "photo.png"], "name the region by either --box T,L,B,R or --mask FILE"),
    "two regions": (["edit", "photo.png", "--box", "0,0,1,1", "--mask", "m.png"], "not both"),
    "box of three": (["edit", "photo.png", "--box", "0,0,1"], "give four fractions TOP,LEFT,BOTTOM,RIGHT"),
    "box upside down": (["edit", "photo.png", "--box", "0.5,0,0.25,1"], "box must be (top, left, bottom, right)"),
    "box empty": (["edit", "photo.png", "--box", "0.1,0,0.1,1"], "0 <= top < bottom"),
    "box of all": (["edit", "photo.png", "--box", "0,0,1,1"], "nothing would be kept of photo.png"),
    "box of all, outpaint": (["edit", "photo.png", "--box", "0,0,1,1", "--mode", "outpaint"], "nothing would be gen"),
    "seam without paste": (["edit", "photo.png", "--box", "0,0,1,.5", "--no-paste-back", "--seam", "3"], "--seam"),
    "cfg too large": (["sample", "--cfg", "1e308"], "cfg must be a finite number in [0, 10000] (0: no guidance), got"),
    "mask missing": (["edit", "photo.png", "--mask", "m.png"], "there is no image file m.png"),
    "class mode without class": (["edit", "photo.png", "--box", "0,0,1,1", "--mode", "class"], "needs --class"),
    "class without class mode": (["edit", "photo.png", "--box", "0,0,1,1", "--class", "1"], "goes with --mode class"),
}


@pytest.mark.parametrize(("arguments", "sentence"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_one_line_and_status_2(run, picture, arguments, sentence):
    Path("notes").write_text("not an image")
    before = sorted(Path().iterdir())
    status, out, err = run(*arguments, model=bool(arguments))
    assert status == 2
    assert err.startswith("varkern: error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sample", "--checkpoint", "nowhere"], "nowhere is neither a file, nor a directory, nor a Hub id"),
        (["sample", "--checkpoint", "broken.safetensors"], "broken.safetensors is neither a whole safetensors file"),
        (["sample", "--checkpoint", "broken.safetensors", "--vae", "broken.safetensors"], "broken.safetensors"),
        (["reconstruct", "photo.png", "--vae", "missing.pth"], "there is no checkpoint file missing.pth"),
        (["sample", "--device", "fridge"], "--device fridge is not a device of torch"),
        (["train-tokenizer", "--data", "digits"], "required: --out"),
        (["train-tokenizer", "--data", "digits", "--out", "o", "--ch", "33"], "ch is 33"),
        (["train", "--data", "d", "--out", "o", "--tokenizer", "t", "--vocab-size", "1"], "unrecognized arguments"),
        (["train-tokenizer", "--data", "d", "--out", "o", "--patch-nums", "1,x"], "invalid comma-separated list"),
        (["evaluate", "--model", "m"], "--data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_of_checkpoints_and_configs(run, picture, arguments, sentence):
    Path("broken.safetensors").write_bytes(b"\x10\x00\x00")
    status, _, err = run(*arguments, model=False)
    assert status == 2
    assert err.startswith("varkern: error: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("VARKERN_DEBUG", "1")
    with pytest.raises(ValueError, match="is not a class"):
        run("sample", "--class", "10")


def test_interrupt_exits_with_130(run, monkeypatch):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(varkern.commands, "generate", interrupt)
    status, _, err = run("sample")
    assert (status, err) == (130, "varkern: interrupted\n")


def test_reconstruct_with_a_tokenizer_alone(run, picture, tmp_path):
    from varkern.models.checkpoint import save_state

    vae = varkern.VQVAE(vocab_size=16, z_channels=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, in_channels=3)
    save_state(vae.state_dict(), tmp_path / "vae.safetensors")
    status, _, err = run("reconstruct", picture, "--vae", "vae.safetensors", "--out", "r", model=False)
    assert status == 0, err
    image = images.read_image(picture, 32, 3)  # 16 x 16 features of the 256 px schedule, downsampled by 2
    made = vae.img_to_reconstructed_img(image[None], last_one=True)[0]
    np.testing.assert_array_equal(pixels("r/00000_photo.png"), images.to_uint8((made + 1) / 2))


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip_is_exact(tmp_path, channels):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    given = np.stack([np.roll(levels, c, axis=0) for c in range(channels)], axis=-1)
    tensor = images.from_uint8(given if channels == 3 else given[..., 0])
    assert tensor.shape == (channels, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    path = images.write_png(images.to_pil((tensor + 1) / 2), tmp_path / "new" / "a.png")
    assert torch.equal(images.read_image(path, 16, channels), tensor)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = images.write_png(Image.new("L", (4, 4)), tmp_path / "a.png")
    before = path.read_bytes()

    def half(image, file, **settings):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        images.write_png(Image.new("L", (8, 8)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_reading_crops_the_centre_and_handles_16_bits_transparency_and_rotation(tmp_path):
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (images.read_image(tmp_path / "wide.png", 8, 1) == 200 / 127.5 - 1).all()
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    torch.testing.assert_close(images.read_image(tmp_path / "deep.png", 8, 1), torch.full((1, 8, 8), 100 / 127.5 - 1))
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (images.read_image(tmp_path / "clear.png", 8, 3) == 1).all()
    turned = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 8, axis=1).repeat(4, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = images.read_image(tmp_path / "turned.png", 8, 1)
    assert (upright[0, :4] == 1).all()
    assert (upright[0, 4:] == -1).all()


def test_sheet_places_images_and_labels():
    row = torch.linspace(0, 1, 6).reshape(2, 3, 1, 1, 1).expand(2, 3, 1, 5, 7)
    plain = np.asarray(images.sheet(list(row), enlarge=2, gap=3))
    assert plain.shape == (3 + 2 * 13, 3 + 3 * 17)
    for y in range(2):
        for x in range(3):
            cell = plain[3 + 13 * y : 13 + 13 * y, 3 + 17 * x : 17 + 17 * x]
            assert (cell == round((3 * y + x) * 51)).all()
    colour = torch.tensor([1.0, 0.2, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 5, 7)
    mixed = np.asarray(images.sheet([colour, row[0][:1]], gap=3))
    assert (mixed[3:8, 3:10] == (255, 51, 0)).all()
    assert (mixed[11:16, 3:10] == 0).all()
    assert (mixed[8:11] == 255).all()
    labelled = np.asarray(
        images.sheet(list(row), row_labels=["a", "b"], column_labels=["x", "y", "long label"], title="t")
    )
    assert (labelled[:40] < 128).any()  # ink above the images
    assert labelled.shape[1] > plain.shape[1]
    with pytest.raises(ValueError, match="2 rows of 3 images have 1 row"):
        images.sheet(list(row), row_labels=["a"])
    with pytest.raises(ValueError, match="one size"):
        images.sheet([torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 5, 5)])


def test_to_pil_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"got \(2, 4, 4\)"):
        images.to_pil(torch.zeros(2, 4, 4))


# --- as installed -------------------------------------------------------------------------------------------------


def test_script_runs_as_a_process(tiny, tmp_path):
    script = shutil.which("varkern", path=Path(sys.executable).parent)
    command = [script] if script else [sys.executable, "-m", "varkern"]
    arguments = ["sample", "--checkpoint", str(tiny), "--num", "2", "--seed", "0", "--out", "s.png"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "wrote s.png" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "varkern", "sample", "--class", "99", "--checkpoint", str(tiny)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("varkern: error: --class 99 is not a class")
    assert "Traceback" not in done.stderr
