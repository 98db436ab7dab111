"""The engine against the published order of operations, and what users want around it."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden
from test_models import tiny
from ties import assert_same_draws
from torch.overrides import TorchFunctionMode

import varkern
from varkern.engine import cached, generate_scales
from varkern.engine import generate as generate_function  # noqa: F401
from varkern.modules.blocks import KVCache


@pytest.fixture(scope="module")
def var() -> varkern.VAR:
    return load_golden("d2").var


def same_tokens(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True))


def settings(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def choose(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    return [
        {
            "batch": choose(1, 1, 2, 3),
            "labels": choose(None, -1, 0, 7),
            "seed": int(torch.randint(10000, (), generator=generator)),
            "cfg": choose(0.0, uniform(0.0, 4.0), 1.5),
            "top_k": choose(0, 1, 20, 500),
            "top_p": choose(0.0, 0.5, uniform(0.0, 1.0), 1.0),
            "schedule": choose((1, 2, 3, 4), (1, 2, 4), (1, 3), (2, 3, 5), (1, 2, 3, 4, 5, 6)),
            "l2_norm": choose(False, True),
            "shared_aln": choose(False, True),
        }
        for _ in range(count)
    ]


def test_tokens_of_the_reference_for_a_hundred_settings() -> None:
    models: dict[tuple, varkern.VAR] = {}
    ties = 0
    for s in settings(100):
        key = s.pop("schedule"), s.pop("l2_norm"), s.pop("shared_aln")
        if key not in models:
            torch.manual_seed(len(models))
            vae = varkern.VQVAE(512, 8, 32, v_patch_nums=key[0], ch_mult=(1, 1), num_res_blocks=1)
            sizes = {"depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 10, "patch_nums": key[0]}
            models[key] = varkern.VAR(vae, attn_l2_norm=key[1], shared_aln=key[2], **sizes).eval()
            models[key].init_weights(init_std=0.1, init_head=1.0, init_adaln_gamma=1.0)
        var = models[key]
        got = varkern.generate(var, **s)
        with varkern.use_backend("reference"):
            want = varkern.generate(var, **s)
        run = functools.partial(varkern.generate, **s)
        same = assert_same_draws(run, var, got.tokens, want.tokens, s["top_k"], s["top_p"])
        ties += int((~same).sum())
        torch.testing.assert_close(got.images[same], want.images[same], rtol=0, atol=1e-3)
    assert ties <= 2  # of 175 images


def test_it_is_the_engine_that_generates(var, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = cached.CachedTransformer.__call__
    monkeypatch.setattr(cached.CachedTransformer, "__call__", lambda self, x: (calls.append(x.shape), run(self, x))[1])
    var.autoregressive_infer_cfg(2, 1, g_seed=0, cfg=1.5)
    assert [shape[:2] for shape in calls] == [(4, p * p) for p in var.patch_nums]
    calls.clear()
    var.autoregressive_infer_cfg(2, 1, g_seed=0, cfg=0.0)  # nothing guides: half the rows
    assert [shape[:2] for shape in calls] == [(2, p * p) for p in var.patch_nums]
    with varkern.use_backend("reference"):
        calls.clear()
        var.autoregressive_infer_cfg(2, 1, g_seed=0)
    assert not calls


def test_adaln_projections_run_once_an_image(var) -> None:
    class Projections(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.count += func is F.linear and len(args[1]) == 6 * var.C
            return func(*args, **(kwargs or {}))

    with Projections() as projections:
        varkern.generate(var, 1, 0, 0)
    assert projections.count == len(var.blocks)


def test_guidance_before_the_head_is_guidance_of_the_logits(var) -> None:
    hidden = torch.randn(4, 3, var.C)
    cond, uncond = var.head(hidden.double().float()).chunk(2)
    torch.testing.assert_close(var.head(cached.guided(hidden, 1.3)), 2.3 * cond - 1.3 * uncond, rtol=1e-4, atol=1e-4)
    assert torch.equal(cached.guided(hidden, 0.0), hidden[:2])


def test_a_cache_takes_its_memory_once_and_the_last_step_its_own() -> None:
    cache = KVCache(30, 16)
    first, at = cache.append(torch.zeros(2, 5, 3, 4, 8))
    assert (at, tuple(first.shape), first.dtype) == (0, (2, 2, 4, 14, 8), torch.float32)
    second, at = cache.append(torch.zeros(2, 9, 3, 4, 8))
    assert second is first
    assert at == 5
    first.normal_()
    last, at = cache.append(torch.zeros(2, 16, 3, 4, 8))
    assert (at, tuple(last.shape)) == (14, (2, 2, 4, 30, 8))
    assert torch.equal(last[:, :, :, :14], first)
    assert cache.tensor is None


class TestSeedsOfImages:
    def test_an_image_does_not_depend_on_its_batch(self, var) -> None:
        labels, seeds = torch.tensor([1, 2, 3]), [11, 12, 13]
        together = varkern.generate(var, 3, labels, seeds, top_k=50)
        for i in range(3):
            alone = varkern.generate(var, 1, labels[i : i + 1], [seeds[i]], top_k=50)
            for a, b in zip(alone.tokens, together.tokens, strict=True):
                assert torch.equal(a[0], b[i])
        other = varkern.generate(var, 2, labels[:2], [12, 11], top_k=50)
        assert not same_tokens(other, varkern.generate(var, 2, labels[:2], [11, 12], top_k=50))

    def test_labels_are_drawn_by_image_too(self, var) -> None:
        together = varkern.generate(var, 2, None, [5, 6])
        alone = varkern.generate(var, 1, None, [6])
        assert all(torch.equal(a[0], b[1]) for a, b in zip(alone.tokens, together.tokens, strict=True))

    def test_one_seed_an_image_alone_is_that_seed(self, var) -> None:
        assert same_tokens(varkern.generate(var, 1, 4, 9), varkern.generate(var, 1, 4, [9]))

    @pytest.mark.parametrize("seeds", [[1], [1, 2, 3], [1, 2.0], [1, True]], ids=str)
    def test_bad_seeds(self, var, seeds) -> None:
        with pytest.raises(ValueError, match="one for each of the 2 images"):
            varkern.generate(var, 2, 0, seeds)

    def test_the_reference_has_one_seed(self, var) -> None:
        with (
            varkern.use_backend("reference"),
            pytest.raises(ValueError, match="a seed for each image needs the engine"),
        ):
            varkern.generate(var, 2, 0, [1, 2])


class TestParts:
    @pytest.mark.parametrize("size", [1, 2, 3, 9])
    @pytest.mark.parametrize("seed", [3, [1, 2, 3], None], ids=["seed", "seeds", "global"])
    def test_the_same_tokens(self, var, size: int, seed) -> None:
        torch.manual_seed(0)
        whole = varkern.generate(var, 3, None, seed, top_p=0.9)
        after = torch.get_rng_state()
        torch.manual_seed(0)
        parts = varkern.generate(var, 3, None, seed, top_p=0.9, max_batch=size)
        assert same_tokens(whole, parts)
        torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-4)
        assert torch.equal(torch.get_rng_state(), after)

    def test_editing(self, var) -> None:
        golden = load_golden("d2")
        mask = torch.rand(2, 8, 8).round()
        keep = varkern.engine.Keep(golden.token_maps(), mask)
        whole = varkern.generate(var, 2, 1, 0, keep=keep)
        assert same_tokens(whole, varkern.generate(var, 2, 1, 0, keep=keep, max_batch=1))

    def test_without_memory_for_all_half_are_computed_at_a_time(self, var, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        whole, after = varkern.generate(var, 5, None), torch.get_rng_state()
        sizes, run = [], cached.CachedTransformer.__call__

        def limited(self, x):
            sizes.append(x.shape[0] // 2)
            if x.shape[0] > 4 and x.shape[1] > 4:  # in the middle of a generation
                raise torch.OutOfMemoryError("no memory")
            return run(self, x)

        monkeypatch.setattr(cached.CachedTransformer, "__call__", limited)
        torch.manual_seed(0)
        parts = varkern.generate(var, 5, None)
        assert same_tokens(whole, parts)
        assert torch.equal(torch.get_rng_state(), after)
        assert sorted(set(sizes)) == [1, 2, 3, 5]

    def test_not_even_one(self, var, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*_):
            raise torch.OutOfMemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(cached.CachedTransformer, "__call__", none)
            with pytest.raises(torch.OutOfMemoryError, match="no memory to generate 1 image at a time; the model is"):
                varkern.generate(var, 2, 0, 0)
            with pytest.raises(torch.OutOfMemoryError, match="2 images at a time"):
                varkern.generate(var, 4, 0, 0, max_batch=2)
        assert varkern.generate(var, 1, 0, 0).images.isfinite().all()

    def test_bad_size(self, var) -> None:
        with pytest.raises(ValueError, match="max_batch must be a positive integer, got 0"):
            varkern.generate(var, 2, 0, 0, max_batch=0)


class TestScales:
    def test_the_last_is_the_image(self, var) -> None:
        steps = list(generate_scales(var, 2, 1, 0, top_k=50))
        whole = varkern.generate(var, 2, 1, 0, top_k=50)
        assert [step.scale for step in steps] == list(range(len(var.patch_nums)))
        assert all(torch.equal(step.tokens, t) for step, t in zip(steps, whole.tokens, strict=True))
        assert torch.equal(steps[-1].images, whole.images)
        assert not torch.equal(steps[-2].images, whole.images)
        with varkern.use_backend("reference"):
            eager = list(generate_scales(var, 2, 1, 0, top_k=50))
        for a, b in zip(steps, eager, strict=True):
            torch.testing.assert_close(a.images, b.images, rtol=0, atol=1e-3)

    def test_nothing_leaks_between_steps(self, var) -> None:
        with varkern.use_backend("cpu"):
            steps = generate_scales(var, 1, 1, 0)
        next(steps)
        assert torch.is_grad_enabled()
        assert varkern.current_backend() is None
        steps.close()
        with varkern.use_backend("reference"):
            steps = generate_scales(var, 1, 1, 0)
        next(steps)
        steps.close()
        assert not any(block.attn.caching for block in var.blocks)

    def test_arguments_are_checked_at_the_call(self, var) -> None:
        with pytest.raises(ValueError, match="cfg must be"):
            generate_scales(var, 1, 1, 0, cfg=-1.0)


def test_two_threads_share_a_model(var) -> None:
    want = [varkern.generate(var, 1, i, i, top_k=30) for i in range(4)]
    got: dict[int, varkern.Generation] = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: varkern.generate(var, 1, i, i, top_k=30)})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert same_tokens(got[i], want[i])


@pytest.mark.parametrize("mode", ["inference_mode", "autocast", "bfloat16"])
def test_modes(mode: str) -> None:
    _, model = tiny()
    model.init_weights(init_std=0.1, init_head=1.0)
    if mode == "inference_mode":
        with torch.inference_mode():
            got = varkern.generate(model, 2, 1, 0)
        assert same_tokens(got, varkern.generate(model, 2, 1, 0))
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = varkern.generate(model, 2, 1, 0)
    else:
        got = varkern.generate(model.bfloat16(), 2, 1, 0)
    assert got.images.float().isfinite().all()
