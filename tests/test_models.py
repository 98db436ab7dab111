"""The drop-in surface: names, shapes, state dicts, defaults, progressive training, bad arguments."""

import copy
import importlib
import inspect
import io
import math

import pytest
import torch
import torch.distributed as dist
from golden import load_golden
from torch import nn

import varkern
from varkern.modules.blocks import SelfAttention
from varkern.modules.schedule import PATCH_NUMS_256, PATCH_NUMS_512, as_sizes, phi_index

SCHEDULE = (1, 2, 3, 4)


def tiny(**kwargs) -> tuple[varkern.VQVAE, varkern.VAR]:
    vae = varkern.VQVAE(vocab_size=64, z_channels=8, ch=32, v_patch_nums=SCHEDULE, ch_mult=(1, 1), num_res_blocks=1)
    options = {"depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 5, "attn_l2_norm": True}
    return vae, varkern.VAR(vae, patch_nums=SCHEDULE, **{**options, **kwargs}).eval()


VAR_ARGUMENTS = (
    "num_classes depth embed_dim num_heads mlp_ratio drop_rate attn_drop_rate drop_path_rate norm_eps shared_aln "
    "cond_drop_rate attn_l2_norm patch_nums flash_if_available fused_if_available"
)
SIGNATURES = {
    varkern.VAR: "vae_local " + VAR_ARGUMENTS,
    varkern.VARHF: "vae_kwargs " + VAR_ARGUMENTS,
    varkern.VQVAE: (
        "vocab_size z_channels ch dropout beta using_znorm quant_conv_ks quant_resi share_quant_resi "
        "default_qresi_counts v_patch_nums test_mode ch_mult num_res_blocks in_channels"
    ),
    varkern.VectorQuantizer2: (
        "vocab_size Cvae using_znorm beta default_qresi_counts v_patch_nums quant_resi share_quant_resi"
    ),
    varkern.build_vae_var: (
        "device patch_nums V Cvae ch share_quant_resi num_classes depth shared_aln attn_l2_norm flash_if_available "
        "fused_if_available init_adaln init_adaln_gamma init_head init_std"
    ),
}


@pytest.mark.parametrize("function", SIGNATURES)
def test_signatures(function) -> None:
    assert " ".join(inspect.signature(function).parameters) == SIGNATURES[function]


def var_keys(depth: int, shared: bool, l2_norm: bool) -> set[str]:
    keys = {"pos_start", "pos_1LC", "lvl_1L", "attn_bias_for_masking", "class_emb.weight", "lvl_embed.weight"}
    keys |= {f"{m}.{p}" for m in ("word_embed", "head", "head_nm.ada_lin.1") for p in ("weight", "bias")}
    for i in range(depth):
        block = ["attn.q_bias", "attn.v_bias", "attn.zero_k_bias", "attn.mat_qkv.weight"]
        block += [f"{m}.{p}" for m in ("attn.proj", "ffn.fc1", "ffn.fc2") for p in ("weight", "bias")]
        block += ["attn.scale_mul_1H11"] if l2_norm else []
        block += ["ada_gss"] if shared else ["ada_lin.1.weight", "ada_lin.1.bias"]
        keys |= {f"blocks.{i}.{name}" for name in block}
    return keys | ({"shared_ada_lin.1.weight", "shared_ada_lin.1.bias"} if shared else set())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("l2_norm", [False, True])
def test_state_dict_keys(shared: bool, l2_norm: bool) -> None:
    _, var = tiny(shared_aln=shared, attn_l2_norm=l2_norm)
    state = var.state_dict()
    assert state.keys() == var_keys(2, shared, l2_norm)
    assert state["lvl_1L"].dtype == torch.int64
    assert state["lvl_1L"].tolist() == [[0] + [1] * 4 + [2] * 9 + [3] * 16]
    level = state["lvl_1L"][0]
    bias = torch.where(level[:, None] >= level[None, :], 0.0, -math.inf)
    assert torch.equal(state["attn_bias_for_masking"], bias[None, None])
    assert not any(name.startswith("vae") for name, _ in var.named_parameters())


@pytest.mark.parametrize(
    ("share", "keys"),
    [
        (4, {f"qresi_ls.{i}" for i in range(4)}),
        (1, {"qresi"}),
        (0, set("0123")),
        (3, {f"qresi_ls.{i}" for i in range(3)}),
    ],
)
def test_phi_keys(share: int, keys: set[str]) -> None:
    quantizer = varkern.VectorQuantizer2(16, 8, False, v_patch_nums=SCHEDULE, share_quant_resi=share)
    want = {f"quant_resi.{k}.{p}" for k in keys for p in ("weight", "bias")} | {"embedding.weight", "ema_vocab_hit_SV"}
    assert quantizer.state_dict().keys() == want


def test_phi_of_each_scale() -> None:
    assert [phi_index(k / 9, 4) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [phi_index(k / 5, 4) for k in range(6)] == [0, 0, 1, 2, 3, 3]
    assert [phi_index(k / 9, 10) for k in range(10)] == list(range(10))


def test_identity_phi() -> None:
    quantizer = varkern.VectorQuantizer2(16, 8, False, v_patch_nums=SCHEDULE, quant_resi=0.0)
    assert quantizer.state_dict().keys() == {"embedding.weight", "ema_vocab_hit_SV"}
    f = torch.randn(2, 8, 4, 4)
    idx = quantizer.f_to_idxBl_or_fhat(f, to_fhat=False)
    f_hat = quantizer.f_to_idxBl_or_fhat(f, to_fhat=True)
    assert torch.equal(f_hat[-1], quantizer.embed_to_fhat(quantizer.embeddings(idx), last_one=True))


def test_attributes() -> None:
    vae, var = tiny()
    assert (vae.Cvae, vae.V, vae.vocab_size, vae.downsample) == (8, 64, 64, 2)
    assert (var.C, var.depth, var.num_heads, var.num_classes, var.V, var.Cvae) == (64, 2, 2, 5, 64, 8)
    assert var.begin_ends == [(0, 1), (1, 5), (5, 14), (14, 30)]
    assert (var.L, var.first_l, var.num_stages_minus_1, var.prog_si, var.patch_nums) == (30, 1, 3, -1, SCHEDULE)
    assert var.vae_proxy[0] is vae
    assert var.vae_quant_proxy[0] is vae.quantize
    assert isinstance(var.rng, torch.Generator)
    assert varkern.VQVAE(ch=32).downsample == 16
    assert not any(p.requires_grad for p in vae.parameters())
    assert not vae.training
    assert sum(p * p for p in PATCH_NUMS_256) == 680
    assert sum(p * p for p in PATCH_NUMS_512) == 2240


def test_built_model_has_the_published_size() -> None:
    with torch.device("meta"):
        vae = varkern.VQVAE(ch=160, v_patch_nums=PATCH_NUMS_256)
        var = varkern.VAR(vae, depth=16, embed_dim=1024, num_heads=16, attn_l2_norm=True)
    assert sum(p.numel() for p in var.parameters()) / 1e6 == pytest.approx(310.3, abs=0.05)
    assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(108.9, abs=0.05)
    assert sum(p.numel() for p in vae.decoder.parameters()) / 1e6 == pytest.approx(64.7, abs=0.05)


def test_init_weights() -> None:
    vae, var = varkern.build_vae_var("cpu", patch_nums=SCHEDULE, V=64, Cvae=32, ch=32, num_classes=5, depth=2)
    std = math.sqrt(1 / 128 / 3)
    assert var.D == var.C == 128
    assert var.word_embed.weight.std().item() == pytest.approx(std, rel=0.1)
    assert var.head.weight.std().item() == pytest.approx(0.02 * std, rel=0.1)
    ada = var.blocks[1].ada_lin[1]
    assert ada.weight[:256].std().item() == pytest.approx(1e-5 * std, rel=0.1)
    assert ada.weight[256:].std().item() == pytest.approx(0.5 * std, rel=0.1)
    assert var.blocks[0].ffn.fc2.weight.std().item() == pytest.approx(std / 2, rel=0.1)
    assert var.blocks[0].drop_path.__class__ is nn.Identity
    assert var.blocks[1].drop_path.drop_prob == pytest.approx(0.1 * 2 / 24)
    assert not any(m.bias.any() for m in var.modules() if isinstance(m, nn.Linear) and m.bias is not None)
    assert not vae.training


def test_label_dropout_draws_from_the_global_generator_in_eval_mode() -> None:
    _, var = tiny(cond_drop_rate=0.5)
    var.init_weights(init_adaln_gamma=1.0, init_head=1.0)
    labels, x = torch.arange(5), torch.randn(5, 29, 8)
    torch.manual_seed(0)
    dropped = torch.rand(5) < 0.5
    torch.manual_seed(0)
    got = var(labels, x)
    var.cond_drop_rate = 0.0
    assert torch.equal(got, var(torch.where(dropped, 5, labels), x))
    assert 0 < dropped.sum() < 5


@pytest.mark.parametrize("prog_si", [0, 1, 2, 3])
def test_progressive_training_runs_the_first_scales(prog_si: int) -> None:
    vae, var = tiny(cond_drop_rate=0.0)
    var.init_weights(init_adaln_gamma=1.0, init_head=1.0)
    labels, features = torch.tensor([1, 2]), torch.randn(2, 8, 4, 4)
    tokens = vae.quantize.f_to_idxBl_or_fhat(features, to_fhat=False)
    full = var(labels, vae.quantize.idxBl_to_var_input(tokens))
    vae.quantize.prog_si = var.prog_si = prog_si
    cut = vae.quantize.f_to_idxBl_or_fhat(features, to_fhat=False)
    assert len(cut) == prog_si + 1
    x = vae.quantize.idxBl_to_var_input(cut)
    assert (x is None) == (prog_si == 0)
    logits = var(labels, torch.empty(2, 0, 8) if x is None else x)
    torch.testing.assert_close(logits, full[:, : var.begin_ends[prog_si][1]], rtol=0, atol=1e-5)
    logits.square().mean().backward()
    assert all(p.grad is not None for name, p in var.named_parameters() if "lvl" not in name)


def test_blocks_can_be_driven_by_hand() -> None:
    """Code in the wild runs the blocks itself, with their caches: scale by scale equals the masked whole."""
    _, var = tiny()
    var.init_weights(init_adaln_gamma=1.0, init_head=1.0)
    x, cond = torch.randn(2, var.L, var.C), torch.randn(2, var.C)
    whole = var.blocks[0](x=x, cond_BD=cond, attn_bias=var.attn_bias_for_masking)
    attn: SelfAttention = var.blocks[0].attn
    attn.kv_caching(True)
    for begin, end in var.begin_ends:
        part = var.blocks[0](x=x[:, begin:end], cond_BD=cond, attn_bias=None)
        torch.testing.assert_close(part, whole[:, begin:end], rtol=0, atol=1e-5)
        assert attn.cached_k.shape == attn.cached_v.shape == (2, 2, end, 32)
    attn.kv_caching(False)
    assert attn.cached_k is None
    assert attn.cached_v is None
    assert var.get_logits(x, cond).shape == (2, 30, 64)


def test_forward_needs_no_causal_leak() -> None:
    _, var = tiny(cond_drop_rate=0.0)
    var.init_weights(init_adaln_gamma=1.0, init_head=1.0)
    x = torch.randn(1, 29, 8)
    changed = x.clone()
    changed[:, 4:] += 1  # the inputs of scales 3 and 4
    a, b = var(torch.tensor([1]), x), var(torch.tensor([1]), changed)
    torch.testing.assert_close(a[:, :5], b[:, :5], rtol=0, atol=1e-6)
    assert (a[:, 5:] - b[:, 5:]).abs().amax() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_models(dtype: torch.dtype) -> None:
    golden = load_golden("d2")
    vae, var = copy.deepcopy(golden.vae).to(dtype), copy.deepcopy(golden.var).to(dtype)
    var.vae_proxy, var.vae_quant_proxy = (vae,), (vae.quantize,)
    torch.manual_seed(7)
    logits = var(golden["labels"], golden["var_input"])
    assert logits.dtype == torch.float32
    error = (logits - golden["forward_logits"]).norm() / golden["forward_logits"].norm()
    assert error < (0.01 if dtype == torch.float16 else 0.05)
    image = varkern.generate(var, 2, golden["labels"], 0).images
    assert image.dtype == dtype
    assert image.isfinite().all()


def test_autocast_keeps_the_embeddings_in_float32() -> None:
    golden = load_golden("d2")
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = golden.var(golden["labels"], golden["var_input"])
        image = golden.var.autoregressive_infer_cfg(2, golden["labels"], g_seed=0)
    assert logits.dtype == torch.float32
    assert (logits - golden["forward_logits"]).norm() / golden["forward_logits"].norm() < 0.05
    assert image.isfinite().all()


def test_hit_counts_are_kept_under_torch_distributed() -> None:
    quantizer = varkern.VectorQuantizer2(16, 8, False, v_patch_nums=SCHEDULE).train()
    f = torch.randn(2, 8, 4, 4)
    quantizer(f)
    assert not quantizer.ema_vocab_hit_SV.any()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        _, usages, _ = quantizer(f, ret_usages=True)
    finally:
        dist.destroy_process_group()
    tokens = quantizer.f_to_idxBl_or_fhat(f, to_fhat=False)
    first = tokens[0].flatten().bincount(minlength=16).float()
    assert torch.equal(quantizer.ema_vocab_hit_SV[0], first)
    assert quantizer.record_hit == len(SCHEDULE)
    margin = (2 * 4 * 4) / 16 * 0.08
    assert usages == [pytest.approx(100 * (row >= margin).float().mean().item()) for row in quantizer.ema_vocab_hit_SV]


def test_straight_through_gradient() -> None:
    quantizer = varkern.VectorQuantizer2(16, 8, False, v_patch_nums=SCHEDULE).train()
    f = torch.randn(2, 8, 4, 4, requires_grad=True)
    f_hat, _, _ = quantizer(f)
    weight = torch.randn_like(f_hat)
    (f_hat * weight).sum().backward()
    assert torch.equal(f.grad, weight)


def test_rectangular_encoding() -> None:
    quantizer = varkern.VectorQuantizer2(16, 8, False, v_patch_nums=SCHEDULE)
    sizes = [(1, 1), (2, 3), (3, 4), (4, 6)]
    tokens = quantizer.f_to_idxBl_or_fhat(torch.randn(2, 8, 4, 6), to_fhat=False, v_patch_nums=sizes)
    assert [t.shape for t in tokens] == [(2, h * w) for h, w in sizes]


def test_growing_maps() -> None:
    golden = load_golden("d2")
    maps = golden.vae.quantize.embeddings(golden.token_maps())
    grown = golden.vae.quantize.embed_to_fhat(maps, all_to_max_scale=False)
    assert [tuple(f.shape[2:]) for f in grown] == as_sizes(golden.config["patch_nums"])
    images = golden.vae.idxBl_to_img(golden.token_maps(), same_shape=False)
    assert [i.shape[-1] for i in images] == [16 * p for p in golden.config["patch_nums"]]
    same = golden.vae.idxBl_to_img(golden.token_maps(), same_shape=True)
    assert {i.shape[-1] for i in same} == {128}
    assert torch.equal(same[-1], golden.vae.idxBl_to_img(golden.token_maps(), same_shape=True, last_one=True))


def test_deepcopy_and_one_channel() -> None:
    vae = varkern.VQVAE(vocab_size=16, z_channels=8, ch=32, v_patch_nums=SCHEDULE, ch_mult=(1, 1), in_channels=1)
    assert vae.img_to_reconstructed_img(torch.zeros(2, 1, 8, 8), last_one=True).shape == (2, 1, 8, 8)
    _, var = tiny()
    assert torch.equal(copy.deepcopy(var).pos_1LC, var.pos_1LC)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("varkern", "VAR VARHF VQVAE VectorQuantizer2 build_vae_var load generate generate_scales edit"),
        ("varkern.models", "VAR VARHF VQVAE VectorQuantizer2 build_vae_var load load_tokenizer"),
        ("varkern.models.var", "VAR AdaLNSelfAttn SharedAdaLin gumbel_softmax_with_rng sample_with_top_k_top_p_"),
        ("varkern.models.vqvae", "VQVAE"),
        ("varkern.models.helpers", "gumbel_softmax_with_rng sample_with_top_k_top_p_"),
        ("varkern.engine", "Keep clear_graphs"),
        ("varkern.train", "TokenizerConfig TransformerConfig train_tokenizer train_transformer"),
        ("varkern.eval", "EvaluateConfig evaluate"),
    ],
)
def test_names_that_people_import(module: str, names: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in names.split() if not hasattr(found, name)] == []


