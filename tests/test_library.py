"""The backend registry: what is chosen, what an override does, and in which threads and compiled regions."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import varkern
from varkern.ops import _op, current_backend, explain, reference_forced, use_backend
from varkern.ops._op import Op
from varkern.ops.backends import _runs_on


def example(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.zeros(4, device=device, dtype=dtype),)


@pytest.fixture(scope="module")
def registered() -> Iterator[Op]:
    """An op of its own: cpu serves at most four elements, and there is no cuda backend."""
    op = Op("example_of_the_tests(Tensor x) -> Tensor", ("triton", "cpu"), example)
    op.limits(lambda backend, x: f"it has {x.numel()} elements" if backend == "cpu" and x.numel() > 4 else None)
    yield op
    del Op.registry[op.name]


@pytest.fixture
def op(registered: Op, monkeypatch: pytest.MonkeyPatch) -> Op:
    """Triton is never there for it, and the extension always."""
    monkeypatch.setitem(_op._ABSENT, "triton", lambda x: "it is never there")
    monkeypatch.setitem(_op._ABSENT, "cpu", lambda x: None)
    return registered


def test_automatic_choice_takes_what_serves_and_ends_at_the_reference(op: Op) -> None:
    assert op.choose(None, torch.zeros(4)) == "cpu"
    assert op.choose(None, torch.zeros(5)) == "reference"
    assert op.choose(None, torch.zeros(4, device="meta")) == "reference"


def test_override_serves_or_raises(op: Op) -> None:
    assert op.choose("reference", torch.zeros(4)) == "reference"
    assert op.choose("cpu", torch.zeros(4)) == "cpu"
    with pytest.raises(
        RuntimeError, match=r"^The backend 'triton' cannot run example_of_the_tests: it is never there\. "
    ):
        op.choose("triton", torch.zeros(4))


def test_an_op_without_the_named_backend_chooses_by_itself(op: Op) -> None:
    assert op.choose("cuda", torch.zeros(4)) == "cpu"


def test_explain(op: Op) -> None:
    expected = {"triton": "it is never there", "cpu": "it has 5 elements", "reference": None}
    assert explain(op.name, torch.zeros(5)) == expected
    with pytest.raises(ValueError, match=r"There is no op 'exampel': name one of .*, example_of_the_tests, "):
        explain("exampel", torch.zeros(5))


def test_interpreted_triton_is_never_an_automatic_choice(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_op._ABSENT, "triton", lambda x: None)
    monkeypatch.setitem(_op._ABSENT, "cpu", lambda x: "it is not built")
    assert op.choose(None, torch.zeros(4)) == "reference"
    assert op.choose("triton", torch.zeros(4)) == "triton"


def test_use_backend_nests_and_restores() -> None:
    assert varkern.use_backend is use_backend
    with use_backend(None):
        assert current_backend() is None
        with use_backend("reference"):
            assert reference_forced()
            with use_backend(None):
                assert not reference_forced()
            with pytest.raises(KeyError), use_backend("cpu"):
                raise KeyError
            assert current_backend() == "reference"
        assert current_backend() is None


@pytest.mark.parametrize("name", ["cpp", "CPU", "auto", ""])
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match=f"The backend is '{name}': name one of reference, cpu, triton, cuda"):
        use_backend(name)


def test_threads_are_independent() -> None:
    seen: dict[str, str | None] = {}
    inside = threading.Barrier(2)

    def work(name: str) -> None:
        with use_backend(name):
            inside.wait(timeout=10)
            seen[name] = current_backend()
            inside.wait(timeout=10)

    with use_backend("triton"):
        threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "cpu")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert current_backend() == "triton"
    assert seen == {"reference": "reference", "cpu": "cpu"}


def test_compiled_code_follows_the_override() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if reference_forced() else x * 3

    def reference_step(x: torch.Tensor) -> torch.Tensor:
        with use_backend("reference"):
            return step(x)

    torch.compiler.reset()
    compiled, x, others = torch.compile(step, fullgraph=True, backend="eager"), torch.ones(2), []
    for name, expected in ((None, 3), ("reference", 2), ("cpu", 3), ("reference", 2), (None, 3)):
        with use_backend(name):
            assert compiled(x).tolist() == [expected, expected]

    def elsewhere() -> None:
        others.append(compiled(x).tolist())
        with use_backend("reference"):
            others.append(compiled(x).tolist())

    with use_backend("reference"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert others == [[3, 3], [2, 2]]
    assert torch.compile(reference_step, fullgraph=True, backend="eager")(x).tolist() == [2, 2]
    assert current_backend() is None


@pytest.mark.parametrize(
    ("value", "printed"), [("reference", "reference True"), ("cpu", "cpu False"), ("", "None False")]
)
def test_environment_variable(value: str, printed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARKERN_BACKEND", value)
    code = "from varkern.ops import *; import threading\n"
    code += "show = lambda: print(current_backend(), reference_forced())\n"
    code += "show(); thread = threading.Thread(target=show); thread.start(); thread.join()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [printed, printed]


def test_environment_variable_of_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARKERN_BACKEND", "gpu")
    done = subprocess.run([sys.executable, "-c", "import varkern"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ValueError: The environment variable VARKERN_BACKEND is 'gpu': "
        "name one of reference, cpu, triton, cuda, or leave it unset to choose freely."
    )


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("80", "90a", "100"), (8, 0), True),
        (("80", "90a", "100"), (8, 9), True),
        (("80", "90a", "100"), (9, 0), True),
        (("80", "90a", "100"), (12, 0), True),  # the PTX of the last one
        (("80", "90a", "100"), (7, 5), False),
        (("86",), (8, 0), False),
        (("80", "90a"), (10, 0), False),  # with a letter, PTX binds too
        (("90a",), (9, 0), True),
        (("90a",), (8, 0), False),
    ],
)
def test_architectures(architectures: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    assert _runs_on(architectures, capability) is runs
