"""Schedules, losses, codebook restarts, checkpoints, and bit-identical resume after SIGKILL."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from varkern.data.datasets import Digits
from varkern.models import VARHF, VQVAE
from varkern.models.checkpoint import read_state
from varkern.train import TokenizerConfig, TransformerConfig, load_tokenizer, train_tokenizer, train_transformer
from varkern.train.codebook import count_codes, residual_features, restart_unused_codes, usage_of
from varkern.train.encode import draw_tokens, features_of, teacher_forcing_input, tokens_of
from varkern.train.loop import Average
from varkern.train.losses import reconstruction_loss, token_loss, token_metrics
from varkern.train.run import CHECKPOINT, METRICS
from varkern.train.schedule import lr_factor, parameter_groups, peak_lr, weight_decay_at

PATCHES = (1, 2, 4)
COMMON = {
    "data": "digits",
    "image_size": 8,
    "channels": 1,
    "held_out": 0.6,
    "batch_size": 64,
    "device": "cpu",
    "log_every": 1,
}
TOKENIZER = {
    **COMMON,
    "vocab_size": 32,
    "z_channels": 8,
    "ch": 32,
    "ch_mult": (1, 1),
    "num_res_blocks": 1,
    "patch_nums": PATCHES,
    "base_lr": 5e-3,
    "warmup_epochs": 0.5,
    "epochs": 2,
    "restart_every": 5,
    "restart_images": 128,
    "ema_decay": 0.9,
    "dropout": 0.1,
    "augment": True,
    "checkpoint_every": 4,
}
TRANSFORMER = {
    **COMMON,
    "depth": 2,
    "width": 64,
    "base_lr": 2e-2,
    "warmup_epochs": 0.5,
    "epochs": 2,
    "drop_rate": 0.1,
    "drop_path_rate": 0.1,
    "ema_decay": 0.9,
    "accumulate": 2,
    "code_temperature": 0.2,
    "checkpoint_every": 4,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of an uninterrupted tokenizer run."""
    return train_tokenizer(TokenizerConfig(**TOKENIZER, out=str(tmp_path_factory.mktemp("tokenizer") / "run")))


@pytest.fixture(scope="module")
def transformer(tokenizer, tmp_path_factory):
    """Folder of an uninterrupted transformer run."""
    out = str(tmp_path_factory.mktemp("transformer") / "run")
    return train_transformer(TransformerConfig(**TRANSFORMER, tokenizer=str(tokenizer), out=out))


def records(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


# ---- schedules ---------------------------------------------------------------------------------------------------
def test_lin0_schedule_values():
    factor = [lr_factor(step, total_steps=1100, warmup_steps=100) for step in range(1100)]
    assert factor[0] == pytest.approx(0.005)
    assert factor[50] == pytest.approx(0.5025)
    assert factor[100] == factor[149] == 1
    assert factor[1099] == pytest.approx(0.01)
    assert lr_factor(1, 3, 0) == pytest.approx(0.01 + 0.99 * 0.5 / 0.95)  # half-way through training
    assert all(a >= b for a, b in itertools.pairwise(factor[100:]))
    assert lr_factor(500, 1100, 100, kind="constant") == 1


def test_peak_lr_scales_with_the_batch():
    assert peak_lr(1e-4, 768) == pytest.approx(3e-4)


def test_weight_decay_half_cosine():
    assert weight_decay_at(7, 100, 0.05, None) == 0.05
    assert weight_decay_at(0, 101, 0.05, 0.2) == pytest.approx(0.05)
    assert weight_decay_at(50, 101, 0.05, 0.2) == pytest.approx(0.125)
    assert weight_decay_at(25, 101, 0.05, 0.2) == pytest.approx(0.2 - 0.15 * (0.5 + 0.5 * math.cos(math.pi / 4)))
    assert weight_decay_at(100, 101, 0.05, 0.2) == pytest.approx(0.2)


@pytest.mark.parametrize("shared_aln", [False, True])
def test_weight_decay_groups_follow_the_recipe(shared_aln):
    vae_kwargs = TokenizerConfig(**TOKENIZER, out="unused").vae_kwargs()
    var = VARHF(
        vae_kwargs=vae_kwargs, num_classes=10, depth=2, embed_dim=128, num_heads=2, patch_nums=PATCHES,
        attn_l2_norm=True, shared_aln=shared_aln,
    )  # fmt: skip
    decayed, kept = parameter_groups(var)
    names = {p: name for name, p in var.named_parameters()}
    decayed_names = {names[p] for p in decayed["params"]}
    block = {"attn.mat_qkv.weight", "attn.proj.weight", "ffn.fc1.weight", "ffn.fc2.weight"}
    if not shared_aln:
        block |= {"ada_lin.1.weight"}
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in block}
    expected |= {"word_embed.weight", "class_emb.weight", "head.weight", "head_nm.ada_lin.1.weight"}
    if shared_aln:
        expected |= {"shared_ada_lin.1.weight"}
    assert decayed_names == expected
    assert (decayed["decay_scale"], kept["decay_scale"]) == (1, 0)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


