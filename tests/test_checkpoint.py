"""Reading and writing weights: official layouts, strictness, damage, and the Hub mixin."""

import copy
import json
import os
import pickle

import pytest
import torch
from golden import load_golden
from safetensors.torch import load_file, save_file
from torch import nn

import varkern
from varkern.models.checkpoint import load_checkpoint, read_state, save_state, var_config, vqvae_config

SCHEDULE = (1, 2, 3)
VAE = {"vocab_size": 32, "z_channels": 8, "ch": 32, "v_patch_nums": SCHEDULE, "ch_mult": (1, 2), "num_res_blocks": 1}
VAR = {"depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 5, "attn_l2_norm": True, "patch_nums": SCHEDULE}


@pytest.fixture
def model() -> varkern.VARHF:
    return varkern.VARHF(vae_kwargs=VAE, **VAR).eval()


def states(model: varkern.VARHF) -> dict[str, torch.Tensor]:
    vae = {"vae." + k: v.clone() for k, v in model.vae_proxy[0].state_dict().items()}
    return vae | {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_official_files_round_trip(model, tmp_path, suffix: str) -> None:
    """Transformer and tokenizer in one flat file each, as the official checkpoints are."""
    write = torch.save if suffix == "pth" else save_file
    write(model.state_dict(), tmp_path / f"var.{suffix}")
    write(model.vae_proxy[0].state_dict(), tmp_path / f"vae.{suffix}")
    loaded = varkern.load(tmp_path / f"var.{suffix}", vae=tmp_path / f"vae.{suffix}")
    assert_same(states(loaded), states(model))
    assert not loaded.training
    plain = varkern.VAR(varkern.VQVAE(**VAE), **VAR)
    plain.load_state_dict(
        torch.load(tmp_path / "var.pth") if suffix == "pth" else load_file(tmp_path / "var.safetensors")
    )
    images = [m.autoregressive_infer_cfg(2, 1, g_seed=0) for m in (model, loaded)]
    assert torch.equal(*images)


@pytest.mark.parametrize("name", ["d2", "d3-shared-adaln", "d2-cosine-nonshared-phi"])
def test_configuration_is_read_from_the_shapes(name: str) -> None:
    golden = load_golden(name)
    c = golden.config
    config = var_config(golden.var.state_dict())
    assert config == {
        "num_classes": c["num_classes"],
        "depth": c["depth"],
        "embed_dim": 64 * c["depth"],
        "num_heads": c["depth"],
        "mlp_ratio": 4.0,
        "shared_aln": c["shared_aln"],
        "attn_l2_norm": c["attn_l2_norm"],
        "patch_nums": c["patch_nums"],
    }
    vae = varkern.VQVAE(**vqvae_config(golden.vae.state_dict(), c["patch_nums"]))
    load_checkpoint(vae, golden.vae.state_dict())


def test_save_and_from_pretrained(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "vae.safetensors"} <= set(os.listdir(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["vae_kwargs"]["vocab_size"] == 32
    loaded = varkern.VARHF.from_pretrained(str(tmp_path))
    assert_same(states(loaded), states(model))
    assert loaded.patch_nums == SCHEDULE
    assert_same(states(varkern.load(tmp_path)), states(model))
    assert varkern.load(tmp_path, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_a_folder_without_its_tokenizer_is_an_error_unless_one_is_named(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "vae.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for load in (varkern.VARHF.from_pretrained, varkern.load):
        with pytest.raises(FileNotFoundError, match=r"has no vae\.safetensors; name the tokenizer's weights"):
            load(str(tmp_path))
        assert_same(states(load(str(tmp_path), vae=tmp_path / "elsewhere.safetensors")), states(model))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        varkern.VARHF.from_pretrained(str(tmp_path))


def test_hit_counts_of_another_schedule_are_left_out(model) -> None:
    vae = model.vae_proxy[0]
    vae.quantize.ema_vocab_hit_SV.fill_(3.0)
    other = vae.state_dict() | {"quantize.ema_vocab_hit_SV": torch.ones(7, 32)}
    vae.load_state_dict(other, strict=True)
    assert (vae.quantize.ema_vocab_hit_SV == 3).all()
    assert other["quantize.ema_vocab_hit_SV"].shape == (7, 32)
    load_checkpoint(vae, vae.state_dict() | {"quantize.ema_vocab_hit_SV": torch.ones(3, 32)})
    assert (vae.quantize.ema_vocab_hit_SV == 1).all()


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("payload-ran",))


class TestDamage:
    """Each file is refused by name and cause, and the model in memory stays as it was."""

    @pytest.fixture(autouse=True)
    def unchanged(self, model, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        before = states(model)
        yield
        assert_same(states(model), before)

    def other(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {k: torch.full_like(v, 2) for k, v in copy.deepcopy(model.state_dict()).items()}

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    @pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
    def test_truncated(self, model, suffix: str, part: float) -> None:
        (torch.save if suffix == "pth" else save_file)(self.other(model), f"w.{suffix}")
        size = os.path.getsize(f"w.{suffix}")
        os.truncate(f"w.{suffix}", int(size * part))
        with pytest.raises(varkern.CheckpointError, match=rf"w\.{suffix}"):
            load_checkpoint(model, f"w.{suffix}")

    def test_missing_file(self, model) -> None:
        with pytest.raises(varkern.CheckpointError, match=r"no checkpoint file nowhere\.pth"):
            load_checkpoint(model, "nowhere.pth")

    def test_malicious(self, model) -> None:
        for name, content in (("a.pth", {"head.weight": Payload()}), ("b.pth", Payload())):
            torch.save(content, name)
            with pytest.raises(varkern.CheckpointError, match="more than tensors"):
                load_checkpoint(model, name)
        with open("c.pth", "wb") as file:
            pickle.dump(Payload(), file, protocol=2)
        with pytest.raises(varkern.CheckpointError, match=r"c\.pth"):
            load_checkpoint(model, "c.pth")
        assert not os.path.exists("payload-ran")

    def test_not_a_state_dict(self, model) -> None:
        for content, words in (({"step": 3}, "it holds step"), ([1, 2], "holds a list"), ({}, "it holds nothing")):
            torch.save(content, "w.pth")
            with pytest.raises(varkern.CheckpointError, match=words):
                load_checkpoint(model, "w.pth")

    def test_missing_key(self, model) -> None:
        state = self.other(model)
        del state["head.bias"]
        with pytest.raises(varkern.CheckpointError, match=r"lacks head\.bias"):
            load_checkpoint(model, state)

    def test_unknown_key(self, model) -> None:
        with pytest.raises(varkern.CheckpointError, match=r"the model has no extra"):
            load_checkpoint(model, self.other(model) | {"extra": torch.zeros(1)})

    def test_wrong_shape(self, model) -> None:
        state = self.other(model) | {"blocks.1.attn.proj.weight": torch.zeros(64, 63)}
        with pytest.raises(varkern.CheckpointError, match=r"proj\.weight is \(64, 63\) where .* \(64, 64\)"):
            load_checkpoint(model, state)

    def test_another_model(self, model) -> None:
        with pytest.raises(varkern.CheckpointError, match=r"does not fit VARHF.* more"):
            load_checkpoint(model, load_golden("d2").var.state_dict())
        torch.save(model.vae_proxy[0].state_dict(), "vae.pth")
        with pytest.raises(varkern.CheckpointError, match="not a checkpoint of VAR: it lacks 'pos_start'"):
            varkern.load("vae.pth", vae="vae.pth")
        torch.save(model.state_dict(), "var.pth")
        with pytest.raises(varkern.CheckpointError, match="not a checkpoint of VQVAE"):
            varkern.load("var.pth", vae="var.pth")
        with pytest.raises(varkern.CheckpointError, match="name the tokenizer's weights too"):
            varkern.load("var.pth")
        with pytest.raises(varkern.CheckpointError, match="neither a file, nor a directory"):
            varkern.load("nowhere")


REFUSED = {
    "sparse": (lambda w: w.to_sparse(), "head.weight is sparse"),
    "meta": (lambda w: w.to("meta"), "head.weight is on the meta device"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "head.weight is quantized"),
    "complex": (lambda w: w.to(torch.complex64), "head.weight is torch.complex64"),
    "int8": (lambda w: w.to(torch.int8), "head.weight is torch.int8 where the model has torch.float32"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "head.weight is torch.float8_e4m3fn"),
    "0-dimensional": (lambda w: torch.tensor(1.0), r"head.weight is \(\) where"),
    "transposed": (lambda w: w.T, r"head.weight is \(64, 32\) where"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_a_refused_tensor_leaves_the_model_as_it_was(model, tmp_path, change, words: str) -> None:
    before = states(model)
    state = {
        k: v + 1 if v.is_floating_point() and "zero" not in k and "mask" not in k else v for k, v in before.items()
    }
    state = {k: v for k, v in state.items() if not k.startswith("vae.")}
    state["head.weight"] = change(state["head.weight"])
    torch.save(state, tmp_path / "w.pth")
    for source in (state, tmp_path / "w.pth"):
        with pytest.raises(varkern.CheckpointError, match=words):
            load_checkpoint(model, source)
        assert_same(states(model), before)


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("attn_bias_for_masking", lambda m: torch.zeros_like(m), "not the block-causal mask"),
        ("attn_bias_for_masking", lambda m: m[:, :, :5, :5], "does not fit VARHF"),
        ("lvl_1L", lambda levels: levels.flip(1), "lvl_1L is not the scales of patch_nums"),
        ("lvl_1L", lambda levels: levels + 2**40, "lvl_1L is not the scales of patch_nums"),
        ("blocks.1.attn.zero_k_bias", lambda b: b + 1, "zero_k_bias is not zero"),
    ],
)
def test_what_follows_from_the_schedule_must_be_right(model, tmp_path, key: str, change, words: str) -> None:
    before = states(model)
    state = {k: v + 1 if k.endswith("weight") else v.clone() for k, v in model.state_dict().items()}
    state[key] = change(state[key])
    with pytest.raises(varkern.CheckpointError, match=words):
        load_checkpoint(model, state)
    assert_same(states(model), before)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "var.safetensors")
    save_file(model.vae_proxy[0].state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(varkern.CheckpointError):
        varkern.load(tmp_path / "var.safetensors", vae=tmp_path / "vae.safetensors")
    if key == "lvl_1L":
        with pytest.raises(RuntimeError, match="lvl_1L does not number the scales"):
            model.load_state_dict(state)


def test_what_follows_from_the_schedule_may_be_missing(model, tmp_path) -> None:
    derived = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")

    def kept(state, *without: str):
        return {k: v for k, v in state.items() if not k.endswith(without)}

    vae = model.vae_proxy[0]
    torch.save(kept(vae.state_dict(), *derived), tmp_path / "vae.pth")
    torch.save(kept(model.state_dict(), *derived), tmp_path / "var.pth")
    for without in (("lvl_1L",), derived[:3]):
        torch.save(kept(model.state_dict(), *without), tmp_path / "var.pth")
        loaded = varkern.load(tmp_path / "var.pth", vae=tmp_path / "vae.pth", patch_nums=SCHEDULE)
        assert_same(states(loaded), states(model))
    with pytest.raises(varkern.CheckpointError, match=r"nothing tells the sides of 14 positions.*patch_nums="):
        varkern.load(tmp_path / "var.pth", vae=tmp_path / "vae.pth")
    with pytest.raises(varkern.CheckpointError, match="do not fit a model of 14 positions"):
        varkern.load(tmp_path / "var.pth", vae=tmp_path / "vae.pth", patch_nums=(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dict_cast_as_a_whole(model, tmp_path, dtype: torch.dtype) -> None:
    cast = {k: v.to(dtype) for k, v in model.state_dict().items()}
    torch.save(cast, tmp_path / "var.pth")
    save_file({k: v.to(dtype) for k, v in model.vae_proxy[0].state_dict().items()}, tmp_path / "vae.safetensors")
    loaded = varkern.load(tmp_path / "var.pth", vae=tmp_path / "vae.safetensors")
    assert_same(states(loaded), {k: v.to(dtype).to(v.dtype) for k, v in states(model).items()})
    with torch.device("meta"):
        assigned = varkern.VARHF(vae_kwargs=VAE, **VAR)
    assigned.load_state_dict(cast, assign=True)
    assert (assigned.lvl_1L.dtype, assigned.head.weight.dtype) == (torch.int64, dtype)


def test_memory_that_is_shared_strided_or_the_models_own(model) -> None:
    block = "blocks.{}.attn.proj.weight"
    first, second = (model.state_dict()[block.format(i)].clone() for i in (0, 1))
    swapped = dict(model.state_dict())
    swapped[block.format(0)], swapped[block.format(1)] = swapped[block.format(1)], swapped[block.format(0)]
    load_checkpoint(model, swapped)
    assert torch.equal(model.blocks[0].attn.proj.weight, second)
    assert torch.equal(model.blocks[1].attn.proj.weight, first)
    tied = model.state_dict() | {block.format(i): first.T.clone().T.requires_grad_() for i in (0, 1)}
    load_checkpoint(model, tied | {"pos_start": torch.tensor(0.5).expand(1, 1, 64)})
    assert torch.equal(model.blocks[0].attn.proj.weight, model.blocks[1].attn.proj.weight)
    assert (model.pos_start == 0.5).all()


@pytest.mark.parametrize("how", ["plain", "assign", "meta", "to_empty"])
def test_official_dicts_load_strictly_both_ways(model, how: str) -> None:
    with torch.device("meta" if how in ("meta", "to_empty") else "cpu"):
        other = varkern.VARHF(vae_kwargs=VAE, **VAR)
    for ours, theirs in ((other, model), (other.vae_proxy[0], model.vae_proxy[0])):
        if how == "to_empty":
            ours.to_empty(device="cpu")
        ours.load_state_dict(theirs.state_dict(), strict=True, assign=how in ("assign", "meta"))
        theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(states(other), states(model))
    hits = model.vae_proxy[0].state_dict() | {"quantize.ema_vocab_hit_SV": torch.ones(7, 32)}
    with torch.device("meta"):
        vae = varkern.VQVAE(**VAE)
    vae.load_state_dict(hits, strict=True, assign=True)
    assert not any(value.is_meta for value in vae.state_dict().values())


def test_a_model_without_memory_is_not_loaded_into(model) -> None:
    with torch.device("meta"):
        other = varkern.VARHF(vae_kwargs=VAE, **VAR)
    with pytest.raises(varkern.CheckpointError, match=r"own .* is on the meta device.*to_empty"):
        load_checkpoint(other, model.state_dict())
    load_checkpoint(other.to_empty(device="cpu"), model.state_dict())
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_weights_that_are_not_finite_are_named(model) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["head.weight"][3, 4] = torch.nan
    state["word_embed.bias"][0] = -torch.inf
    with pytest.warns(varkern.CheckpointWarning, match=r"head\.weight, word_embed\.bias hold NaN or infinity"):
        load_checkpoint(model, state)


def test_writing_is_atomic(model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "w.safetensors"
    save_state(model.state_dict(), path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("varkern.models.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state({"a": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert_same(read_state(path), model.state_dict())
