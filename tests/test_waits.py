"""No host waits for its device between the check of the labels and the images."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, tensors_of
from graph_standin import model
from test_models import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import varkern
from varkern.engine.arguments import check_labels, draw_labels
from varkern.engine.noise import BatchNoise
from varkern.engine.options import Options
from varkern.modules.schedule import PATCH_NUMS_256
from varkern.ops import quantize, sampling
from varkern.ops.attention import cached

generate_module = sys.modules["varkern.engine.generate"]  # the name means the function


class Waits(TorchDispatchMode):
    """Fails for what would make the host wait: values of a meta tensor cannot be read, nor may the CPU give any."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        # Of one sample some versions of torch read back on a GPU whether the probabilities were any.
        assert func is not torch.ops.aten.multinomial.default or args[1] > 1
        out = func(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.launches += not (view or "empty" in func.__name__ or "view" in func.__name__)
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        places = {t.device.type for t in tensors}
        assert places <= {"meta"}, f"{func} uses {places}"
        return out


class TestNothingWaits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "options",
        [Options(top_k=5, top_p=0.9), Options(cfg=0.0), Options(more_smooth=True)],
        ids=["filters", "no guidance", "more_smooth"],
    )
    def test_between_labels_and_images(self, dtype, options, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a device without values no value is read, and nothing comes from the host."""
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device
        var = model()
        vae = var.vae_proxy[0].to("meta", dtype)
        var.to("meta", dtype)
        labels = torch.zeros(2, dtype=torch.int64, device="meta")
        with torch.no_grad(), Waits() as waits:
            got = generate_module._computed(options, var, labels, BatchNoise(2, torch.device("meta"), None))
        assert got.images.shape == (2, vae.in_channels, 8, 8)
        assert [tuple(tokens.shape) for tokens in got.tokens] == [(2, p * p) for p in var.patch_nums]
        assert waits.count > 100

    def test_nor_in_the_reference_ops_that_serve_a_device_without_kernels(self) -> None:
        with torch.device("meta"), torch.no_grad(), Waits() as waits:
            assert sampling._draw_reference(torch.empty(4, 9, 64), torch.empty(18, 64), 1.5, 5, 0.9).shape == (2, 9)
            qkv, cache, bias = torch.empty(2, 9, 3, 2, 32), torch.empty(2, 2, 2, 14, 32), torch.empty(64)
            out = cached.cached_attention_reference(qkv, cache, 5, bias, bias, torch.empty(2), 1.0)
            assert out.shape == (2, 9, 2, 32)
            f_hat, codes = torch.empty(2, 8, 4, 4), torch.empty(2, 8, 2, 2)
            phi = quantize.Phi(torch.empty(8, 8, 3, 3), torch.empty(8), 0.5)
            assert quantize.next_scale_input_reference(f_hat, codes, phi, (3, 3))[0] is f_hat
        assert waits.count > 30

    @pytest.mark.parametrize("name", CASES)
    def test_nor_in_any_op(self, name: str) -> None:
        """Nor on the way to it: the reference of every op, as its public function calls it."""
        case = CASES[name]
        inputs = [t.to("meta") for t in case.fresh()]
        with torch.no_grad(), varkern.use_backend("reference"), Waits():
            case.function(*inputs)
        if case.differentiable:
            leaves = [t.requires_grad_() if i in case.differentiable else t for i, t in enumerate(inputs)]
            used = [t.clone() if i == case.writes else t for i, t in enumerate(leaves)]
            with varkern.use_backend("reference"), Waits():
                out = next(t for t in tensors_of(case.function(*used)) if t.requires_grad)
                torch.autograd.grad(out.sum(), [leaves[i] for i in case.differentiable], allow_unused=True)

    def test_launches_of_an_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What docs/engine.md counts; an op that is computed by several kernels is one."""
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        with torch.device("meta"):
            vae, var = varkern.build_vae_var("meta", patch_nums=PATCH_NUMS_256, depth=16)
        var.eval().bfloat16()
        vae.bfloat16()
        labels, noise = torch.zeros(1, dtype=torch.int64, device="meta"), BatchNoise(1, torch.device("meta"), None)
        with torch.no_grad(), Waits() as waits:
            generate_module._computed(Options(top_k=900, top_p=0.96), var, labels, noise)
        print(f"ops that launch something: {waits.launches}")
        assert 1000 < waits.launches <= 1668

    def test_nor_for_a_label(self) -> None:
        uniform = torch.full((1, 10), 0.1, device="meta")
        var = SimpleNamespace(num_classes=10, lvl_1L=torch.zeros(1, device="meta"), uniform_prob=uniform)
        with Waits():
            assert draw_labels(var, 1, None).shape == (1,)
            assert draw_labels(var, 3, None).shape == (3,)

    def test_what_would_wait_is_seen(self) -> None:
        with Waits():
            x = torch.ones(3, device="meta")
            with pytest.raises(RuntimeError, match="item"):
                int(x.sum())
            with pytest.raises((RuntimeError, NotImplementedError), match="nonzero"):
                x[x > 0]
            with pytest.raises(AssertionError, match="uses"):
                torch.tensor([1.0], device="cpu")
            with pytest.raises((AssertionError, NotImplementedError)):
                x.cpu()

    def test_labels_of_the_device_are_not_read(self) -> None:
        _, var = tiny()
        var.to("meta")
        with Waits():
            assert check_labels(var, 2, torch.zeros(2, dtype=torch.int32, device="meta")).dtype == torch.int64

    def test_labels_of_the_host_are_checked_there(self) -> None:
        _, var = tiny()
        var.to("meta")
        for labels in (3, [1, 2], -1, (5, 0)):
            assert check_labels(var, 2, labels).device.type == "meta"
        for labels in (6, [1, 6], [-1, 2]):
            with pytest.raises(ValueError, match=r"labels must be in \[0, 5\]"):
                check_labels(var, 2, labels)

    @pytest.mark.parametrize("classes", [1, 2, 10, 1000])
    def test_a_label_is_drawn_as_multinomial_draws(self, classes: int) -> None:
        uniform = torch.full((1, classes), 1.0 / classes)
        var = SimpleNamespace(num_classes=classes, lvl_1L=torch.zeros(1), uniform_prob=uniform)
        for seed in range(20):
            a, b = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
            want = torch.multinomial(uniform, 1, replacement=True, generator=b).view(1)
            assert torch.equal(draw_labels(var, 1, a), want)
            assert torch.equal(a.get_state(), b.get_state())
