"""The model's attention: which implementation serves `VAR.forward`, what the peers say, and the mask's place."""

import copy
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from test_models import tiny

import varkern
from varkern.ops.attention import BlockCausal, block_causal_attention
from varkern.ops.attention.peers import ATTENTIONS, peer_attention
from varkern.ops.attention.reference import block_causal_attention_reference, block_causal_mask

LENGTHS = (1, 4, 9)


def model(**options) -> varkern.VAR:
    torch.manual_seed(0)
    _, var = tiny(cond_drop_rate=0.0, **options)
    var.init_weights(init_adaln_gamma=1.0, init_head=1.0, init_std=0.15)  # large: attention must matter
    for block in var.blocks:
        torch.nn.init.normal_(block.attn.q_bias, std=0.1)
        torch.nn.init.normal_(block.attn.v_bias, std=0.1)
    return var


def logits_and_gradients(var: varkern.VAR) -> list[torch.Tensor]:
    labels, x = torch.tensor([1, 2]), torch.randn(2, 29, 8, generator=torch.Generator().manual_seed(0))
    logits = var(labels, x)
    loss = F.cross_entropy(logits.flatten(0, 1), torch.arange(60) % 64)
    names = [name for name, _ in var.named_parameters()]
    grads = torch.autograd.grad(loss, [p for _, p in var.named_parameters()])
    assert len(names) == len(grads)
    return [logits.detach(), *grads]


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("shared_aln", [False, True])
def test_forward_and_every_gradient_equal_the_masked_ones(l2_norm: bool, shared_aln: bool) -> None:
    var = model(attn_l2_norm=l2_norm, shared_aln=shared_aln)
    got = logits_and_gradients(var)
    with varkern.use_backend("reference"):
        want = logits_and_gradients(var)
    var.attention = "sdpa"
    peer = logits_and_gradients(var)
    for a, b, c in zip(got, want, peer, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(c, b, rtol=1e-3, atol=1e-5)


def test_training_runs_the_fused_op_and_makes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    var, calls = model(), []
    import varkern.modules.blocks as blocks
    from varkern.ops.attention import reference as attention_reference

    def masks(*args: object) -> None:
        raise AssertionError("a dense mask was made")

    fused = blocks.block_causal_attention_qkv
    monkeypatch.setattr(blocks, "block_causal_attention_qkv", lambda *args: (calls.append(1), fused(*args))[1])
    monkeypatch.setattr(attention_reference, "block_causal_mask", masks)
    attention_reference._kept_mask.cache_clear()
    logits_and_gradients(var)
    assert len(calls) == len(var.blocks)


def test_attention_dropout_takes_sdpa() -> None:
    var = model(attn_drop_rate=0.5)
    still = logits_and_gradients(var)[0]
    var.train()
    torch.manual_seed(1)
    dropped = logits_and_gradients(var)[0]
    assert (dropped - still).abs().max() > 1e-2
    var.attention = "sdpa"
    torch.manual_seed(1)
    assert torch.equal(dropped, logits_and_gradients(var)[0])
    var.attention = "flex"
    with pytest.raises(RuntimeError, match=r"FlexAttention has no dropout, and dropout is 0\.5; use 'sdpa'"):
        logits_and_gradients(var)


def test_unknown_attention() -> None:
    var = model()
    with pytest.raises(ValueError, match="attention is 'xformers', give one of varkern, sdpa, flex, flash"):
        var.attention = "xformers"
    assert var.attention == "varkern"
    assert copy.deepcopy(var).attention == "varkern"


def test_bfloat16_and_autocast() -> None:
    var = model()
    exact = logits_and_gradients(var)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits_and_gradients(var)
    with varkern.use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        eager = logits_and_gradients(var)
    for a, b, c in zip(got, eager, exact, strict=True):
        assert a.dtype == b.dtype
        # Both round every product to eight bits; over a whole model the errors are alike, not below one another.
        assert (a - c).norm() <= 2 * (b - c).norm() + 0.01 * c.norm()
    half = copy.deepcopy(var).bfloat16()
    logits = half(torch.tensor([1, 2]), torch.randn(2, 29, 8))
    logits.sum().backward()
    assert half.blocks[0].attn.scale_mul_1H11.grad.dtype == torch.bfloat16


def test_a_cache_and_a_mask_exclude_each_other() -> None:
    var = model()
    var.blocks[0].attn.kv_caching(True)
    with pytest.raises(RuntimeError, match=re.escape("call kv_caching(False), or pass None")):
        var.blocks[0](x=torch.randn(1, 30, 64), cond_BD=torch.randn(1, 64), attn_bias=BlockCausal((1, 4, 9, 16)))


class TestPeers:
    def heads(self, D: int = 16) -> list[torch.Tensor]:
        return list(torch.randn(3, 2, 2, 14, D).unbind(0))

    def test_sdpa(self) -> None:
        q, k, v = self.heads()
        want = block_causal_attention(q, k, v, lengths=LENGTHS, softmax_scale=0.3)
        torch.testing.assert_close(peer_attention("sdpa", q, k, v, LENGTHS, 0.3), want, rtol=1e-5, atol=1e-5)

    @pytest.mark.slow
    def test_flex(self) -> None:
        q, k, v = self.heads()
        with torch.no_grad():
            got = peer_attention("flex", q, k, v, LENGTHS, 0.3)
        torch.testing.assert_close(got, block_causal_attention_reference(q, k, v, LENGTHS, 0.3), rtol=1e-4, atol=1e-5)

    def test_flex_says_what_it_cannot_do(self) -> None:
        q, k, v = self.heads()
        with pytest.raises(RuntimeError, match="'flex' cannot serve: FlexAttention has no backward pass on the CPU"):
            peer_attention("flex", q.requires_grad_(), k, v, LENGTHS, 0.3)
        with pytest.raises(RuntimeError, match="a power of two from 16 up, these are 24 wide"):
            peer_attention("flex", *self.heads(24), LENGTHS, 0.3)

    def test_flash_says_what_it_cannot_do(self) -> None:
        with pytest.raises(
            RuntimeError, match="'flash' cannot serve: flash-attn runs on CUDA devices, and the tensors"
        ):
            peer_attention("flash", *self.heads(), LENGTHS, 0.3)

    def test_flash_is_one_prefix_call_a_scale(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from varkern.ops.attention import peers as attention_peers

        module, shapes = types.ModuleType("flash_attn"), []

        def flash_attn_func(q, k, v, softmax_scale):  # as flash-attn has it: (B, L, H, D)
            shapes.append((q.shape[1], k.shape[1]))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)

        module.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        attention_peers._flash_function.cache_clear()
        try:
            assert attention_peers._flash_function()[1] is None
            q, k, v = self.heads()
            got = attention_peers._flash(q, k, v, LENGTHS, 0.3, 0.0)
        finally:
            attention_peers._flash_function.cache_clear()
        assert shapes == [(1, 1), (4, 5), (9, 14)]
        torch.testing.assert_close(got, block_causal_attention_reference(q, k, v, LENGTHS, 0.3), rtol=1e-5, atol=1e-5)

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "varkern"])
    def test_on_the_device(self, name: str) -> None:
        q, k, v = (x.to("cuda", torch.bfloat16).requires_grad_() for x in self.heads(64))
        try:
            got = peer_attention(name, q, k, v, LENGTHS, 0.3)
        except RuntimeError as error:
            if "is not installed" in str(error):
                pytest.skip(str(error))
            raise
        want = block_causal_attention_reference(q.float(), k.float(), v.float(), LENGTHS, 0.3)
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)


