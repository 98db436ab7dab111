"""Generation and editing: what the arguments mean and which are refused."""

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden

import varkern
from varkern.engine import Keep
from varkern.ops import sampling


@pytest.fixture(scope="module")
def golden():
    return load_golden("d2")


@pytest.fixture(scope="module")
def var(golden) -> varkern.VAR:
    return golden.var


def test_same_seed_same_image_whatever_ran_before(var) -> None:
    a = var.autoregressive_infer_cfg(2, 3, g_seed=5, top_k=50)
    torch.rand(7)
    assert torch.equal(a, var.autoregressive_infer_cfg(2, 3, g_seed=5, top_k=50))
    assert not torch.equal(a, var.autoregressive_infer_cfg(2, 3, g_seed=6, top_k=50))
    assert a.amin() >= 0
    assert a.amax() <= 1


def test_without_a_seed_the_global_generator_draws(var) -> None:
    torch.manual_seed(1)
    a = var.autoregressive_infer_cfg(1, None)
    torch.manual_seed(1)
    assert torch.equal(a, var.autoregressive_infer_cfg(1, None))


def test_labels_in_every_form(var) -> None:
    want = varkern.generate(var, 2, torch.tensor([4, 4]), 0).tokens
    for labels in (4, [4, 4], torch.tensor([4, 4], dtype=torch.int32)):
        assert all(torch.equal(a, b) for a, b in zip(varkern.generate(var, 2, labels, 0).tokens, want, strict=True))
    none = varkern.generate(var, 2, torch.tensor([10, 10]), 0).images
    assert torch.equal(none, varkern.generate(var, 2, -1, 0).images)


def test_caches_are_dropped_even_after_an_error(var, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sample_tokens_reference", fail)
        with varkern.use_backend("reference"), pytest.raises(RuntimeError, match="interrupted"):
            var.autoregressive_infer_cfg(1, 0, g_seed=0)
    assert all(block.attn.cached_k is None and not block.attn.caching for block in var.blocks)
    assert var.autoregressive_infer_cfg(1, 0, g_seed=0).shape == (1, 3, 128, 128)


def test_no_gradient_is_recorded(var) -> None:
    assert not var.autoregressive_infer_cfg(1, 0, g_seed=0).requires_grad


def test_a_multinomial_draw_is_the_argmax_of_p_over_exponential_noise() -> None:
    """The equality that lets another sampler give the same tokens for a seed."""
    logits = torch.randn(3, 50, 200) * 3
    a, b = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    drawn = sampling.sample_tokens_reference(logits, a)
    p = logits.softmax(-1).view(150, 200)
    q = torch.empty_like(p).exponential_(1, generator=b)
    assert torch.equal(drawn, (p / q).argmax(-1).view(3, 50))


def test_filters_against_a_direct_computation() -> None:
    logits = torch.randn(4, 6, 30)
    kept = sampling.filter_logits_reference_(logits.clone(), top_k=5).isfinite()
    assert (kept.sum(-1) == 5).all()
    assert (logits.masked_fill(kept, -torch.inf).amax(-1) <= logits.masked_fill(~kept, torch.inf).amin(-1)).all()
    kept = sampling.filter_logits_reference_(logits.clone(), top_p=0.7).isfinite()
    p = logits.double().softmax(-1)
    for row, keep in zip(p.view(-1, 30), kept.view(-1, 30), strict=True):
        assert row[keep].sum() >= 0.7 - 1e-6  # the kept mass covers top_p ...
        assert row[keep].sum() - row[keep].min() < 0.7 + 1e-6  # ... and without its least code would not
    one = sampling.filter_logits_reference_(logits.clone(), top_p=1e-9).isfinite()
    assert torch.equal(one, F.one_hot(logits.argmax(-1), 30).bool())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"B": 0}, ValueError, "batch size B"),
        ({"B": 2.0}, ValueError, "batch size B"),
        ({"label_B": 11}, ValueError, r"labels must be in \[0, 10\]"),
        ({"label_B": torch.tensor([1, -1])}, ValueError, r"labels must be in \[0, 10\].*-1"),
        ({"label_B": torch.tensor([1])}, ValueError, "B = 2 labels"),
        ({"label_B": torch.tensor([1.0, 2.0])}, TypeError, "integers"),
        ({"label_B": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "on meta but the model is on cpu"),
        ({"cfg": float("nan")}, ValueError, "cfg must be"),
        ({"cfg": -1.0}, ValueError, "cfg must be"),
        ({"top_k": 513}, ValueError, r"top_k must be an integer in .*512\]"),
        ({"cfg": torch.tensor([1.0, -1.0])}, ValueError, "cfg must hold finite numbers"),
        ({"cfg": torch.ones(3)}, ValueError, "cfg must be a number, or one for each of the 2 images"),
        ({"more_smooth": 2}, TypeError, "more_smooth"),
        ({"top_k": 2.5}, ValueError, "top_k"),
        ({"top_p": float("nan")}, ValueError, "top_p"),
    ],
)
def test_bad_arguments_leave_the_generator_alone(var, change, error, match) -> None:
    state, own = torch.get_rng_state(), var.rng.manual_seed(3).get_state()
    with pytest.raises(error, match=match):
        var.autoregressive_infer_cfg(**({"B": 2, "label_B": 1, "g_seed": 0} | change))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(var.rng.get_state(), own)