# ---- losses ------------------------------------------------------------------------------------------------------
def test_token_loss_and_metrics():
    tokens = torch.tensor([[0, 1, 2, 1, 1]])
    uniform = torch.zeros(1, 5, 4)
    assert token_loss(uniform, tokens).item() == pytest.approx(math.log(4))
    logits = uniform.clone()
    logits[0, torch.arange(5), tokens[0]] = 100.0
    logits[0, 4] = torch.tensor([100.0, 0, 0, 0])  # one wrong of four in the second scale
    metrics = token_metrics(logits, tokens, (1, 2))
    assert metrics["Accm"] == pytest.approx(80)
    assert metrics["Acct"] == metrics["Acc_2"] == pytest.approx(75)
    assert metrics["Acc_1"] == pytest.approx(100)
    assert metrics["Lm"] == pytest.approx(20)
    assert metrics["Lt"] == metrics["L_2"] == pytest.approx(25)
    # Smoothing 0.1 over 4 classes: the target keeps 0.925, the others 0.025 each.
    smooth = token_loss(torch.tensor([[[2.0, 0, 0, 0]]]), torch.tensor([[0]]), label_smoothing=0.1).item()
    norm = math.log(math.exp(2) + 3)
    assert smooth == pytest.approx(0.925 * (norm - 2) + 0.075 * norm)


def test_reconstruction_loss_terms():
    target = torch.zeros(1, 1, 4, 4)
    output = target.clone()
    output[..., 2:] = 1.0  # one vertical edge: 4 of 12 horizontal differences are 1
    assert reconstruction_loss(output, target).item() == pytest.approx(0.5)
    assert reconstruction_loss(output, target, l1_weight=0.2).item() == pytest.approx(0.6)
    assert reconstruction_loss(output, target, gradient_weight=0.3).item() == pytest.approx(0.6)


# ---- codebook ----------------------------------------------------------------------------------------------------
def tiny_vae():
    torch.manual_seed(0)
    return VQVAE(**TokenizerConfig(**TOKENIZER, out="unused").vae_kwargs(), test_mode=False)


def test_residual_features_are_what_the_quantizer_sees():
    vae = tiny_vae()
    residuals, indices = residual_features(vae, Digits(8).images[:16])
    codes = vae.quantize.embedding.weight
    for z, index in zip(residuals, indices, strict=True):
        assert torch.equal(torch.cdist(z.double(), codes.double()).argmin(-1), index)


def test_restart_revives_a_collapsed_codebook(tokenizer):
    vae = VQVAE(**{**load_tokenizer(tokenizer).vae_kwargs, "test_mode": False})
    vae.load_state_dict(read_state(tokenizer / "vae.safetensors"))
    images = Digits(8).images[:200]
    codes = vae.quantize.embedding.weight
    with torch.no_grad():
        codes[1:] += 100.0  # out of reach: one code takes everything
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0)
    vae(images)[2].backward()
    optimizer.step()
    kept = codes[0].clone()
    before, moved = restart_unused_codes(vae, images, torch.Generator().manual_seed(0), optimizer)
    assert moved == 31
    assert before.touched == before.overall == pytest.approx(100 / 32)
    assert torch.equal(codes[0], kept)
    assert optimizer.state[codes]["exp_avg"][1:].count_nonzero() == 0
    assert optimizer.state[codes]["exp_avg"][0].count_nonzero() > 0
    assert vae.training
    vae.eval()
    after = usage_of(count_codes(vae.img_to_idxBl(images), 32))
    assert after.overall > 50
    assert after.perplexity > 3


def test_restart_is_a_function_of_its_generator():
    def moved(seed):
        vae = tiny_vae()
        restart_unused_codes(vae, Digits(8).images[:50], torch.Generator().manual_seed(seed))
        return vae.quantize.embedding.weight.detach()

    assert torch.equal(moved(0), moved(0))
    assert not torch.equal(moved(0), moved(1))


