"""The peak memory of one call on a CPU, measured in a process of its own: python memory_child.py CASE BACKEND

Prints {"peak_bytes": ..., "result": [...]}: what the call took at its peak above what the process held before it, so
without weights and inputs; and the mean absolute value of each of its results, to compare.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import models
import torch
from bench_attention import ATTENTION_SHAPE, training_attention
from bench_generate import generation
from bench_quantize import Problem
from bench_sampling import PAPER, problem
from torch import Tensor

import varkern
from varkern.ops import quantize, sampling

Call = Callable[[], list[Tensor]]
CPU = torch.device("cpu")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h


def generate(depth: int, batch: int, ch: int, backend: str | None, **sizes: Any) -> Call:
    call = generation(models.build(depth, CPU, ch=ch, **sizes), batch, backend)

    def tensors() -> list[Tensor]:
        result = call()
        return [result.images, *result.tokens]

    return tensors


def encode(batch: int, backend: str | None) -> Call:
    p = Problem(("256px", batch), CPU)

    def call() -> list[Tensor]:
        with torch.inference_mode(), varkern.use_backend(backend):
            indices, f_hats = quantize.residual_quantize(p.features, p.codebook, p.phis, p.sizes, False, False)
        return [*indices, *f_hats]

    return call


def sample(images: int, backend: str | None) -> Call:
    logits, noise = problem(CPU, (images, 256), torch.float32)

    def call() -> list[Tensor]:
        with torch.inference_mode(), varkern.use_backend(backend):
            return [sampling.sample_tokens(logits, noise, *PAPER)]

    return call


CASES: dict[str, Callable[[str | None], Call]] = {
    "generate tiny-B1": lambda backend: generate(1, 1, 32, backend, patch_nums=(1, 2, 3, 4)),
    "generate small-B1": lambda backend: generate(4, 1, 32, backend),
    "generate small-B8": lambda backend: generate(4, 8, 32, backend),
    "generate small-B32": lambda backend: generate(4, 32, 32, backend),
    "generate d16-B1": lambda backend: generate(16, 1, 160, backend),
    "encode 256px-B32": lambda backend: encode(32, backend),
    "sample_tokens B8-16x16": lambda backend: sample(8, backend),
    "attention 512px-forward+backward": lambda backend: training_attention(ATTENTION_SHAPE, backend),
}


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak(call: Call) -> tuple[int, list[Tensor]]:
    """Bytes above what is held now, and the call's result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is in use
    before = status("VmRSS")
    result = call()
    return status("VmHWM") - before, result


if __name__ == "__main__":
    case, backend = sys.argv[1], sys.argv[2]
    measure.settings.smoke = False
    named = None if backend == "varkern" else backend
    # Freed memory goes back to the system at once, instead of being held for a next call that then seems to need none.
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        ctypes.CDLL(None).mallopt(parameter, 1 << 16)
    call = CASES[case](named)
    call()  # libraries' code and buffers that a first call of these sizes brings into memory are not the call's
    taken, result = peak(call)
    print(json.dumps({"peak_bytes": taken, "result": [float(tensor.double().abs().mean()) for tensor in result]}))
