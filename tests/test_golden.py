"""Parity with the published implementation, tensor by tensor, by every backend that generates."""

import pytest
import torch
import torch.nn.functional as F
from golden import SMALL, Golden, assert_close, build, load_golden
from ties import assert_same_draws

import varkern
from varkern.engine import reference
from varkern.modules.blocks import DropPath
from varkern.ops.sampling import draw_noise

# Tolerances that hold between two correct float32 implementations: tokens equal, logits and images 1e-3 absolute,
# losses 1e-5 relative, gradient norms 1e-3 relative.
LOGITS = IMAGE = 1e-3


# The full-size model runs once by the automatic choice; what differs by backend shows on the small ones.
CASES = [pytest.param(n, b, id=f"{n}-{b or 'automatic'}") for n in SMALL for b in (None, "reference")]
CASES.append(pytest.param("d16-256", None, id="d16-256-automatic", marks=pytest.mark.slow))


@pytest.fixture(params=[None, "reference"], ids=["automatic", "reference"])
def backend(request: pytest.FixtureRequest):
    with varkern.use_backend(request.param):
        yield request.param


@pytest.fixture
def golden(name: str, backend: str | None):
    with varkern.use_backend(backend):
        yield load_golden(name)


@pytest.mark.parametrize(("name", "backend"), CASES)
class TestParity:
    @torch.inference_mode()
    def test_tokenizer(self, golden: Golden) -> None:
        vae = golden.vae
        ours, features = vae.quant_conv(vae.encoder(golden.image)), golden["encoder_features"]
        assert_close(ours, features, 1e-3)
        tokens = vae.quantize.f_to_idxBl_or_fhat(features, to_fhat=False)
        same = golden.same_codes(tokens)
        f_hats = vae.quantize.f_to_idxBl_or_fhat(features, to_fhat=True)
        assert_close(f_hats[0][same], golden["f_hat_first"][same], 1e-4)
        assert_close(f_hats[-1][same], golden["f_hat_last"][same], 1e-4)
        assert_close(vae.quantize.idxBl_to_var_input(golden.token_maps()), golden["var_input"], 1e-4)
        image = vae.img_to_reconstructed_img(golden.image, last_one=True)
        same = golden.same_codes(vae.quantize.f_to_idxBl_or_fhat(ours, to_fhat=False), ours)
        assert_close(golden.stored(image)[same], golden["reconstruction"][same], IMAGE)

    @torch.inference_mode()
    def test_forward(self, golden: Golden) -> None:
        torch.manual_seed(7)
        logits = golden.var(golden["labels"], golden["var_input"])
        assert logits.dtype == torch.float32
        assert_close(logits[:, ::17, ::64] if golden.full_size else logits, golden["forward_logits"], LOGITS)

    @pytest.mark.parametrize("which", ["sample", "smooth", "greedy", "unlabelled"])
    def test_generation(self, golden: Golden, which: str) -> None:
        c = golden.config
        labels, seed, options = golden["labels"], c["seed"], golden.sampling
        if which == "smooth":
            options["more_smooth"] = True
        elif which == "greedy":
            options |= {"top_k": 1, "top_p": 0.0}
        elif which == "unlabelled":
            labels, seed, options = None, seed + 1, {"cfg": c["cfg"]}

        def run(var: varkern.VAR) -> varkern.Generation:
            return varkern.generate(var, c["B"], labels, seed, **options)

        got, want = run(golden.var), golden.token_maps(f"{which}_tokens")
        same = assert_same_draws(run, golden.var, got.tokens, want, options.get("top_k", 0), options.get("top_p", 0.0))
        if f"{which}_image" in golden.tensors:
            assert_close(golden.stored(got.images)[same], golden[f"{which}_image"][same], IMAGE)
        if not golden.full_size:
            again = golden.var.autoregressive_infer_cfg(c["B"], labels, g_seed=seed, **options)
            assert torch.equal(again, got.images)

    def test_editing(self, golden: Golden) -> None:
        c = golden.config
        box = (0.1, 0.1, 0.8, 0.8)
        assert torch.equal(1 - varkern.edit.box_mask(c["patch_nums"][-1], box), golden["edit_mask"])

        def run(var: varkern.VAR) -> varkern.Generation:
            return varkern.edit.class_edit(
                var, golden.image, golden["labels"], box=box, seed=c["seed"], **golden.sampling
            )

        got, want = run(golden.var), golden.token_maps("edit_tokens")
        same = assert_same_draws(run, golden.var, got.tokens, want, c["top_k"], c["top_p"])
        assert_close(golden.stored(got.images)[same], golden["edit_image"][same], IMAGE)


