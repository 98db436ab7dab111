"""The models that the end-to-end benchmarks run, with random weights, and the least arithmetic that they need."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import measure
import shapes
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import varkern


def build(
    depth: int, device: torch.device, patch_nums: Sequence[int] = shapes.PATCH_NUMS, ch: int = 160
) -> varkern.VAR:
    """A transformer of the published form, its tokenizer in ``vae_proxy[0]``; ch = 160 is the published tokenizer."""
    torch.manual_seed(0)
    # Fresh weights say little: conditions near zero, which switch the blocks off, and logits that are nearly flat. With
    # these a wrong result of any op changes tokens, and top-k and top-p have something to choose.
    _, var = varkern.build_vae_var(device, patch_nums, depth=depth, ch=ch, init_adaln_gamma=1.0, init_head=1.0)
    with torch.no_grad():
        var.class_emb.weight.div_(var.class_emb.weight.std())
    return var.eval()


@contextlib.contextmanager
def as_the_demo_runs(device: torch.device) -> Iterator[None]:
    """On a GPU the published demo's settings, float32 weights under float16 autocast with TF32; on a CPU float32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = True
    measure.note_float32()
    try:
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def compiled_twin(var: varkern.VAR) -> varkern.VAR:
    """The same weights, every block compiled: what torch.compile makes of the reference.

    Each scale has a shape of its own, so ten versions of a block; without CUDA graphs, since the caches that grow
    outlive the call that made them.
    """
    torch._dynamo.config.cache_size_limit = 64
    twin = copy.copy(var)
    twin._modules = dict(var._modules)
    mode = "max-autotune-no-cudagraphs" if var.lvl_1L.is_cuda else None
    twin.blocks = nn.ModuleList([torch.compile(block, dynamic=False, mode=mode) for block in var.blocks])
    return twin


def half_twin(var: varkern.VAR) -> varkern.VAR:
    """The same weights in float16, tokenizer too."""
    twin = copy.deepcopy(var)
    twin.vae_proxy = (copy.deepcopy(var.vae_proxy[0]).half(),)
    twin.vae_quant_proxy = (twin.vae_proxy[0].quantize,)
    return twin.half()


def generation_work(var: varkern.VAR, batch: int, itemsize: int) -> tuple[int, int]:
    """(bytes, operations) of a generation with guidance: weights once a scale, AdaLN and decoder once an image.

    The decoder counts as it is written, with full convolutions after nearest upsampling.
    """
    C, depth, lengths = var.C, var.depth, [p * p for p in var.patch_nums]
    pairs = sum(n * sum(lengths[: i + 1]) for i, n in enumerate(lengths))
    linear, ada, head = 12 * C * C * depth, 6 * C * C * depth + 2 * C * C, C * var.V
    flop = 2 * linear * 2 * batch * var.L + 4 * C * pairs * 2 * batch * depth
    flop += 2 * ada * 2 * batch + 2 * head * batch * var.L + batch * decoder_flop(var.vae_proxy[0])
    decoder = sum(p.numel() for p in var.vae_proxy[0].decoder.parameters())
    return (len(lengths) * (linear + head) + ada + decoder) * itemsize, flop


def decoder_flop(vae: varkern.VQVAE) -> int:
    """Operations to decode one image."""
    side = vae.quantize.v_patch_nums[-1]
    return _flop(vae.decoder, torch.empty(1, vae.Cvae, side, side, device="meta"))


def encoder_flop(vae: varkern.VQVAE) -> int:
    """Operations to encode one image into features."""
    side = vae.quantize.v_patch_nums[-1] * vae.downsample
    return _flop(vae.encoder, torch.empty(1, 3, side, side, device="meta"))


def _flop(module: nn.Module, x: torch.Tensor) -> int:
    twin: Any = copy.deepcopy(module).to("meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), varkern.use_backend("reference"):
        twin(x)
    return counter.get_total_flops()


def same_tokens(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The share of equal tokens."""
    return float((torch.cat(list(got), 1) == torch.cat(list(want), 1)).double().mean())
