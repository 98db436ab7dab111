"""A training step of the transformer, forward, backward and AdamW, on tokens that are there: eager and varkern.

As a trainer runs them: on a GPU a sample is ``STEPS`` steps in succession between two events, none of which waits for
the device or empties its cache, and a row's time is a step's share. So what the host takes to launch a step is hidden
behind the step before where that takes longer on the device, and counts where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shapes
import torch
import torch.nn.functional as F
from measure import settings

import varkern

# (depth, batch)
SIZES = {"cpu": (2, 1) if settings.smoke else (8, 4), "cuda": (2, 1) if settings.smoke else (16, 64)}
STEPS = 4  # on a GPU; a CPU's follow each other anyway


def step_of(depth: int, batch: int, device: torch.device) -> tuple[Callable[..., torch.Tensor], int]:
    """A function that takes one step on a backend, compiled or not, and returns its loss; and a step's arithmetic."""
    torch.manual_seed(0)
    vae = varkern.VQVAE(ch=32, v_patch_nums=shapes.PATCH_NUMS_256, test_mode=True)
    var = varkern.VAR(vae, depth=depth, embed_dim=64 * depth, num_heads=depth, attn_l2_norm=True).to(device)
    var.init_weights(init_std=-1)
    optimizer = torch.optim.AdamW(var.parameters(), lr=1e-4)
    labels = torch.randint(1000, (batch,), device=device)
    x = torch.randn(batch, var.L - 1, var.Cvae, device=device)
    tokens = torch.randint(var.V, (batch, var.L), device=device)

    compiled = torch.compile(var)  # nothing is compiled before it is called

    def step(backend: str | None, compile: bool = False) -> torch.Tensor:
        model = compiled if compile else var
        with varkern.use_backend(backend), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(labels, x).flatten(0, 1), tokens.flatten())
        with varkern.use_backend(backend):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()  # a number would wait for the device

    once = sum(p.numel() for n, p in var.named_parameters() if "ada_lin" not in n and "emb" not in n and "pos" not in n)
    return step, 6 * once * batch * var.L


@pytest.mark.benchmark(group="training step")
def test_training_step(compare: Any, device: torch.device) -> None:
    depth, batch = SIZES[device.type]
    step, flop = step_of(depth, batch, device)
    with torch.random.fork_rng():
        losses = []
        for backend in ("reference", None):
            torch.manual_seed(1)  # the labels that are dropped
            losses.append(float(step_of(depth, 1, device)[0](backend)))
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]
    calls = {"reference": lambda: step("reference")}
    if settings.compile:
        calls["torch.compile"] = lambda: step("reference", compile=True)
    calls["varkern"] = lambda: step(None)
    steps = 1 if device.type == "cpu" else STEPS
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    facts = {"shape": (batch, 680), "dtype": dtype, "depth": depth, "batch": batch}
    compare(calls, moved=0, flop=flop, steps=steps, case=f"d{depth}-B{batch}", **facts)