class TestTies:
    """What the comparisons above let pass: tokens that float64 finds equally likely, within rounding, and no others."""

    @staticmethod
    def draw(layer: torch.nn.Linear) -> list[torch.Tensor]:
        """Of logits that make up for the noise, but for the rounding errors of a layer and for what is in its bias."""
        x, noise = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
        balance = draw_noise(6, 50, "cpu", torch.Generator().manual_seed(1)).log().view(2, 3, 50)
        logits = layer(x.to(layer.weight)) - (x.double() @ layer.weight.double().T).to(layer.weight) + balance
        guided = reference.ops.guided_logits_reference(torch.cat((logits, logits)), 0.0)
        return [reference.ops.sample_tokens_reference(guided, noise)]

    @torch.no_grad()
    def test_tokens_within_rounding(self) -> None:
        layer = torch.nn.Linear(64, 50)
        layer.bias.zero_()
        (got,) = self.draw(layer)
        other = got.clone()
        other[1] = (got[1] + 1) % 50
        assert assert_same_draws(self.draw, layer, [got], [other]).tolist() == [True, False]
        layer.bias[7] = 1e-4  # more than rounding
        (got,) = self.draw(layer)
        assert (got == 7).all()
        other = got.clone()
        other[1, 2] = 8
        with pytest.raises(AssertionError, match=r"image 1, scale 0: \[8\] not within rounding"):
            assert_same_draws(self.draw, layer, [got], [other])

    @pytest.mark.parametrize("smooth", [False, True])
    def test_another_token_in_a_generation(self, smooth: bool) -> None:
        def run(var: varkern.VAR) -> varkern.Generation:
            return varkern.generate(var, 2, 1, 0, top_k=300, top_p=0.96, more_smooth=smooth)

        var = load_golden("d2").var
        got = run(var).tokens
        want = [tokens.clone() for tokens in got]
        want[2][1, 4] = (want[2][1, 4] + 1) % var.V
        with pytest.raises(AssertionError, match=r"image 1, scale 2: \[\d+\] not within rounding"):
            assert_same_draws(run, var, got, want, 300, 0.96)

    def test_another_code(self) -> None:
        golden = load_golden("d2")
        tokens = [t.clone() for t in golden.token_maps()]
        codebook = golden.vae.quantize.embedding.weight.data
        tokens[1][1, 2] = (tokens[1][1, 2] + 1) % len(codebook)
        with pytest.raises(AssertionError, match="image 1, scale 1: not a tie"):
            golden.same_codes(tokens)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", SMALL)
class TestGradients:
    def test_transformer(self, name: str) -> None:
        golden = load_golden(name)
        _, var = build(golden.config)
        var.train()
        for module in var.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        torch.manual_seed(7)
        logits = var(golden["labels"], golden["var_input"].clone())
        loss = F.cross_entropy(logits.flatten(0, 1), golden["token_indices"].flatten(), label_smoothing=0.1)
        loss.backward()
        torch.testing.assert_close(loss.detach(), golden["train_loss"], rtol=1e-5, atol=0)
        check_norms(golden, var, "grad_norm/")

    def test_tokenizer(self, name: str) -> None:
        golden = load_golden(name)
        vae, _ = build(golden.config, test_mode=False)
        vae.train()
        image = golden.image
        reconstruction, usages, vq_loss = vae(image)
        assert usages is None
        loss = F.mse_loss(reconstruction, image) + vq_loss
        loss.backward()
        torch.testing.assert_close(vq_loss.detach(), golden["vq_loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(loss.detach(), golden["vae_train_loss"], rtol=1e-5, atol=0)
        check_norms(golden, vae, "vae_grad_norm/")


def check_norms(golden: Golden, module: torch.nn.Module, prefix: str) -> None:
    norms = {key.removeprefix(prefix): value for key, value in golden.tensors.items() if key.startswith(prefix)}
    got = {key: value.grad.norm() for key, value in module.named_parameters() if value.grad is not None}
    assert got.keys() == norms.keys()
    for key, want in norms.items():
        # A bias before a normalisation has no gradient but rounding: the floor is far under every other norm.
        torch.testing.assert_close(got[key], want, rtol=1e-3, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
