"""TF32 stays out of what is compared with: the switch, and that the tests' bounds would notice it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import test_conv
import test_quantize
import torch
import torch.nn.functional as F
from torch import Tensor

import varkern
from varkern.ops import _precision, conv
from varkern.ops._precision import full_float32, full_float32_of
from varkern.ops.quantize import reference as quantize_reference


def tf32(tensor: Tensor) -> Tensor:
    """Float32 rounded to the nearest number of 10 bits of mantissa, as a tensor core takes it; others as they are."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Rounded:
    """``torch.nn.functional`` whose convolution is a GPU's with TF32."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    @staticmethod
    def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        return F.conv2d(tf32(x), tf32(weight), bias, **options)


def test_the_rounding_is_tf32() -> None:
    x = torch.tensor([1.0, 1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11 - 2.0**-20, 0.0])
    want = torch.tensor([1.0, 1 + 2.0**-10, 1.0, 1 + 2.0**-9, -1 - 2.0**-10, 0.0])
    assert torch.equal(tf32(x), want)
    x = torch.randn(1000)
    assert ((tf32(x) - x).abs() <= 2.0**-11 * x.abs()).all()


class TestBoundsNotice:
    @pytest.mark.parametrize(
        "test", ["test_quantize", "test_dequantize", "test_teacher_forcing_input", "test_next_scale_input"]
    )
    def test_quantizer(self, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
        case = test_quantize.Case()
        run = getattr(test_quantize, test)
        with varkern.use_backend("cpu"):
            run(torch.device("cpu"), case)
            monkeypatch.setattr(quantize_reference, "F", Rounded())
            with pytest.raises(AssertionError):
                run(torch.device("cpu"), case)

    def test_gradients_of_the_quantizer(self) -> None:
        """The backward pass of phi, which is ATen's own where it is the reference's."""
        problem = test_quantize.Case().make()
        indices = problem.indices()
        grad = torch.randn(len(problem.sizes), 2, 8, 5, 5)
        want = quantize_reference.residual_quantize_backward_reference(
            grad, indices, problem.codebook, problem.phis, problem.sizes
        )
        phis = [phi._replace(weight=tf32(phi.weight)) for phi in problem.phis]
        got = quantize_reference.residual_quantize_backward_reference(
            grad, indices, problem.codebook, phis, problem.sizes
        )
        with pytest.raises(AssertionError):
            torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", [name for name in test_conv.CASES if name != "image"])
    def test_convolution(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of some draws, since few numbers may be near TF32's. So many channels as in "image" have a wider bound."""
        draws = [test_conv.arguments(test_conv.CASES[name]) for _ in range(8)]
        with varkern.use_backend("reference"):
            for inputs in draws:
                test_conv.check(inputs)
            monkeypatch.setattr(conv, "F", Rounded())
            assert any(self.fails(inputs) for inputs in draws)

    @staticmethod
    def fails(inputs: tuple[Any, ...]) -> bool:
        try:
            test_conv.check(inputs)
        except AssertionError:
            return True
        return False


def flags() -> list[Any]:
    if hasattr(torch.backends.cudnn, "conv"):
        backends = torch.backends
        return [s.fp32_precision for s in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)]
    return [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]


class TestSwitch:
    def test_full_float32(self) -> None:
        before = flags()
        with full_float32():
            assert set(flags()) <= {"ieee", False}
            assert not torch.backends.cudnn.allow_tf32  # the older flag can still be read
            assert not torch.backends.cuda.matmul.allow_tf32
            with full_float32():
                assert set(flags()) <= {"ieee", False}
            assert set(flags()) <= {"ieee", False}
        assert flags() == before
        with pytest.raises(KeyError), full_float32():
            raise KeyError
        assert flags() == before

    @pytest.mark.parametrize("set_before", ["older", "newer", "high"])
    def test_what_was_set_is_set_again(self, set_before: str) -> None:
        backends, before = torch.backends, (*flags(), torch.backends.cudnn.allow_tf32)
        try:
            if set_before == "older":
                backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
            elif set_before == "high":
                torch.set_float32_matmul_precision("high")
            elif hasattr(backends.cudnn, "conv"):
                backends.cudnn.conv.fp32_precision = "tf32"
                backends.cudnn.rnn.fp32_precision = "ieee"
            inside = flags()
            with full_float32():
                assert set(flags()) <= {"ieee", False}
            assert flags() == inside
            if set_before == "high":
                assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = before[-1]
            if hasattr(backends.cudnn, "conv"):
                switches = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
                for switch, value in zip(switches, before, strict=False):
                    switch.fp32_precision = value
        assert (*flags(), torch.backends.cudnn.allow_tf32) == before

    def test_on_the_cpu_nothing_is_switched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = flags()
        monkeypatch.setattr(_precision, "full_float32", lambda: pytest.fail("switched"))
        with full_float32_of(torch.ones(2)):
            assert flags() == before

    def test_phi_asks_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is computed on a CUDA device, forwards and backwards; here a CPU stands for one."""
        monkeypatch.setattr(quantize_reference, "full_float32_of", lambda tensor: _precision._one_at_a_time())
        seen: list[list[Any]] = []

        class Watched(Rounded):
            @staticmethod
            def conv2d(*args: Any, **options: Any) -> Tensor:
                seen.append(flags())
                return F.conv2d(*args, **options)

        monkeypatch.setattr(quantize_reference, "F", Watched())
        before = flags()
        problem = test_quantize.Case().make()
        quantize_reference.residual_quantize_reference(*problem.args)
        assert len(seen) == len(problem.sizes)
        assert all(set(state) <= {"ieee", False} for state in seen)
        assert flags() == before

    def test_threads_restore_what_was_set_before_them_all(self) -> None:
        before, wrong = flags(), []

        def work() -> None:
            for _ in range(200):
                with _precision._one_at_a_time():
                    if not set(flags()) <= {"ieee", False}:
                        wrong.append(flags())

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert flags() == before
