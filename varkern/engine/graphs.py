"""CUDA graphs of whole generations: all scales, sampling and decoder in one launch, replayed with new seeds and labels.

A generation of one image launches thousands of kernels, most of them shorter than their launch. A graph holds them all
with their arguments, so that what it was captured with must still hold when it is replayed: `watch.Watch` says whether
the model is as it was, `_key` what else the captured Python read. What varies goes in through memory of the graph: the
labels are copied there, and its own generators take the state of the caller's and hand it back.

A device keeps at most `MAX_GRAPHS`, the last used ones. They share one pool of memory, which is then as large as the
largest of them needs; so they run one after another, whatever streams and threads they are asked for from, and what
they give is copied out of the pool. This file decides; `recorder` calls CUDA.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from varkern.engine.noise import ReplayableNoise
from varkern.engine.options import Generation, Options
from varkern.engine.recorder import CudaRecorder, Recorder, Recording, Run
from varkern.engine.watch import Watch
from varkern.modules.transformer import Transformer

MAX_GRAPHS = 4  # kept on a device
AUTOMATIC_BATCH = 32  # a larger batch is not captured unasked: its kernels are long, and its memory is large
_MAX_ASKED = 32  # generations remembered that have run once without a graph

RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}

Key = tuple[Any, ...]  # begins with the id of the model
Compute = Callable[[Transformer, Tensor, ReplayableNoise], Generation]


@dataclass(frozen=True)
class GraphRequest:
    """A generation that may become a graph. compute: the model, labels (B,) and noise -> images and tokens; it must not
    read anything else that varies, but what ``options`` and ``backend`` say."""

    var: Transformer
    batch: int
    noise: ReplayableNoise
    options: Options
    backend: str | None
    compute: Compute

    @property
    def device(self) -> torch.device:
        return self.var.lvl_1L.device

    def why_not(self, max_batch: int | None) -> str | None:
        """Why it cannot be a graph, as a clause without a full stop, or None."""
        if self.device.type not in RECORDERS:
            return f"the model is on {self.device}, not on a CUDA device"
        if self.backend == "reference":
            return "the reference backend runs it, which keeps caches in the modules (as float32 more_smooth does)"
        if isinstance(self.options.cfg, Tensor):
            return "a guidance for each image is not among a graph's inputs"
        if self.options.keep is not None:
            return "what `keep` holds fixed is not among a graph's inputs"
        if max_batch is not None and max_batch < self.batch:
            return f"max_batch={max_batch} computes the {self.batch} images in parts"
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "the current stream is being captured already"
        if torch.compiler.is_compiling():
            return "the call is being compiled"
        return None


def clear_graphs(var: Transformer | None = None) -> None:
    """Free the CUDA graphs of a model, or of all models, and their memory once no graph is left on the device.

    Waits for replays that are under way. The next generations run without a graph, or capture again, as if they were
    the first. Without graphs it does nothing.
    """
    with _devices_lock:
        devices = list(_devices.values())
    for device in devices:
        with device.changed:
            device.forget(None if var is None else id(var))


class DeviceGraphs:
    """The graphs of one device. All of its state is guarded by ``changed``, which is held during capture and replay."""

    def __init__(self, device: torch.device) -> None:
        self.recorder = RECORDERS[device.type](device)
        self.changed = threading.Condition(threading.RLock())
        self.graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self.asked: OrderedDict[Key, Watch | None] = OrderedDict()  # None: could not be captured
        self.models: set[int] = set()  # ids of those whose end is watched
        self.eager = 0  # generations under way without a graph
        self.collected: list[int] = []  # ids of models that are no more

    @contextlib.contextmanager
    def running_eagerly(self) -> Iterator[None]:
        """While something draws or computes without a graph. No capture is under way then: up to torch 2.13 the global
        generator refuses to draw during one."""
        with self.changed:
            self.eager += 1
        try:
            yield
        finally:
            with self.changed:
                self.eager -= 1
                self.changed.notify_all()

    def generate(self, request: GraphRequest, labels: Tensor, required: bool) -> Generation | None:
        """By a graph, which is captured if that is worth it or is ``required``; None: run it without one.

        The request's generators have drawn what the generation draws, or with None nothing. Raises RuntimeError or
        torch.OutOfMemoryError where it must be a graph and cannot.
        """
        key = _key(request)
        with self.changed:
            graph = self._find(key)
            if graph is None and required and self.eager:
                self.changed.wait_for(lambda: self.eager == 0)
                graph = self._find(key)
            if graph is None:
                watch = self._watch_if_due(key, request, required)
                return None if watch is None else self._capture(key, request, labels, watch, required)
            try:
                return graph.replay(labels, request.noise)
            except torch.OutOfMemoryError as error:  # for the copies of the results
                self.forget(None)
                if required:
                    raise torch.OutOfMemoryError(_NO_MEMORY) from error
                return None

    def forget(self, model: int | None) -> None:
        """Drop the graphs of a model, by its id, or all."""
        for key in [key for key in self.asked if model in (None, key[0])]:
            del self.asked[key]
        self._release([key for key in self.graphs if model in (None, key[0])])

    def _release(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self.graphs.pop(key).recording.release()
        if not self.graphs:
            self.recorder.trim()

    def _find(self, key: Key) -> _Graph | None:
        self._forget_collected()
        graph = self.graphs.get(key)
        if graph is not None and not graph.watch.holds():
            self.forget(key[0])  # the model's other graphs hold the same addresses
            return None
        if graph is not None:
            self.graphs.move_to_end(key)
        return graph

    def _forget_collected(self) -> None:
        while self.collected:
            model = self.collected.pop()
            self.models.discard(model)
            self.forget(model)

    def _on_collected(self, model: int) -> None:
        """Called from wherever the garbage is collected, so it may not wait; who holds the lock forgets afterwards."""
        self.collected.append(model)
        if self.changed.acquire(blocking=False):
            try:
                self._forget_collected()
            finally:
                self.changed.release()

    def _watch_if_due(self, key: Key, request: GraphRequest, required: bool) -> Watch | None:
        """What the graph to capture depends on, or None: leave it. A generation is captured the second time that it is
        asked for: once is no reason, and weights that move every time would be captured every time."""
        if not required:
            if request.batch > AUTOMATIC_BATCH:
                return None
            if key in self.asked:
                self.asked.move_to_end(key)
                asked = self.asked[key]
                if asked is None or asked.holds():
                    return None if self.eager else asked
            watch = Watch(request.var)
            if watch.refusal is None:
                self._forget_when_collected(request.var)  # what it holds must go with the model
                self.asked[key] = watch
                while len(self.asked) > _MAX_ASKED:
                    self.asked.popitem(last=False)
            return None
        watch = Watch(request.var)
        if watch.refusal is not None:
            raise RuntimeError(refusal(watch.refusal))
        return watch

    def _capture(
        self, key: Key, request: GraphRequest, labels: Tensor, watch: Watch, required: bool
    ) -> Generation | None:
        """Run the generation once to warm up, which gives its result, and capture it for the next time."""
        graph = _Graph(self.recorder, request, watch)
        states = [generator.get_state() for generator in request.noise.generators]
        try:
            result = graph.warm_up(labels, request.noise)
        except torch.OutOfMemoryError as error:
            self.forget(None)
            if required:
                raise torch.OutOfMemoryError(_NO_MEMORY) from error
            return None  # in parts it may fit
        if len(self.graphs) >= MAX_GRAPHS:
            self._release(list(self.graphs)[: len(self.graphs) + 1 - MAX_GRAPHS])
        self._forget_when_collected(request.var)
        failure = graph.capture()
        if isinstance(failure, torch.OutOfMemoryError) and self.graphs:
            self.forget(None)
            failure = graph.capture()
        if failure is None:
            self.graphs[key] = graph
            return result
        self._release(())  # the failed capture may have been alone in the pool
        self.asked[key] = None
        if required:
            for generator, state in zip(request.noise.generators, states, strict=True):
                generator.set_state(state)
            if isinstance(failure, torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(_NO_MEMORY) from failure
            raise RuntimeError(refusal(f"the capture failed ({failure})")) from failure
        warnings.warn(
            f"A generation of {request.batch} images could not be captured in a CUDA graph, and goes on "
            f"without one: {failure}",
            RuntimeWarning,
            stacklevel=4,
        )
        return result

    def _forget_when_collected(self, var: Transformer) -> None:
        if id(var) not in self.models:
            self.models.add(id(var))
            weakref.finalize(var, self._on_collected, id(var)).atexit = False


class _Graph:
    """One generation in a graph: its inputs, and what it was captured with."""

    def __init__(self, recorder: Recorder, request: GraphRequest, watch: Watch) -> None:
        self.recorder, self.watch = recorder, watch
        device = request.device
        with torch.inference_mode(False):  # replays outside of inference_mode write to them
            self.labels = torch.zeros(request.batch, dtype=torch.int64, device=device)
        self.generators = [torch.Generator(device=device) for _ in request.noise.generators]
        self.lengths = [request.batch * n for n in request.var.scale_lengths]
        self.run = self._run(request)
        self.recording: Recording

    def _run(self, request: GraphRequest) -> Run:
        model, labels, noise, compute = (
            weakref.ref(request.var),
            self.labels,
            request.noise.drawn_by(self.generators),
            request.compute,
        )
        kind = request.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

        def run() -> tuple[Tensor, ...]:
            var = model()
            assert var is not None
            with torch.inference_mode(False), torch.no_grad(), _casting_once(kind, dtype):
                got = compute(var, labels, noise)
                return got.images, torch.cat([tokens.flatten() for tokens in got.tokens])

        return run

    def warm_up(self, labels: Tensor, noise: ReplayableNoise) -> Generation:
        self._load(labels, noise)
        return self._result(self.recorder.warm_up(self.run), noise)

    def capture(self) -> RuntimeError | None:
        """What prevented it, or None."""
        try:
            self.recording = self.recorder.capture(self.run, self.generators)
        except RuntimeError as error:
            return error.with_traceback(None)  # which holds the tensors of the attempt
        return None

    def replay(self, labels: Tensor, noise: ReplayableNoise) -> Generation:
        return self._result(self.recording.replay(lambda: self._load(labels, noise)), noise)

    def _load(self, labels: Tensor, noise: ReplayableNoise) -> None:
        self.labels.copy_(labels)
        for mine, theirs in zip(self.generators, noise.generators, strict=True):
            mine.set_state(theirs.get_state())

    def _result(self, outputs: tuple[Tensor, ...], noise: ReplayableNoise) -> Generation:
        """Only now have the caller's generators drawn: what has failed drew nothing."""
        for mine, theirs in zip(self.generators, noise.generators, strict=True):
            theirs.set_state(mine.get_state())
        images, tokens = outputs
        return Generation(images, [scale.view(len(self.labels), -1) for scale in tokens.split(self.lengths)])


