"""Photographs of any size and shape: the square that is edited, and what is pasted back of it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_run import made_files, pixels
from PIL import Image

import varkern
from varkern import edit, images, photograph
from varkern.sampling import image_seed


def region_of(shape, rows, columns):
    region = np.zeros(shape, bool)
    region[rows, columns] = True
    return region


SQUARES = {
    "all of the model's size": ((32, 32), (slice(3, 5), slice(20, 31)), (0, 0, 32)),
    "all of a small photograph": ((20, 20), (slice(3, 5), slice(10, 12)), (0, 0, 20)),
    "the model's size around a small region": ((100, 300), (slice(50, 52), slice(100, 104)), (35, 86, 32)),
    "twice the region": ((100, 300), (slice(40, 60), slice(100, 140)), (10, 80, 80)),
    "at the border": ((100, 300), (slice(90, 100), slice(280, 300)), (60, 260, 40)),
    "all of a square photograph": ((100, 100), (slice(0, 100), slice(50, 100)), (0, 0, 100)),
    "higher than the photograph": ((100, 300), (slice(0, 100), slice(100, 200)), (-25, 75, 150)),
    "wider than a high one": ((300, 100), (slice(10, 12), slice(0, 90)), (0, -17, 135)),
    "as wide as a wide one": ((100, 300), (slice(50, 100), slice(0, 300)), (-100, 0, 300)),
}


@pytest.mark.parametrize(("shape", "place", "want"), SQUARES.values(), ids=SQUARES.keys())
def test_the_square_around_a_region(shape, place, want):
    region = region_of(shape, *place)
    square = photograph.square_around(region, 32)
    assert square == photograph.Square(*want)
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    cut = square.cut(photo)
    assert cut.shape == (square.side, square.side, 3)
    whole = np.ones(shape)
    np.testing.assert_array_equal(square.put(photo, cut, whole), photo)
    for y, x in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)):
        if square.top <= y < square.top + square.side and square.left <= x < square.left + square.side:
            np.testing.assert_array_equal(cut[y - square.top, x - square.left], photo[y, x])
    assert square.cut(region).sum() >= region.sum()  # it holds all of the region
    changed = square.put(photo, 255 - cut, whole)
    assert (changed[region] == 255 - photo[region]).all()


def test_what_leaves_the_photograph_is_mirrored():
    photo = np.arange(6).reshape(2, 3)
    cut = photograph.Square(-2, 0, 6).cut(photo)
    np.testing.assert_array_equal(cut[:, 0], [3, 0, 0, 3, 3, 0])
    assert cut.shape == (6, 6)


def test_a_seam_fades_within_the_region_alone():
    region = region_of((20, 30), slice(4, 20), slice(5, 25))
    alpha = photograph.faded(region, 3)
    assert (alpha[~region] == 0).all()
    np.testing.assert_allclose(alpha[4:9, 12], [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(alpha[12, 21:26], [1, 0.75, 0.5, 0.25, 0])
    assert (alpha[19, 10:20] == 1).all()  # the edge of the photograph is no seam
    np.testing.assert_array_equal(photograph.faded(region, 0), region)


@pytest.mark.parametrize("seam", [1, 4, photograph.LONGEST_SEAM])
def test_a_seam_counts_the_pixels_to_the_nearest_one_outside(seam):
    region = np.random.default_rng(seam).random((23, 31)) < 0.97
    outside = np.argwhere(~region)
    pixels = np.argwhere(region)
    away = np.abs(pixels[:, None] - outside[None]).max(-1).min(-1)  # rows or columns, whichever are more
    got = photograph.faded(region, seam)
    np.testing.assert_allclose(got[region], np.minimum(away, seam + 1) / (seam + 1), rtol=1e-6)
    assert (got[~region] == 0).all()


def test_a_region_too_long_for_any_square_is_told(run):
    Image.new("L", (1, 30_000)).save("long.png")
    status, _, err = run("edit", "long.png", "--box", "0,0,0.5,1", "--out", "e")
    assert (status, "15000 pixels long in a photograph of 1x30000" in err, err.count("\n")) == (2, True, 1)
    assert run("edit", "long.png", "--box", "0.5,0,0.501,1", "--out", "e.png")[0] == 0
    assert pixels("e.png").shape == (30_000, 1)
    assert not Path("e").exists()


def test_several_photographs_too_large_for_one_picture_are_told(run):
    Image.new("L", (6000, 6000)).save("large.png")
    status, _, err = run("edit", "large.png", "--box", "0,0,0.01,0.01", "--num", 2, "--out", "e.png")
    assert (status, "2 photographs of 6000x6000 are too many pixels for one picture" in err) == (2, True)


@pytest.mark.parametrize("name", ["a b", "a\nb", b"a\xffb"])
def test_photographs_and_masks_of_any_name(run, name):
    name = os.fsdecode(name)
    photo = photo_file(f"{name}.png", 60, 200)
    region = mask_file(f"{name}.mask.png", 60, 200, slice(20, 40), slice(80, 120))
    status, out, err = run("edit", f"{name}.png", "--mask", f"{name}.mask.png", "--seed", 1, "--out", name)
    assert (status, len(out.splitlines())) == (0, 3), err
    np.testing.assert_array_equal(pixels(f"{name}/00000_inpaint.png")[~region], photo[~region])


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inpaint", "outpaint", "class"])
def test_edit_writes_what_the_library_returns(run, tiny, picture, mode):
    image = images.read_image(picture, 32, 1).expand(2, -1, -1, -1)
    images.write_png(images.to_pil((image[0] + 1) / 2), "square.png")
    label = ["--class", "7,none"] if mode == "class" else ["--num", 2]
    arguments = ["--box", "0.5,0,1,0.75", "--mode", mode, "--seed", 3, *label]
    status, out, _ = run("edit", "square.png", *arguments, "--no-paste-back", "--out", "e")
    assert (status, out.splitlines()[0]) == (0, "editing all of square.png, 32x32")
    assert run("edit", "square.png", *arguments, "--out", "p")[0] == 0
    var, box = varkern.load(tiny), (0.5, 0.0, 1.0, 0.75)
    image = images.read_image("square.png", 32, 1).expand(2, -1, -1, -1)
    seeds = [image_seed(3, i) for i in range(2)]
    for folder, paste_back in (("e", False), ("p", True)):
        settings = {"box": box, "seed": seeds, "paste_back": paste_back}
        if mode == "class":
            made = edit.class_edit(var, image, torch.tensor([7, 10]), **settings).images
        else:
            made = getattr(edit, mode)(var, image, **settings).images
        kinds = ["class7", "none"] if mode == "class" else [mode, mode]
        assert list(made_files(folder)) == [f"0000{i}_{kind}.png" for i, kind in enumerate(kinds)]
        for name, image_made in zip(made_files(folder), made, strict=True):
            np.testing.assert_array_equal(pixels(f"{folder}/{name}"), images.to_uint8(image_made)[..., 0])


def photo_file(name, height, width, grey=False):
    y, x = np.mgrid[0:height, 0:width]
    levels = np.stack([x * 3, y * 5, (x + y) * 2], axis=-1).astype(np.uint8)
    levels = levels[..., 0] if grey else levels
    Image.fromarray(levels).save(name)
    return levels


def mask_file(name, height, width, *place):
    levels = np.zeros((height, width), np.uint8)
    levels[place] = 255
    Image.fromarray(levels).save(name)
    return levels > 0


PLACES = {
    "thin": (60, 200, (slice(31, 32), slice(20, 180))),
    "small": (300, 90, (slice(200, 203), slice(5, 8))),
    "corner": (50, 80, (slice(48, 50), slice(78, 80))),
    "high": (60, 200, (slice(0, 60), slice(70, 120))),
    "two": (60, 200, ([5, 50], [10, 190])),
    "nearly all": (60, 60, (slice(1, 60), slice(0, 60))),
}


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("mode", ["inpaint", "outpaint"])
@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES.keys())
def test_photographs_change_in_the_region_alone(run, where, mode, grey):
    height, width, place = where
    photo = photo_file("photo.png", height, width, grey)
    region = mask_file("mask.png", height, width, *place)
    generated = ~region if mode == "outpaint" else region
    status, out, err = run("edit", "photo.png", "--mask", "mask.png", "--mode", mode, "--seed", 1, "--out", "e.png")
    assert status == 0, err
    assert out.startswith("editing ")
    edited = pixels("e.png")
    assert edited.shape == photo.shape
    np.testing.assert_array_equal(edited[~generated], photo[~generated])
    assert (edited[generated].astype(int) - photo[generated] != 0).mean() > 0.5
    assert run("edit", "photo.png", "--mask", "mask.png", "--mode", mode, "--no-paste-back", "--out", "s.png")[0] == 0
    assert pixels("s.png").shape == (32, 32)


def test_a_box_is_in_fractions_of_the_whole_photograph(run):
    photo = photo_file("photo.png", 60, 200)
    status, out, _ = run("edit", "photo.png", "--box", "0.25,0.75,0.75,0.9", "--num", 2, "--seed", 1, "--out", "e")
    assert status == 0
    assert "editing a square of photo.png, 200x60: rows 0 to 59, columns 135 to 194, as 32x32" in out
    for name in made_files("e"):
        changed = (pixels(f"e/{name}") != photo).any(-1)
        assert changed[15:45, 150:180].mean() > 0.9
        changed[15:45, 150:180] = False
        assert not changed.any()
    first, second = (pixels(f"e/{name}") for name in made_files("e"))
    assert not np.array_equal(first, second)


def test_a_thin_box_is_edited_too(run):
    photo = photo_file("photo.png", 60, 200)
    assert run("edit", "photo.png", "--box", "0.5,0,0.52,1", "--seed", 1, "--out", "e.png")[0] == 0
    changed = (pixels("e.png") != photo).any(-1)
    assert changed[30].mean() > 0.9
    changed[30] = False
    assert not changed.any()


def test_a_seam_keeps_what_is_outside(run):
    photo = photo_file("photo.png", 60, 200).astype(int)
    command = ["edit", "photo.png", "--box", "0.2,0.2,0.8,0.5", "--seed", 1]
    run(*command, "--out", "hard.png")
    run(*command, "--seam", 5, "--out", "soft.png")
    hard, soft = pixels("hard.png").astype(int), pixels("soft.png").astype(int)
    inside = region_of((60, 200), slice(12, 48), slice(40, 100))
    np.testing.assert_array_equal(soft[~inside], photo[~inside])
    np.testing.assert_array_equal(soft[20:40, 50:90], hard[20:40, 50:90])
    ring = inside & ~region_of((60, 200), slice(13, 47), slice(41, 99))
    # A sixth of the way, rounded.
    assert np.abs(soft[ring] - (photo[ring] + (hard[ring] - photo[ring]) / 6)).max() <= 0.51


def test_masks_of_other_sizes(run):
    photo = photo_file("photo.png", 60, 200)
    mask_file("half.png", 30, 100, slice(10, 20), slice(40, 60))
    mask_file("double.png", 120, 400, slice(40, 80), slice(160, 240))
    mask_file("same.png", 60, 200, slice(20, 40), slice(80, 120))
    mask_file("square.png", 32, 32, slice(10, 20), slice(10, 20))
    for name in ("half", "double", "same"):
        assert run("edit", "photo.png", "--mask", f"{name}.png", "--seed", 1, "--out", f"e-{name}.png")[0] == 0
    assert (pixels("e-same.png") != photo).any()
    np.testing.assert_array_equal(pixels("e-half.png"), pixels("e-same.png"))
    np.testing.assert_array_equal(pixels("e-double.png"), pixels("e-same.png"))
    status, _, err = run("edit", "photo.png", "--mask", "square.png", "--out", "e.png")
    assert status == 2
    assert "square.png is 32x32 but the photograph 200x60, of another shape" in err
    mask_file("none.png", 60, 200, slice(0, 0), 0)
    status, _, err = run("edit", "photo.png", "--mask", "none.png")
    assert (status, "nothing would be generated of photo.png: the region is none of it" in err) == (2, True)
    mask_file("all.png", 60, 200, slice(None), slice(None))
    status, _, err = run("edit", "photo.png", "--mask", "all.png")
    assert (status, "nothing would be kept of photo.png: the region is all of the photograph" in err) == (2, True)


def test_an_upright_photograph_and_mask_belong_together(run):
    """A camera's file that is turned when shown, with a mask made on what was shown."""
    photo = photo_file("shown.png", 60, 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    Image.fromarray(np.rot90(photo).copy()).save("turned.png", exif=exif)
    region = mask_file("mask.png", 60, 200, slice(20, 40), slice(80, 120))
    assert run("edit", "turned.png", "--mask", "mask.png", "--seed", 1, "--out", "e.png")[0] == 0
    np.testing.assert_array_equal(pixels("e.png")[~region], photo[~region])


def test_edits_go_on_and_other_regions_are_other_runs(run):
    photo_file("photo.png", 60, 200)
    command = ["edit", "photo.png", "--box", "0.2,0.2,0.8,0.5", "--seed", 1, "--out", "e", "--batch-size", 2]
    run(*command, "--num", 3)
    before = made_files("e")
    Path("e/00001_inpaint.png").unlink()
    status, out, _ = run(*command, "--num", 3)
    assert (status, "wrote 1 images" in out, "beside 2 that were there" in out) == (0, True, True)
    assert [name[:5] for name in made_files("e")] == [f"{i:05d}" for i in range(3)]
    assert made_files("e")["00000_inpaint.png"] == before["00000_inpaint.png"]
    assert made_files("e") == before
    for change in (["--box", "0.2,0.2,0.8,0.6"], ["--seam", "2"], ["--no-paste-back"], ["--cfg", "3"]):
        count = len(made_files("e"))
        assert run(*command, *change)[0] == 0
        assert len(made_files("e")) == count + 1
    with Image.open("e/00001_inpaint.png") as image:
        text = json.loads(image.text["varkern"])
    assert (text["command"], text["mode"], text["seed"], text["index"]) == ("edit", "inpaint", 1, 1)
