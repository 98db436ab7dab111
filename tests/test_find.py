"""Finding models and tokenizers: wrapped dicts, trainers' files, files, folders and repositories, in every command."""

import argparse
import json
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import assert_both, assert_same, save_told
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import varkern
from varkern import cli
from varkern.models import find, load_tokenizer
from varkern.models.checkpoint import load_checkpoint, read_state, save_state
from varkern.modules.schedule import PATCH_NUMS_256

SCHEDULE = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_told(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return varkern.load(folder)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def other(state):
    return {name: value + 1 if name.endswith("weight") else value for name, value in state.items()}


# --- what people save ---------------------------------------------------------------------------------------------

WRAPPED = {
    "DistributedDataParallel": lambda state: prefixed("module.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled and distributed": lambda state: prefixed("module._orig_mod.", state),
    "distributed and compiled": lambda state: prefixed("_orig_mod.module.module.", state),
    "compiled blocks": lambda state: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in state.items()},
    "one prefix": lambda state: prefixed("transformer.", state),
    "mixed prefixes": lambda state: prefixed("net._orig_mod.", state),
    "under model": lambda state: {"model": state, "step": 3},
    "under state_dict": lambda state: {"state_dict": prefixed("model.", state), "epoch": 1},
    "under module and model": lambda state: {"module": {"model": prefixed("module.", state)}},
    "with arguments": lambda state: {
        "model": state,
        "args": argparse.Namespace(lr=1e-4, out="x"),
        "best": np.float64(3.5),
        "path": Path("runs"),
    },
    "average of torch": lambda state: {"n_averaged": torch.tensor(5), **prefixed("module.", state)},
    "with an optimizer": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1.0}]},
    },
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_dicts_load(model, wrap):
    vae = model.vae_proxy[0]
    torch.save(wrap(model.state_dict()), "var.pth")
    torch.save(wrap(vae.state_dict()), "vae.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_both(varkern.load("var.pth", vae="vae.pth"), model)
    fresh = varkern.VARHF(**model._hub_mixin_config)
    load_checkpoint(fresh, wrap(model.state_dict()))
    load_checkpoint(fresh.vae_proxy[0], "vae.pth")
    assert_both(fresh, model)
    assert_same(read_state("vae.pth"), dict(vae.state_dict()))
    wrapper = nn.Module()
    wrapper.module = varkern.VARHF(**model._hub_mixin_config)
    load_checkpoint(wrapper, wrap(model.state_dict()))
    assert_same(wrapper.module.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "pack",
    [
        lambda var, vae: {"trainer": {"config": {}, "var_wo_ddp": var, "vae_local": vae}, "epoch": 2, "args": {"a": 1}},
        lambda var, vae: {"trainer": {"var_wo_ddp": prefixed("_orig_mod.", var), "vae_local": vae, "var_opt": {}}},
        lambda var, vae: {"state_dict": {**prefixed("var.", var), **prefixed("vae.", vae)}},
        lambda var, vae: {**var, **prefixed("vae_local.", vae)},
        lambda var, vae: {**var, **vae},
    ],
    ids=["official trainer", "compiled", "two prefixes", "submodule", "side by side"],
)
@pytest.mark.parametrize("suffix", ["pth", "ckpt"])
def test_one_file_with_both_models(model, pack, suffix):
    torch.save(pack(model.state_dict(), model.vae_proxy[0].state_dict()), f"both.{suffix}")
    assert_both(varkern.load(f"both.{suffix}"), model)
    found = load_tokenizer(f"both.{suffix}", SCHEDULE).vae
    assert_same(found.state_dict(), model.vae_proxy[0].state_dict())


@pytest.mark.parametrize("name", ["ema", "model_ema", "state_dict_ema", "ema_0.999"])
def test_averaged_weights_are_taken_and_said_so(model, name):
    state = model.state_dict()
    parameters = {key: value for key, value in state.items() if key in dict(model.named_parameters())}
    torch.save({"model": other(state), name: prefixed("module.", parameters)}, "both.pth")
    fresh = varkern.VARHF(**model._hub_mixin_config)
    with pytest.warns(varkern.CheckpointWarning, match=rf"averaged weights were taken \({name}\), not the last ones"):
        load_checkpoint(fresh, "both.pth")
    assert_same(fresh.state_dict(), state)
    torch.save({"model": other(state), "ema_1": state, "ema_2": other(state)}, "both.pth")
    with pytest.raises(varkern.CheckpointError, match=r"several models \(ema_1, ema_2\)"):
        load_checkpoint(fresh, "both.pth")


def test_several_different_models_are_refused_and_copies_are_not(model):
    state = model.state_dict()
    fresh = varkern.VARHF(**model._hub_mixin_config)
    load_checkpoint(fresh, {"a": state, "b": dict(state)})
    assert_same(fresh.state_dict(), state)
    with pytest.raises(varkern.CheckpointError, match=r"several models \(a, b\); save the one you want"):
        load_checkpoint(fresh, {"a": state, "b": other(state)})
    with pytest.raises(varkern.CheckpointError, match=r"occur twice, once as module\.head\.bias"):
        load_checkpoint(fresh, {**state, "module.head.bias": state["head.bias"]})


def test_checkpoints_of_our_own_training(model):
    """With the settings that no shape tells, and the averages of the parameters alone."""
    vae = model.vae_proxy[0]
    shadow = {k: v + 1 for k, v in vae.named_parameters()}
    settings = {"patch_nums": list(SCHEDULE), "beta": 0.5, "quant_resi": 0.25, "dropout": 0.1}
    file = {"format": 1, "kind": "TokenizerConfig", "settings": settings, "model": vae.state_dict()}
    torch.save({**file, "average": {"n": 3, "shadow": shadow}}, "checkpoint.pt")
    with pytest.warns(varkern.CheckpointWarning, match=r"averaged weights were taken \(average\.shadow\)"):
        found = load_tokenizer("checkpoint.pt")
    assert_same(found.vae.state_dict(), {**vae.state_dict(), **shadow})
    assert (found.vae.quantize.v_patch_nums, found.vae.quantize.beta) == (SCHEDULE, 0.5)
    assert found.vae.quantize.quant_resi[0].resi_ratio == 0.25
    torch.save({**file, "average": None}, "checkpoint.pt")
    assert_same(load_tokenizer("checkpoint.pt").vae.state_dict(), vae.state_dict())
    for folder, call in ((".", load_tokenizer), (Path(), varkern.load)):
        with pytest.raises(varkern.CheckpointError, match=r"its training has not ended; name checkpoint\.pt"):
            call(folder)


def test_heads_of_a_model_without_l2_norm_are_found():
    vae = {"vocab_size": 16, "z_channels": 8, "ch": 32, "v_patch_nums": [1, 2], "ch_mult": [1, 1], "num_res_blocks": 1}
    model = varkern.VARHF(vae, depth=1, embed_dim=96, num_heads=6, norm_eps=1e-5, num_classes=3, patch_nums=(1, 2))
    model.save_pretrained("m")
    for source in ("m", "m/model.safetensors"):
        assert varkern.load(source).num_heads == 6
    assert varkern.load("m").blocks[0].norm_eps == 1e-5
    Path("m/config.json").unlink()
    assert varkern.load("m").num_heads == 6
    torch.save(model.state_dict(), "var.pth")
    with pytest.raises(varkern.CheckpointError, match="nothing tells the number of heads of width 96"):
        varkern.load("var.pth", vae="m/vae.safetensors")
    for heads in (0, 7, 2.0, True):
        Path("m/config.json").write_text(json.dumps({"num_heads": heads}))
        with pytest.raises(varkern.CheckpointError, match=rf"num_heads is {heads} in .*the width, 96"):
            varkern.load("m")


# --- tokenizers ---------------------------------------------------------------------------------------------------


def test_every_place_of_a_tokenizer(folder, model, tmp_path):
    """The schedule comes along, whatever it is; no sentence is said."""
    vae = model.vae_proxy[0]
    shutil.copy(folder / "vae.safetensors", "alone.safetensors")  # which tells its schedule in its metadata
    shutil.copytree(folder, "run", ignore=shutil.ignore_patterns("model*"))
    save_file(vae.state_dict(), "run/plain.safetensors")  # by the config.json beside it
    shutil.copytree(folder, "bare", ignore=shutil.ignore_patterns("model*", "config*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (folder, folder / "vae.safetensors", "alone.safetensors", "run", Path("run"), "bare",
                       "run/plain.safetensors", str(tmp_path / "run")):  # fmt: skip
            found = load_tokenizer(source)
            assert_same(found.vae.state_dict(), vae.state_dict())
            assert found.vae.quantize.v_patch_nums == SCHEDULE, source
            assert not found.vae.training
            assert json.loads(json.dumps(found.vae_kwargs)) == found.vae_kwargs


def test_a_file_that_does_not_tell_its_schedule(model):
    vae = model.vae_proxy[0]
    save_file(vae.state_dict(), "vae.safetensors")
    with pytest.raises(varkern.CheckpointError, match=r"is of 4 scales, but nothing tells their sides.*patch_nums="):
        load_tokenizer("vae.safetensors")
    assert load_tokenizer("vae.safetensors", SCHEDULE).vae.quantize.v_patch_nums == SCHEDULE
    for rows in (torch.zeros(10, 32), None):
        state = {k: v for k, v in vae.state_dict().items() if not k.endswith("hit_SV")}
        torch.save(state if rows is None else {**state, "quantize.ema_vocab_hit_SV": rows}, "vae.pth")
        with pytest.warns(varkern.CheckpointWarning, match="does not tell its schedule; the published one of 256 px"):
            assert load_tokenizer("vae.pth").vae.quantize.v_patch_nums == PATCH_NUMS_256
    with pytest.raises(varkern.CheckpointError, match="each larger than the one before"):
        load_tokenizer("vae.pth", (1, 2, 2))


def test_another_schedule_than_the_tokenizers_is_said(folder, model):
    torch.save(model.state_dict(), "var.pth")
    kwargs = {**model._hub_mixin_config["vae_kwargs"], "v_patch_nums": [1, 2, 3, 5]}
    save_state(model.vae_proxy[0].state_dict(), "v.safetensors", find.metadata_of({"vae_kwargs": kwargs}))
    with pytest.warns(varkern.CheckpointWarning, match=r"schedule \[1, 2, 3, 4\] is taken, not the tokenizer's own"):
        assert_both(varkern.load("var.pth", vae="v.safetensors"), model)


def test_a_model_takes_its_tokenizer_from_anywhere(folder, model):
    shutil.copytree(folder, "tok", ignore=shutil.ignore_patterns("model*"))
    shutil.copytree(folder, "var", ignore=shutil.ignore_patterns("vae*"))
    for checkpoint in ("var", "var/model.safetensors"):
        for vae in ("tok", "tok/vae.safetensors", folder):
            assert_both(varkern.load(checkpoint, vae=vae), model)
    assert_both(varkern.load(folder / "model.safetensors"), model)
    assert_both(varkern.VARHF.from_pretrained("var", vae="tok", drop_rate=0.5), model)
    with pytest.raises(varkern.CheckpointError, match="brings its own tokenizer"):
        varkern.load(folder, vae="tok")
    with pytest.raises(varkern.CheckpointError, match=r"there is no checkpoint file gone\.pth"):
        varkern.load(folder, vae="gone.pth")
    with pytest.raises(
        varkern.CheckpointError, match=r"has no model\.safetensors: it is the folder of a tokenizer alone"
    ):
        varkern.load("tok")
    with pytest.raises(varkern.CheckpointError, match="holds the transformer alone; name the tokenizer's weights too"):
        varkern.load("var/model.safetensors")


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_every_command_takes_a_tokenizer_by_file_and_by_folder(folder, model, run):
    shutil.copytree(folder, "tok", ignore=shutil.ignore_patterns("model*"))
    torch.save(model.state_dict(), "var.pth")
    assert run("sample", "--checkpoint", folder, "--seed", 0, "--num", 1, "--out", "a.png")[0] == 0
    shown = []
    for vae in ("tok", "tok/vae.safetensors"):
        both = ["--checkpoint", "var.pth", "--vae", vae, "--seed", 0, "--out", "b.png"]
        assert run("sample", *both, "--num", 1)[0] == 0
        assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()  # the files tell their settings, too
        assert run("edit", "a.png", *both, "--box", "0,0,0.5,1")[0] == 0
        for option in (
            ["--vae", vae],
            ["--checkpoint", vae],
            ["--checkpoint", folder],
            ["--checkpoint", "var.pth", "--vae", vae],
        ):
            status, out, err = run("reconstruct", "a.png", *option, "--out", "r.png")
            assert (status, err) == (0, "")
            shown.append(out.splitlines()[0])
    assert len(set(shown)) == 1
    assert run("sample", "--checkpoint", "tok")[::2] == (
        2,
        "varkern: error: tok has no model.safetensors: it is the folder of a tokenizer alone; "
        "name that of a transformer\n",
    )
    assert "name the transformer too (--checkpoint)" in run("sample", "--vae", "tok")[2]


def test_reconstruct_at_the_size_that_is_told_or_named(model, run, folder):
    from PIL import Image

    run("sample", "--checkpoint", folder, "--seed", 0, "--num", 1, "--out", "a.png")
    vae = model.vae_proxy[0]
    save_file(vae.state_dict() | {"quantize.ema_vocab_hit_SV": torch.zeros(10, 32)}, "vae.safetensors")
    status, _, err = run("reconstruct", "a.png", "--vae", "vae.safetensors", "--out", "r.png")
    assert status == 0
    assert err.count("\n") == 1
    assert err.startswith("varkern: vae.safetensors does not tell its schedule; the published one of 256 px is taken")
    named = ["reconstruct", "a.png", "--vae", "vae.safetensors", "--patch-nums", "1,2,3,4", "--out", "n"]
    assert run(*named)[2] == ""
    assert run("reconstruct", "a.png", "--checkpoint", folder, "--out", "f")[0] == 0
    pixels = [np.asarray(Image.open(f"{out}/00000_a.png")) for out in "nf"]  # their files tell different settings
    assert np.array_equal(*pixels)


def test_train_and_evaluate_take_any_tokenizer(folder, run, model):
    from PIL import Image

    for name in ("a", "b"):
        Path("data", name).mkdir(parents=True)
        for i in range(6):
            noise = np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(noise).save(Path("data", name, f"{i}.png"))
    save_file(model.vae_proxy[0].state_dict(), "own.safetensors")
    data = ["--data", "data", "--image-size", 32, "--channels", 1, "--device", "cpu", "--batch-size", 4]
    small = ["--depth", 1, "--epochs", 1, "--validate-every", 0, "--tokenizer", "own.safetensors", "--out", "var"]
    status, _, err = run("train", *data, *small)
    assert (status, "is of 4 scales, but nothing tells their sides" in err) == (2, True)
    shutil.rmtree("var", ignore_errors=True)
    status, _, err = run("train", *data, *small, "--patch-nums", "1,2,3,4")
    assert status == 0, err
    assert_same(varkern.load("var").vae_proxy[0].state_dict(), model.vae_proxy[0].state_dict())
    status, out, err = run("evaluate", "--model", "var", *data)
    assert status == 0, err
    whole = json.loads(out)
    save_file(varkern.load("var").state_dict(), "var.safetensors")
    status, out, err = run("evaluate", "--model", "var.safetensors", "--vae", "var", *data)
    assert json.loads(out) == whole, err
    shutil.copytree(folder, "tok", ignore=shutil.ignore_patterns("model*"))
    status, out, err = run("evaluate", "--model", "tok", *data)
    assert json.loads(out) == {k: v for k, v in whole.items() if k != "transformer"}, err


def test_loading_draws_nothing_and_serves_subclasses(folder, model):
    class Own(varkern.VARHF):
        def __init__(self, *args, colour: int = 3, **settings):
            super().__init__(*args, **settings)
            self.register_buffer("table", torch.arange(4.0) * colour, persistent=False)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded = varkern.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not any(p.requires_grad for p in loaded.vae_proxy[0].parameters())
    own = Own.from_pretrained(folder, colour=2)
    assert_both(own, model)
    assert own.table.tolist() == [0, 2, 4, 6]


# --- the Hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Calls of the Hub, which is not there."""
    calls = []

    class Session:
        def head(self, url, timeout):
            calls.append(url)
            raise OSError("no network")

    monkeypatch.setattr("varkern.models.fetch.get_session", Session)
    monkeypatch.setattr("varkern.models.fetch.constants.HF_HUB_OFFLINE", False)
    return calls


@pytest.mark.parametrize(
    "name",
    ["./user/model", "../runs", "/nowhere/model", "~/nowhere/model", "runs/va", "a/b/c", "user/var_d16.pth", "nowhere",
     "user/model.safetensors"],
)  # fmt: skip
def test_a_mistyped_path_does_not_go_to_the_hub(hub, name):
    Path("runs/var").mkdir(parents=True)
    for call in (varkern.load, load_tokenizer, varkern.VARHF.from_pretrained):
        with pytest.raises(FileNotFoundError, match=r"there is no checkpoint file|neither a file, nor a directory"):
            call(name)
    with pytest.raises(FileNotFoundError):
        varkern.load(Path("user/model"))
    assert not hub


def test_a_hub_that_cannot_be_reached_is_one_sentence_and_quick(hub, tmp_path):
    began = time.perf_counter()
    for call in (varkern.load, load_tokenizer):
        with pytest.raises(varkern.CheckpointError, match=r"user/model is neither .* cannot be reached \(no network\)"):
            call("user/model")
    with pytest.raises(varkern.CheckpointError, match="only the cache was to be read"):
        varkern.VARHF.from_pretrained("user/model-1.5", local_files_only=True, cache_dir=tmp_path)
    assert time.perf_counter() - began < 10
    assert len(hub) == 2


def test_a_repository_is_a_folder(folder, model, monkeypatch):
    asked = []

    def snapshot(repository, **settings):
        asked.append((repository, settings["revision"]))
        return str(folder)

    monkeypatch.setattr("varkern.models.fetch._unreachable", lambda: "")
    monkeypatch.setattr("varkern.models.fetch.snapshot_download", snapshot)
    assert_both(varkern.load("user/model"), model)
    assert_both(varkern.VARHF.from_pretrained("user/model-1.5", revision="main"), model)
    assert_same(load_tokenizer("user/model").vae.state_dict(), model.vae_proxy[0].state_dict())
    assert asked == [("user/model", None), ("user/model-1.5", "main"), ("user/model", None)]


def test_a_cached_repository_serves_without_a_connection(hub, folder, model, tmp_path):
    snapshot = tmp_path / "cache/models--user--model/snapshots/abc"
    shutil.copytree(folder, snapshot)
    refs = tmp_path / "cache/models--user--model/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert_both(varkern.VARHF.from_pretrained("user/model", cache_dir=tmp_path / "cache"), model)