def test_usage_counts():
    hits = torch.tensor([[4, 0, 0, 0], [0, 1000, 1, 999]])
    usage = usage_of(hits)
    assert usage.touched == 100
    assert usage.overall == 75  # code 2 has 1 hit where 8 % of an even share of 2000 tokens is 40
    assert usage.scales == [25, 50]
    assert usage_of(torch.ones(2, 8, dtype=torch.int64)).perplexity == pytest.approx(8)


# ---- drawn codes -------------------------------------------------------------------------------------------------
def test_codes_drawn_at_temperature_zero_are_the_nearest(tokenizer):
    vae = load_tokenizer(tokenizer).vae
    images = Digits(8).images[:20]
    tokens, inputs = draw_tokens(vae, features_of(vae, images), 0.0)
    assert torch.equal(tokens, tokens_of(vae, images))
    torch.testing.assert_close(inputs, teacher_forcing_input(vae, tokens), rtol=0, atol=1e-6)


def test_drawn_codes_vary_but_decode_to_nearly_the_same_image(tokenizer):
    vae = load_tokenizer(tokenizer).vae
    images = Digits(8).images[:100]
    features = features_of(vae, images)
    torch.manual_seed(0)
    nearest = tokens_of(vae, images)
    drawn, inputs = draw_tokens(vae, features, 0.5)
    torch.testing.assert_close(inputs, teacher_forcing_input(vae, drawn), rtol=0, atol=1e-5)
    assert 0.1 < (drawn != nearest).float().mean() < 0.95
    sizes = [p * p for p in PATCHES]

    def error(tokens):
        return (vae.idxBl_to_img(tokens.split(sizes, 1), same_shape=True, last_one=True) - images).square().mean()

    uniform = torch.randint(0, 32, drawn.shape)
    assert error(drawn) - error(nearest) < 0.2 * (error(uniform) - error(nearest))
    torch.manual_seed(0)
    assert torch.equal(drawn, draw_tokens(vae, features, 0.5)[0])


# ---- loops -------------------------------------------------------------------------------------------------------
def test_tokenizer_training_lowers_the_loss(tokenizer):
    steps = [r for r in records(tokenizer) if "image_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 23))
    assert steps[-1]["image_loss"] < 0.6 * steps[0]["image_loss"]
    validated = [r for r in records(tokenizer) if "val_psnr" in r]
    assert [r["step"] for r in validated] == [11, 22]
    assert len(validated[0]["val_usage_scales"]) == len(PATCHES)


def test_transformer_training_lowers_the_loss(transformer):
    steps = [r for r in records(transformer) if "Lm" in r]
    assert steps[0]["Lm"] == pytest.approx(math.log(32), rel=0.05)
    assert steps[-1]["Lm"] < 0.8 * steps[0]["Lm"]
    assert {"Lt", "Accm", "Acct", "L_1", "Acc_4"} <= steps[0].keys()
    assert [r["step"] for r in records(transformer) if "val_Lm" in r] == [11, 22]


def test_exports_hold_the_averaged_weights(tokenizer, transformer):
    for folder, module, name in (
        (tokenizer, load_tokenizer(tokenizer).vae, "encoder.conv_in.weight"),
        (transformer, VARHF.from_pretrained(str(transformer)), "head.weight"),
    ):
        state = torch.load(folder / CHECKPOINT, weights_only=True)
        exported = module.state_dict()[name]
        assert torch.equal(exported, state["average"]["shadow"][name])
        assert not torch.equal(exported, state["model"][name])


def test_transformer_model_carries_its_tokenizer(tokenizer, transformer):
    var = VARHF.from_pretrained(str(transformer))
    for name, value in load_tokenizer(tokenizer).vae.state_dict().items():
        assert torch.equal(var.vae_proxy[0].state_dict()[name], value)
    assert var.autoregressive_infer_cfg(2, 3, g_seed=0).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(("augment", "temperature"), [(True, 0.0), (True, 0.2), (False, 0.0)])
def test_transformer_trains_on_images_features_or_tokens(augment, temperature, tokenizer, tmp_path):
    settings = {**TRANSFORMER, "epochs": 1, "augment": augment, "code_temperature": temperature, "validate_every": 0}
    out = train_transformer(TransformerConfig(**settings, tokenizer=str(tokenizer), out=str(tmp_path)))
    losses = [r["Lm"] for r in records(out) if "Lm" in r]
    assert losses[-1] < losses[0]


KILLED = """
import json, os, signal, sys
import torch
from varkern.train import *
from varkern.train.loop import Loop
torch.set_num_threads(1)
train_step = Loop.train_step
def dying(self, images, labels):
    if self.step == 18:  # mid-epoch (11 steps each), two steps after a checkpoint
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, images, labels)
Loop.train_step = dying
settings = json.loads(sys.argv[1])
if "tokenizer" in settings:
    train_transformer(TransformerConfig(**settings))
else:
    train_tokenizer(TokenizerConfig(**settings))
"""


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_killed_and_resumed_run_is_bit_identical(stage, tokenizer, transformer, tmp_path):
    whole, settings, config, train, weights = {
        "tokenizer": (tokenizer, TOKENIZER, TokenizerConfig, train_tokenizer, "vae.safetensors"),
        "transformer": (
            transformer,
            {**TRANSFORMER, "tokenizer": str(tokenizer)},
            TransformerConfig,
            train_transformer,
            "model.safetensors",
        ),
    }[stage]
    settings = {**settings, "out": str(tmp_path / "run")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    dead = subprocess.run([sys.executable, "-c", KILLED, json.dumps(settings)], env=environment, capture_output=True)
    assert dead.returncode == -9, dead.stderr.decode()[-2000:]
    assert max(r["step"] for r in records(tmp_path / "run")) == 18
    assert not (tmp_path / "run" / weights).exists()
    resumed = train(config(**settings, resume=True))
    expected, got = read_state(whole / weights), read_state(resumed / weights)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    ends = [torch.load(folder / CHECKPOINT, weights_only=True) for folder in (whole, resumed)]
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name]), name
    strip = [
        [{k: v for k, v in r.items() if k != "images_per_second"} for r in records(folder)]
        for folder in (whole, resumed)
    ]
    assert strip[0] == strip[1]


