"""What benchmarks make of results that a GPU computes otherwise, of peers that fail there, and of what ends them.

Here a CPU stands for the GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_rows import BENCHMARKS, bars, measure, module, record, result, row, suite
from torch import Tensor

from varkern import cli

attention, models, quantize, sampling, shapes, training = map(
    module, ("bench_attention", "models", "bench_quantize", "bench_sampling", "shapes", "bench_training")
)


class Gpu:
    """What a benchmark asks of a device."""

    type = "cuda"


CPU: Any = torch.device("cpu")


def compare(*_: Any, **__: Any) -> None:
    """Times nothing."""


# --- results of 16 bits, and near-ties ------------------------------------------------------------------------------


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of few positions in the dtypes of a GPU."""
    monkeypatch.setattr(attention, "HEADS", 4)
    monkeypatch.setattr(attention, "batch_of", lambda *_: 2)
    monkeypatch.setattr(attention, "dtype_of", lambda _: request.param)
    monkeypatch.setitem(shapes.SCHEDULES, "256px", (1, 2, 3, 4, 5))


@pytest.mark.usefixtures("small")
def test_gradients_of_16_bits() -> None:
    attention.test_from_the_projection(compare, CPU, "256px")
    for backward in (False, True):
        attention.test_attention(compare, CPU, "256px", backward)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["qkv", "q_bias", "v_bias", "log_scale"])
