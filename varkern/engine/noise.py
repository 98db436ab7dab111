"""The randomness of a generation: exponential noise in the order in which the published model draws it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from varkern.engine.arguments import draw_labels
from varkern.modules.transformer import Transformer
from varkern.ops.sampling import draw_noise


class NoiseSource(Protocol):
    """What tokens are drawn with."""

    def noise(self, n: int, V: int) -> Tensor:
        """Exponential noise (B * n, V) float32 for n tokens an image."""


class BatchNoise:
    """One generator for the whole batch: `noise` of n tokens an image is one draw of (B * n, V).

    generator: None is the device's global one.
    """

    def __init__(self, batch: int, device: torch.device, generator: torch.Generator | None) -> None:
        self.batch, self.device, self.generator = batch, device, generator

    @property
    def generators(self) -> list[torch.Generator]:
        """What draws."""
        return [_default(self.device, self.generator)]

    def drawn_by(self, generators: Sequence[torch.Generator]) -> BatchNoise:
        """The same noise from generators in the state of these."""
        return BatchNoise(self.batch, self.device, generators[0])

    def labels(self, var: Transformer) -> Tensor:
        """Classes (B,), drawn uniformly."""
        return draw_labels(var, self.batch, self.generator)

    def noise(self, n: int, V: int) -> Tensor:
        """(B * n, V) float32."""
        return draw_noise(self.batch * n, V, self.device, self.generator)

    def part(self, begin: int, end: int) -> BatchPartNoise:
        """The noise of images begin to end - 1 alone; this one stays where it is."""
        return BatchPartNoise(self, begin, end)


class BatchPartNoise:
    """Some images' rows of a `BatchNoise`: the whole is drawn from a copy of the generator, and cut."""

    def __init__(self, whole: BatchNoise, begin: int, end: int) -> None:
        self.whole, self.begin, self.end = whole, begin, end
        self.generator = torch.Generator(device=whole.device)
        self.generator.set_state(_default(whole.device, whole.generator).get_state())

    def noise(self, n: int, V: int) -> Tensor:
        drawn = draw_noise(self.whole.batch * n, V, self.whole.device, self.generator)
        return drawn[self.begin * n : self.end * n]

    def finish(self) -> None:
        """The part has drawn everything: the whole goes on from here."""
        _default(self.whole.device, self.whole.generator).set_state(self.generator.get_state())


class ImageNoise:
    """A generator an image: what an image draws does not depend on the batch that it is in."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.device = device
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def drawn_by(self, generators: Sequence[torch.Generator]) -> ImageNoise:
        noise = ImageNoise((), self.device)
        noise.generators = list(generators)
        return noise

    def labels(self, var: Transformer) -> Tensor:
        return torch.cat([draw_labels(var, 1, generator) for generator in self.generators])

    def noise(self, n: int, V: int) -> Tensor:
        return torch.cat([draw_noise(n, V, self.device, generator) for generator in self.generators])

    def part(self, begin: int, end: int) -> ImageNoise:
        copies = [torch.Generator(device=self.device) for _ in self.generators[begin:end]]
        for copy, generator in zip(copies, self.generators[begin:end], strict=True):
            copy.set_state(generator.get_state())
        return self.drawn_by(copies)

    def finish(self) -> None:
        """Nobody draws after the images: there is nothing to go on with."""


# Of a whole generation: a graph may draw by generators of its own in place of these.
ReplayableNoise = BatchNoise | ImageNoise


def _default(device: torch.device, generator: torch.Generator | None) -> torch.Generator:
    if generator is not None:
        return generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
