"""Bad calls of all that a generation touches: each raises a useful sentence, none crashes, and the next call is right.

``bad_values.py`` spoils arguments, ``bad_calls.py`` has the calls, ``bad_calls_run.py`` judges what comes of them.
"""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_calls import direct_ops, public_ops, tiny_model
from golden import load_golden

import varkern
from varkern import ops
from varkern.engine import cached
from varkern.ops._op import Op, library
from varkern.ops.quantize.reference import Phi

CALLS, SHARDS = 10_000, 4


@pytest.mark.parametrize("shard", range(SHARDS))
def test_bad_calls(shard: int, tmp_path: Path) -> None:
    """In a process of its own: a call that ends it is the last line of the journal."""
    journal = tmp_path / "journal"
    script = str(Path(__file__).with_name("bad_calls_run.py"))
    command = [sys.executable, script, *map(str, (shard, SHARDS, CALLS)), str(journal)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    lines = journal.read_text().splitlines() if journal.exists() else []
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-4000:]}\nlast call: {lines[-1:]}"
    assert len(lines) == CALLS // SHARDS


def test_every_op_is_called() -> None:
    """Each registered op through its function and, with all operators of the library, directly."""
    rng = random.Random(0)
    public = {make().name for make in public_ops(rng)}
    direct = {make().name.removeprefix("torch.ops.") for make in direct_ops(rng, None)}
    assert set(Op.registry) <= public
    operators = {name.split("::")[1].split(".")[0] for name in library._op_defs}
    assert operators == direct
    assert set(Op.registry) <= direct


@pytest.fixture(scope="module")
def var() -> varkern.VAR:
    return tiny_model()


@pytest.fixture(params=[None, "cpu", "reference"])
def backend(request: pytest.FixtureRequest):
    with varkern.use_backend(request.param):
        yield request.param


@pytest.mark.usefixtures("backend")
class TestNaN:
    """NaN and infinities are passed on to what they are part of, and to nothing else, where no value is promised."""

    def test_layer_norm(self) -> None:
        x, zero = torch.randn(2, 3, 37), torch.zeros(2, 1, 37)
        x[1, 2, 36], x[0, 0, 0] = torch.nan, torch.inf
        nan = ops.modulated_layer_norm(x, zero, zero).isnan()
        assert nan.all(-1).tolist() == [[True, False, False], [False, False, True]]
        assert nan.any(-1).equal(nan.all(-1))

    @pytest.mark.parametrize("part", [0, 1, 2], ids="qkv")
    @pytest.mark.parametrize("cached_", [False, True], ids=["block-causal", "cached"])
    def test_attention(self, part: int, cached_: bool, backend: str | None) -> None:
        if backend == "reference":
            pytest.skip("a row of NaN scores is a row of zeros to PyTorch's own attention on the CPU")
        qkv = torch.randn(1, 5, 3, 2, 8)
        qkv[0, 0, part, 1, 3] = torch.nan  # the first token of the second head
        if cached_:
            out = ops.cached_attention(qkv, torch.zeros(2, 1, 2, 5, 8), 0, None, None, None, 0.3)
        else:
            out = ops.block_causal_attention_qkv(qkv, None, None, None, [1, 4], 0.3)
        assert out[0, :, 0].isfinite().all()
        if part == 0:
            assert out[0, 1:, 1].isfinite().all()
        lost = out[0, :1, 1] if part == 0 else out[0, :, 1, 3] if part == 2 else out[0, :, 1]
        assert lost.isnan().all()

    def test_quantizer(self) -> None:
        phi, codebook = Phi(torch.randn(4, 4, 3, 3), torch.randn(4), 0.5), torch.randn(7, 4)
        features = torch.randn(2, 4, 4, 4)
        features[0, :, 1, 1] = torch.nan
        sizes = [(1, 1), (2, 2), (4, 4)]
        indices, _ = ops.residual_quantize(features, codebook, [phi] * 3, sizes)
        want, _ = ops.residual_quantize(features[1:], codebook, [phi] * 3, sizes)
        assert all(((i >= 0) & (i < 7)).all() for i in indices)
        assert all(torch.equal(a[1:], b) for a, b in zip(indices, want, strict=True))
        codebook[3] = torch.nan
        f_hat = ops.residual_dequantize(torch.full((1, 21), 3), codebook, [phi] * 3, sizes, (4, 4))[-1]
        assert f_hat.isnan().all()
        codes = torch.full((1, 4, 2, 2), torch.nan)
        f_hat, following = ops.next_scale_input(torch.zeros(1, 4, 4, 4), codes, phi, (3, 3))
        assert f_hat.isnan().all()
        assert following.isnan().all()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_logits(self, value: float) -> None:
        logits = torch.randn(2, 3, 11)
        logits[1, 2, 7] = value
        with pytest.raises(RuntimeError, match="logits of batch row 1, position 2 have no distribution"):
            ops.sample_tokens(logits, None, None, 5, 0.9)
        kept = ops.filter_logits(logits, None, 5, 0.9)
        want = ops.filter_logits(logits[:1], None, 5, 0.9)
        assert torch.equal(kept[:1], want)
        assert not kept[1, 2].isfinite().all()

    def test_weights(self) -> None:
        """A model that overflows says so instead of giving a picture."""
        var = tiny_model()
        with torch.no_grad():
            var.head.bias[3] = torch.nan
        with pytest.raises(RuntimeError, match=r"NaN|inf"):
            varkern.generate(var, 1, 0, 0)