class TestMask:
    def test_it_is_in_the_state_dict_alone(self) -> None:
        var = model()
        assert "attn_bias_for_masking" not in dict(var.named_buffers())
        names = list(var.state_dict())
        assert names[names.index("lvl_1L") + 1] == "attn_bias_for_masking"  # the published order
        mask = var.state_dict()["attn_bias_for_masking"]
        assert torch.equal(mask, block_causal_mask((1, 4, 9, 16), torch.float32)[None, None])
        assert torch.equal(var.attn_bias_for_masking, mask)
        assert copy.deepcopy(var).bfloat16().state_dict()["attn_bias_for_masking"].dtype == torch.bfloat16

    def test_strict_loading(self) -> None:
        var, state = model(), model().state_dict()
        var.load_state_dict(state, strict=True)
        outer = torch.nn.ModuleDict({"var": var})
        outer.load_state_dict({f"var.{name}": value for name, value in state.items()}, strict=True)
        del state["attn_bias_for_masking"]
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "attn_bias_for_masking"'):
            var.load_state_dict(state)
        assert not any(var.load_state_dict(state, strict=False).unexpected_keys)

    def test_no_other_mask_is_taken(self) -> None:
        var, state = model(), model().state_dict()
        causal = torch.full((30, 30), -torch.inf).triu(1)
        with pytest.raises(RuntimeError, match="is not the block-causal mask of patch_nums"):
            var.load_state_dict(state | {"attn_bias_for_masking": causal[None, None]})
        with pytest.raises(RuntimeError, match=r"size mismatch for attn_bias_for_masking: \(1, 1, 14, 14\)"):
            var.load_state_dict(state | {"attn_bias_for_masking": torch.zeros(1, 1, 14, 14)})

    def test_a_dense_mask_given_to_a_block_is_used(self) -> None:
        var = model()
        x, cond = torch.randn(2, 30, 64), torch.randn(2, 64)
        dense = var.blocks[0](x=x, cond_BD=cond, attn_bias=var.attn_bias_for_masking)
        sparse = var.blocks[0](x=x, cond_BD=cond, attn_bias=BlockCausal((1, 4, 9, 16)))
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)
        causal = torch.full((30, 30), -torch.inf).triu(1)[None, None]
        assert not torch.allclose(var.blocks[0](x=x, cond_BD=cond, attn_bias=causal), dense)
