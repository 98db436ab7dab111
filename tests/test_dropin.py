"""What people do with the transformer between construction and use: hooks, patches, wrappers, adapters, other tensors.

Each change is made to one model, which then generates and computes gradients as the same model does whose modules are
called one by one (`published_transformer`). Where a change leaves blocks alone, those stay fast.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import published_transformer as published
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import varkern
from varkern.modules.blocks import AdaLNBeforeHead, AdaLNSelfAttn, SelfAttention

LABELS = torch.tensor([1, 4])


class LoRA(nn.Module):
    """A linear layer with an update of low rank, as people write it: no ``weight`` of its own."""

    def __init__(self, layer: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.randn(layer.out_features, rank) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.down), self.up)

    def merged(self) -> nn.Linear:
        layer = copy.deepcopy(self.layer)
        layer.weight.data += self.up.data @ self.down.data
        return layer


def replace_linears(module: nn.Module, change: Callable[[nn.Linear], nn.Module], kinds: tuple = (nn.Linear,)) -> None:
    for name, child in list(module.named_children()):
        if type(child) in kinds:
            setattr(module, name, change(child))
        else:
            replace_linears(child, change, kinds)


class Doubled(AdaLNSelfAttn):
    def forward(self, x, cond_BD, attn_bias):
        return super().forward(x, cond_BD, attn_bias) * 1.01


class Halved(SelfAttention):
    def forward(self, x, attn_bias):
        assert attn_bias is None or isinstance(attn_bias, Tensor)
        return super().forward(x, attn_bias) * 0.5


class Wrapper(nn.Module):
    """Around a block, with the published arguments by name."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    @property
    def attn(self) -> nn.Module:
        return self.block.attn

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        assert attn_bias is None or type(attn_bias) is Tensor
        return self.block(x=x, cond_BD=cond_BD, attn_bias=attn_bias) + 0.01


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.1


def on_attention(block: AdaLNSelfAttn, change: Callable[[Tensor], Tensor]) -> None:
    """Patches ``attn.forward`` as public code does, with its published arguments."""
    forward = block.attn.forward

    def patched(x: Tensor, attn_bias: Tensor | None) -> Tensor:
        assert attn_bias is None or type(attn_bias) is Tensor
        return change(forward(x, attn_bias))

    block.attn.forward = patched


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda m, args, out: out * 1.05)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda m, args: (args[0] * 1.05, *args[1:]))


def keyword_hook(block: nn.Module) -> None:
    def seen(m, args, kwargs):
        assert set(kwargs) == {"x", "cond_BD", "attn_bias"}
        assert kwargs["attn_bias"] is None or type(kwargs["attn_bias"]) is Tensor
        return args, kwargs | {"x": kwargs["x"] * 1.05}

    block.register_forward_pre_hook(seen, with_kwargs=True)


def subclass(module: nn.Module, kind: type) -> None:
    module.__class__ = kind


class OtherHead(varkern.VAR):
    def get_logits(self, h, cond_BD):
        return super().get_logits(h, cond_BD) * 1.2


def other_logits(var: varkern.VAR) -> None:
    get_logits = var.get_logits
    var.get_logits = lambda h, cond_BD: get_logits(h, cond_BD) * 1.2