def test_a_gradient_that_is_wrong_by_a_tenth(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    true = attention.block_causal_attention_qkv

    def wrong(*inputs: Any) -> Tensor:
        changed = list(inputs)
        changed[which] = inputs[which] + 0.1 * (inputs[which] - inputs[which].detach())
        return true(*changed)

    monkeypatch.setattr(attention, "block_causal_attention_qkv", wrong)
    with pytest.raises(AssertionError, match="of its norm"):
        attention.test_from_the_projection(compare, CPU, "256px")


class Generator(torch.Generator):
    """Of a GPU."""

    def __new__(cls, device: Any = None) -> Any:
        return super().__new__(cls)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU for the benchmarks of sampling; the logits have many ties."""
    draw = sampling.ops.draw_noise
    monkeypatch.setattr(sampling, "LAST", (1, 64))
    monkeypatch.setattr(sampling.ops, "draw_noise", lambda rows, V, _, generator=None: draw(rows, V, CPU, generator))
    monkeypatch.setattr(torch, "Generator", Generator)

    def problem(device: Any, rows: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        logits = (4 * torch.randn(2 * rows[0], rows[1], sampling.V)).round() / 4
        return logits.to(dtype), draw(rows[0] * rows[1], sampling.V, CPU)

    monkeypatch.setattr(sampling, "problem", problem)
    return Gpu()


def in_another_order(logits: Tensor, guidance: float, top_k: int, top_p: float) -> Tensor:
    """filter_logits whose sort has ties the other way round, and whose sums are float64."""
    x = sampling.ops.guided_logits_reference(logits, guidance).flip(-1)
    x.masked_fill_(x < x.topk(top_k).values[..., -1:], -torch.inf)
    ascending, order = x.sort(dim=-1, stable=True)
    drop = ascending.double().softmax(-1).cumsum(-1) <= 1 - top_p
    return x.masked_fill(drop.scatter(-1, order, drop), -torch.inf).flip(-1)


def test_filtered_logits_in_another_order(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, _ = sampling.problem(gpu, sampling.LAST, torch.float32)
    assert not torch.equal(
        in_another_order(logits, *sampling.PAPER), sampling.ops.filter_logits(logits, *sampling.PAPER)
    )
    monkeypatch.setattr(sampling.ops, "filter_logits", in_another_order)
    sampling.test_filter(compare, gpu)
    monkeypatch.setattr(sampling.ops, "filter_logits", lambda *args: in_another_order(*args[:3], args[3] - 0.01))
    with pytest.raises(AssertionError, match="logits are kept wrongly or not"):
        sampling.test_filter(compare, gpu)


def test_drawn_tokens_differ_at_ties_alone(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true = sampling.ops.sample_tokens
    sampling.test_with_noise(compare, gpu)
    sampling.run(compare, gpu, (1, 8), torch.float32, sampling.PAPER)
    monkeypatch.setattr(sampling.ops, "sample_tokens", lambda *args: (true(*args) + 1) % sampling.V)
    for draw in (
        lambda: sampling.test_with_noise(compare, gpu),
        lambda: sampling.run(compare, gpu, (1, 8), torch.float32, sampling.PAPER),
    ):
        with pytest.raises(AssertionError, match="tokens differ where no rounding decides"):
            draw()


def test_a_tie_may_be_drawn_either_way() -> None:
    x, noise = torch.tensor([[0.0, 3.0, 1.0, 3.0]]), torch.tensor([[1.0, 0.5, 1.0, 0.5 * (1 + 2.0**-23)]])
    codes = [torch.tensor([[i]]) for i in range(4)]
    sampling.check_drawn(codes[3], codes[1], x, noise, 0, 0.0)
    for wrong in (0, 2):
        with pytest.raises(AssertionError, match="1 of the tokens"):
            sampling.check_drawn(codes[wrong], codes[1], x, noise, 0, 0.0)


def test_another_code_at_a_near_tie_changes_its_images_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    true = quantize.ops.residual_quantize_train
    monkeypatch.setattr(quantize, "check_indices", lambda *_: None)
    change = torch.zeros(2, quantize.CV, 16, 16)
    change[0] = 0.05

    def near(features: Tensor, *rest: Any) -> Any:
        return true(features + change, *rest)

    monkeypatch.setattr(quantize.ops, "residual_quantize_train", near)
    quantize.test_training(compare, CPU, ("256px", 2))
    change[1] = 0.05
    quantize.test_training(compare, CPU, ("256px", 2))  # nothing is left to compare
    change.zero_()
    monkeypatch.setattr(
        quantize.ops, "residual_quantize_train", lambda f, *rest: true(f + 0.001 * (f - f.detach()), *rest)
    )
    with pytest.raises(AssertionError, match="gradient 0 is off by"):
        quantize.test_training(compare, CPU, ("256px", 2))


# --- what a row is measured with ------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`measure` with a GPU, on which each call takes a millisecond."""
    monkeypatch.setattr(measure, "sample", lambda call, repeats, _: [call() for _ in range(repeats)] and 4e-3)
    monkeypatch.setattr(measure, "ceilings", lambda *_: measure.Ceilings(1e12, 1e14))
    monkeypatch.setattr(measure, "peak_bytes", lambda call, _: [call()] and 1)
    monkeypatch.setattr(measure, "ROUNDS", 3)
    monkeypatch.setattr(measure.settings, "smoke", False)
    return lambda calls, **options: measure.measure(calls, Gpu(), 1e6, 1e6, **options)


def test_a_row_tells_how_float32_was_computed(timed: Any) -> None:
    def demo() -> None:
        with models.as_the_demo_runs(Gpu()):
            pass

    rows = timed({"reference": lambda: None, "varkern": demo})
    assert rows["varkern"]["facts"]["float32"]["products"] == "tf32"
    assert rows["reference"]["facts"]["float32"] == measure.float32_settings()
    assert rows["reference"]["facts"]["float32"]["products"] != "tf32"
    with measure.full_float32():
        assert set(measure.float32_settings().values()) == {"ieee", "highest"}


def test_steps_follow_each_other(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = []
    assert timed({"varkern": lambda: count.append(1)}, steps=4)["varkern"]["median_s"] == pytest.approx(1e-3)
    assert len(count) % 4 == 1  # and one for the memory
    asked: dict[str, Any] = {}
    monkeypatch.setattr(training, "step_of", lambda *_: (lambda *_: torch.tensor(8.0), 1))
    training.test_training_step(lambda *_, **options: asked.update(options), Gpu())
    assert asked["steps"] == training.STEPS > 1


def test_a_step_waits_for_no_number() -> None:
    step, _ = training.step_of(1, 1, CPU)
    assert isinstance(step(None), Tensor)


# --- peers that fail ------------------------------------------------------------------------------------------------


def too_large(after: int = 0) -> Any:
    """A call that the memory does not suffice for after so many that it did for."""
    calls = []

    def call() -> str:
        calls.append(1)
        if len(calls) > after:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return "fine"

    return call


@pytest.mark.parametrize("after", [0, 1, 4], ids=["checked", "timed_first", "timed_later"])
def test_a_reference_out_of_memory_costs_its_own_row_alone(timed: Any, after: int) -> None:
    calls = {"reference": too_large(after), "varkern": lambda: "fine"}
    found = measure.results_of(calls)
    assert list(found) == (["varkern"] if after == 0 else ["reference", "varkern"])
    rows = timed(calls)
    assert rows["reference"] == {"rounds": 0, "facts": {"out_of_memory": True}}
    assert rows["varkern"]["median_s"] == 4e-3
    assert rows["varkern"]["speedup"] is None
    assert rows["varkern"]["facts"].get("unchecked", False) == (after == 0)


def test_varkern_out_of_memory_is_a_failure(timed: Any) -> None:
    for work in (measure.results_of, timed):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            work({"reference": lambda: "fine", "varkern float16": too_large()})


def test_a_kernel_that_runs_out_of_memory_is_not_taken_for_one_that_does_not_run() -> None:
    assert attention.runs(lambda *_: too_large()(), torch.ones(2))
    assert not attention.runs(lambda *_: torch.ones(2) @ torch.ones(3), torch.ones(2))


def test_tables_of_a_reference_out_of_memory(tmp_path: Path) -> None:
    short = {**row(provider="reference"), **record.UNTIMED, "rounds": 0, "facts": {"out_of_memory": True}}
    facts = {"batch": 1, "depth": 2, "pixels": 256}
    ours = {**row(facts=facts), "speedup": None, "speedup_quartiles": None}
    found = result(short, ours, row("small", "reference"), row("small"))
    found["versions"] = {"torch": "2.11", "python": "3.12"}
    record.write(tmp_path / "record.json", found)
    assert record.read(tmp_path / "record.json") == found
    assert "out of memory" in record.table(found)
    assert "| out of memory (reference) | 1 ms |  | 50% | 000000000 |" in record.cases(found, "bench_quantize.py")
    for table in (record.summary, record.overview):
        assert "| 1 case | 2.00 | 000000000 |" in table(found)
        assert bars.ENCODE not in table({**found, "rows": [short, ours]})  # no span of speed-ups
        whole = [{**entry, "file": "bench_generate.py"} for entry in (short, ours)]
        assert "| out of memory (reference) | 1 ms |  | 000000000 |" in table({**found, "rows": whole})
    assert record.not_faster(found) == []
    assert record.slower(found, {**found, "rows": [short, {**ours, "median_s": 9e-3}]}) != []
    assert bars.value_of(bars.Bar("q", "cpu", bars.ENCODE, ours["name"], "speedup", 2.0), [short, ours]) is None
    pytest.importorskip("matplotlib")
    plot = module("plot")
    scaled = [{**entry, "group": "generation against batch"} for entry in (short, ours)]
    assert len(plot.draw(result(*found["rows"], *scaled), tmp_path, "here")) == 3


PLANTED = """
import os, time, pytest, torch
from measure import results_of

seen = []

def compiler(graph, inputs):
    seen.append([type(value) for value in inputs if not isinstance(value, torch.Tensor)])
    return graph.forward

@pytest.mark.benchmark(group="planted")
@pytest.mark.parametrize("size", [3, 4, 5])
def test_shapes(compare, device, size):
    compiled = torch.compile(torch.sin, backend=compiler)
    compare({"peer": lambda: compiled(torch.ones(size, size)), "varkern": lambda: None}, moved=8)
    assert seen == [[]] * (size - 2)  # compiled for each size alone

@pytest.mark.benchmark(group="planted")
def test_peer(compare, device):
    calls = {"reference": lambda: 1, "flex": lambda: 1 // 0, "varkern": lambda: 2}
    assert results_of(calls) == {"reference": 1, "varkern": 2}
    compare(calls, moved=8)

@pytest.mark.benchmark(group="planted")
def test_that_hangs(compare, device):
    path = os.environ.get("PLANTED")
    if path:
        open(path, "w").write(str(os.getpid()))
        time.sleep(600)
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks, all of the above."""
    for name in ("conftest.py", "measure.py"):
        (tmp_path / name).write_text((BENCHMARKS / name).read_text())
    (tmp_path / "bench_planted.py").write_text(PLANTED)
    monkeypatch.setattr(suite, "BENCHMARKS", tmp_path)
    return tmp_path


def test_cases_are_compiled_each_alone_and_a_failing_peer_costs_its_own_row_alone(planted: Path) -> None:
    out = planted / "record.json"
    arguments = ["bench", "--smoke", "--device", "cpu", "--out", str(out)]
    assert suite.run(cli.build_parser().parse_args(arguments)) == 1
    found = record.read(out)
    (failure,) = found["failures"]
    assert "test_peer[cpu], flex: ZeroDivisionError" in failure
    names = [(entry["name"], entry["provider"]) for entry in found["rows"]]
    assert names[-2:] == [("peer", "reference"), ("peer", "varkern")]
    assert len(names) == 8


# --- what ends a run ------------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import suite
from varkern import cli
suite.BENCHMARKS = Path({folder!r})
sys.exit(suite.run(cli.build_parser().parse_args(["bench", "--smoke", "--device", "cpu", "--out", {out!r}])))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_ended_leaves_its_rows(planted: Path, number: signal.Signals) -> None:
    out, pid = planted / "record.json", planted / "pid"
    # Measured earlier: the one is not reached this time, the other is measured again.
    record.write(
        out, result(row("hangs", file="bench_planted.py"), row("peer", file="bench_planted.py", group="planted"))
    )
    script = RUN.format(benchmarks=str(BENCHMARKS), folder=str(planted), out=str(out))
    child = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PLANTED": str(pid)})
    try:
        deadline = time.monotonic() + 120
        while len(record.read(out)["rows"]) < 9 or not pid.is_file():  # eight, and one that is old
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.1)
        child.send_signal(number)
        assert child.wait(60) == (-number if number == signal.SIGKILL else 1)
    finally:
        child.kill()
        if pid.is_file() and Path(f"/proc/{pid.read_text()}").exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)
    found = record.read(out)
    names = [entry["name"] for entry in found["rows"]]
    assert len(names) == 9
    assert "hangs" in names
    if number != signal.SIGKILL:
        assert found["not_run"] == ["bench_planted.py: it was stopped"]
    assert [path.name for path in planted.glob(".record*")] == []