def test_what_is_off_in_the_published_model_is_off(var) -> None:
    want = varkern.generate(var, 2, 1, 0)
    for off in ({"top_k": -1}, {"top_p": 1.5}, {"top_p": -0.5}, {"top_p": 1.0}, {"more_smooth": 0}):
        got = varkern.generate(var, 2, 1, 0, **off)
        assert all(torch.equal(a, b) for a, b in zip(got.tokens, want.tokens, strict=True)), off
    smooth = varkern.generate(var, 1, 1, 0, more_smooth=1)
    assert torch.equal(smooth.images, varkern.generate(var, 1, 1, 0, more_smooth=True).images)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_guidance_of_each_image(var, backend) -> None:
    with varkern.use_backend(backend):
        together = varkern.generate(var, 2, 1, 0, cfg=torch.tensor([0.5, 4.0]))
        for i, cfg in enumerate((0.5, 4.0)):
            alone = varkern.generate(var, 2, 1, 0, cfg=cfg)
            # Only the guidance differs from row to row; the noise is that of the batch.
            assert all(torch.equal(a[i], b[i]) for a, b in zip(alone.tokens, together.tokens, strict=True))
        shapes = (torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([2.0, 2.0]), torch.full((2, 1, 1), 2.0))
        want = varkern.generate(var, 2, 1, 0, cfg=2)
        for cfg in shapes:
            got = varkern.generate(var, 2, 1, 0, cfg=cfg, max_batch=None if backend else 1)
            assert all(torch.equal(a, b) for a, b in zip(got.tokens, want.tokens, strict=True))


def test_progressive_models_do_not_generate(var, monkeypatch) -> None:
    monkeypatch.setattr(var, "prog_si", 2)
    with pytest.raises(ValueError, match="set it to -1"):
        var.autoregressive_infer_cfg(1, 0)


class TestEditing:
    def test_what_is_kept_is_kept(self, golden) -> None:
        """With everything kept an edit decodes the image's own tokens."""
        edited = varkern.generate(
            golden.var, 2, 10, 0, keep=Keep(golden.vae.img_to_idxBl(golden.image), torch.ones(8, 8))
        )
        own = golden.vae.img_to_reconstructed_img(golden.image, last_one=True).add(1).mul(0.5)
        torch.testing.assert_close(edited.images, own, rtol=0, atol=1e-5)

    def test_outside_and_inside_are_complementary(self, golden) -> None:
        box, mask = (0.0, 0.0, 1.0, 0.5), torch.zeros(8, 8)
        mask[:, :4] = 1
        a = varkern.edit.inpaint(golden.var, golden.image, box=box, seed=0)
        b = varkern.edit.outpaint(golden.var, golden.image, mask=1 - mask, seed=0)
        c = varkern.edit.class_edit(golden.var, golden.image, 10, mask=mask, seed=0)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.images, c.images)
        other = varkern.edit.class_edit(golden.var, golden.image, torch.tensor([3, 7]), box=box, seed=0)
        assert not torch.equal(a.images, other.images)

    def test_masks_of_any_size_and_one_an_image(self, golden) -> None:
        mask = torch.zeros(2, 128, 128)
        mask[:, :, :64] = 1
        a = varkern.edit.inpaint(golden.var, golden.image, mask=mask, seed=0)
        b = varkern.edit.inpaint(golden.var, golden.image, box=(0.0, 0.0, 1.0, 0.5), seed=0)
        assert torch.equal(a.images, b.images)

    def test_the_first_scales_follow_the_image(self, golden) -> None:
        keep = Keep(golden.token_maps(), torch.zeros(8, 8))
        codebook = golden.vae.quantize.embedding.weight
        h = torch.randn(2, 32, 1, 1)
        assert torch.equal(
            keep.embeddings(0, h, golden.vae.quantize.embedding)[:, :, 0, 0], codebook[golden.token_maps()[0][:, 0]]
        )
        h = torch.randn(2, 32, 2, 2)
        assert torch.equal(keep.embeddings(1, h, golden.vae.quantize.embedding), h)

    @pytest.mark.parametrize(
        ("region", "match"),
        [
            ({}, "by either box"),
            ({"box": (0, 0, 1, 1), "mask": torch.zeros(8, 8)}, "by either box"),
            ({"box": (0.5, 0.0, 0.2, 1.0)}, "0 <= top < bottom <= 1"),
            ({"box": (0.0, 0.0, 1.5, 1.0)}, "0 <= top < bottom <= 1"),
            ({"mask": torch.zeros(8, 8)}, "nothing to generate"),
            ({"mask": torch.ones(9, 9)}, "nothing to keep"),
            ({"mask": torch.full((8, 8), 2.0)}, r"in \[0, 1\]"),
            ({"mask": torch.zeros(8)}, r"\(H, W\)"),
            ({"mask": torch.eye(8).repeat(3, 1, 1)}, "3 regions for 2 images"),
        ],
    )
    def test_bad_regions(self, golden, region, match) -> None:
        with pytest.raises(ValueError, match=match):
            varkern.edit.inpaint(golden.var, golden.image, **region)

    def test_bad_images(self, golden) -> None:
        with pytest.raises(ValueError, match=r"images must be in \[-1, 1\]"):
            varkern.edit.inpaint(golden.var, golden.image * 3, box=(0, 0, 1, 0.5))
        with pytest.raises(ValueError, match=r"images must be \(B, 3, 128, 128\)"):
            varkern.edit.inpaint(golden.var, golden.image[..., :64], box=(0, 0, 1, 0.5))
