"""What public code reads of the tokenizer and gives it: attributes, memory, dtypes, schedules, compilers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published_tokenizer import SCHEDULE, count, images, published, quantizer_results, tiny, tokens
from safetensors.torch import load_file, save_file
from test_dropin_tokenizer import PHI
from test_flops import MISSING
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import varkern
from varkern.modules.schedule import phi_index

OBLONG = [(1, 1), (2, 2), (2, 3), (4, 5)]


def maps(vae: varkern.VQVAE, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, vae.Cvae, p, p, dtype=dtype) for p in SCHEDULE]


class TestAttributes:
    def test_quantizer(self) -> None:
        quantize = tiny(using_znorm=True, beta=0.5).quantize
        assert (quantize.vocab_size, quantize.Cvae, quantize.using_znorm, quantize.beta) == (16, 8, True, 0.5)
        assert (quantize.v_patch_nums, quantize.prog_si, quantize.record_hit) == (SCHEDULE, -1, 0)
        assert quantize.quant_resi_ratio == quantize.quant_resi[0.0].resi_ratio == 0.5
        assert quantize.embedding.weight.shape == (16, 8)
        assert quantize.ema_vocab_hit_SV.shape == (4, 16)

    def test_layers(self) -> None:
        vae = varkern.VQVAE(ch=32)
        for part in (vae.encoder, vae.decoder):
            assert (part.ch, part.num_resolutions, part.num_res_blocks, part.in_channels) == (32, 5, 2, 3)
        assert vae.encoder.downsample_ratio == vae.downsample == 16
        block = vae.decoder.up[4].block[0]
        assert (block.in_channels, block.out_channels) == (128, 128)
        assert (vae.decoder.mid.attn_1.C, vae.decoder.mid.attn_1.w_ratio) == (128, 128**-0.5)

    @pytest.mark.parametrize(("share", "n"), [(4, 4), (3, 3), (0, 4), (2, 2)])
    def test_ticks(self, share: int, n: int) -> None:
        resi = tiny(share_quant_resi=share).quantize.quant_resi
        margin = 1 / 12 if n == 4 else 1 / (2 * n)
        assert isinstance(resi.ticks, np.ndarray)
        assert np.array_equal(resi.ticks, np.linspace(margin, 1 - margin, n))
        of = list(resi) if share == 0 else list(resi.qresi_ls)
        for position in [k / 9 for k in range(10)]:
            assert resi[position] is of[int(np.argmin(np.abs(resi.ticks - position)))]
            assert phi_index(position, n) == int(np.argmin(np.abs(resi.ticks - position)))

    def test_eini(self) -> None:
        quantize = varkern.VectorQuantizer2(512, 8, False, v_patch_nums=SCHEDULE)
        before = quantize.embedding.weight.clone()
        quantize.eini(0)
        assert torch.equal(quantize.embedding.weight, before)
        quantize.eini(0.5)
        # 4096 draws of a normal distribution: its deviation is 0.5 to 1 / sqrt(8192), here to 5 times that.
        assert quantize.embedding.weight.std().item() == pytest.approx(0.5, rel=5 / math.sqrt(8192))
        assert quantize.embedding.weight.abs().max() <= 2
        quantize.eini(-64)
        weight = quantize.embedding.weight
        assert weight.abs().max() <= 64 / 512
        assert weight.std().item() == pytest.approx(0.125 / math.sqrt(3), rel=0.05)


class TestMemory:
    def test_results_own_their_memory(self, tmp_path: Path) -> None:
        vae, img = tiny(), images()
        features = torch.randn(2, 8, 4, 4)
        results = vae.img_to_idxBl(img) + vae.quantize.f_to_idxBl_or_fhat(features, to_fhat=True)
        results += vae.quantize.embed_to_fhat(maps(vae)) + vae.img_to_reconstructed_img(img)
        results.append(vae.quantize.embed_to_fhat(maps(vae), last_one=True))
        for tensor in results:
            tensor.view(-1)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        save_file({str(k): idx for k, idx in enumerate(results)}, tmp_path / "maps.safetensors")
        loaded = load_file(tmp_path / "maps.safetensors")
        assert all(torch.equal(loaded[str(k)], idx) for k, idx in enumerate(results))
        torch.save(results[0], tmp_path / "first.pt")
        assert (tmp_path / "first.pt").stat().st_size < 2000

    def test_nobody_elses_tensors_change(self) -> None:
        vae = tiny()
        given = [images(), *tokens(vae), *maps(vae), torch.randn(2, 8, 4, 4)]
        before = copy.deepcopy(given)
        vae.img_to_reconstructed_img(given[0])
        vae.idxBl_to_img(given[1:5], True)
        vae.quantize.idxBl_to_var_input(given[1:5])
        vae.embed_to_img(given[5:9], True)
        vae.embed_to_img(given[5:9], False)
        vae.fhat_to_img(given[9])
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


class TestArguments:
    @pytest.mark.parametrize("hooked", [False, True])
    def test_int32_tokens(self, hooked: bool) -> None:
        vae = tiny()
        if hooked:
            vae.get_submodule(PHI).register_forward_hook(lambda *_: None)
            vae.quantize.embedding.register_forward_hook(lambda *_: None)
        idx = tokens(vae)
        narrow, mixed = [i.int() for i in idx], [i.int() if k % 2 else i for k, i in enumerate(idx)]
        for call in (vae.quantize.idxBl_to_var_input, lambda i: vae.idxBl_to_img(i, True, last_one=True)):
            assert torch.equal(call(narrow), call(idx))
            assert torch.equal(call(mixed), call(idx))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("hooked", [False, True])
    def test_other_f_hats(self, dtype: torch.dtype, hooked: bool) -> None:
        """As in plain PyTorch: changed in place, of the dtype it has, what is added to it rounded once a scale."""
        vae = tiny()
        if hooked:
            vae.get_submodule(PHI).register_forward_hook(lambda *_: None)
        f_hat, codes = torch.randn(2, 8, 4, 4).to(dtype), maps(vae, dtype)
        want, eps = f_hat.clone().double(), torch.finfo(dtype).eps
        precise = copy.deepcopy(vae.quantize).double()
        for k, p in enumerate(SCHEDULE):
            got, following = vae.quantize.get_next_autoregressive_input(np.int64(k), np.int64(4), f_hat, codes[k])
            with published(), torch.no_grad():
                want, _ = precise.get_next_autoregressive_input(k, 4, want, codes[k].double())
            assert got is f_hat
            assert following.dtype == dtype
            # A rounding to dtype a scale, and one of the mean; what is added is a float32 sum of 72 products.
            bound = (k + 2) * want.abs().max() * (eps + 100 * torch.finfo(torch.float32).eps)
            assert (got - want).abs().max() <= bound
            side = SCHEDULE[k + 1] if k < 3 else p
            assert (following - F.interpolate(want, size=(side, side), mode="area")).abs().max() <= bound
        image = vae.fhat_to_img(f_hat)
        assert image.dtype == torch.float32
        assert torch.equal(image, vae.fhat_to_img(f_hat.float()))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_f_hat_under_autocast(self, dtype: torch.dtype) -> None:
        vae = tiny()
        f_hat, codes = torch.randn(2, 8, 4, 4).to(dtype), maps(vae)
        same = f_hat.clone()
        want = vae.quantize.get_next_autoregressive_input(1, 4, same, codes[1])
        with torch.autocast("cpu", torch.bfloat16):
            got = vae.quantize.get_next_autoregressive_input(1, 4, f_hat, codes[1])
            image = vae.fhat_to_img(f_hat)
        assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(got, want, strict=True))
        assert image.dtype == torch.bfloat16

    @pytest.mark.parametrize(("si", "SN"), [(1.0, 4), (4, 4), (-1, 4), (1, 3), ("1", 4), (None, 4)])
    def test_scale_index(self, si, SN) -> None:
        with pytest.raises(ValueError, match=r"give a scale in \[0, 3\] and the number of all, 4"):
            tiny().quantize.get_next_autoregressive_input(si, SN, torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 2))

    def test_batches_differ(self) -> None:
        for f_hat in (torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 4, 4).half()):
            with pytest.raises(ValueError, match="one batch size and device, got 2 on cpu and 1 on cpu"):
                tiny().quantize.get_next_autoregressive_input(1, 4, f_hat, torch.zeros(1, 8, 2, 2))


class TestSchedules:
    def test_other_maps_are_refused_and_the_advice_works(self) -> None:
        vae = tiny()
        bigger = [torch.randint(16, (2, n)) for n in (1, 4, 9, 25)]
        oblong = [torch.randint(16, (2, h * w)) for h, w in OBLONG]
        for idx in (bigger, oblong):
            with pytest.raises(ValueError, match=r"which has \[1, 4, 9, 16\]; .* as \(B, 8, h, w\) to embed_to_img"):
                vae.idxBl_to_img(idx, same_shape=True)
        codes = [vae.quantize.embedding(i).mT.unflatten(2, size) for i, size in zip(oblong, OBLONG, strict=True)]
        assert [i.shape[2:] for i in vae.embed_to_img(codes, all_to_max_scale=True)] == [(8, 10)] * 4
        grown = vae.embed_to_img(codes, all_to_max_scale=False)
        assert [i.shape[2:] for i in grown] == [(2 * h, 2 * w) for h, w in OBLONG]

    def test_a_rectangle_is_decoded_as_it_was_encoded(self) -> None:
        vae = tiny()
        img = torch.rand(2, 3, 8, 10)
        idx = vae.img_to_idxBl(img, v_patch_nums=OBLONG)
        codes = [vae.quantize.embedding(i).mT.unflatten(2, size) for i, size in zip(idx, OBLONG, strict=True)]
        want = vae.img_to_reconstructed_img(img, v_patch_nums=OBLONG)
        for a, b in zip(vae.embed_to_img(codes, all_to_max_scale=True), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    def test_another_number_of_scales(self) -> None:
        vae, other = tiny(), (1, 3, 4)
        idx = vae.img_to_idxBl(images(), v_patch_nums=other)
        with pytest.raises(ValueError, match=r"got 3 token maps for the 4 scales .* a VQVAE with those v_patch_nums"):
            vae.idxBl_to_img(idx, same_shape=True)
        rebuilt = varkern.VQVAE(16, 8, 32, v_patch_nums=other, ch_mult=(1, 2), num_res_blocks=1)
        rebuilt.load_state_dict(vae.state_dict())
        torch.manual_seed(5)
        img = images()
        got = rebuilt.idxBl_to_img(vae.img_to_idxBl(img, v_patch_nums=other), True, last_one=True)
        want = vae.img_to_reconstructed_img(img, v_patch_nums=other, last_one=True)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype | str]:
    """A default dtype or device that is in force while a test runs."""
    try:
        if isinstance(request.param, torch.dtype):
            torch.set_default_dtype(request.param)
        else:
            torch.set_default_device(request.param)
        yield request.param
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


DTYPES = [torch.float64, torch.bfloat16, torch.float16]
_vae = tiny()
_given = images(), tokens(_vae), maps(_vae)


def everything(vae: varkern.VQVAE) -> list[Tensor]:
    img, idx, codes = _given
    img = img.to(vae.quantize.embedding.weight.dtype)
    with torch.no_grad():
        results = [*vae.img_to_idxBl(img), *vae.img_to_reconstructed_img(img), vae(img)[0], vae(img)[2]]
        results += [*vae.idxBl_to_img(idx, True), *vae.idxBl_to_img(idx, False), *vae.embed_to_img(codes, True)]
        f_hat = torch.zeros(2, 8, 4, 4, dtype=torch.float32, device="cpu")
        results += [vae.quantize.idxBl_to_var_input(idx)]
        return [*results, *vae.quantize.get_next_autoregressive_input(1, 4, f_hat, codes[1])]


class TestOtherParts:
    def test_other_channels(self) -> None:
        vae = tiny()
        vae.encoder.conv_in = nn.Conv2d(1, 32, 3, padding=1)
        assert [i.shape[1] for i in vae.img_to_idxBl(torch.rand(2, 1, 8, 8))] == [1, 4, 9, 16]
        with pytest.raises(ValueError, match=r"images must be \(B, 1, 8, 8\)"):
            vae.img_to_idxBl(images())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_no_convolution_around_the_quantizer(self, dtype: torch.dtype) -> None:
        vae = tiny(dtype)
        vae.quant_conv = vae.post_quant_conv = nn.Identity()
        assert vae.img_to_reconstructed_img(images(dtype), last_one=True).dtype == dtype

    def test_another_encoder(self) -> None:
        vae = tiny()
        vae.encoder = nn.Sequential(nn.Conv2d(5, 8, 4, stride=4), nn.Tanh())
        vae.encoder.requires_grad_(False)
        assert vae.img_to_reconstructed_img(torch.rand(2, 5, 16, 16), last_one=True).shape == (2, 3, 8, 8)

    def test_compiled_parts(self) -> None:
        vae = tiny()
        f_hat = torch.randn(2, 8, 4, 4)
        want = vae.fhat_to_img(f_hat)
        torch.compiler.reset()
        vae.decoder.mid.block_1.compile(backend="eager")
        vae.decoder.up[0].block[1] = torch.compile(vae.decoder.up[0].block[1], backend="eager")
        torch.testing.assert_close(vae.fhat_to_img(f_hat), want, rtol=1e-4, atol=1e-4)

    def test_flops_are_counted_as_published(self) -> None:
        vae = tiny()
        totals = []
        for _ in range(2):
            with FlopCounterMode(display=False, custom_mapping=MISSING) as counter:
                vae.fhat_to_img(torch.zeros(2, 8, 4, 4))
            totals.append(counter.get_total_flops())
            with published(), FlopCounterMode(display=False, custom_mapping=MISSING) as counter:
                vae.fhat_to_img(torch.zeros(2, 8, 4, 4))
            totals.append(counter.get_total_flops())
        assert len(set(totals)) == 1
        assert totals[0] > 1e6


class TestDefaults:
    @pytest.mark.parametrize("hooked", [False, True])
    @pytest.mark.parametrize("backend", [None, "reference"])
    @pytest.mark.parametrize("default", [*DTYPES, "meta", "cpu"], indirect=True, ids=str)
    def test_a_model_of_another_default(self, default, backend: str | None, hooked: bool) -> None:
        vae = copy.deepcopy(_vae)
        if hooked:
            vae.get_submodule(PHI).register_forward_hook(lambda *_: None)
            vae.quantize.embedding.register_forward_hook(lambda *_: None)
        with varkern.use_backend(backend):
            got = everything(vae)
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
            want = everything(vae)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))

    @pytest.mark.parametrize("default", DTYPES, indirect=True, ids=str)
    def test_built_and_used(self, default: torch.dtype) -> None:
        vae = varkern.VQVAE(16, 8, 32, v_patch_nums=SCHEDULE, ch_mult=(1, 2), num_res_blocks=1)
        assert {p.dtype for p in vae.parameters()} == {default}
        assert vae.quantize.ema_vocab_hit_SV.dtype == torch.float32
        got = everything(vae)
        want = everything(vae.double())
        # Where a map is rounded to 16 bits other codes are found; the images of given ones pass some 30 roundings.
        decoded = slice(10, 14)
        for a, b in zip(got[decoded], want[decoded], strict=True):
            assert a.dtype == default
            assert (a - b).norm() / b.norm() < 30 * torch.finfo(default).eps + 1e-5

    def test_meta(self) -> None:
        with torch.device("meta"):
            vae = varkern.VQVAE(16, 8, 32, v_patch_nums=SCHEDULE, ch_mult=(1, 2), num_res_blocks=1)
            image = vae.img_to_reconstructed_img(torch.empty(2, 3, 8, 8), last_one=True)
        assert image.is_meta
        assert image.shape == (2, 3, 8, 8)


def paths(vae: varkern.VQVAE) -> dict:
    img, idx, codes = _given
    return {
        "forward": lambda: vae(img)[0::2],
        "img_to_idxBl": lambda: vae.img_to_idxBl(img),
        "idxBl_to_img": lambda: vae.idxBl_to_img(idx, True, last_one=True),
        "idxBl_to_img, growing": lambda: vae.idxBl_to_img(idx, False, last_one=True),
        "img_to_reconstructed_img": lambda: vae.img_to_reconstructed_img(img, last_one=True),
        "img_to_reconstructed_img, other schedule": lambda: vae.img_to_reconstructed_img(img, (1, 3, 4), True),
        "fhat_to_img": lambda: vae.fhat_to_img(codes[3]),
        "embed_to_img": lambda: vae.embed_to_img(codes, True, last_one=True),
        "idxBl_to_var_input": lambda: vae.quantize.idxBl_to_var_input(idx),
        "int32": lambda: vae.quantize.idxBl_to_var_input([i.int() for i in idx]),
        "f_to_idxBl_or_fhat": lambda: vae.quantize.f_to_idxBl_or_fhat(codes[3], to_fhat=True),
        "quantize": lambda: vae.quantize(codes[3])[0::2],
    }


def check_compiled(call, backend: str) -> None:
    torch.compiler.reset()
    got = torch.utils._pytree.tree_leaves(torch.compile(call, fullgraph=True, backend=backend)())
    want = torch.utils._pytree.tree_leaves(call())
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class TestCompile:
    @pytest.mark.parametrize("path", paths(_vae))
    def test_fullgraph(self, path: str) -> None:
        check_compiled(paths(_vae)[path], "eager" if "img" in path else "aot_eager")

    @pytest.mark.slow
    @pytest.mark.parametrize("path", ["fhat_to_img", "img_to_idxBl"])
    def test_inductor(self, path: str) -> None:
        check_compiled(paths(_vae)[path], "inductor")

    @pytest.mark.parametrize("share", [0, 1, 3])
    def test_every_bank_and_scale(self, share: int) -> None:
        quantize, codes = tiny(share_quant_resi=share).quantize, _given[2]
        torch.compiler.reset()
        compiled = torch.compile(quantize.get_next_autoregressive_input, fullgraph=True, backend="aot_eager")
        for k in range(4):
            a, b = codes[3].clone(), codes[3].clone()
            for got, want in zip(
                compiled(k, 4, a, codes[k]), quantize.get_next_autoregressive_input(k, 4, b, codes[k]), strict=True
            ):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert torch.equal(a, b)

    @pytest.mark.parametrize("path", ["forward", "idxBl_to_var_input"])
    def test_a_hooked_model(self, path: str) -> None:
        vae = tiny()
        vae.get_submodule(PHI).register_forward_hook(lambda m, args, out: out * 1.3)
        vae.decoder.up[0].block[0].conv1.register_forward_hook(lambda m, args, out: out + out.flip(1))
        check_compiled(paths(vae)[path], "eager")


class TestTransforms:
    def test_functional_call(self) -> None:
        vae = tiny()
        other = tiny()
        f = torch.randn(2, 8, 4, 4)
        state = dict(other.decoder.named_parameters())
        call = lambda: torch.func.functional_call(vae.decoder, state, (f,))  # noqa: E731
        assert torch.equal(call(), other.decoder(f))
        assert count(call) == count(lambda: other.decoder(f))

    def test_grad_jvp_vmap_of_a_decoded_image(self) -> None:
        vae, f = tiny(torch.float64), torch.randn(2, 8, 4, 4).double()
        leaf = f.clone().requires_grad_()
        vae.decoder(leaf).square().sum().backward()
        got = torch.func.grad(lambda f: vae.decoder(f).square().sum())(f)
        torch.testing.assert_close(got, leaf.grad)
        value, tangent = torch.func.jvp(lambda f: vae.decoder(f).square().sum(), (f,), (f,))
        torch.testing.assert_close(tangent, (leaf.grad * f).sum())
        torch.testing.assert_close(value, vae.decoder(f).square().sum())
        each = torch.func.vmap(vae.decoder)(f.unsqueeze(1))
        torch.testing.assert_close(each.squeeze(1), vae.decoder(f))

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_grad_in_the_parameters(self, backend: str | None) -> None:
        vae, img = tiny().requires_grad_(True).train(), images()
        state = dict(vae.named_parameters())

        def loss(state: dict[str, nn.Parameter]) -> Tensor:
            image, _, loss = torch.func.functional_call(vae, state, (img,))
            return image.square().mean() + loss

        with varkern.use_backend(backend):
            got = torch.func.grad(loss)(state)
            loss(state).backward()
        for name, parameter in state.items():
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_published_and_fused_quantizers_agree_under_cosine() -> None:
    """The other way to choose codes, through called modules."""
    vae = tiny(using_znorm=True)
    fused = torch.no_grad()(quantizer_results)(vae)
    vae.get_submodule(PHI).register_forward_hook(lambda *_: None)
    called = torch.no_grad()(quantizer_results)(vae)
    for name in fused:
        torch.testing.assert_close(called[name], fused[name], rtol=1e-4, atol=2e-4)
