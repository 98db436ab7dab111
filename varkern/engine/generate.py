"""Whole-image generation: `generate` a batch, or `generate_scales`, which shows every scale of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from varkern.engine import graphs
from varkern.engine.arguments import (
    check_batch,
    check_keep,
    check_labels,
    check_model,
    check_options,
    check_seed,
    check_seeds,
)
from varkern.engine.cached import cached_scales
from varkern.engine.noise import BatchNoise, ImageNoise, NoiseSource, ReplayableNoise
from varkern.engine.options import Generation, Keep, Options, ScaleStep
from varkern.engine.reference import reference_scales
from varkern.modules.plain import compute_dtype
from varkern.modules.transformer import Transformer
from varkern.ops import current_backend, use_backend


@dataclass(frozen=True)
class ScaleImages:
    """What `generate_scales` yields: the scale from 0, its tokens (B, n_k), and the images after it, in [0, 1]."""

    scale: int
    tokens: Tensor
    images: Tensor


def generate(
    var: Transformer,
    batch: int,
    labels: int | Sequence[int] | Tensor | None,
    seed: int | Sequence[int] | None = None,
    *,
    cfg: float | Tensor = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
    keep: Keep | None = None,
    max_batch: int | None = None,
    cuda_graph: bool | None = None,
) -> Generation:
    """Generate a batch of images; see `VAR.autoregressive_infer_cfg` for what is not said here.

    Args:
        seed: one seed for the batch, as the published model draws; or one for each image, which then does not depend
            on the others or on their number; or None, the global generator.
        keep: what of given images is held fixed (zero-shot editing, arXiv 2404.02905 section 5.3). With it, or with
            ``more_smooth``, the image is not made of the drawn tokens alone.
        max_batch: images computed at a time, with the same tokens. None: all, and on a device without memory for them
            half as many, until they fit.
        cuda_graph: capture the whole generation in a CUDA graph, or replay one, with the same tokens. None: on a CUDA
            device, the second time that up to 32 images are asked for with the same arguments but for labels and seed,
            under the same settings of torch, of a model whose weights have not moved; without a graph where there can
            be none. True: at once, RuntimeError where there can be none. False: no graph.

    The first generation by a graph also runs without it and takes the time to capture: several times that of a
    generation without one. A device keeps the four graphs last used, which share the memory that the largest
    needs, beside their results: about what a generation without a graph takes, but for as long as a graph is kept, and
    under autocast a copy of the weights in 16 bits. `varkern.engine.clear_graphs` frees it. Weights may change in
    place; a model that is moved, converted or given other tensors is captured anew. Generations by graphs run one after
    another on a device.

    ``more_smooth`` in float32 runs the reference ops unless a backend is asked for. Two threads may generate with one
    model, unless ``varkern.use_backend("reference")`` is in force, which keeps caches in the modules. Raises ValueError
    for arguments outside their domain before anything is drawn, torch.OutOfMemoryError where one image does not fit.
    """
    call = _CheckedCall.checked(var, batch, labels, seed, Options(cfg, top_k, top_p, more_smooth, keep), max_batch)
    captured = graphs.GraphRequest(
        var,
        call.batch,
        call.noise,
        call.options,
        call.backend,
        functools.partial(_computed, call.options),
    )
    why_not = captured.why_not(max_batch)
    if cuda_graph and why_not is not None:
        raise RuntimeError(graphs.refusal(why_not))
    device = captured.device
    with torch.no_grad(), use_backend(call.backend):
        if call.backend == "reference":
            with graphs.running_eagerly(device):
                return var.run_gathered(call.reference)
        label_B = call.labels
        if label_B is None:
            with graphs.running_eagerly(device):
                label_B = call.noise.labels(var)
        if cuda_graph is not False and why_not is None:
            result = graphs.of_device(device).generate(captured, label_B, required=bool(cuda_graph))
            if result is not None:
                return result
        with graphs.running_eagerly(device):
            return var.run_gathered(functools.partial(call.in_parts_that_fit, label_B, max_batch))


def _computed(options: Options, var: Transformer, label_B: Tensor, noise: NoiseSource) -> Generation:
    """A batch, whole. What a CUDA graph holds."""
    steps = list(cached_scales(var, label_B, noise, options))
    return Generation(_images(var, steps[-1].f_hat), [step.tokens for step in steps])


def _images(var: Transformer, f_hat: Tensor) -> Tensor:
    return var.vae_proxy[0].fhat_to_img(f_hat).add_(1).mul_(0.5)


def generate_scales(
    var: Transformer,
    batch: int,
    labels: int | Sequence[int] | Tensor | None,
    seed: int | Sequence[int] | None = None,
    *,
    cfg: float | Tensor = 1.5,
    top_k: int = 0,
    top_p: float = 0.0,
    more_smooth: bool = False,
    keep: Keep | None = None,
) -> Iterator[ScaleImages]:
    """`generate`, yielding the images after each scale: coarse, then finer; the last are `generate`'s.

    Decoding every scale costs as much as the last one, so this takes longer than `generate`. Arguments are checked at
    the call, not at the first step. A caller may stop at any scale.
    """
    call = _CheckedCall.checked(var, batch, labels, seed, Options(cfg, top_k, top_p, more_smooth, keep), None)
    return call.stream()


@dataclass(frozen=True)
class _CheckedCall:
    """A checked call of `generate`."""

    var: Transformer
    batch: int
    labels: Tensor | None
    noise: ReplayableNoise
    options: Options
    backend: str | None

    @classmethod
    def checked(
        cls,
        var: Transformer,
        batch: int,
        labels: int | Sequence[int] | Tensor | None,
        seed: int | Sequence[int] | None,
        options: Options,
        max_batch: int | None,
    ) -> _CheckedCall:
        check_model(var)
        batch = check_batch("the batch size B", batch)
        options = check_options(var, batch, options)
        label_B = check_labels(var, batch, labels)
        check_keep(var, batch, options.keep)
        check_batch("max_batch", 1 if max_batch is None else max_batch)
        backend, device = current_backend(), var.lvl_1L.device
        if options.more_smooth and backend is None and compute_dtype(var.head) == torch.float32:
            # The mixture of codes amplifies every rounding by up to 1 / tau = 74, over all scales: only the published
            # order of operations gives the published image within 1e-3.
            backend = "reference"
        noise: ReplayableNoise
        if seed is None or isinstance(seed, SupportsIndex):
            generator = None if seed is None else torch.Generator(device=device).manual_seed(check_seed(seed))
            noise = BatchNoise(batch, device, generator)
        else:
            noise = ImageNoise(check_seeds(batch, seed), device)
            if backend == "reference":
                raise ValueError(
                    "a seed for each image needs the engine: give one seed, or leave the reference backend"
                    + (" (float32 more_smooth runs on it; name another by use_backend)" if options.more_smooth else "")
                )
        return cls(var, batch, label_B, noise, options, backend)

    def reference(self) -> Generation:
        steps = list(self.steps())
        return Generation(_images(self.var, steps[-1].f_hat), [step.tokens for step in steps])

    def in_parts_that_fit(self, label_B: Tensor, max_batch: int | None) -> Generation:
        """The batch, ``max_batch`` images at a time, or as many as there is memory for."""
        size = self.batch if max_batch is None else min(self.batch, int(max_batch))
        while True:
            # Parts draw from copies of the generators: what fails for lack of memory has drawn nothing.
            with contextlib.suppress(torch.OutOfMemoryError):
                return self.in_parts(label_B, size)
            if graphs.make_room(self.var.lvl_1L.device):
                continue
            if size == 1 or max_batch is not None:
                raise torch.OutOfMemoryError(
                    f"there is no memory to generate {size} image{'s' * (size > 1)} at a time; the model is unchanged. "
                    "Free memory, give a smaller max_batch, or use a 16-bit model or autocast"
                )
            size = (size + 1) // 2
            torch.cuda.empty_cache()

    def in_parts(self, label_B: Tensor, size: int) -> Generation:
        """The batch, ``size`` images at a time."""
        parts = []
        for begin in range(0, self.batch, size):
            end = min(begin + size, self.batch)
            noise = self.noise.part(begin, end)
            parts.append(_computed(self.options.part(begin, end), self.var, label_B[begin:end], noise))
        noise.finish()
        if len(parts) == 1:
            return parts[0]
        tokens = [torch.cat(maps) for maps in zip(*(part.tokens for part in parts), strict=True)]
        return Generation(torch.cat([part.images for part in parts]), tokens)

    def steps(self) -> Iterator[ScaleStep]:
        label_B = self.labels if self.labels is not None else self.noise.labels(self.var)
        if self.backend == "reference":
            assert isinstance(self.noise, BatchNoise)
            return reference_scales(self.var, label_B, self.noise.generator, self.options)
        return cached_scales(self.var, label_B, self.noise, self.options)

    def stream(self) -> Iterator[ScaleImages]:
        # Neither no_grad nor the backend may leak into the caller between two steps.
        steps: Iterator[ScaleStep] | None = None
        try:
            while True:
                with torch.no_grad(), use_backend(self.backend), graphs.running_eagerly(self.var.lvl_1L.device):
                    steps = self.steps() if steps is None else steps
                    step = self.var.run_gathered(functools.partial(next, steps, None))
                    if step is None:
                        return
                    images = _images(self.var, step.f_hat)
                yield ScaleImages(step.scale, step.tokens, images)
        finally:
            if steps is not None and hasattr(steps, "close"):
                steps.close()
