"""CUDA graphs of generations: their results, and what is captured, by a stand-in; on a GPU the graphs themselves."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden
from graph_standin import StandIn, eager, in_threads, model, same, twice
from test_models import tiny

import varkern
from varkern.engine import Keep, cached, clear_graphs, generate_scales, graphs
from varkern.engine.noise import BatchNoise
from varkern.engine.options import Options


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch):
    """Graphs on the CPU, by the stand-in."""
    monkeypatch.setitem(graphs.RECORDERS, "cpu", StandIn)
    monkeypatch.setattr(graphs, "_devices", {})
    yield graphs.of_device(torch.device("cpu")).recorder
    clear_graphs()


@pytest.fixture
def var() -> varkern.VAR:
    return model()


class TestResults:
    @pytest.mark.parametrize("seeds", [(1, 2, 3), ([1, 2], [3, 4], [5, 1])], ids=["one seed", "a seed an image"])
    @pytest.mark.parametrize("labels", [(1, 2, 0), (None, None, None), ([1, 2], [0, 5], [4, 4])], ids=str)
    def test_those_of_new_seeds_and_labels(self, var, recorder, seeds, labels) -> None:
        for seed, label in zip(seeds, labels, strict=True):
            got = varkern.generate(var, 2, label, seed, top_k=20, top_p=0.9, cuda_graph=True)
            want = eager(var, 2, label, seed, top_k=20, top_p=0.9)
            assert same(got, want)
            assert all(tokens.is_contiguous() for tokens in got.tokens)
        assert (recorder.captures, recorder.replays) == (1, 2)

    def test_the_global_generator_ends_where_it_would(self, var, recorder) -> None:
        for _ in range(3):
            state = torch.get_rng_state()
            got, after = varkern.generate(var, 2, None, cuda_graph=True), torch.get_rng_state()
            torch.set_rng_state(state)
            assert same(got, eager(var, 2, None))
            assert torch.equal(torch.get_rng_state(), after)
        assert recorder.replays == 2

    @pytest.mark.parametrize("options", [{"cfg": 0.0}, {"cfg": 3.0, "top_k": 5}, {"top_p": 0.5}], ids=str)
    def test_options(self, var, recorder, options) -> None:
        for seed in (0, 1):
            assert same(
                varkern.generate(var, 1, 1, seed, cuda_graph=True, **options), eager(var, 1, 1, seed, **options)
            )

    def test_more_smooth_in_16_bits(self, var, recorder) -> None:
        var.bfloat16()
        for seed in (0, 1):
            got = varkern.generate(var, 1, 1, seed, more_smooth=True, cuda_graph=True)
            assert same(got, eager(var, 1, 1, seed, more_smooth=True))

    def test_captured_under_inference_mode_and_replayed_outside(self, var, recorder) -> None:
        with torch.inference_mode():
            varkern.generate(var, 1, 1, 0, cuda_graph=True)
        assert same(varkern.generate(var, 1, 2, 1, cuda_graph=True), eager(var, 1, 2, 1))
        assert recorder.replays == 1

    def test_autocast(self, var, recorder) -> None:
        for seed in (0, 1):
            with torch.autocast("cpu", torch.bfloat16):
                got, want = varkern.generate(var, 1, 1, seed, cuda_graph=True), eager(var, 1, 1, seed)
            assert same(got, want)
        assert (recorder.captures, recorder.replays) == (1, 1)
        assert not same(got, eager(var, 1, 1, seed))


class TestAutocast:
    def test_a_weight_is_cast_once(self, var, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its values are autocast's, autocast's own cache stays empty, and each weight has one copy in all scales."""
        casts, cast = [], graphs._CastOnce._cast
        monkeypatch.setattr(graphs._CastOnce, "_cast", lambda self, w: (casts.append(id(w)), cast(self, w))[1])
        noise = BatchNoise(1, torch.device("cpu"), torch.Generator().manual_seed(0))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mode = graphs._CastOnce(torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), mode:
                list(cached.cached_scales(var, torch.tensor([1]), noise, Options()))
        assert set(mode.copies) == set(casts)
        assert len(casts) > 3 * len(mode.copies)
        weight = var.blocks[0].ffn.fc1.weight
        assert torch.equal(mode.copies[id(weight)], weight.bfloat16())

    def test_outside_of_it_weights_stay(self, var) -> None:
        with graphs._CastOnce(torch.bfloat16) as mode:
            assert F.linear(torch.ones(1, 64), var.blocks[0].ffn.fc1.weight).dtype == torch.float32
        assert not mode.copies


