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


def test_from_pretrained_without_tokenizer_says_so(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "vae.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"has no vae\.safetensors"):
        varkern.VARHF.from_pretrained(str(tmp_path))
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
        torch.save({"model": model.state_dict(), "step": 3}, "w.pth")
        with pytest.raises(varkern.CheckpointError, match="not a flat dict of named tensors"):
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