class _CastOnce(TorchFunctionMode):
    """Autocast's 16-bit copies of the weights, once for a generation, and its own.

    Autocast keeps copies too, but for all threads, until the outermost context ends: a graph must neither hold the
    address of such a copy, nor leave copies there that only a replay fills.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (F.linear, F.conv2d):
            args = tuple(self._cast(arg) if isinstance(arg, nn.Parameter) else arg for arg in args)
            kwargs = {k: self._cast(v) if isinstance(v, nn.Parameter) else v for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _cast(self, weight: Tensor) -> Tensor:
        kind = weight.device.type
        if weight.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
            return weight
        if id(weight) not in self.copies:
            self.copies[id(weight)] = weight.to(self.dtype)
        return self.copies[id(weight)]


@contextlib.contextmanager
def _casting_once(kind: str, dtype: torch.dtype | None) -> Iterator[None]:
    if dtype is None:
        yield
        return
    with torch.autocast(kind, dtype=dtype, cache_enabled=False), _CastOnce(dtype):
        yield


_NO_MEMORY = (
    "there is no memory to capture the generation in a CUDA graph; the model is unchanged. Free memory, give fewer "
    "images, or leave cuda_graph unset to run without a graph"
)


def refusal(reason: str) -> str:
    return f"cuda_graph=True, but the generation cannot be a CUDA graph: {reason}. Leave cuda_graph unset to run it"


def _key(request: GraphRequest) -> Key:
    """What the captured Python read, beside the model: another value would have launched other kernels."""
    kind = request.device.type
    options = request.options
    backends: Any = torch.backends
    precision: tuple[object, ...]
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9; the older names raise once a newer one was set
        precision = (backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)
    else:
        precision = (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32)
    return (
        *(id(request.var), request.batch, type(request.noise), request.backend, str(request.device)),
        *(options.cfg, options.top_k, options.top_p, options.more_smooth),
        torch.is_autocast_enabled(kind) and (torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()),
        *(precision, torch.get_default_dtype()),
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        *(backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        *(torch.are_deterministic_algorithms_enabled(), _fills_empty()),
        *(backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled()),
        *(backends.cuda.math_sdp_enabled(), backends.cuda.cudnn_sdp_enabled()),
    )


def _fills_empty() -> bool:
    deterministic: Any = torch.utils.deterministic
    return deterministic.fill_uninitialized_memory


_devices: dict[torch.device, DeviceGraphs] = {}
_devices_lock = threading.Lock()


def of_device(device: torch.device) -> DeviceGraphs:
    """The graphs of a device that has them, made at the first call."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with _devices_lock:
        if not _devices:  # CUDA is gone when the interpreter tears this module down
            atexit.register(clear_graphs)
        if device not in _devices:
            _devices[device] = DeviceGraphs(device)
        return _devices[device]


def make_room(device: torch.device) -> bool:
    """Drop the graphs of a device that has no memory left; whether there were any."""
    if device.type not in RECORDERS:
        return False
    graphs = of_device(device)
    with graphs.changed:
        had = bool(graphs.graphs)
        graphs.forget(None)
    return had


def running_eagerly(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """While something draws or computes on a device without a graph; nothing where there are none."""
    return of_device(device).running_eagerly() if device.type in RECORDERS else contextlib.nullcontext()