class TestChoice:
    def test_the_second_time_captures(self, var, recorder) -> None:
        counts = []
        for seed in range(4):
            assert same(varkern.generate(var, 1, seed, seed), eager(var, 1, seed, seed))
            counts.append((recorder.captures, recorder.replays))
        assert counts == [(0, 0), (1, 0), (1, 1), (1, 2)]
        assert torch.equal(var.autoregressive_infer_cfg(1, 3, 3), eager(var, 1, 3, 3).images)
        assert recorder.replays == 3

    def test_never_where_it_is_switched_off(self, var, recorder) -> None:
        for _ in range(3):
            eager(var, 1, 1, 0)
        assert recorder.captures == 0

    def test_large_batches_only_when_asked(self, var, recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graphs, "AUTOMATIC_BATCH", 1)
        twice(var, 2, 1, 0)
        assert recorder.captures == 0
        varkern.generate(var, 2, 1, 0, cuda_graph=True)
        assert recorder.captures == 1

    def test_whatever_the_python_read_makes_another_graph(self, var, recorder, monkeypatch) -> None:
        monkeypatch.setattr(graphs, "MAX_GRAPHS", 20)

        def run(**kwargs) -> None:
            varkern.generate(var, 1, 1, cuda_graph=True, **{"seed": 0, **kwargs})

        changes = [{"cfg": 1.0}, {"top_k": 3}, {"top_p": 0.5}, {"seed": [0]}]
        for change in ({}, *changes):
            run(**change)
        assert recorder.captures == 5
        with varkern.use_backend("cpu"):
            run()
        with torch.autocast("cpu", torch.bfloat16):
            run()
        with torch.autocast("cpu", torch.float16):
            run()
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        run()
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            run()
        finally:
            torch.set_float32_matmul_precision(precision)
        assert recorder.captures == 10
        assert recorder.replays == 0

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"max_batch": 1}, "max_batch=1 computes the 2 images in parts"),
            ({"keep": True}, "`keep` holds fixed"),
            ({"more_smooth": True}, "the reference backend"),
        ],
        ids=["max_batch", "keep", "more_smooth"],
    )
    def test_refused_requests(self, recorder, kwargs, match) -> None:
        golden = load_golden("d2")
        if "keep" in kwargs:
            kwargs = {"keep": Keep(golden.token_maps(), torch.zeros(8, 8))}
        with pytest.raises(RuntimeError, match=f"cuda_graph=True, but .*{match}"):
            varkern.generate(golden.var, 2, 1, 0, cuda_graph=True, **kwargs)
        twice(golden.var, 2, 1, 0, **kwargs)
        assert recorder.captures == 0

    def test_refused_models(self, var, recorder) -> None:
        calls = []
        hook = var.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(RuntimeError, match="a forward hook is registered"):
            varkern.generate(var, 1, 1, 0, cuda_graph=True)
        twice(var, 1, 1, 0)
        hook.remove()
        _, dropped = tiny(drop_rate=0.5)
        with pytest.raises(RuntimeError, match=r"training mode with dropout; call eval\(\)"):
            varkern.generate(dropped.train(), 1, 1, 0, cuda_graph=True)
        twice(dropped, 1, 1, 0)
        assert recorder.captures == 0
        varkern.generate(dropped.eval(), 1, 1, 0, cuda_graph=True)
        assert recorder.captures == 1

    def test_without_a_cuda_device(self, var) -> None:
        with pytest.raises(RuntimeError, match=r"the model is on cpu, not on a CUDA device\. Leave cuda_graph unset"):
            varkern.generate(var, 1, 1, 0, cuda_graph=True)
        twice(var, 1, 1, 0)
        clear_graphs()

    def test_scales_are_no_graph(self, var, recorder) -> None:
        want = eager(var, 1, 1, 0)
        for _ in range(3):
            assert torch.equal(list(generate_scales(var, 1, 1, 0))[-1].images, want.images)
        assert recorder.captures == 0