def test_average_restores_the_live_weights():
    module = torch.nn.Linear(2, 2)
    average = Average(module, 0.9)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    average.update(module)  # the first update has decay 0.1
    with average.applied(module):
        torch.testing.assert_close(module.weight.detach(), start + 0.9)
    torch.testing.assert_close(module.weight.detach(), start + 1.0)


# ---- errors ------------------------------------------------------------------------------------------------------
def test_finished_run_is_neither_overwritten_nor_changed(tokenizer):
    settings = {**TOKENIZER, "out": str(tokenizer)}
    with pytest.raises(FileExistsError, match="checkpoint of another run"):
        train_tokenizer(TokenizerConfig(**settings))
    with pytest.raises(ValueError, match=r"made with beta = 0\.25, not 0\.5"):
        train_tokenizer(TokenizerConfig(**{**settings, "beta": 0.5, "resume": True}))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "foreign"])
def test_damaged_checkpoint_gives_a_clear_error(damage, tokenizer, tmp_path):
    whole = (tokenizer / CHECKPOINT).read_bytes()
    if damage == "foreign":
        torch.save({"weights": torch.zeros(2)}, tmp_path / CHECKPOINT)
    else:
        (tmp_path / CHECKPOINT).write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"junk" * 100)
    message = "not a varkern training checkpoint" if damage == "foreign" else "not a readable checkpoint"
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TokenizerConfig(**TOKENIZER, out=str(tmp_path), resume=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ch": 48}, "multiple of 32"),
        ({"image_size": 16}, "need 8"),
        ({"accumulate": 3}, "must divide batch_size"),
        ({"precision": "float16"}, "needs a CUDA device"),
        ({"lr_schedule": "cosine"}, "'lin0' or 'constant'"),
        ({"ema_decay": 1.0}, "below 1"),
        ({"batch_size": 5000}, "only 7.. training images"),
    ],
)
def test_bad_tokenizer_settings_are_refused(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train_tokenizer(TokenizerConfig(**{**TOKENIZER, **change}, out=str(tmp_path / "run")))


def test_transformer_must_fit_its_tokenizer(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="tokenizer takes 8 pixels"):
        train_transformer(
            TransformerConfig(**{**TRANSFORMER, "image_size": 16}, tokenizer=str(tokenizer), out=str(tmp_path / "a"))
        )
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train_transformer(TransformerConfig(**TRANSFORMER, tokenizer=str(tmp_path / "no"), out=str(tmp_path / "b")))


def test_every_setting_is_documented():
    for config in (TokenizerConfig, TransformerConfig):
        for field in dataclasses.fields(config):
            assert len(field.metadata["help"]) > 10, field.name
