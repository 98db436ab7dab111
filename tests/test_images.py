"""One reader of image files for training, reconstruct and edit."""

import os
import struct

import numpy as np
import pytest
from PIL import Image

from varkern.data.datasets import ImageFolder
from varkern.images import check_image, image_suffixes, open_image, read_image, to_uint8

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)


def pixels(path, channels=1):
    return np.asarray(open_image(path, channels)).astype(int)


def saved(path, array_or_image, **settings):
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    image.save(path, **settings)
    return path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("grey16.png", RAMP.astype(np.uint16) * 257),
        ("big_endian.tif", (RAMP.astype(np.uint16) * 257).astype(">u2")),
        ("int32.tif", RAMP.astype(np.int32) * 257),
        ("unit.tif", RAMP.astype(np.float32) / 255),
        ("bytes.tif", RAMP.astype(np.float32)),
        ("grey.pgm", RAMP),
    ],
)
def test_grey_of_any_depth_keeps_its_scale(name, values, tmp_path):
    assert np.array_equal(pixels(saved(tmp_path / name, values)), RAMP)


def test_floats_that_tell_no_image_are_refused(tmp_path):
    for name, value in (("nan", np.nan), ("inf", np.inf), ("large", 1e4), ("negative", -1.0)):
        values = np.full((4, 4), 0.5, np.float32)
        values[1, 2] = value
        with pytest.raises(ValueError, match=rf"{name}\.tif cannot be read"):
            open_image(saved(tmp_path / f"{name}.tif", values), 1)


def test_transparency_of_every_kind_is_laid_on_white(tmp_path):
    alpha = np.where(RAMP < 128, 0, 255).astype(np.uint8)
    white = np.where(RAMP < 128, 255, RAMP)
    saved(tmp_path / "la.png", Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(alpha)]))
    saved(tmp_path / "rgba.png", Image.merge("RGBA", [Image.fromarray(RAMP)] * 3 + [Image.fromarray(alpha)]))
    saved(tmp_path / "half.tif", Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(alpha)]))
    for name in ("la.png", "rgba.png", "half.tif"):
        assert np.array_equal(pixels(tmp_path / name), white), name
        assert np.array_equal(pixels(tmp_path / name, 3)[..., 1], white), name
    palette = Image.fromarray(RAMP // 128).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    saved(tmp_path / "p.png", palette, transparency=0)
    assert np.array_equal(pixels(tmp_path / "p.png", 3)[0, 0], [255, 255, 255])
    assert np.array_equal(pixels(tmp_path / "p.png", 3)[15, 15], [200, 100, 50])
    saved(tmp_path / "deep.png", RAMP.astype(np.uint16) * 257, transparency=100 * 257)
    assert np.array_equal(pixels(tmp_path / "deep.png"), np.where(RAMP == 100, 255, RAMP))


def test_other_modes(tmp_path):
    bits = RAMP > 127
    assert np.array_equal(pixels(saved(tmp_path / "bit.png", Image.fromarray(bits))), bits * 255)
    ink = Image.fromarray(COLOUR).convert("CMYK")
    assert np.array_equal(pixels(saved(tmp_path / "cmyk.tif", ink), 3), COLOUR)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50)
        assert pixels(tmp_path / name, 3)[0, 0] == pytest.approx([255, 0, 0], abs=3), name


def test_every_orientation_is_turned_upright(tmp_path):
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # undone by these `Image.transpose` methods
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    for orientation, method in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path / f"{orientation}.png", image, exif=exif)
        assert np.array_equal(pixels(path), np.asarray(image.transpose(method))), orientation


@pytest.mark.parametrize("settings", [{}, {"compression": "tiff_lzw"}], ids=["plain", "compressed"])
def test_every_orientation_of_a_tiff_is_turned_upright(settings, tmp_path):
    """Plain TIFFs are mapped into memory where Pillow knows their path."""
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    rng = np.random.default_rng(0)
    for mode, levels in (("L", rng.integers(0, 256, (30, 70))), ("RGB", rng.integers(0, 256, (30, 70, 3)))):
        image = Image.fromarray(levels.astype(np.uint8))
        for orientation, method in turns.items():
            path = saved(tmp_path / f"{mode}{orientation}.tif", image, tiffinfo={274: orientation}, **settings)
            want = image if method is None else image.transpose(method)
            assert np.array_equal(pixels(path, len(mode)), np.asarray(want)), (mode, orientation)


def grey_tiff(path, data, size, bits, photometric, sample_format=1, order="<"):
    """An uncompressed grey TIFF of one strip."""
    width, height = size
    entries = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)]
    short = 0 if order == "<" else 16  # a value stands at the left of its four bytes
    body = b"".join(struct.pack(f"{order}HHII", t, k, 1, v << (short if k == 3 else 0)) for t, k, v in entries)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack(f"{order}H", len(entries)) + body + bytes(4))
    return path


