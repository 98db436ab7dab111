"""Metrics against closed forms, and the bundled model against its bars."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import save_tiny

from varkern.assets import bundled_model
from varkern.data.config import DataConfig
from varkern.data.datasets import load_split
from varkern.eval import EvaluateConfig, evaluate, frechet_distance, gaussian_of, psnr
from varkern.eval.digits import DigitMeasures
from varkern.eval.evaluate import generate, stacked
from varkern.eval.metrics import nearest_distances
from varkern.models import VARHF

evaluation = importlib.import_module("varkern.eval.evaluate")  # a function of that name is in its place


def test_psnr_of_a_constant_error():
    target = torch.zeros(2, 1, 4, 4)
    output = target + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(output, target), torch.tensor([20.0, 40.0]), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(output, target[:1])


def test_frechet_distance_of_commuting_gaussians():
    """Covariances with common axes: |m1 - m2|^2 + sum (s1 - s2)^2 of the standard deviations."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    s1, s2 = rng.uniform(0.1, 2, 5), rng.uniform(0.1, 2, 5)
    m1, m2 = rng.normal(size=5), rng.normal(size=5)
    distance = frechet_distance(m1, axes @ np.diag(s1**2) @ axes.T, m2, axes @ np.diag(s2**2) @ axes.T)
    assert distance == pytest.approx(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum(), rel=1e-9)


def test_frechet_distance_of_general_gaussians():
    """In two dimensions tr (C1 C2)^(1/2) = (tr(C1 C2) + 2 (det C1 det C2)^(1/2))^(1/2)."""
    rng = np.random.default_rng(1)
    a, b = (x @ x.T for x in rng.normal(size=(2, 2, 2)))
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    zero = np.zeros(2)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-9)
    assert frechet_distance(zero, a, zero, a) == pytest.approx(0, abs=1e-9)
    singular = np.diag([1.0, 0.0])
    assert frechet_distance(zero, singular, zero, np.zeros((2, 2))) == pytest.approx(1)


def test_gaussian_of_samples():
    rows = np.random.default_rng(2).normal(size=(20000, 3)) * [1, 2, 3] + [4, 5, 6]
    mean, cov = gaussian_of(rows)
    np.testing.assert_allclose(mean, [4, 5, 6], atol=0.1)
    np.testing.assert_allclose(cov, np.diag([1, 4, 9]), atol=0.3)
    with pytest.raises(ValueError, match="two feature rows"):
        gaussian_of(rows[:1])


