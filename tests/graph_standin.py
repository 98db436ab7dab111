"""A stand-in for CUDA, so that a machine without a GPU can test what decides about graphs.

It runs what was captured again. So it shows which generations are captured, replayed and dropped, and that labels,
seeds and results pass through; that a replay reads addresses, and no Python, only a GPU can show.
"""

import threading

import torch
from test_models import tiny

import varkern


class StandIn:
    """A recorder of one device, and what happened to it."""

    def __init__(self, device: torch.device) -> None:
        self.captures = self.replays = self.released = self.trimmed = 0
        self.failures: list[Exception] = []  # of the next captures
        self.busy = threading.Lock()

    def warm_up(self, run):
        return tuple(output.clone() for output in run())

    def capture(self, run, generators):
        assert self.busy.acquire(blocking=False)
        try:
            if self.failures:
                raise self.failures.pop(0)
            self.captures += 1
            return _Rerun(self, run)
        finally:
            self.busy.release()

    def trim(self):
        self.trimmed += 1


class _Rerun:
    def __init__(self, recorder, run):
        self.recorder, self.run = recorder, run

    def replay(self, load):
        assert self.recorder.busy.acquire(blocking=False), "two replays at once"
        try:
            self.recorder.replays += 1
            load()
            return tuple(output.clone() for output in self.run())
        finally:
            self.recorder.busy.release()

    def release(self):
        self.recorder.released += 1
        del self.run


def model() -> varkern.VAR:
    _, var = tiny()
    var.init_weights(init_std=0.1, init_head=1.0, init_adaln_gamma=1.0)
    return var


def same(a: varkern.Generation, b: varkern.Generation, images: bool = True) -> bool:
    tokens = all(torch.equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True))
    return tokens and (not images or torch.equal(a.images, b.images))


def eager(var, *args, **kwargs) -> varkern.Generation:
    return varkern.generate(var, *args, cuda_graph=False, **kwargs)


def twice(var, *args, **kwargs) -> varkern.Generation:
    """What makes the automatic choice capture; the second result."""
    varkern.generate(var, *args, **kwargs)
    return varkern.generate(var, *args, **kwargs)


def in_threads(work, count: int) -> None:
    errors = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors, errors