def packed_12_bits(values):
    bits = (values.reshape(-1, 1) >> np.arange(11, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()


def test_12_bit_grey_keeps_its_scale(tmp_path):
    values = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) * 16 + RAMP // 16  # 255 is 4095
    path = grey_tiff(tmp_path / "deep.tif", packed_12_bits(values), (16, 16), 12, photometric=1)
    assert np.array_equal(pixels(path), np.round(values * (255 / 4095)))
    assert pixels(path).max() == 255


@pytest.mark.parametrize(
    ("bits", "kind", "values"),
    [
        (8, 1, RAMP),
        (16, 1, RAMP.astype("<u2") * 257),
        (32, 3, RAMP.astype("<f4") / np.float32(255)),
        (32, 3, RAMP.astype("<f4")),
    ],
    ids=["8", "16", "unit", "float"],
)
def test_grey_whose_zero_is_white(bits, kind, values, tmp_path):
    for photometric, want in ((1, RAMP), (0, 255 - RAMP)):
        path = grey_tiff(tmp_path / f"{photometric}.tif", values.tobytes(), (16, 16), bits, photometric, kind)
        assert np.array_equal(pixels(path), want), photometric


@pytest.mark.parametrize(("bits", "order"), [(12, "<"), (16, ">"), (32, ">"), (10, "<")])
def test_grey_tiffs_that_pillow_does_not_know_are_refused(bits, order, tmp_path):
    path = grey_tiff(tmp_path / "a.tif", bytes(16 * 16 * 4), (16, 16), bits, photometric=0, order=order)
    with pytest.raises(
        ValueError, match=r"a\.tif cannot be read as an image \(of no kind that .*\); convert it to PNG"
    ):
        open_image(path, 1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, that the data are damaged
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_damaged_exif_leaves_the_picture(suffix, tmp_path):
    image = Image.fromarray(np.repeat(RAMP.repeat(2, axis=1)[..., None], 3, axis=2))
    whole = pixels(saved(tmp_path / f"whole{suffix}", image), 3)
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[274] = 1
    exif[0x9286] = "comment"
    good = exif.tobytes()
    for i in range(40):
        bad = bytearray(good)
        for at in rng.integers(6, len(bad), 1 + i % 6):
            bad[at] = rng.integers(0, 256)
        bad = bytes(bad[: len(bad) - (i % 7)])
        path = saved(tmp_path / f"{i}{suffix}", image, exif=bad)
        try:
            with Image.open(path) as opened:
                turned = opened.getexif().get(274, 1) in range(2, 9)
        except Exception:
            turned = False
        if not turned:
            assert np.array_equal(pixels(path, 3), whole), i
        check_image(path)


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_very_long_image(size, tmp_path):
    path = saved(tmp_path / "long.png", Image.new("L", size, 77))
    assert open_image(path, 3).size == size
    assert (to_uint8(read_image(path, 32, 1).add(1).div(2)) == 77).all()


def test_every_suffix_that_this_pillow_reads_is_an_image(tmp_path):
    assert {".jfif", ".avif", ".jpg", ".webp", ".tif", ".jp2"} <= image_suffixes() | {".avif"}
    assert not {".eps", ".pdf", ".h5", ".mpg"} & image_suffixes()
    (tmp_path / "a").mkdir()
    Image.fromarray(COLOUR).save(tmp_path / "a" / "photo.JFIF", format="JPEG")
    assert [path.name for path in ImageFolder(tmp_path, 8).files] == ["photo.JFIF"]


def test_what_is_no_image_is_refused_in_one_sentence(tmp_path, monkeypatch):
    whole = saved(tmp_path / "whole.png", COLOUR).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("cut", "empty", "text", "program", "pipe"):
        with pytest.raises(ValueError, match=rf"{name}\.png cannot be read as an image \(.+\); convert") as caught:
            open_image(tmp_path / f"{name}.png", 3)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=rf"{name}\.png cannot be read"):
            check_image(tmp_path / f"{name}.png")
    with pytest.raises(FileNotFoundError, match="there is no image file"):
        open_image(tmp_path / "missing.png", 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"whole\.png cannot be read as an image \(.*decompression bomb"):
        open_image(tmp_path / "whole.png", 3)


def test_training_reads_as_reconstruction_does(tmp_path):
    """18 x 18 pixels need no resizing for training at 16, so its centre is the file's own."""
    (tmp_path / "a").mkdir()
    alpha = np.full((18, 18, 4), (10, 20, 30, 0), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    ramp = np.arange(18 * 18, dtype=np.uint16).reshape(18, 18) * 200
    saved(tmp_path / "a" / "0.png", ramp)
    saved(tmp_path / "a" / "1.png", alpha)
    saved(tmp_path / "a" / "2.png", (ramp // 256).astype(np.uint8), exif=exif)
    saved(tmp_path / "a" / "3.tif", (ramp / 65535).astype(np.float32))
    data = ImageFolder(tmp_path, 16)
    for i, path in enumerate(data.files):
        assert (data[i][0] == read_image(path, 18, 3)[:, 1:17, 1:17]).all(), path.name
