"""The training loop that both stages share: schedule, accumulation, clipping, averaging, exact resume."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from varkern.data.config import check, resolve_device
from varkern.data.datasets import Labelled, batches, epoch_order
from varkern.train.config import PRECISIONS, LoopConfig
from varkern.train.run import Run, Stopped, random_state, restore_random_state
from varkern.train.schedule import lr_factor, parameter_groups, peak_lr, weight_decay_at

__all__ = ["Average", "Loop"]


class Clock(NamedTuple):
    """Wall-clock and processor seconds."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: tuple[float, ...]) -> Clock:  # type: ignore[override]
        return Clock(self.wall + other[0], self.cpu + other[1])

    def __sub__(self, other: tuple[float, ...]) -> Clock:
        return Clock(self.wall - other[0], self.cpu - other[1])


class Average:
    """Exponential moving average of a module's parameters, without bias towards the initial weights.

    The decay is ``min(decay, (1 + n) / (10 + n))`` at update n, so that the average forgets the start early on.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in module.named_parameters():
            if name in self.shadow:
                self.shadow[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Within the block ``module`` holds the averaged weights."""
        live = {name: p.detach().clone() for name, p in module.named_parameters() if name in self.shadow}
        self.copy(self.shadow, module)
        try:
            yield
        finally:
            self.copy(live, module)

    @torch.no_grad()
    def copy(self, source: dict[str, torch.Tensor], module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if name in source:
                parameter.copy_(source[name])


class Loop:
    """One training stage. A subclass gives ``loss`` and ``validate`` and may act in ``before_step``.

    Every random draw comes from the global generators, which the checkpoint holds, or is a function of
    (seed, epoch, index) or (seed, step): a run killed at any moment and resumed gives bit-identical weights.
    """

    def __init__(self, config: LoopConfig, run: Run, model: nn.Module, train: Labelled, held_out: Labelled) -> None:
        self.config, self.run, self.model, self.train_images = config, run, model, train
        self.device = resolve_device(config.device)
        model.to(self.device)
        check(
            len(held_out) > 0 or not config.validate_every,
            f"held_out is {config.held_out}, which leaves nothing to validate on; raise it, or set validate_every to 0",
        )
        self.steps_per_epoch = len(train) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size is {config.batch_size} but there are only {len(train)} training images; lower it"
            )
        self.total_steps = config.epochs * self.steps_per_epoch
        self.warmup_steps = round(config.warmup_epochs * self.steps_per_epoch)
        self.step = self.stop = 0  # stop: the signal that asks for it
        self.peak_lr = peak_lr(config.base_lr, config.batch_size)
        self.optimizer = torch.optim.AdamW(parameter_groups(model), lr=self.peak_lr, betas=(0.9, 0.95))
        self.dtype = PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.average = Average(model, config.ema_decay) if config.ema_decay else None
        self.spent = self.started = Clock()

    # ---- what a stage adds -------------------------------------------------------------------------------------
    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of one micro-batch and metrics to log."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Metrics on the held-out images, of the averaged weights when there are any."""
        raise NotImplementedError

    def before_step(self) -> dict[str, Any]:
        """Called before each optimizer step; a non-empty result is logged."""
        return {}

    # ---- the loop ----------------------------------------------------------------------------------------------
    def fit(self) -> None:
        """Train to the last step, from the checkpoint if the run has one.

        SIGTERM and the first SIGINT end the step, write a checkpoint and raise `Stopped`.
        """
        state = self.run.load()
        if state is not None:
            self.load_state(state)
        self.model.train()
        self.started = Clock.now()
        with (
            self.signals(),
            tqdm(total=self.total_steps, initial=self.step, desc=self.run.folder.name, unit="step") as progress,
        ):
            while self.step < self.total_steps:
                self.fit_epoch(progress)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within the block SIGTERM and the first SIGINT are noted in ``stop``; the main thread alone can do so."""

        def note(signum: int, frame: object) -> None:
            self.stop = signum
            signal.signal(signal.SIGINT, signal.default_int_handler)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def fit_epoch(self, progress: tqdm) -> None:
        config = self.config
        epoch, start = divmod(self.step, self.steps_per_epoch)
        self.train_images.set_epoch(epoch)
        order = epoch_order(len(self.train_images), config.seed, epoch)
        began = time.perf_counter()
        for images, labels in batches(
            self.train_images, order, config.batch_size, start=start, drop_last=True, workers=config.workers
        ):
            noted = self.before_step()
            if noted:
                self.run.log(self.step, noted)
            logged = (self.step + 1) % config.log_every == 0 or self.step + 1 == self.total_steps
            metrics = self.train_step(images, labels)
            progress.update()
            if logged:
                rate = config.batch_size / (time.perf_counter() - began)
                self.run.log(self.step, {"epoch": epoch, **metrics, "images_per_second": rate})
                progress.set_postfix({k: f"{v:.4g}" for k, v in list(metrics.items())[:4]}, refresh=False)
            ended = self.step % self.steps_per_epoch == 0
            last = self.step == self.total_steps
            due = ended and bool(config.validate_every) and ((epoch + 1) % config.validate_every == 0 or last)
            if due:
                self.run.log(self.step, {"epoch": epoch, **{f"val_{k}": v for k, v in self.validated().items()}})
            stop = self.stop
            if due or last or stop or self.step % config.checkpoint_every == 0:
                self.run.save(self.state())
            if stop and not last:
                raise Stopped(stop, self.run.folder, self.step)
            began = time.perf_counter()

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """One optimizer step on a global batch; metrics are means over the micro-batches."""
        config = self.config
        factor = lr_factor(self.step, self.total_steps, self.warmup_steps, config.lr_end, config.lr_schedule)
        decay = weight_decay_at(self.step, self.total_steps, config.weight_decay, config.weight_decay_end)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = self.peak_lr * factor, decay * group["decay_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        for part, part_labels in zip(images.chunk(config.accumulate), labels.chunk(config.accumulate), strict=True):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss, metrics = self.loss(part.to(self.device), part_labels.to(self.device))
            self.scaler.scale(loss / config.accumulate).backward()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / config.accumulate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or float("inf"))
        if self.dtype != torch.float16 and not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm.item()} at step {self.step}; lower base_lr or lengthen the warm-up"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        self.step += 1
        return {**totals, "grad_norm": norm.item(), "lr": self.peak_lr * factor, "weight_decay": decay}

    def validated(self) -> dict[str, float]:
        """``validate`` on the weights to be exported, leaving mode and random states as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), self.exported():
            torch.manual_seed(self.config.seed)
            self.model.eval()
            try:
                return self.validate()
            finally:
                self.model.train()

    @contextmanager
    def exported(self) -> Iterator[None]:
        """Within the block the model holds the weights that are validated and exported."""
        if self.average is None:
            yield
        else:
            with self.average.applied(self.model):
                yield

    # ---- state -------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else {"n": self.average.updates, "shadow": self.average.shadow},
            "random": random_state(self.device),
            "spent": list(self.spent + (Clock.now() - self.started)),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.updates = state["average"]["n"]
            for name, value in state["average"]["shadow"].items():
                self.average.shadow[name].copy_(value)
        self.step = state["step"]
        self.spent = Clock(*state["spent"])
        restore_random_state(state["random"], self.device)