class StatefulHook:
    """Changes every call, as a schedule over scales does."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module, args, out):
        self.calls = self.calls % 4 + 1
        return out * (1 + 0.02 * self.calls)


# Change, and how many of the two blocks stay fused.
CHANGES: dict[str, tuple[Callable[[varkern.VAR], object], int]] = {
    "nothing": (lambda var: None, 2),
    "hook on a block": (lambda var: hook(var.blocks[0]), 1),
    "pre-hook on a block's keywords": (lambda var: keyword_hook(var.blocks[1]), 1),
    "hook on attention": (lambda var: hook(var.blocks[1].attn), 1),
    "pre-hook on attention": (lambda var: pre_hook(var.blocks[0].attn), 1),
    "hook on a norm": (lambda var: hook(var.blocks[0].ln_wo_grad), 1),
    "hook on feed-forward": (lambda var: hook(var.blocks[0].ffn), 2),
    "hook on a linear layer": (lambda var: hook(var.blocks[0].ffn.fc2), 2),
    "hook on qkv": (lambda var: [hook(block.attn.mat_qkv) for block in var.blocks], 2),
    "pre-hook on qkv": (lambda var: pre_hook(var.blocks[1].attn.mat_qkv), 2),
    "hook on proj": (lambda var: hook(var.blocks[1].attn.proj), 2),
    "replaced drop path": (lambda var: setattr(var.blocks[0], "drop_path", nn.GELU()), 1),
    "hook on drop path": (lambda var: hook(var.blocks[1].drop_path), 1),
    "hook on ada_lin": (lambda var: hook(var.blocks[1].ada_lin), 2),
    "stateful hook on ada_lin": (lambda var: var.blocks[0].ada_lin[1].register_forward_hook(StatefulHook()), 2),
    "hook on the head": (lambda var: hook(var.head), 2),
    "hook on the head's norm": (lambda var: hook(var.head_nm), 2),
    "hook on the head's projection": (lambda var: hook(var.head_nm.ada_lin[1]), 2),
    "hook on word_embed": (lambda var: hook(var.word_embed), 2),
    "hook on class_emb": (lambda var: hook(var.class_emb), 2),
    "hook on lvl_embed": (lambda var: hook(var.lvl_embed), 2),
    "hook on the shared projection": (lambda var: hook(var.shared_ada_lin), 2),
    "patched attention": (lambda var: on_attention(var.blocks[0], lambda out: out * 0.5), 1),
    "patched block": (
        lambda var: setattr(var.blocks[0], "forward", lambda x, cond_BD, attn_bias: x + 0.1 * cond_BD.mean()),
        1,
    ),
    "patched feed-forward": (lambda var: setattr(var.blocks[0].ffn, "forward", lambda x: x * 0.2), 2),
    "patched get_logits": (other_logits, 2),
    "subclassed model": (lambda var: subclass(var, OtherHead), 2),
    "subclassed block": (lambda var: subclass(var.blocks[1], Doubled), 1),
    "subclassed attention": (lambda var: subclass(var.blocks[0].attn, Halved), 1),
    "wrapped blocks": (lambda var: setattr(var, "blocks", nn.ModuleList(map(Wrapper, var.blocks))), 0),
    "wrapped block": (lambda var: var.blocks.__setitem__(0, Wrapper(var.blocks[0])), 1),
    "replaced feed-forward": (lambda var: setattr(var.blocks[0], "ffn", nn.Tanh()), 2),
    "replaced norm": (lambda var: setattr(var.blocks[0], "ln_wo_grad", nn.LayerNorm(64, 1e-3)), 1),
    "replaced head norm": (lambda var: setattr(var.head_nm, "ln_wo_grad", nn.Identity()), 2),
    "nonlinear head": (lambda var: setattr(var, "head", nn.Sequential(var.head, nn.Tanh())), 2),
    "wrapped word_embed": (lambda var: setattr(var, "word_embed", nn.Sequential(var.word_embed, nn.Tanh())), 2),
    "adapters on blocks": (lambda var: replace_linears(var.blocks, LoRA), 2),
    "adapters on every linear layer": (lambda var: replace_linears(var, LoRA), 2),
    "parametrized qkv": (
        lambda var: parametrize.register_parametrization(var.blocks[0].attn.mat_qkv, "weight", Scaled()),
        2,
    ),
    "parametrized bias": (
        lambda var: parametrize.register_parametrization(var.blocks[0].attn, "q_bias", Scaled()),
        1,
    ),
    "weight norm": (lambda var: nn.utils.parametrizations.weight_norm(var.blocks[0].ffn.fc1), 2),
    "compiled block": (lambda var: var.blocks[0].compile(backend="eager"), 1),
    "another epsilon": (lambda var: setattr(var.blocks[0].ln_wo_grad, "eps", 0.1), 2),
    "another temperature": (lambda var: setattr(var.blocks[0].attn, "scale", 0.5), 2),
}
changes = pytest.mark.parametrize(("change", "fused"), CHANGES.values(), ids=CHANGES)


def assert_generates(var: varkern.VAR, cfg: float = 1.5) -> None:
    want, images = published.generate(var, LABELS, 3, cfg)
    got = varkern.generate(var, 2, LABELS, 3, cfg=cfg)
    assert all(torch.equal(a, b) for a, b in zip(got.tokens, want, strict=True))
    torch.testing.assert_close(got.images, images, rtol=0, atol=1e-4)
    assert not any(block.attn.caching or block.attn.cached_k is not None for block in var.blocks)


class TestChanges:
    @changes
    @pytest.mark.parametrize("shared_aln", [False, True], ids=["", "shared_aln"])
    def test_generation(self, change, fused: int, shared_aln: bool) -> None:
        var = published.model(shared_aln=shared_aln)
        if shared_aln and not hasattr(var.blocks[0], "ada_lin"):
            for block in var.blocks:  # for the changes that name it
                block.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(64, 6 * 64))
        change(var)
        assert_generates(var)
        assert_generates(var, cfg=0.0)
        with published.Ops() as ops:
            varkern.generate(var, 2, LABELS, 3)
        assert ops.counts["cached_attention"] == fused * len(var.patch_nums)

    @pytest.mark.parametrize("name", [name for name in CHANGES if "stateful" not in name])  # a second pass differs
    def test_training(self, name: str) -> None:
        change, _ = CHANGES[name]
        var = published.model(cond_drop_rate=0.0)
        change(var)
        inputs = torch.randn(2, var.L - 1, var.Cvae)
        got = var(LABELS, inputs)
        published.loss(got).backward()
        grads = {name: p.grad for name, p in var.named_parameters()}
        var.zero_grad(set_to_none=True)
        want = published.logits(var, LABELS, inputs)
        published.loss(want).backward()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        for name, parameter in var.named_parameters():
            if parameter.grad is None or grads[name] is None:
                assert parameter.grad is grads[name], name
            else:
                torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)

    @pytest.mark.parametrize("cfg", [0.0, 1.5])
    def test_the_plain_model_is_fast_again_when_a_hook_is_removed(self, cfg: float) -> None:
        var = published.model()
        handle = var.blocks[0].register_forward_hook(lambda *_: None)
        counts = []
        for _ in range(2):
            with published.Ops() as ops:
                varkern.generate(var, 1, 1, 0, cfg=cfg)
            counts.append(ops.counts["cached_attention"])
            handle.remove()
        assert counts == [4, 8]

    def test_hooks_on_every_module(self) -> None:
        var = published.model()
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
        try:
            with published.Ops() as ops:
                varkern.generate(var, 1, 1, 0)
        finally:
            handle.remove()
        assert ops.counts["cached_attention"] == 0

    def test_class_forward_patched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forward, calls = AdaLNSelfAttn.forward, []

        def counted(self, x, cond_BD, attn_bias):
            calls.append(attn_bias)
            return forward(self, x, cond_BD, attn_bias)

        monkeypatch.setattr(AdaLNSelfAttn, "forward", counted)
        var = published.model()
        assert_generates(var)
        assert len(calls) == 2 * 4 * 2
        var(LABELS, torch.randn(2, var.L - 1, var.Cvae))
        assert all(type(bias) is Tensor for bias in calls[-2:])

    def test_class_logits_patched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        var, get_logits = published.model(), varkern.VAR.get_logits
        monkeypatch.setattr(varkern.VAR, "get_logits", lambda self, h, cond_BD: get_logits(self, h, cond_BD) * 1.2)
        assert_generates(var)
        assert_generates(var, cfg=0.0)

    def test_hooks_see_every_call_and_tensors_that_stay(self) -> None:
        """What a hook keeps is not written to afterwards."""
        var, kept = published.model(), []
        for block in (var.blocks[0], var.blocks[1].ffn, var.blocks[1].attn.mat_qkv):
            block.register_forward_hook(lambda m, args, kwargs, out: kept.append((out, out.clone())), with_kwargs=True)
        varkern.generate(var, 1, 1, 0)
        assert len(kept) == 3 * 4
        assert all(torch.equal(now, then) for now, then in kept)


class TestAdapters:
    def test_they_count_and_are_their_merged_weights(self) -> None:
        var = published.model()
        plain = varkern.generate(var, 2, LABELS, 0)
        replace_linears(var.blocks, LoRA)
        adapted = varkern.generate(var, 2, LABELS, 0)
        assert not all(torch.equal(a, b) for a, b in zip(adapted.tokens, plain.tokens, strict=True))
        replace_linears(var.blocks, LoRA.merged, (LoRA,))
        merged = varkern.generate(var, 2, LABELS, 0)
        torch.testing.assert_close(adapted.images, merged.images, rtol=0, atol=1e-3)

    def test_peft(self) -> None:
        peft = pytest.importorskip("peft")
        var = published.model()
        names = [name for name, m in var.blocks.named_modules() if type(m) is nn.Linear]
        assert any(name.endswith("mat_qkv") for name in names)
        config = peft.LoraConfig(r=2, target_modules=[f"blocks.{name}" for name in names], init_lora_weights=False)
        wrapped = peft.get_peft_model(var, config)
        inner = wrapped.base_model.model
        assert_generates(inner)
        trained = [p for p in inner.parameters() if p.requires_grad]
        published.loss(inner(LABELS, torch.randn(2, var.L - 1, var.Cvae))).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        adapted = varkern.generate(inner, 2, LABELS, 0)
        merged = varkern.generate(wrapped.merge_and_unload(), 2, LABELS, 0)
        torch.testing.assert_close(adapted.images, merged.images, rtol=0, atol=1e-3)


class TestOtherTensors:
    def test_dynamic_quantization(self) -> None:
        var = published.model()
        with torch.no_grad():
            quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(var), {nn.Linear}, dtype=torch.qint8)
        assert_generates(quantized)

    def test_integer_weights(self) -> None:
        class Int8(nn.Module):
            def __init__(self, layer: nn.Linear) -> None:
                super().__init__()
                scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
                self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
                self.register_buffer("scale", scale)
                self.bias = layer.bias

            def forward(self, x: Tensor) -> Tensor:
                assert x.is_floating_point()
                return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)

        var = published.model()
        for name in ("head", "word_embed"):
            setattr(var, name, Int8(getattr(var, name)))
        replace_linears(var.blocks, Int8)
        assert_generates(var)

    def test_a_subclass_of_tensor(self) -> None:
        class Marked(Tensor):
            pass

        var = published.model()
        bias = var.blocks[0].attn.q_bias.detach().as_subclass(Marked)
        var.blocks[0].attn.q_bias = nn.Parameter(bias)
        assert type(var.blocks[0].attn.q_bias) is not nn.Parameter
        assert_generates(var)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_default_dtype(self, dtype: torch.dtype) -> None:
        var, before = published.model(), torch.get_default_dtype()
        want = varkern.generate(var, 2, None, 0, top_k=5, top_p=0.9)
        inputs = torch.randn(2, var.L - 1, var.Cvae)
        torch.manual_seed(1)
        values = var(LABELS, inputs)
        try:
            torch.set_default_dtype(dtype)
            for backend in (None, "reference"):
                with varkern.use_backend(backend):
                    got = varkern.generate(var, 2, None, 0, top_k=5, top_p=0.9)
                    assert all(torch.equal(a, b) for a, b in zip(got.tokens, want.tokens, strict=True))
                    varkern.generate(var, 1, 1, 0, more_smooth=True)
            # The draw of dropped labels follows the default dtype, as published: none is dropped here.
            var.cond_drop_rate = 0.0
            assert var(LABELS, inputs).dtype == torch.float32
        finally:
            torch.set_default_dtype(before)
        assert values.dtype == torch.float32

    def test_default_device(self) -> None:
        var = published.model()
        want = varkern.generate(var, 2, None, 0)
        with torch.device("meta"):
            got = varkern.generate(var, 2, None, 0)
            assert varkern.generate(var, 2, 3, [0, 1]).images.device.type == "cpu"
        assert torch.equal(got.images, want.images)

    def test_copies(self) -> None:
        var = published.model()
        assert var.rng is not None
        assert_generates(copy.deepcopy(var))
        gc.collect()


@pytest.mark.parametrize("shared_aln", [False, True])
def test_a_condition_for_the_whole_batch(shared_aln: bool) -> None:
    var = published.model(shared_aln=shared_aln)
    x, cond = torch.randn(3, 5, 64), torch.randn(1, 64)
    for call in (
        lambda c: var.blocks[0](x=x, cond_BD=var.shared_ada_lin(c), attn_bias=None),
        lambda c: var.get_logits(x, c),
    ):
        torch.testing.assert_close(call(cond), call(cond.expand(3, -1)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="a condition of B rows of 64, or of one"):
        var.get_logits(x, torch.randn(2, 64))


def test_head_norm_has_the_published_parts() -> None:
    head = AdaLNBeforeHead(64, 64, 1e-6)
    x, cond = torch.randn(2, 3, 64), torch.randn(2, 64)
    scale, shift = head.ada_lin(cond).view(-1, 1, 2, 64).unbind(2)
    torch.testing.assert_close(head(x, cond), head.ln_wo_grad(x).mul(scale.add(1)).add_(shift), rtol=1e-5, atol=1e-5)
