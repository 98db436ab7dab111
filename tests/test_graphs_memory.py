"""What bounds the memory of CUDA graphs, who waits for whom, and which calls of CUDA they make; without a GPU."""

import contextlib
import threading
import time
import warnings

import pytest
import torch
from graph_standin import StandIn, eager, in_threads, model, same, twice
from test_models import tiny

import varkern
from varkern.engine import cached, clear_graphs, graphs
from varkern.engine import recorder as recorders
from varkern.ops import sampling


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


class TestMemory:
    def test_the_last_used_are_kept(self, var, recorder) -> None:
        for cfg in (1.0, 2.0, 3.0, 4.0):
            varkern.generate(var, 1, 1, 0, cfg=cfg, cuda_graph=True)
        varkern.generate(var, 1, 1, 0, cfg=1.0, cuda_graph=True)
        varkern.generate(var, 1, 1, 0, cfg=5.0, cuda_graph=True)
        assert (recorder.captures, recorder.replays, recorder.released) == (5, 1, 1)
        varkern.generate(var, 1, 1, 0, cfg=1.0, cuda_graph=True)
        assert recorder.replays == 2
        varkern.generate(var, 1, 1, 0, cfg=2.0, cuda_graph=True)
        assert (recorder.captures, recorder.released) == (6, 2)

    def test_clear(self, var, recorder) -> None:
        _, other = tiny()
        for each in (var, other):
            twice(each, 1, 1, 0)
        clear_graphs(var)
        assert (recorder.released, recorder.trimmed) == (1, 0)
        varkern.generate(other, 1, 1, 0)
        assert recorder.replays == 1
        clear_graphs()
        assert recorder.released == 2
        assert recorder.trimmed == 1
        twice(var, 1, 1, 0)
        assert recorder.captures == 3

    def test_what_was_asked_for_is_bounded(self, var, recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graphs, "_MAX_ASKED", 2)
        for cfg in (1.0, 2.0, 3.0):
            varkern.generate(var, 1, 1, 0, cfg=cfg)
        assert len(graphs.of_device(torch.device("cpu")).asked) == 2

    def test_no_memory_to_capture(self, var, recorder) -> None:
        """The others make room; where that does not help the generation goes on without, and does not try again."""
        twice(var, 1, 1, 0)
        recorder.failures = [torch.OutOfMemoryError("full")]
        varkern.generate(var, 2, 1, 0, cuda_graph=True)
        assert (recorder.captures, recorder.released) == (2, 1)
        recorder.failures = [torch.OutOfMemoryError("full")] * 2
        varkern.generate(var, 3, None)
        torch.manual_seed(3)
        with pytest.warns(RuntimeWarning, match="generation of 3 images could not be captured in a CUDA graph"):
            got = varkern.generate(var, 3, None)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        assert same(got, eager(var, 3, None))
        assert torch.equal(torch.get_rng_state(), after)
        assert not recorder.failures
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            varkern.generate(var, 3, None)
        assert recorder.captures == 2
        recorder.failures = [torch.OutOfMemoryError("full")]
        state = torch.get_rng_state()
        with pytest.raises(torch.OutOfMemoryError, match="no memory to capture the generation"):
            varkern.generate(var, 3, 1, cuda_graph=True)
        assert torch.equal(torch.get_rng_state(), state)
        varkern.generate(var, 3, 1, 0, cuda_graph=True)
        assert recorder.captures == 3

    def test_what_cannot_be_captured(self, var, recorder) -> None:
        recorder.failures = [RuntimeError("operation not permitted when stream is capturing")]
        with pytest.raises(RuntimeError, match=r"the capture failed \(operation not permitted"):
            varkern.generate(var, 1, 1, 0, cuda_graph=True)
        assert same(varkern.generate(var, 1, 1, 0), eager(var, 1, 1, 0))
        assert recorder.captures == 0

    def test_no_memory_to_warm_up(self, var, recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        want, run = eager(var, 2, None, [1, 2]), cached.CachedTransformer.__call__
        varkern.generate(var, 2, None, [1, 2])

        def limited(self, x):
            if x.shape[0] > 2 and x.shape[1] > 4:
                raise torch.OutOfMemoryError("full")
            return run(self, x)

        monkeypatch.setattr(cached.CachedTransformer, "__call__", limited)
        assert same(varkern.generate(var, 2, None, [1, 2]), want, images=False)
        with pytest.raises(torch.OutOfMemoryError, match="no memory to capture the generation"):
            varkern.generate(var, 2, 1, 0, cuda_graph=True)

    def test_graphs_make_room_before_a_batch_is_halved(self, var, recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        want, run, sizes = eager(var, 2, 1, 0), cached.CachedTransformer.__call__, []
        twice(var, 1, 1, 0)

        def limited(self, x):
            sizes.append(x.shape[0])
            if graphs.of_device(torch.device("cpu")).graphs:
                raise torch.OutOfMemoryError("full")
            return run(self, x)

        monkeypatch.setattr(cached.CachedTransformer, "__call__", limited)
        assert same(eager(var, 2, 1, 0), want)
        assert set(sizes) == {4}
        assert recorder.released == 1


class TestThreads:
    @pytest.mark.parametrize("cuda_graph", [True, None], ids=["asked for", "automatic"])
    def test_they_share_a_graph(self, var, recorder, cuda_graph) -> None:
        want = [eager(var, 1, i % 5, i) for i in range(6)]
        got: dict[int, varkern.Generation] = {}
        twice(var, 1, 0, 0)
        in_threads(lambda i: got.update({i: varkern.generate(var, 1, i % 5, i, cuda_graph=cuda_graph)}), 6)
        assert all(same(got[i], want[i]) for i in range(6))
        assert (recorder.captures, recorder.replays) == (1, 6)

    def test_no_capture_while_another_draws(self, var, recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        """Up to torch 2.13 drawing from the global generator fails during a capture."""
        drawing, capture, draw = [], StandIn.capture, sampling.draw_noise
        seen = []

        def capturing(self, run, generators):
            seen.append(list(drawing))
            return capture(self, run, generators)

        def slow(*args):
            if threading.current_thread().name == "eager":
                drawing.append(1)
                time.sleep(0.02)
                drawing.pop()
            return draw(*args)

        monkeypatch.setattr(StandIn, "capture", capturing)
        monkeypatch.setattr("varkern.engine.noise.draw_noise", slow)
        thread = threading.Thread(target=lambda: eager(var, 1, 1), name="eager")
        thread.start()
        while not drawing:
            time.sleep(0.001)
        varkern.generate(var, 1, 1, 0, cuda_graph=True)
        thread.join()
        assert seen == [[]]


class Cuda:
    """The calls of `torch.cuda` that a recorder makes, in their order; nothing else of CUDA."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fail: set[str] = set()
        self.current = self.default = self.object("default")
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: self.call(name))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (self.call("pool"), object())[1])
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.object("side"))
        monkeypatch.setattr(torch.cuda, "Event", lambda: self.object("idle"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self.object("graph"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: self.call("record_stream"))

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            self.fail.remove(name)
            raise RuntimeError(f"{name} failed")

    def object(self, name: str):
        cuda = self

        class Object:
            def __getattr__(self, method: str):
                return lambda *args, **kwargs: cuda.call(f"{name}.{method}")

        return Object()

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def take(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


class TestCallsOfCuda:
    """What can be said of `CudaRecorder` without a device: which calls it makes, also after an error."""

    @pytest.fixture
    def cuda(self, monkeypatch: pytest.MonkeyPatch) -> Cuda:
        return Cuda(monkeypatch)

    def run(self, cuda: Cuda):
        def run() -> tuple[torch.Tensor, ...]:
            assert cuda.current is not cuda.default
            cuda.call("run")
            return (torch.ones(2),)

        return run

    @pytest.mark.parametrize("registers", [True, False], ids=["torch 2.13", "torch 2.14"])
    def test_capture_and_replay(self, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, registers: bool) -> None:
        monkeypatch.setattr(recorders, "_REGISTER", registers)
        recorder = recorders.CudaRecorder(torch.device("cpu"))
        (copy_,) = recorder.warm_up(self.run(cuda))
        assert torch.equal(copy_, torch.ones(2))
        assert cuda.take() == ["side.wait_stream", "run", "default.wait_stream", "record_stream"]
        recording = recorder.capture(self.run(cuda), [torch.Generator()])
        register = ["graph.register_generator_state"] * registers
        begin = ["graph.capture_begin", "run", "graph.capture_end", "default.wait_stream"]
        assert cuda.take() == ["pool", "synchronize", "empty_cache", *register, *begin]
        (first,) = recording.replay(lambda: cuda.call("load"))
        assert cuda.take() == ["default.wait_event", "load", "graph.replay", "idle.record"]
        first.zero_()
        assert torch.equal(recording.replay(lambda: None)[0], torch.ones(2))
        cuda.take()
        recorder.capture(self.run(cuda), [])
        assert "pool" not in cuda.take()
        recording.release()
        recorder.trim()
        assert cuda.take() == ["idle.synchronize", "graph.reset", "empty_cache"]
        recorder.capture(self.run(cuda), [])
        assert cuda.take()[0] == "pool"

    def test_what_raises_in_a_capture_ends_it(self, cuda: Cuda) -> None:
        recorder = recorders.CudaRecorder(torch.device("cpu"))
        cuda.fail = {"run"}
        with pytest.raises(RuntimeError, match="run failed"):
            recorder.capture(self.run(cuda), [])
        assert cuda.take()[-4:] == ["graph.capture_begin", "run", "graph.capture_end", "graph.reset"]
        assert cuda.current is cuda.default
        recorder.capture(self.run(cuda), [])
        assert "pool" not in cuda.take()

    def test_a_capture_that_cuda_has_ended(self, cuda: Cuda) -> None:
        recorder = recorders.CudaRecorder(torch.device("cpu"))
        cuda.fail = {"run", "graph.capture_end"}
        with pytest.raises(RuntimeError, match="run failed"):
            recorder.capture(self.run(cuda), [])
        another = ["graph.capture_begin", "graph.capture_end", "graph.reset"]
        assert cuda.take()[-6:] == ["run", "graph.capture_end", *another, "graph.reset"]
        assert cuda.current is cuda.default
        recorder.capture(self.run(cuda), [])
        assert cuda.take()[0] == "pool"
