"""What csrc/bind.h makes of the argument structs: names, order, and what it refuses."""

import inspect
import re
from typing import Any

import pytest
import toolchain
import torch

from varkern import _C

try:
    from varkern import _C_cuda
except ImportError:
    _C_cuda = None


def listed(module: str) -> list[str]:
    return re.findall(r"^VARKERN_\w+_OP\((\w+),", (toolchain.CSRC / module / "ops.def").read_text(), re.MULTILINE)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def members(struct: str) -> list[str]:
    """The names that a struct of csrc/ops declares itself, without those of the struct it extends."""
    text = "".join(path.read_text() for path in sorted(toolchain.CSRC.glob("ops/*.h")))
    body = re.search(rf"^VARKERN_(?:MORE_)?ARGUMENTS\({struct},(.*?)^\)", text, re.MULTILINE | re.DOTALL)
    assert body, struct
    lines = (line.partition("//")[0].strip() for line in body[1].splitlines())
    return [re.findall(r"\w+", name)[-1] for line in lines if line.endswith(";") for name in line[:-1].split(",")]


@pytest.mark.parametrize("name", listed("cpu"))
def test_every_listed_operation_is_bound(name: str) -> None:
    names = parameters(getattr(_C, name))
    assert len(set(names)) == len(names) > 10
    assert getattr(_C, name).__doc__.startswith("Shapes and dtypes: ")
    assert getattr(_C, name).__module__ == "varkern._C"


def test_names_are_those_of_the_members() -> None:
    assert parameters(_C.group_norm) == members("GroupNorm")
    assert parameters(_C.residual_dequantize) == members("ResidualMaps") + members("ResidualDequantize")
    rows = [f"{name}{part}" for name in "qkv" for part in ("", "_stride_b", "_stride_h", "_stride_l")]
    assert parameters(_C.block_causal_attention_forward)[:13] == [*rows, "q_bias"]


@pytest.mark.skipif(_C_cuda is None, reason="built without CUDA")
@pytest.mark.parametrize("name", listed("cuda"))
def test_cuda_takes_what_the_cpu_takes_and_more(name: str) -> None:
    shared, names = parameters(getattr(_C, name)), parameters(getattr(_C_cuda, name))
    assert names[: len(shared)] == shared
    assert names[-1] == "stream"


class Call:
    """A call of group_norm with C > P > B, so that no two sizes can change places."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.weight, self.bias = torch.randn(2, 12, 5), torch.randn(12), torch.randn(12)
        self.out, self.coefficients = torch.full((2, 12, 5), torch.nan), torch.full((3, 2, 12), torch.nan)
        tensors = {"x": self.x, "weight": self.weight, "bias": self.bias, "out": self.out}
        self.arguments: dict[str, Any] = {key: tensor.data_ptr() for key, tensor in tensors.items()}
        self.arguments |= {"coefficients": self.coefficients.data_ptr(), "B": 2, "C": 12, "P": 5, "groups": 3}
        self.arguments |= {"dtype": 0, "channels_last": False, "silu": False, "eps": 1e-5}

    def expected(self) -> torch.Tensor:
        return torch.nn.functional.group_norm(self.x.double(), 3, self.weight.double(), self.bias.double(), 1e-5)


@pytest.mark.parametrize("positional", [0, 1, 8, 12, 13])
@pytest.mark.parametrize("backwards", [False, True])
def test_names_may_come_in_any_order(positional: int, backwards: bool) -> None:
    call = Call()
    values, named = list(call.arguments.values())[:positional], list(call.arguments.items())[positional:]
    _C.group_norm(*values, **dict(reversed(named) if backwards else named))
    assert (call.out - call.expected()).abs().max() < 1e-5  # of about 1: anything misplaced is far off


def test_names_need_not_be_interned() -> None:
    call = Call()
    _C.group_norm(**{"".join(list(name)): value for name, value in call.arguments.items()})
    assert (call.out - call.expected()).abs().max() < 1e-5


# What is changed, the error, and what it says.
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no_integer": ({"C": 12.0}, TypeError, "group_norm: C is 12.0: 'float' object cannot be interpreted as an integer"),
    "no_pointer": ({"weight": None}, TypeError, "group_norm: weight is None: "),
    "no_number": ({"eps": "small"}, TypeError, "group_norm: eps is 'small': must be real number, not str"),
    "no_flag": ({"silu": 1}, TypeError, "group_norm: silu is 1: give True or False"),
    "the_first_of_two": ({"B": "2", "eps": "small"}, TypeError, "group_norm: B is '2': "),
    "more_than_32_bits": ({"dtype": 1 << 32}, OverflowError, "group_norm: dtype is 4294967296: give an integer of 32 "),
    "more_than_64_bits": ({"P": 1 << 64}, OverflowError, "group_norm: P is 18446744073709551616: "),
    "unknown_name": ({"epsilon": 1e-5}, TypeError, "group_norm takes 13 arguments, not 14"),
    "unknown_dtype": ({"dtype": 9}, RuntimeError, "unknown dtype code"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changes, error, message = REFUSED[name]
    call = Call()
    with pytest.raises(error, match=re.escape(message)):
        _C.group_norm(**(call.arguments | changes))
    assert call.out.isnan().all()
    assert call.coefficients.isnan().all()


def test_a_name_that_is_missing_or_given_twice_is_refused() -> None:
    call = Call()
    first, *others = call.arguments.items()
    with pytest.raises(TypeError, match="group_norm has no argument 'y'"):
        _C.group_norm(y=first[1], **dict(others))
    with pytest.raises(TypeError, match="group_norm is given 'weight' twice"):
        _C.group_norm(first[1], first[1], **dict(others[:-1]))
    with pytest.raises(TypeError, match=r"group_norm takes 13 arguments, not 12; see help\(group_norm\)"):
        _C.group_norm(**dict(others))
    assert call.out.isnan().all()