def replace_block(var: varkern.VAR) -> None:
    var.blocks[1] = copy.deepcopy(var.blocks[0])


def scaled(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Other values in other memory."""
    state = module.state_dict()
    return {k: t * 0.9 if t.is_floating_point() and "mask" not in k else t.clone() for k, t in state.items()}


def assign(var: varkern.VAR) -> None:
    var.load_state_dict(scaled(var), assign=True)


def assign_tokenizer(var: varkern.VAR) -> None:
    vae = var.vae_proxy[0]
    vae.load_state_dict(scaled(vae), assign=True)


def replace_tokenizer(var: varkern.VAR) -> None:
    vae = copy.deepcopy(var.vae_proxy[0])
    var.vae_proxy, var.vae_quant_proxy = (vae,), (vae.quantize,)
    assign_tokenizer(var)


def replace_decoder(var: varkern.VAR) -> None:
    quantize = var.vae_quant_proxy[0]
    var.vae_proxy = (copy.deepcopy(var.vae_proxy[0]),)
    assert var.vae_quant_proxy[0] is quantize
    assign_tokenizer(var)


def restride(var: varkern.VAR) -> None:
    weight = var.blocks[0].attn.proj.weight
    weight.data = weight.data.t()  # the same address


CHANGES = [
    replace_block,
    assign,
    assign_tokenizer,
    replace_tokenizer,
    replace_decoder,
    restride,
    lambda var: var.bfloat16().float(),
    lambda var: setattr(var.blocks[0].attn, "scale", 0.5),
    lambda var: setattr(var.blocks[0].ln_wo_grad, "eps", 0.5),
    lambda var: var.blocks[0].register_parameter("extra", None),
]


class TestChangedModels:
    @pytest.mark.parametrize("change", CHANGES, ids=[getattr(c, "__name__", "lambda") for c in CHANGES])
    def test_captured_anew(self, var, recorder, change) -> None:
        varkern.generate(var, 1, 1, 0, cuda_graph=True)
        varkern.generate(var, 2, 1, 0, cuda_graph=True)
        change(var)
        got = varkern.generate(var, 1, 1, 1, cuda_graph=True)
        assert same(got, eager(var, 1, 1, 1))
        assert (recorder.captures, recorder.replays, recorder.released) == (3, 0, 2)
        varkern.generate(var, 1, 1, 1, cuda_graph=True)
        assert recorder.replays == 1

    def test_a_patched_model_is_no_graph(self, var, recorder) -> None:
        varkern.generate(var, 1, 1, 0, cuda_graph=True)
        var.blocks[0].attn.forward = var.blocks[1].attn.forward
        with pytest.raises(RuntimeError, match=r"blocks\.0\.attn is not as it was built"):
            varkern.generate(var, 1, 1, 1, cuda_graph=True)
        assert same(varkern.generate(var, 1, 1, 1), eager(var, 1, 1, 1))
        assert (recorder.captures, recorder.replays) == (1, 0)

    def test_values_may_change(self, var, recorder) -> None:
        before = varkern.generate(var, 1, 1, 0, cuda_graph=True)
        optimizer = torch.optim.SGD(var.parameters(), lr=0.1)
        for parameter in var.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        var.load_state_dict(scaled(var))
        got = varkern.generate(var, 1, 1, 0, cuda_graph=True)
        assert recorder.replays == 1
        assert same(got, eager(var, 1, 1, 0))
        assert not same(got, before)

    def test_weights_that_move_every_time_are_never_captured_unasked(self, var, recorder) -> None:
        for seed in range(5):
            assign(var)
            assert same(varkern.generate(var, 1, 1, seed), eager(var, 1, 1, seed))
        assert recorder.captures == 0
        twice(var, 1, 1, 0)
        assert recorder.captures == 1

    def test_a_hook_stops_replays(self, var, recorder) -> None:
        twice(var, 1, 1, 0)
        calls = []
        hook = var.vae_proxy[0].decoder.register_forward_pre_hook(lambda *_: calls.append(1))
        varkern.generate(var, 1, 1, 0)
        assert len(calls) == 1
        assert recorder.released == 1
        hook.remove()

    def test_graphs_go_with_the_model(self, recorder) -> None:
        _, model = tiny()
        weight, gone = weakref.ref(model.blocks[0].ffn.fc1.weight), weakref.ref(model)
        twice(model, 1, 1, 0)
        varkern.generate(model, 2, 1, 0)  # asked for once
        del model
        gc.collect()
        assert gone() is None
        assert weight() is None
        assert recorder.released == 1
        state = graphs.of_device(torch.device("cpu"))
        assert not state.graphs
        assert not state.asked
        assert recorder.trimmed


@pytest.fixture
def on_gpu(var):
    var.vae_proxy[0].cuda()
    yield var.cuda()
    clear_graphs()


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("seeds", ["one", "a seed an image"])
    @pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
    def test_tokens_of_the_eager_path(self, on_gpu, batch: int, seeds: str, mode: str) -> None:
        if mode == "bfloat16":
            on_gpu.bfloat16()
            on_gpu.vae_proxy[0].bfloat16()
        with torch.autocast("cuda", torch.float16, enabled=mode == "autocast"):
            for seed in range(5):
                given = seed if seeds == "one" else list(range(seed, seed + batch))
                labels = torch.full((batch,), seed % 5, device="cuda")
                got = varkern.generate(on_gpu, batch, labels, given, top_k=20, top_p=0.9, cuda_graph=True)
                want = eager(on_gpu, batch, labels, given, top_k=20, top_p=0.9)
                assert same(got, want, images=False), seed
                torch.testing.assert_close(got.images, want.images, rtol=0, atol=1e-3)

    def test_the_global_generator(self, on_gpu) -> None:
        for _ in range(3):
            state = torch.cuda.get_rng_state()
            got, after = varkern.generate(on_gpu, 2, None, cuda_graph=True), torch.cuda.get_rng_state()
            torch.cuda.set_rng_state(state)
            assert same(got, eager(on_gpu, 2, None), images=False)
            assert torch.equal(torch.cuda.get_rng_state(), after)

    def test_weights_in_place_and_moved(self, on_gpu) -> None:
        first = twice(on_gpu, 1, 1, 0)
        with torch.no_grad():
            for parameter in on_gpu.parameters():
                parameter.mul_(1.2)
        second = varkern.generate(on_gpu, 1, 1, 0)
        assert same(second, eager(on_gpu, 1, 1, 0), images=False)
        assert not same(first, second)
        on_gpu.cpu().cuda()
        assert same(varkern.generate(on_gpu, 1, 1, 0), second, images=False)

    def test_memory(self, on_gpu) -> None:
        """Many graphs take the memory of one, but for results; all of it comes back."""
        varkern.generate(on_gpu, 4, 1, 0, cuda_graph=True)  # workspaces of libraries stay
        clear_graphs()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        varkern.generate(on_gpu, 4, 1, 0, cuda_graph=True)
        torch.cuda.empty_cache()
        one = torch.cuda.memory_reserved() - before
        for i in range(8):
            varkern.generate(on_gpu, 4, 1, 0, cfg=0.5 + i, cuda_graph=True)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() - before <= 1.5 * one + 2**25
        clear_graphs()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() - before <= 2**25

    def test_streams_and_threads(self, on_gpu) -> None:
        want = [eager(on_gpu, 1, i % 5, i) for i in range(8)]
        twice(on_gpu, 1, 0, 0)
        got: dict[int, varkern.Generation] = {}

        def work(i: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                got[i] = varkern.generate(on_gpu, 1, i % 5, i)
                torch.cuda.current_stream().synchronize()

        in_threads(work, 8)
        assert all(same(got[i], want[i], images=False) for i in range(8))

    def test_nothing_waits(self, on_gpu) -> None:
        for graph in (False, True):
            varkern.generate(on_gpu, 1, None, [3], cuda_graph=False)
            varkern.generate(on_gpu, 2, 1, [0, 1], top_k=20, top_p=0.9, cuda_graph=graph)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                varkern.generate(on_gpu, 2, 1, [1, 2], top_k=20, top_p=0.9, cuda_graph=graph)
                varkern.generate(on_gpu, 1, None, [3], cuda_graph=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
