"""A training step of the transformer, forward, backward and AdamW, on tokens that are there: eager and varkern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shapes
import torch
import torch.nn.functional as F

import varkern


def step_of(depth: int, batch: int, device: torch.device) -> tuple[Callable[[str | None], float], int]:
    """A function that takes one step on a backend and returns its loss; and the least arithmetic of a step."""
    torch.manual_seed(0)
    vae = varkern.VQVAE(ch=32, v_patch_nums=shapes.PATCH_NUMS_256, test_mode=True)
    var = varkern.VAR(vae, depth=depth, embed_dim=64 * depth, num_heads=depth, attn_l2_norm=True).to(device)
    var.init_weights(init_std=-1)
    optimizer = torch.optim.AdamW(var.parameters(), lr=1e-4)
    labels = torch.randint(1000, (batch,), device=device)
    x = torch.randn(batch, var.L - 1, var.Cvae, device=device)
    tokens = torch.randint(var.V, (batch, var.L), device=device)

    def step(backend: str | None) -> float:
        with varkern.use_backend(backend), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(var(labels, x).flatten(0, 1), tokens.flatten())
        with varkern.use_backend(backend):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    once = sum(p.numel() for n, p in var.named_parameters() if "ada_lin" not in n and "emb" not in n and "pos" not in n)
    return step, 6 * once * batch * var.L


@pytest.mark.benchmark(group="training step")
def test_training_step(compare: Any, device: torch.device) -> None:
    depth, batch = (8, 4) if device.type == "cpu" else (16, 64)
    step, flop = step_of(depth, batch, device)
    with torch.random.fork_rng():
        losses = []
        for backend in ("reference", None):
            torch.manual_seed(1)  # the labels that are dropped
            losses.append(step_of(depth, 1, device)[0](backend))
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]
    calls = {"reference": lambda: step("reference"), "varkern": lambda: step(None)}
    compare(calls, moved=1, flop=flop, shape=(batch, 680), depth=depth)