def test_no_rows(backend: str | None) -> None:
    """A batch of zero is none to generate, and no error below."""
    empty = torch.empty(0, 3, 8)
    assert ops.modulated_layer_norm(empty, torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 3, 8)
    assert ops.sample_tokens(torch.empty(0, 3, 8)).shape == (0, 3)
    assert ops.filter_logits(torch.empty(0, 3, 8), None, 2, 0.5).shape == (0, 3, 8)
    qkv, cache = torch.empty(0, 3, 3, 2, 8), torch.empty(2, 0, 2, 7, 8)
    assert ops.cached_attention(qkv, cache, 2, None, None, None, 0.3).shape == (0, 3, 2, 8)
    assert ops.block_causal_attention_qkv(qkv, None, None, None, [1, 2], 0.3).shape == (0, 3, 2, 8)
    with pytest.raises(ValueError, match="batch size B must be a positive integer"):
        varkern.generate(tiny_model(), 0, None)


def same(a: varkern.Generation, b: varkern.Generation) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True)) and torch.equal(a.images, b.images)


def test_threads_are_not_disturbed_by_bad_calls_or_streams(var: varkern.VAR) -> None:
    """Two threads generate with one model while one makes bad calls and one streams."""
    rounds = 25
    want = [varkern.generate(var, 2, i % 4, i, top_k=5) for i in range(rounds)]
    wrong: list[str] = []
    start = threading.Barrier(4)

    def good(first: int) -> None:
        for i in range(first, rounds, 2):
            if not same(varkern.generate(var, 2, i % 4, i, top_k=5), want[i]):
                wrong.append(f"generate {i}")

    def bad() -> None:
        poisoned = torch.full((1, 2, var.V), torch.nan)
        for i in range(rounds):
            calls: list[Callable[[], object]] = [
                lambda i=i: varkern.generate(var, 2, 5 + i, i),
                lambda: varkern.generate(var, 1, 0, 0, cfg=float("nan")),
                lambda: ops.sample_tokens(poisoned),
                lambda: var.get_logits(torch.zeros(1, 1, 3), torch.zeros(1, var.C)),
                lambda: var.blocks[0](torch.zeros(1, 1, var.C), torch.zeros(2, var.C), None),
            ]
            for number, call in enumerate(calls):
                try:
                    call()
                except (ValueError, RuntimeError):
                    continue
                wrong.append(f"bad call {number} returned")

    def stream() -> None:
        for i in range(rounds):
            with varkern.use_backend("cpu"):
                steps = varkern.generate_scales(var, 2, i % 4, i, top_k=5)
            if i % 2:
                next(steps)
                steps.close()  # type: ignore[attr-defined]
                continue
            last = list(steps)[-1]
            if not torch.equal(last.tokens, want[i].tokens[-1]):
                wrong.append(f"scales {i}")

    def guarded(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            wrong.append(repr(error))

    jobs = (lambda: good(0), lambda: good(1), bad, stream)
    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert varkern.current_backend() is None
    assert torch.is_grad_enabled()


class TestMemory:
    @staticmethod
    def _limit(var: varkern.VAR, monkeypatch: pytest.MonkeyPatch, images: int) -> list[int]:
        """The decoder has no memory for more than some images."""
        vae, sizes = var.vae_proxy[0], []
        decode = vae.decoder.forward

        def limited(z: torch.Tensor) -> torch.Tensor:
            sizes.append(z.shape[0])
            if z.shape[0] > images:
                raise torch.OutOfMemoryError("no memory")
            return decode(z)

        monkeypatch.setattr(vae.decoder, "forward", limited)
        return sizes

    @pytest.mark.parametrize("seed", [5, None], ids=["seed", "global"])
    def test_the_decoder_computes_in_parts(self, var, monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
        torch.manual_seed(0)
        whole, after = varkern.generate(var, 4, None, seed, top_k=5), torch.get_rng_state()
        sizes = self._limit(var, monkeypatch, 2)
        torch.manual_seed(0)
        parts = varkern.generate(var, 4, None, seed, top_k=5)
        assert sizes == [4, 2, 2]
        assert all(torch.equal(a, b) for a, b in zip(whole.tokens, parts.tokens, strict=True))
        torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), after)

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_no_memory_leaves_model_and_generator_usable(self, var, monkeypatch, backend: str | None) -> None:
        want = varkern.generate(var, 2, 1, 3)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        with monkeypatch.context() as patch, varkern.use_backend(backend):
            self._limit(var, patch, 0)
            with pytest.raises(torch.OutOfMemoryError):
                varkern.generate(var, 2, 1, 3)
            steps = varkern.generate_scales(var, 2, 1, 3)
            with pytest.raises(torch.OutOfMemoryError):
                next(steps)
            if backend is None:  # parts draw from copies of the generator
                with pytest.raises(torch.OutOfMemoryError, match="no memory to generate 1 image at a time; the model"):
                    varkern.generate(var, 2, 1)
                assert torch.equal(torch.get_rng_state(), state)
        assert not any(block.attn.caching or block.attn.cached_k is not None for block in var.blocks)
        assert torch.is_grad_enabled()
        assert same(varkern.generate(var, 2, 1, 3), want)

    def test_the_golden_tokens_after_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        golden = load_golden("d2")
        run = cached.CachedTransformer.__call__

        def none(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] > 16:  # in the middle of a generation
                raise torch.OutOfMemoryError("no memory")
            return run(self, x)

        arguments = (golden.var, golden.config["B"], golden["labels"], golden.config["seed"])
        with monkeypatch.context() as patch:
            patch.setattr(cached.CachedTransformer, "__call__", none)
            with pytest.raises(torch.OutOfMemoryError, match="the model is unchanged"):
                varkern.generate(*arguments, **golden.sampling)
        got = varkern.generate(*arguments, **golden.sampling)
        assert torch.equal(torch.cat(got.tokens, 1), golden["sample_tokens"])
