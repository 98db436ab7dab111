"""The calls of CUDA that capture and replay a graph; what is captured, and when, is `graphs`' to say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]

# From torch 2.14 on a graph finds the generators that draw in it by itself, and registering one warns.
_REGISTER = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14)


class Recording(Protocol):
    def replay(self, load: Callable[[], None]) -> tuple[Tensor, ...]:
        """Run again what was captured, on the current stream, after ``load`` has written its inputs; copies of its
        outputs. The generators that were named at the capture draw as if the work ran without a graph."""

    def release(self) -> None:
        """Free it, once its replays are done."""


class Recorder(Protocol):
    def warm_up(self, run: Run) -> tuple[Tensor, ...]:
        """Run it as it will be captured, so that everything is loaded and chosen; copies of its outputs."""

    def capture(self, run: Run, generators: Sequence[torch.Generator]) -> Recording:
        """Record it without running it. Where that raises, a RuntimeError such as OutOfMemoryError, nothing is left."""

    def trim(self) -> None:
        """No recording is left: give back the memory."""


class CudaRecorder:
    """Captures on a stream of its own, all into one pool of memory, and replays one after another on any stream.

    Graphs may share a pool because no two of them run at once (``idle`` orders them on the device, the caller's lock on
    the host) and nothing in the pool is read after the next one has started.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.idle = torch.cuda.Event()  # when the last replay and the copies of its outputs are done
        self.pool: Any = None

    def warm_up(self, run: Run) -> tuple[Tensor, ...]:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                outputs = run()
            current.wait_stream(self.stream)
            copies = tuple(output.clone() for output in outputs)
            for output in outputs:
                output.record_stream(current)
            return copies

    def capture(self, run: Run, generators: Sequence[torch.Generator]) -> Recording:
        with torch.cuda.device(self.device):
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            # What the warm-up took is cached for its stream and of no use to the pool.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            if _REGISTER:
                for generator in generators:
                    graph.register_generator_state(generator)
            # torch.cuda.graph would leave its stream current where the capture cannot even be ended.
            with torch.cuda.stream(self.stream):
                # Other threads may allocate and launch meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    outputs = run()
                except BaseException:
                    self._give_up(graph)
                    raise
                graph.capture_end()
            torch.cuda.current_stream().wait_stream(self.stream)
            return _CudaRecording(self, graph, outputs)

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture in which something raised."""
        try:
            graph.capture_end()
        except RuntimeError:
            # CUDA had ended the capture itself, and torch (up to 2.13) has left the global generator waiting for its
            # end: it would refuse every draw. A capture of next to nothing ends that. The allocator waits as well, and
            # takes no other capture into this pool, which lives as long as the graphs in it.
            self.pool = None
            with contextlib.suppress(RuntimeError):
                empty = torch.cuda.CUDAGraph()
                empty.capture_begin(capture_error_mode="thread_local")
                torch.zeros(1, dtype=torch.float32, device=self.device)
                empty.capture_end()
                empty.reset()
        graph.reset()

    def trim(self) -> None:
        if self.pool is not None:
            self.pool = None
            with torch.cuda.device(self.device):
                torch.cuda.empty_cache()


class _CudaRecording:
    def __init__(self, recorder: CudaRecorder, graph: torch.cuda.CUDAGraph, outputs: tuple[Tensor, ...]) -> None:
        self.recorder, self.graph, self.outputs = recorder, graph, outputs

    def replay(self, load: Callable[[], None]) -> tuple[Tensor, ...]:
        with torch.cuda.device(self.recorder.device):
            current = torch.cuda.current_stream()
            current.wait_event(self.recorder.idle)
            try:
                load()
                self.graph.replay()
                return tuple(output.clone() for output in self.outputs)
            finally:
                self.recorder.idle.record(current)

    def release(self) -> None:
        self.recorder.idle.synchronize()
        self.outputs = ()
        self.graph.reset()
