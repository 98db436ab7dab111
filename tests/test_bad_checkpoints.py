"""Files that are no checkpoints, damaged ones, and configurations that do not fit: refused, by their true cause."""

import io
import json
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import assert_both, assert_same, save_told
from safetensors.torch import save

import varkern
from varkern.models import load_tokenizer
from varkern.models.checkpoint import read_state, save_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_told(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return varkern.load(folder)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def zipped(name, content, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def tarred(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("w.pth")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


CAUSES = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \n", "nothing but blanks"),
    "zeros": (bytes(1000), "nothing but blanks"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "is a Git LFS pointer.*git lfs pull"),
    "page": (b"<!DOCTYPE html><html>", "is a web page, not weights"),
    "page later": (b"\n\n  <html lang=en>", "is a web page, not weights"),
    "JSON": (b'{"a": 1}', "is JSON text"),
    "gzip": (b"\x1f\x8b" + bytes(9), "compressed with gzip; unpack"),
    "tar": (tarred(b"abc"), "is a tar archive"),
    "GGUF": (b"GGUF" + bytes(99), "is a GGUF file"),
    "other zip": (zipped("a.txt", b"abc"), "zip archive, but not a checkpoint"),
    "compressed zip": (zipped("a/data.pkl", bytes(10**5), zipfile.ZIP_DEFLATED), "packed again with compression"),
    "program": (zipped("a/data.pkl", b"") [:-22], "cut short or damaged"),
    "text": (b"hello, world, this is not a checkpoint", "neither a whole safetensors file nor one of PyTorch"),
    "pickle": (b"\x80\x02K\x01.", "damaged or no checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("content", "words"), CAUSES.values(), ids=CAUSES)
def test_true_cause_of_a_file_that_is_no_checkpoint(content, words, suffix):
    path = Path(f"w.{suffix}")
    path.write_bytes(content)
    for call in (read_state, load_tokenizer, varkern.load):
        with pytest.raises(varkern.CheckpointError, match=rf"w\.{suffix} .*{words}") as raised:
            call(path)
        assert "\n" not in str(raised.value)


def test_the_content_decides_not_the_suffix(model):
    torch.save(model.state_dict(), "var.safetensors")
    Path("vae.ckpt").write_bytes(save(dict(model.vae_proxy[0].state_dict())))
    assert_both(varkern.load("var.safetensors", vae="vae.ckpt"), model)
    torch.save(model.state_dict(), "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_state("old.pth"), dict(model.state_dict()))


def test_a_flipped_bit_of_a_weight_is_noticed(model):
    torch.save(model.state_dict(), "var.pth")
    save_state(model.state_dict(), "var.safetensors")
    for path in (Path("var.pth"), Path("var.safetensors")):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(varkern.CheckpointError, match="damaged"):
            read_state(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), "unchecked.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_state("unchecked.pth"), dict(model.state_dict()))


def test_a_view_that_repeats_its_memory_is_no_weight(model):
    state = model.state_dict() | {"class_emb.weight": torch.zeros(1, 1).expand(10**9, 64)}
    torch.save(state, "var.pth")
    with pytest.raises(varkern.CheckpointError, match=r"claims to hold 256.* bytes of weights in a file of"):
        varkern.load("var.pth", vae="var.pth")


CONFIGS = {
    "depth": ({"depth": 10**9}, "says depth = 1000000000, but the weights have 2"),
    "num_classes": ({"num_classes": 2 * 10**7}, "says num_classes = 20000000, but the weights have 10"),
    "embed_dim": ({"embed_dim": 10**6}, "says embed_dim"),
    "mlp_ratio": ({"mlp_ratio": 1e9}, "says mlp_ratio"),
    "patch_nums": ({"patch_nums": [1, 10**6]}, "says patch_nums"),
    "patch_nums of another model": ({"patch_nums": [1, 2, 3, 5]}, r"says patch_nums = \[1, 2, 3, 5\]"),
    "num_heads": ({"num_heads": 0}, "says num_heads = 0, but the weights have 1"),
    "norm_eps": ({"norm_eps": "small"}, "says norm_eps = 'small', which is not a value"),
    "drop_rate": ({"drop_rate": float("nan")}, "says drop_rate = nan"),
    "unknown": ({"num_haeds": 2}, "has a setting 'num_haeds' that VAR does not know"),
    "no object": ({"vae_kwargs": [1]}, r"says vae_kwargs = \[1\], not an object"),
    "vae ch": ({"ch": 32 * 10**6}, "says ch = 32000000, but the weights have 32"),
    "vae share": ({"share_quant_resi": 10**9}, "says share_quant_resi = 1000000000, but the weights have 4"),
    "vae blocks": ({"num_res_blocks": 10**9}, "says num_res_blocks"),
    "vae levels": ({"ch_mult": [1] * 500}, "says ch_mult"),
    "vae unknown": ({"colour": True}, "has a setting 'colour' that VQVAE does not know"),
    "vae schedule": ({"v_patch_nums": [1, 2, 3, 10**9]}, "v_patch_nums"),
    "vae resi": ({"quant_resi": None}, "says quant_resi = None"),
}


@pytest.mark.parametrize(("change", "words"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused_before_anything_is_built(folder, change, words, request):
    shutil.copytree(folder, "m")
    config = json.loads(Path("m/config.json").read_text())
    if request.node.callspec.id.startswith("vae "):
        config["vae_kwargs"].update(change)
        shutil.copytree(folder, "tok", ignore=shutil.ignore_patterns("model*"))
        Path("tok/config.json").write_text(json.dumps({"vae_kwargs": config["vae_kwargs"]}))
        with pytest.raises(varkern.CheckpointError, match=r"config\.json" if "v_patch" in words else words):
            load_tokenizer("tok")
    else:
        config.update(change)
    Path("m/config.json").write_text(json.dumps(config))
    began = time.perf_counter()
    for call in (varkern.load, varkern.VARHF.from_pretrained):
        with pytest.raises(varkern.CheckpointError, match=words):
            call("m")
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "holds a list"),
        ("{", "is not JSON"),
        ("3", "holds a int"),
        ("\xff", "is not JSON"),
        ("[" * 10**5, "JSON"),
    ],
)
def test_a_config_json_that_is_no_object(folder, content, words):
    shutil.copytree(folder, "m")
    Path("m/config.json").write_bytes(content.encode("latin-1"))
    for call in (varkern.load, load_tokenizer):
        with pytest.raises(varkern.CheckpointError, match=rf"config\.json .*{words}"):
            call("m")


def test_a_folder_without_config_json_and_one_of_hugging_face(folder, model):
    shutil.copytree(folder, "m")
    Path("m/config.json").unlink()
    assert_both(varkern.load("m"), model)
    config = {**model._hub_mixin_config, "model_type": "var", "_name_or_path": "x", "architectures": ["VAR"]}
    Path("m/config.json").write_text(json.dumps(config))
    assert_both(varkern.load("m"), model)
