"""Other people's code around the tokenizer: adapters that train, and libraries that wrap, shard, quantize."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from published_tokenizer import (
    EXACT,
    Lora,
    Ops,
    bent,
    both,
    check_as_published,
    count,
    images,
    published,
    quantizer_results,
    replace,
    tiny,
    tokens,
)
from test_dropin_tokenizer import CONVS, PHI
from torch import Tensor, nn

import varkern


def gradients(vae: varkern.VQVAE, dtype: torch.dtype) -> dict[str, Tensor]:
    vae.zero_grad()
    torch.manual_seed(4)
    image, _, loss = vae(images(dtype))
    ((image * torch.randn_like(image)).sum() + loss).backward()
    return {name: p.grad.clone() for name, p in vae.named_parameters() if p.requires_grad}


def check_gradients(vae: varkern.VQVAE) -> dict[str, Tensor]:
    """Codes are searched in float32, and everything after them is float64 but for f_hat: a relative bound of 1e-3."""
    got = gradients(vae, torch.float64)
    with published():
        want = gradients(vae, torch.float64)
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-3)
        assert error < 1e-3, f"{name}: {error}"
    return got


LORA = ["decoder.up.0.block.0.conv1", "decoder.up.0.block.0.nin_shortcut", "encoder.mid.attn_1.qkv", PHI]


@pytest.mark.parametrize("trained", ["everything", "adapters", "one adapter"])
def test_gradients_of_adapters(trained: str) -> None:
    vae = tiny(torch.float64).requires_grad_(trained == "everything").train()
    for name in LORA[-1:] if trained == "one adapter" else LORA:
        replace(vae, name, Lora(vae.get_submodule(name)))
    got = check_gradients(vae)
    adapters = [name for name in got if ".up.weight" in name or ".down.weight" in name]
    assert all(got[name].norm() > 1e-3 for name in adapters)
    assert len(adapters) == 2 * (1 if trained == "one adapter" else len(LORA))


def test_a_trained_shortcut_is_not_taken_into_the_convolution() -> None:
    """What alone has a gradient may be the residual."""
    vae = tiny()
    shortcut = vae.decoder.up[0].block[0].nin_shortcut.requires_grad_(True)
    with Ops() as ops:
        vae.decoder(torch.randn(2, 8, 4, 4)).sum().backward()
    assert shortcut.weight.grad.norm() > 0
    assert ops.count["conv3x3"] > 5  # of what comes before it


def test_autocast_around_hooked_layers() -> None:
    """As near to float32 as the published order in bfloat16 is: a rounding more or less a layer."""
    for name in ("decoder.mid.block_1.norm1", "decoder.mid.attn_1.qkv", "decoder.up.0.block.0", "encoder.conv_in"):
        vae = tiny()
        vae.get_submodule(name).register_forward_hook(lambda m, args, out: bent(out))
        with torch.no_grad(), published():
            want = both(vae)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got = both(vae)
            with published():
                eager = both(vae)
        assert (got - want).norm() <= 1.5 * (eager - want).norm() + 1e-3 * want.norm()


def test_lora_merged_and_apart_are_one() -> None:
    vae, names = tiny(torch.float64), [n for n in CONVS if "downsample" not in n]
    for name in names:
        replace(vae, name, Lora(vae.get_submodule(name)))
    merged = copy.deepcopy(vae)
    for name in names:
        replace(merged, name, merged.get_submodule(name).merged())
    with torch.no_grad():
        torch.testing.assert_close(both(vae), both(merged), rtol=1e-7, atol=1e-7)


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    vae = tiny(torch.float64)
    plain = both(vae)
    targets = [name for name, m in vae.named_modules() if type(m) is nn.Conv2d]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(vae), config).double()
    wrapped = model.base_model.model
    check_as_published(wrapped, plain)
    check_gradients(wrapped.train())
    merged = model.eval().merge_and_unload()
    with torch.no_grad():
        want = both(merged)
        assert count(lambda: both(merged)) == count(lambda: both(vae))
        with published():
            torch.testing.assert_close(want, both(merged), **EXACT)


def test_peft_adapts_the_codebook() -> None:
    peft = pytest.importorskip("peft")
    vae = tiny()
    config = peft.LoraConfig(r=2, target_modules=["embedding"], init_lora_weights=False)
    wrapped = peft.get_peft_model(vae, config).base_model.model
    got = torch.no_grad()(quantizer_results)(wrapped)
    with published():
        want = torch.no_grad()(quantizer_results)(wrapped)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-4)


def test_offloaded_weights() -> None:
    accelerate = pytest.importorskip("accelerate")
    vae = tiny()
    idx, offloaded = tokens(vae), accelerate.cpu_offload(copy.deepcopy(vae), execution_device="cpu")
    assert offloaded.decoder.conv_in.weight.is_meta
    for same_shape in (True, False):
        got, want = (v.idxBl_to_img(idx, same_shape, last_one=True) for v in (offloaded, vae))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("root", [False, True])
def test_sharded_layers(root: bool) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    vae = tiny()
    idx, img, sharded = tokens(vae), images(), copy.deepcopy(vae).requires_grad_(True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in (*sharded.decoder.mid, sharded.decoder.conv_in, sharded.get_submodule(PHI)):
            fsdp.fully_shard(layer, mesh=mesh)
        if root:
            fsdp.fully_shard(sharded, mesh=mesh)
            for method in ("idxBl_to_img", "img_to_idxBl"):
                fsdp.register_fsdp_forward_method(sharded, method)
        image, _, loss = sharded(img)
        (image.sum() + loss).backward()
        with torch.no_grad():
            got, coded = sharded.idxBl_to_img(idx, True, last_one=True), sharded.img_to_idxBl(img)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(got, vae.idxBl_to_img(idx, True, last_one=True), rtol=1e-4, atol=1e-4)
    assert [t.shape for t in coded] == [t.shape for t in idx]


@pytest.mark.filterwarnings("ignore:.*(torch.ao|deprecated).*")
def test_a_quantized_codebook() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    vae = tiny()
    int8 = quantization.quantize_dynamic(vae, {nn.Embedding: quantization.float_qparams_weight_only_qconfig})
    idx = tokens(vae)
    with published():
        want = int8.idxBl_to_img(idx, True, last_one=True), int8.quantize.idxBl_to_var_input(idx)
    got = int8.idxBl_to_img(idx, True, last_one=True), int8.quantize.idxBl_to_var_input(idx)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)