def test_nearest_distances():
    images, references = np.array([[0.0, 0.0], [5.0, 5.0]]), np.array([[3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_allclose(nearest_distances(images, references), [5.0, 1.0])


@pytest.fixture(scope="module")
def digits():
    train, held_out = load_split(DataConfig(data="digits", image_size=32, channels=1))
    return DigitMeasures(stacked(train), train.labels, stacked(held_out), held_out.labels)


def test_measures_tell_real_digits_from_bad_ones(digits):
    """Unseen real digits pass; noisy, wrongly labelled and copied ones are each found out by their own measure."""
    n = 300
    real, labels = digits.held_out[:n], digits.held_out_labels[:n]
    noisy = (real + torch.randn(real.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    # Neighbouring scans come from one writer: only a random part is a sample of the whole.
    drawn = np.random.default_rng(0).permutation(len(digits.train))[:n]
    copies = digits.train[drawn]
    assert digits.accuracy(real, labels) > 97
    assert digits.accuracy(real, np.roll(labels, 1)) < 40
    assert digits.measure(noisy, labels)["frechet_pca_ratio"] > 5
    copied = digits.measure(copies, digits.train_labels[drawn])
    assert copied["copies"] == 100
    assert copied["frechet_pca_ratio"] < 1.5
    assert digits.measure(real, labels)["copies"] < 3
    with pytest.raises(ValueError, match="at most"):
        digits.measure(digits.train.repeat(2, 1, 1, 1), np.tile(digits.train_labels, 2))


@pytest.fixture(scope="module")
def bundled():
    return VARHF.from_pretrained(str(bundled_model())).eval()


def test_bundled_model_reconstructs_unseen_digits(bundled, digits):
    vae = bundled.vae_proxy[0]
    tokens = vae.img_to_idxBl(digits.held_out[:150])
    images = vae.idxBl_to_img(tokens, same_shape=True, last_one=True)
    assert psnr(images, digits.held_out[:150]).mean() >= 28


def test_bundled_model_draws_the_digit_asked_for(bundled, digits):
    settings = json.loads((bundled_model() / "metrics.json").read_text())["generation"]
    labels = np.arange(100) % 10
    drawn = generate(bundled, labels, **{k: settings[k] for k in ("cfg", "top_k", "top_p")}, seed=123)
    assert drawn.shape == (100, 1, 32, 32)
    assert digits.accuracy(drawn, labels) >= 95
    assert len(np.unique(drawn.numpy().round(2), axis=0)) == 100  # a hundred different images


@pytest.mark.slow
def test_bundled_metrics_are_those_of_the_bundled_weights(bundled):
    recorded = json.loads((bundled_model() / "metrics.json").read_text())
    result = evaluate(EvaluateConfig(model=str(bundled_model()), data="digits", image_size=32, channels=1))
    assert result["images"] == recorded["images"]
    assert result["tokenizer"]["psnr"] == pytest.approx(recorded["tokenizer"]["psnr"], abs=0.02)
    assert result["tokenizer"]["usage"] == pytest.approx(recorded["tokenizer"]["usage"], abs=1)
    assert result["transformer"]["Lm"] == pytest.approx(recorded["transformer"]["Lm"], rel=2e-3)


def test_evaluate_refuses_what_does_not_fit():
    model = str(bundled_model())
    with pytest.raises(ValueError, match="makes 32 pixels"):
        evaluate(EvaluateConfig(model=model, data="digits", image_size=64, channels=1))
    with pytest.raises(ValueError, match="the model has 1"):
        evaluate(EvaluateConfig(model=model, data="digits", image_size=32, channels=3))
    with pytest.raises(ValueError, match="'held_out' or 'train'"):
        evaluate(EvaluateConfig(model=model, data="digits", image_size=32, channels=1, part="test"))
    with pytest.raises(ValueError, match="'digits' only"):
        evaluate(EvaluateConfig(model=model, data="folder", image_size=32, channels=1, generate=True))


@pytest.fixture
def named(tmp_path, monkeypatch):
    """A model of ten classes with names, and a folder with images of all of them."""
    save_tiny(tmp_path / "model")
    names = [f"kind {i}" for i in range(10)]
    (tmp_path / "model" / "classes.json").write_text(json.dumps(names))
    rng = np.random.default_rng(0)
    for name in names:
        (tmp_path / "all" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (36, 36), dtype=np.uint8)).save(tmp_path / "all" / name / f"{i}.png")
    return tmp_path


def measured(folder, data, monkeypatch):
    """The result, and the parts that were measured."""
    seen, encode = [], evaluation.encode_all

    def watched(vae, part, *arguments, **settings):
        seen.append(part)
        return encode(vae, part, *arguments, **settings)

    monkeypatch.setattr(evaluation, "encode_all", watched)
    settings = {"image_size": 32, "channels": 1, "device": "cpu", "batch_size": 8}
    result = evaluate(EvaluateConfig(model=str(folder / "model"), data=str(folder / data), **settings))
    monkeypatch.setattr(evaluation, "encode_all", encode)
    part = seen[0]
    files = [
        (part.whole.files[i].relative_to(folder / data).as_posix(), int(part.whole.labels[i])) for i in part.indices
    ]
    return result, files


def test_some_of_the_classes_are_measured_as_the_model_numbers_them(named, monkeypatch):
    _, everything = measured(named, "all", monkeypatch)
    for name in ("kind 9", "kind 2", "kind 5"):
        shutil.copytree(named / "all" / name, named / "some" / name)
    result, files = measured(named, "some", monkeypatch)
    assert (result["images"], result["classes"]) == (6, 3)
    assert {label for _, label in files} == {2, 5, 9}
    assert files == [(file, label) for file, label in everything if label in (2, 5, 9)]  # the same are held out


def test_classes_that_the_model_does_not_have_are_told(named, monkeypatch):
    (named / "all" / "kind 3").rename(named / "all" / "dog")
    with pytest.raises(ValueError, match=r"not trained on the classes dog of \S*all, but on kind 0, .*; give a folder"):
        measured(named, "all", monkeypatch)
    shutil.rmtree(named / "all" / "dog")
    (named / "model" / "classes.json").unlink()
    with pytest.raises(ValueError, match=r"has 9 classes, not 10 as the model; to measure on some .*classes\.json"):
        measured(named, "all", monkeypatch)


def test_an_unwritable_result_is_refused_before_the_model_is_read(named, monkeypatch):
    monkeypatch.setattr(evaluation, "load", lambda *arguments: pytest.fail("it was read"))
    settings = {"model": str(named / "model"), "data": str(named / "all"), "image_size": 32, "channels": 1}
    with pytest.raises(ValueError, match="a folder; name a file"):
        evaluate(EvaluateConfig(**settings, out=str(named)))
    with pytest.raises(OSError, match=r"classes\.json is a file; choose another folder"):
        evaluate(EvaluateConfig(**settings, out=str(named / "model" / "classes.json" / "r.json")))
