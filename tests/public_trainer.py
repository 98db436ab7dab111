"""A trainer as people write one around the published models: what it reads, replaces and calls of them.

Own code after the description of the published training: generator replaced, DDP around the transformer, parameter
groups by name, autocast with gradient clipping, accumulation, progressive training, evaluation, nested state dicts.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

NO_DECAY = (
    *("cls_token", "start_token", "task_token", "cfg_uncond", "pos_embed", "pos_1LC", "pos_start", "start_pos"),
    *("lvl_embed", "gamma", "beta", "ada_gss", "moe_bias", "scale_mul"),
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        plain = parameter.ndim == 1 or name.endswith("bias") or any(key in name for key in NO_DECAY)
        groups[0.0 if plain else weight_decay].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


class Amp:
    """Autocast, loss scaling and clipping around an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], bf16: bool, clip: float):
        self.optimizer, self.parameters, self.clip = optimizer, parameters, clip
        self.context = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11, enabled=not bf16)

    def backward(self, loss: torch.Tensor, stepping: bool, accumulate: int) -> float | None:
        self.scaler.scale(loss / accumulate).backward()
        if not stepping:
            return None
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> dict:
        return {"scaler": self.scaler.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.scaler.load_state_dict(state["scaler"])
        self.optimizer.load_state_dict(state["optimizer"])


class Trainer:
    def __init__(self, device: str, vae_local, var_wo_ddp, var, bf16: bool = True, lr: float = 3e-3) -> None:
        self.vae_local, self.quantize_local = vae_local, vae_local.quantize
        self.var, self.var_wo_ddp = var, var_wo_ddp
        optimizer = torch.optim.AdamW(parameter_groups(var_wo_ddp, 0.05), lr=lr, betas=(0.9, 0.95))
        self.var_opt = Amp(optimizer, list(var_wo_ddp.parameters()), bf16, clip=2.0)
        del self.var_wo_ddp.rng
        self.var_wo_ddp.rng = torch.Generator(device=device)
        self.patch_nums = var_wo_ddp.patch_nums
        self.L, self.last_l = sum(pn * pn for pn in self.patch_nums), self.patch_nums[-1] ** 2
        self.begin_ends, self.loss_weight = [], torch.ones(1, self.L, device=device) / self.L
        at = 0
        for pn in self.patch_nums:
            self.begin_ends.append((at, at + pn * pn))
            at += pn * pn
        self.prog_it, self.last_prog_si = 0, -1

    def train_step(self, stepping: bool, accumulate: int, images, labels, prog_si: int, prog_warmup: float = 0):
        self.var_wo_ddp.prog_si = self.vae_local.quantize.prog_si = prog_si
        if self.last_prog_si != prog_si:
            self.last_prog_si, self.prog_it = prog_si, 0
        self.prog_it += 1
        newest = max(min(self.prog_it / prog_warmup, 1), 0.01) if prog_warmup else 1.0
        if prog_si == len(self.patch_nums) - 1:
            prog_si = -1
            self.var_wo_ddp.prog_si = self.vae_local.quantize.prog_si = -1
        B, V = len(labels), self.vae_local.vocab_size
        if hasattr(self.var, "require_backward_grad_sync"):
            self.var.require_backward_grad_sync = stepping
        maps = self.vae_local.img_to_idxBl(images)
        target = torch.cat(maps, dim=1)
        inputs = self.quantize_local.idxBl_to_var_input(maps)
        with self.var_opt.context:
            assert callable(self.var_wo_ddp.forward)  # public code reads it, to compile it
            logits = self.var(labels, inputs)
            loss = F.cross_entropy(logits.view(-1, V), target.view(-1), reduction="none").view(B, -1)
            if prog_si >= 0:
                begin, end = self.begin_ends[prog_si]
                assert logits.shape[1] == target.shape[1] == end
                weight = self.loss_weight[:, :end].clone()
                weight[:, begin:end] *= min(max(newest, 0), 1)
            else:
                weight = self.loss_weight
            loss = loss.mul(weight).sum(dim=-1).mean()
        norm = self.var_opt.backward(loss, stepping, accumulate)
        self.var_wo_ddp.prog_si = self.vae_local.quantize.prog_si = -1
        return loss.item(), norm

    @torch.no_grad()
    def evaluate(self, loader) -> dict[str, float]:
        training = self.var_wo_ddp.training
        self.var_wo_ddp.eval()
        sums, seen = torch.zeros(4), 0
        for images, labels in loader:
            B, V = len(labels), self.vae_local.vocab_size
            maps = self.vae_local.img_to_idxBl(images)
            target = torch.cat(maps, dim=1)
            assert callable(self.var_wo_ddp.forward)
            logits = self.var_wo_ddp(labels, self.quantize_local.idxBl_to_var_input(maps))
            right = (logits.argmax(-1) == target).float() * 100
            pairs = (logits, target), (logits[:, -self.last_l :], target[:, -self.last_l :])
            losses = [F.cross_entropy(part.reshape(-1, V), goal.reshape(-1)) for part, goal in pairs]
            sums += torch.stack([*losses, right.mean(), right[:, -self.last_l :].mean()]) * B
            seen += B
        self.var_wo_ddp.train(training)
        return dict(zip(("Lm", "Lt", "Accm", "Acct"), (sums / seen).tolist(), strict=True))

    def get_config(self) -> dict:
        return {"prog_it": self.prog_it, "last_prog_si": self.last_prog_si, "patch_nums": self.patch_nums}

    def state_dict(self) -> dict:
        state = {"config": self.get_config()}
        for name in ("var_wo_ddp", "vae_local", "var_opt"):
            module = getattr(self, name)
            state[name] = getattr(module, "_orig_mod", module).state_dict()
        return state

    def load_state_dict(self, state: dict, strict: bool = True) -> None:
        for name in ("var_wo_ddp", "vae_local"):
            module = getattr(self, name)
            missing, unexpected = getattr(module, "_orig_mod", module).load_state_dict(state[name], strict=strict)
            assert not missing
            assert not unexpected
        self.var_opt.load_state_dict(state["var_opt"])
        self.prog_it, self.last_prog_si = state["config"]["prog_it"], state["config"]["last_prog_si"]


def distributed(var: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(var, find_unused_parameters=False, broadcast_buffers=False)
