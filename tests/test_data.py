"""Data sets: determinism, split, crops, and errors that name the file."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from varkern.data.config import DataConfig
from varkern.data.datasets import Digits, ImageFolder, batches, epoch_order, load_split, stratified_split


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("cats", 6), ("dogs", 9)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_folder_classes_labels_and_range(folder):
    data = ImageFolder(folder, 16)
    assert data.classes == ["cats", "dogs"]
    assert data.labels.tolist() == [0] * 6 + [1] * 9
    image, label = data[7]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert -1 <= image.min() < image.max() <= 1
    assert label == 1
    assert ImageFolder(folder, 16, channels=1)[0][0].shape == (1, 16, 16)


def test_folder_resizes_short_side_then_crops_the_centre(folder):
    path = folder / "cats" / "0.png"
    size = 16
    with Image.open(path) as image:
        width, height = image.size
        scale = 18 / min(width, height)  # 1.125 x 16
        resized = image.resize((round(width * scale), 18), Image.Resampling.LANCZOS)
    left = (resized.size[0] - size + 1) // 2
    window = resized.crop((left, 1, left + size, 1 + size))
    expected = torch.from_numpy(np.array(window)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(ImageFolder(folder, size)[0][0], expected, rtol=0, atol=1e-6)


def test_augmentation_is_a_function_of_seed_epoch_and_index(folder):
    def crops(seed, epoch, touch=0):
        data = ImageFolder(folder, 16, seed=seed, augment=True, flip=True)
        torch.manual_seed(touch)  # the global generator must not matter
        data.set_epoch(epoch)
        return torch.stack([data[i][0] for i in range(len(data))])

    assert torch.equal(crops(1, 2), crops(1, 2, touch=9))
    assert not torch.equal(crops(1, 2), crops(1, 3))
    assert not torch.equal(crops(1, 2), crops(2, 2))


def test_flip_mirrors_some_images_and_leaves_the_rest(folder):
    plain, flipped = ImageFolder(folder, 16), ImageFolder(folder, 16, flip=True)
    mirrored = [torch.equal(flipped[i][0], plain[i][0].flip(2)) for i in range(len(plain))]
    same = [torch.equal(flipped[i][0], plain[i][0]) for i in range(len(plain))]
    assert any(mirrored)
    assert any(same)
    assert all(m or s for m, s in zip(mirrored, same, strict=True))


def test_workers_give_the_same_batches(folder):
    data = ImageFolder(folder, 16, seed=3, augment=True)
    data.set_epoch(4)
    order = epoch_order(len(data), 3, 4)
    alone = list(batches(data, order, 4))
    shared = list(batches(data, order, 4, workers=2))
    assert [len(labels) for _, labels in alone] == [4, 4, 4, 3]
    for (a, x), (b, y) in zip(alone, shared, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    tail = list(batches(data, order, 4, start=2, drop_last=True))
    assert len(tail) == 1
    assert torch.equal(tail[0][0], alone[2][0])


def test_batches_leave_the_global_generator_alone(folder):
    data = ImageFolder(folder, 16)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(batches(data, range(5), 2))
    assert torch.equal(before, torch.get_rng_state())


def test_corrupt_image_is_named(folder):
    (folder / "dogs" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"dogs/0\.png cannot be read as an image"):
        ImageFolder(folder, 16)[6]


def test_truncated_image_is_named(folder):
    path = folder / "dogs" / "0.png"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"dogs/0\.png cannot be read as an image"):
        ImageFolder(folder, 16)[6]


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere", 16)
    with pytest.raises(ValueError, match="no class sub-folders"):
        ImageFolder(tmp_path, 16)
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match="hold no images"):
        ImageFolder(tmp_path, 16)


def test_split_is_disjoint_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [30, 60, 9])
    train, held = stratified_split(labels, 1 / 3, seed=0)
    assert not set(train) & set(held)
    assert sorted([*train, *held]) == list(range(99))
    assert np.bincount(labels[held]).tolist() == [10, 20, 3]
    again = stratified_split(labels, 1 / 3, seed=0)
    assert np.array_equal(train, again[0])
    assert not np.array_equal(held, stratified_split(labels, 1 / 3, seed=1)[1])


def test_digits_are_the_real_scans():
    digits = Digits(8)
    assert len(digits) == 1797
    assert digits.images.shape == (1797, 1, 8, 8)
    from sklearn.datasets import load_digits

    scans = torch.from_numpy(load_digits().images).float() / 8 - 1
    torch.testing.assert_close(digits.images[:, 0], scans, rtol=0, atol=1 / 127.5)
    large = Digits(32, channels=3)[5][0]
    assert large.shape == (3, 32, 32)
    pooled = torch.nn.functional.adaptive_avg_pool2d(large[:1], 8)[0]
    assert (pooled - scans[5]).square().mean() < 0.1


def test_digits_split_is_the_same_for_both_stages():
    """Tokenizer and transformer may use other training seeds; the held-out digits must stay held out."""
    config = DataConfig(data="digits", image_size=8, channels=1, augment=True)
    train_a, held_a = load_split(config, seed=1)
    train_b, held_b = load_split(config, seed=2)
    assert np.array_equal(held_a.indices, held_b.indices)
    assert np.array_equal(train_a.indices, train_b.indices)
    assert not set(train_a.indices) & set(held_a.indices)
    assert 590 <= len(held_a) <= 605
    assert torch.equal(held_a[0][0], held_b[0][0])


def test_digits_augmentation_moves_ink_without_losing_it():
    plain, moved = Digits(32), Digits(32, augment=True, seed=1)
    same = [torch.equal(plain[i][0], moved[i][0]) for i in range(40)]
    assert not all(same)
    change = [abs((plain[i][0] + 1).sum() - (moved[i][0] + 1).sum()) / (plain[i][0] + 1).sum() for i in range(40)]
    assert np.mean(change) < 0.1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("channels", 2, "use 1"),
        ("held_out", 1.0, "below 1"),
        ("image_size", 0, "positive"),
        ("workers", -1, "negative"),
    ],
)
def test_bad_settings_are_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        load_split(DataConfig(data="digits", **{field: value}))


# ---- what a folder holds -----------------------------------------------------------------------------------------
def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((18, 18, 3), 90, np.uint8)).save(path, format="PNG")


def test_classes_are_numbered_in_natural_order(tmp_path):
    for name in ("10", "2", "1", "b11", "b9"):
        picture(tmp_path / name / "0.png")
    data = ImageFolder(tmp_path, 16)
    assert data.classes == ["1", "2", "10", "b9", "b11"]
    assert [path.parent.name for path in data.files] == data.classes
    assert "0 1, 1 2, 2 10" in load_split(DataConfig(data=str(tmp_path), image_size=16))[0].describe()


def test_hidden_broken_and_foreign_entries_are_no_images(tmp_path):
    for name in ("cat/0.png", "cat/deep.png/1.png", ".git/0.png", "__MACOSX/0.png", "cat/._0.png", "cat/.x/2.png"):
        picture(tmp_path / name)
    picture(tmp_path / "cat/.ipynb_checkpoints/0.png")
    (tmp_path / "cat/gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "cat/loop").symlink_to(tmp_path / "cat")
    os.mkfifo(tmp_path / "cat/pipe.png")
    (tmp_path / "cat/notes.txt").touch()
    (tmp_path / "empty").mkdir()
    data = ImageFolder(tmp_path, 16)
    assert data.classes == ["cat"]
    assert [path.relative_to(tmp_path).as_posix() for path in data.files] == ["cat/0.png", "cat/deep.png/1.png"]
    notes = "\n".join(data.notes)
    for words in (
        "1 class folders without images are no classes: empty",
        "1 broken links",
        "1 pipes",
        "1 of type .txt",
    ):
        assert words in notes, words


@pytest.mark.parametrize("above", ["", "CLS-LOC"])
def test_the_parts_of_a_data_set_are_no_classes(above, tmp_path):
    for name in ("train/n01/0.png", "train/n02/0.png", "val/0.png"):
        picture(tmp_path / above / name)
    with pytest.raises(ValueError, match=r"parts train, val of a data set, not classes; give .*train$"):
        ImageFolder(tmp_path, 16)
    assert ImageFolder(tmp_path / above / "train", 16).classes == ["n01", "n02"]


def test_bad_files_are_listed_before_training_or_left_out(folder):
    for i in range(6):
        (folder / "dogs" / f"{i}.png").write_bytes(b"junk")
    settings = {"data": str(folder), "image_size": 16}
    with pytest.raises(ValueError, match=r"^6 image files are bad: .*dogs/0\.png .* and 1 more; repair") as caught:
        load_split(DataConfig(**settings))
    assert "\n" not in str(caught.value)
    train, held_out = load_split(DataConfig(**settings, on_bad_image="skip"))
    assert len(train) + len(held_out) == 9
    assert len(train.whole.skipped) == 6
    assert np.bincount(train.whole.labels).tolist() == [6, 3]
    assert "6 bad image files are left out" in train.describe()
    for path in (folder / "cats").iterdir():
        path.write_bytes(b"junk")
    train, _ = load_split(DataConfig(**settings, on_bad_image="skip"))
    assert train.classes == ["dogs"]
    assert set(train.whole.labels) == {0}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".gif", ".bmp"])
def test_a_truncated_file_is_found_before_training(suffix, folder):
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = folder / "dogs" / f"x{suffix}"
    Image.fromarray(pixels).save(path)
    load_split(DataConfig(data=str(folder), image_size=16))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])  # the header is whole
    with pytest.raises(ValueError, match=rf"1 image file is bad: \S*x\{suffix} cannot be read"):
        load_split(DataConfig(data=str(folder), image_size=16))


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (3, 20_000)])
@pytest.mark.parametrize("augment", [False, True])
def test_a_very_long_image_is_not_enlarged_to_gigabytes(size, augment, tmp_path, monkeypatch):
    resize = Image.Image.resize

    def watched(image, size, *arguments):
        assert max(size) <= 16 * min(size)
        return resize(image, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", watched)
    (tmp_path / "a").mkdir()
    levels = np.linspace(0, 255, max(size)).astype(np.uint8)
    levels = np.broadcast_to(levels if size[0] > size[1] else levels[:, None], size[::-1])
    Image.fromarray(levels.copy()).save(tmp_path / "a" / "0.png")
    data = ImageFolder(tmp_path, 16, 1, augment=augment)
    means = []
    for epoch in range(5):
        data.set_epoch(epoch)
        image = data[0][0]
        assert image.shape == (1, 16, 16)
        assert image.std() < 0.05  # sixteen rows of a hundred thousand
        means.append(float(image.mean()))
    assert np.std(means) > 0.1 if augment else np.allclose(means, 0, atol=0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_later_is_one_sentence(workers, folder):
    data = ImageFolder(folder, 16)
    path = folder / "dogs" / "0.png"
    torch.ones(512, 512) @ torch.ones(512, 512)  # a parallel region: forked workers must not wait for its threads
    data.check("error")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"^\S*dogs/0\.png cannot be read as an image") as caught:
        list(batches(data, range(len(data)), 4, workers=workers))
    assert "\n" not in str(caught.value)


def test_workers_have_one_thread(folder):
    class Threads(ImageFolder):
        def __getitem__(self, index):
            return torch.tensor(torch.get_num_threads()), 0

    torch.ones(512, 512) @ torch.ones(512, 512)
    for threads, _ in batches(Threads(folder, 16), range(15), 4, workers=2):
        assert (threads == 1).all()


def test_digest_tells_other_data(folder):
    before = ImageFolder(folder, 16).digest()
    assert ImageFolder(folder, 32).digest() == before
    (folder / "cats" / "0.png").rename(folder / "dogs" / "x.png")
    assert ImageFolder(folder, 16).digest() != before


def test_class_names_that_are_not_utf8_are_saved_and_read(tmp_path):
    from varkern.eval.evaluate import class_names
    from varkern.train.run import Run

    names = [os.fsdecode(b"\xff\xfe"), "a\nb", "\u00e9"]
    for name in names:
        picture(tmp_path / "data" / name / "0.png")
    data = ImageFolder(tmp_path / "data", 16)
    assert set(data.classes) == set(names)
    run = object.__new__(Run)
    run.folder = tmp_path
    run.write_classes(data.classes)
    assert class_names(tmp_path) == data.classes
    assert "\u00e9" in (tmp_path / "classes.json").read_text(encoding="utf-8")