def test_a_whole_model_travels_in_a_pickle() -> None:
    """As ``torch.save(model)`` writes it, by the names of its classes and of the modules that they are in."""
    _, var = tiny()
    file = io.BytesIO()
    torch.save(var, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is varkern.VAR
    assert torch.equal(loaded.autoregressive_infer_cfg(1, 2, g_seed=0), var.autoregressive_infer_cfg(1, 2, g_seed=0))


class TestBadArguments:
    @pytest.mark.parametrize("schedule", [(), (4,), (1, 2, 2), (2, 1), (0, 1), (1, (2, 0))])
    def test_schedule(self, schedule) -> None:
        with pytest.raises(ValueError, match="each larger than the one before"):
            varkern.VectorQuantizer2(16, 8, False, v_patch_nums=schedule)

    def test_widths(self) -> None:
        with pytest.raises(ValueError, match="multiple of 32"):
            varkern.VQVAE(ch=40)
        with pytest.raises(ValueError, match="not divisible by num_heads"):
            tiny(embed_dim=64, num_heads=3)

    def test_schedules_differ(self) -> None:
        vae, _ = tiny()
        with pytest.raises(ValueError, match="differ from the tokenizer's"):
            varkern.VAR(vae, patch_nums=(1, 2, 3), embed_dim=64, num_heads=1, depth=1)

    @pytest.mark.parametrize("shape", [(2, 3, 8, 6), (2, 1, 8, 8), (3, 8, 8), (2, 3, 16, 16)])
    def test_image_size(self, shape: tuple[int, ...]) -> None:
        vae, _ = tiny()
        for call in (vae.img_to_idxBl, vae.img_to_reconstructed_img, vae):
            with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 8\)"):
                call(torch.zeros(shape))

    def test_image_dtype(self) -> None:
        vae, _ = tiny()
        with pytest.raises(TypeError, match=r"images are torch\.float64"):
            vae.img_to_idxBl(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
        with pytest.raises(ValueError, match="images are on meta"):
            vae.img_to_idxBl(torch.zeros(1, 3, 8, 8, device="meta"))

    def test_features(self) -> None:
        vae, _ = tiny()
        with pytest.raises(ValueError, match="pass v_patch_nums ending in the feature size"):
            vae.quantize.f_to_idxBl_or_fhat(torch.zeros(1, 8, 5, 5), to_fhat=True)

    def test_tokens(self) -> None:
        vae, _ = tiny()
        with pytest.raises(ValueError, match=r"must be \(B, 4\), got \(1, 5\)"):
            vae.quantize.idxBl_to_var_input([torch.zeros(1, n, dtype=torch.long) for n in (1, 5, 9)])
        with pytest.raises(ValueError, match="needs 3 token maps, got 1"):
            vae.quantize.idxBl_to_var_input([torch.zeros(1, 1, dtype=torch.long)])
        with pytest.raises(ValueError, match="got 1 token maps for the 4 scales"):
            vae.idxBl_to_img([torch.zeros(1, 5, dtype=torch.long)], same_shape=True)

    @pytest.mark.parametrize(
        ("labels", "x", "error", "match"),
        [
            (torch.tensor([1, 6]), torch.zeros(2, 29, 8), ValueError, r"labels must be in \[0, 5\]"),
            (torch.tensor([1.0]), torch.zeros(1, 29, 8), TypeError, "integers"),
            (torch.tensor([[1]]), torch.zeros(1, 29, 8), TypeError, r"\(B,\) integers"),
            (torch.tensor([1]), torch.zeros(1, 30, 8), ValueError, r"must be \(1, 29, 8\)"),
            (torch.tensor([1]), torch.zeros(1, 29, 8, device="meta"), ValueError, "move them together"),
        ],
    )
    def test_forward(self, labels, x, error, match) -> None:
        _, var = tiny()
        with pytest.raises(error, match=match):
            var(labels, x)
