"""The benchmarks run, record, compare and are held to their bars: on tiny shapes, and on planted records."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_rows import BENCHMARKS, bars, measure, module, record, result, row, suite

from varkern import cli

# --- the whole suite, tiny ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    command = [sys.executable, "-c", "import sys; from varkern.cli import main; sys.exit(main())"]
    command += ["bench", "--smoke", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.exists(), done.stdout + done.stderr
    found, output = json.loads(out.read_text()), done.stdout
    assert found["failures"] == []
    assert found["not_run"] == []
    assert done.returncode == 0, output
    assert {entry["file"] for entry in found["rows"]} == {path.name for path in BENCHMARKS.glob("bench_*.py")}
    record.check(found)
    timed = [entry for entry in found["rows"] if entry["median_s"] is not None]
    assert all(entry["median_s"] > 0 and entry["speedup"] > 0 and entry["ceilings"][1] > 0 for entry in timed)
    for comparison in record.comparisons(found).values():
        assert any(entry["provider"].startswith("varkern") for entry in comparison)
        assert comparison[0]["provider"] == comparison[0]["baseline"]
    memory = [entry["peak_bytes"] for entry in found["rows"] if entry["group"] == bars.MEMORY]
    assert len(memory) == 2
    assert all(1 << 20 < peak < 1 << 30 for peak in memory)
    assert f"bars on {found['device']}" in output
    assert "block-causal attention" in output


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = module("plot")
    rows = [row(provider="reference"), row(), row("small", "reference"), row("small", speedup=0.7)]
    assert plot.scaling(result(*rows)) is None  # nothing to draw
    for axis, (_, group) in plot.AXES.items():
        for value in (1, 2, 4):
            facts = {"batch": 1, "depth": 2, "pixels": 256, axis: value}
            rows += [row(f"{axis} {value}", who, group=group, facts=facts) for who in ("reference", "varkern")]
    paths = plot.draw(result(*rows), tmp_path, "here")
    assert [path.name for path in paths] == ["here-speedup.png", "here-scaling.png", "here-roofline.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000 for path in paths)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(SystemExit, match="is no benchmark result"):
        plot.main([str(tmp_path / "r.json")])


BROKEN = """
import os, pytest, torch

@pytest.mark.benchmark(group="planted")
@pytest.mark.parametrize("which", ["fine", "wrong", "nonsense", "crash"])
def test_planted(compare, record, device, which):
    x = torch.ones(4)
    if which == "crash":
        os._exit(7)
    if which == "nonsense":
        record({"varkern": {"median_s": "fast"}})
        return
    calls = {"reference": lambda: x + 1, "varkern": lambda: x + (2 if which == "wrong" else 1)}
    torch.testing.assert_close(calls["varkern"](), calls["reference"]())
    compare(calls, moved=32)
"""


def test_what_was_measured_outlives_a_failure_and_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("conftest.py", "measure.py"):
        (tmp_path / name).write_text((BENCHMARKS / name).read_text())
    (tmp_path / "bench_planted.py").write_text(BROKEN)
    monkeypatch.setattr(suite, "BENCHMARKS", tmp_path)
    out = tmp_path / "record.json"
    arguments = ["bench", "--smoke", "--device", "cpu", "--out", str(out)]
    assert suite.run(cli.build_parser().parse_args(arguments)) == 1
    found = record.read(out)
    assert [entry["name"] for entry in found["rows"]] == ["planted fine", "planted fine"]
    wrong, crash, nonsense = found["failures"]
    assert "test_planted[cpu-wrong]" in wrong
    assert "not close" in wrong
    assert crash == "bench_planted.py: ended with status 7"
    assert "planted nonsense" in nonsense


def test_what_the_time_does_not_suffice_for_is_listed(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    arguments = ["bench", "--smoke", "--only", "norm", "--device", "cpu", "--minutes=-1", "--out", str(out)]
    assert suite.run(cli.build_parser().parse_args(arguments)) == 0
    found = record.read(out)
    assert found["rows"] == []
    assert found["not_run"] == ["bench_norm.py: the time was up"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "nrom"], "there is no benchmark 'nrom'; name one of attention"),
        (["--against", "nowhere.json"], "--against nowhere.json: there is no such file"),
        (["--out", "broken.json"], "broken.json is no benchmark result"),
    ],
)
def test_bad_options(arguments: list[str], sentence: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text('{"rows": 3}')
    assert cli.main(["bench", "--smoke", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_without_a_checkout(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("varkern.commands.__file__", str(tmp_path / "site-packages/varkern/commands.py"))
    assert cli.main(["bench"]) == 2
    assert "there are no benchmarks beside this installation" in capsys.readouterr().err


# --- timing ---------------------------------------------------------------------------------------------------------


def test_a_call_that_sleeps_twice_as_long_is_half_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(measure.settings, "smoke", False)
    monkeypatch.setattr(measure, "ROUNDS", 8)
    calls = {"reference": lambda: time.sleep(0.01), "varkern": lambda: time.sleep(0.02)}
    rows = measure.measure(calls, torch.device("cpu"), moved=1e6, flop=1e6)
    assert rows["varkern"]["speedup"] == pytest.approx(0.5, rel=0.3)
    assert rows["varkern"]["median_s"] >= 0.02
    assert rows["varkern"]["gb_s"] == pytest.approx(1e-3 / rows["varkern"]["median_s"])
    copy_gb_s, product_gflop_s = rows["varkern"]["ceilings"]
    assert rows["varkern"]["floor_s"] == pytest.approx(max(1e-3 / copy_gb_s, 1e-3 / product_gflop_s))
    assert len({tuple(entry["ceilings"]) for entry in rows.values()}) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_of_a_call_is_seen_though_freed() -> None:
    script = """
import memory_child, torch
grow = lambda: [torch.ones(8 << 20).add(1).sum()]  # two tensors of 32 MiB
print(memory_child.peak(grow)[0] >> 20, memory_child.peak(grow)[0] >> 20)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert 60 <= first < 80
    assert 60 <= second < 80  # what the first call freed is not counted as held


def test_device_as_file_name() -> None:
    assert measure.file_name("AMD EPYC, avx512, 2 threads") == "amd-epyc-avx512-2-threads"
    assert measure.file_name("Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz, avx512, 4 threads") == (
        "intel-xeon-gold-6148-cpu-2-40ghz-avx512-4-threads"
    )
    assert measure.file_name("NVIDIA H200") == "nvidia-h200"


# --- the record -----------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    written = result(row(provider="reference"), row(), failures=["a: b"])
    record.write(path, written)
    assert record.read(path) == written
    assert record.read(tmp_path / "none.json") is None
    assert len(path.read_text().splitlines()) < 20  # a row a line
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    record.write(path, result(row()))
    before = path.read_text()
    monkeypatch.setattr(record.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        record.write(path, result(row(), row("another")))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: found.update(schema=0),
        lambda found: found.pop("commit"),
        lambda found: found["rows"][0].pop("fraction"),
        lambda found: found["rows"][0].update(median_s="fast"),
    ],
    ids=["schema", "head", "column", "type"],
)
def test_what_is_no_record_is_refused(spoil: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    found = result(row())
    spoil(found)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="is no benchmark result"):
        record.read(path)


def test_rows_of_what_did_not_run_stay() -> None:
    old = result(row("a"), row("b", file="bench_norm.py"), row("gone"))
    merged = record.merged(old, result(row("a", median_s=5e-3)), ["bench_quantize.py"])
    assert [(entry["name"], entry["median_s"]) for entry in merged["rows"]] == [("b", 1e-3), ("a", 5e-3)]


# --- what got slower ------------------------------------------------------------------------------------------------


def pair(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return result(row(provider="reference"), row()), result(row(provider="reference"), row(**changes))


def test_a_slower_row_is_named() -> None:
    (line,) = record.slower(*pair(median_s=1.5e-3, speedup=1.33))
    assert "encode 256px-B1 / varkern: 1 ms -> 1.5 ms, 2.00x -> 1.33x" in line
    assert record.slower(None, pair()[1]) == []


def test_noise_is_not() -> None:
    assert record.slower(*pair(median_s=1.09e-3, speedup=1.84)) == []
    # Twice as slow, but its quartiles say that this happens.
    wide = {"quartiles_s": [0.7e-3, 2.7e-3], "speedup_quartiles": [0.5, 2.5]}
    assert record.slower(*pair(median_s=2e-3, speedup=1.0, **wide)) == []


def test_a_slow_moment_of_the_machine_is_not() -> None:
    old, new = pair(median_s=1.5e-3, speedup=1.33)
    new["rows"][1]["ceilings"] = [20.0, 66.0]  # products took 1.5 times as long when this was measured
    assert record.slower(old, new) == []
    # The baseline was slow in the same rounds.
    assert record.slower(*pair(median_s=1.5e-3, speedup=2.0)) == []


def test_a_slower_reference_is_named() -> None:
    old, new = pair()
    new["rows"][0] = row(provider="reference", median_s=3e-3)
    (line,) = record.slower(old, new)
    assert "reference: 2 ms -> 3 ms" in line


def test_a_faster_machine_excuses_nothing_and_accuses_nothing() -> None:
    old, new = pair()
    new["rows"][1]["ceilings"] = [40.0, 200.0]
    assert record.slower(old, new) == []


# --- bars -----------------------------------------------------------------------------------------------------------


def verdict(found: dict[str, Any], bar: Any) -> tuple[str, float | None]:
    (only,) = bars.evaluate(found, (bar,))
    return only.status, only.value


QUANTIZER = bars.Bar("quantizer", "cpu", bars.ENCODE, "encode 256px-B1", "speedup", 2.0)


def test_a_missed_bar_shows() -> None:
    assert verdict(result(row(provider="reference"), row(speedup=2.0)), QUANTIZER) == ("pass", 2.0)
    missed = result(row(provider="reference"), row(speedup=1.9))
    assert verdict(missed, QUANTIZER) == ("FAIL", 1.9)
    assert "FAIL              1.90x  quantizer" in bars.table(missed, (QUANTIZER,))
    assert verdict(result(row("another")), QUANTIZER) == ("not run", None)
    assert "0 pass, 0 FAIL, 1 not run" in bars.table(result(), (QUANTIZER,))


def test_every_measure_of_a_bar() -> None:
    def bar(measure: str, bound: float, **more: Any) -> Any:
        return bars.Bar("engine", "cuda", "generation", "generate d16-B64", measure, bound, **more)

    name, group = "generate d16-B64", "generation"
    rows = [
        row(name, "reference", group=group, median_s=0.8, peak_bytes=1000),
        row(name, "torch.compile", group=group, median_s=0.3),
        row(name, group=group, median_s=0.16, speedup=5.1, peak_bytes=700, facts={"batch": 64}),
        {**row("memcheck", group=bars.SANITIZER, facts={"errors": 2}), **record.UNTIMED},
    ]
    found = result(*rows, device_type="cuda", device="NVIDIA H100")
    assert verdict(found, bar("speedup", 5.0)) == ("pass", 5.1)  # in the rounds, not of the medians
    assert verdict(found, bar("speedup", 2.0, against="torch.compile")) == ("FAIL", pytest.approx(1.875))
    assert verdict(found, bar("speedup", 2.0, against="flash")) == ("not run", None)
    assert verdict(found, bar("seconds", 0.1)) == ("FAIL", 0.16)
    assert verdict(found, bar("images_s", 399)) == ("pass", pytest.approx(400))
    assert verdict(found, bar("memory", 0.6)) == ("FAIL", 0.7)
    memcheck = bars.Bar("sanitizer", "cuda", bars.SANITIZER, "memcheck", "errors", 0)
    assert verdict(found, memcheck) == ("FAIL", 2)
    assert "bars on NVIDIA H100 (set for an H200)" in bars.table(found, (memcheck,))
    assert bars.evaluate(found, (QUANTIZER,)) == []  # of another device


@pytest.mark.slow
def test_every_cpu_bar_names_a_benchmark_that_exists() -> None:
    """The groups and names in bars.py are those that the benchmarks record."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        check=True,
    )
    collected = set()
    for line in done.stdout.splitlines():
        function, _, which = line.partition("::test_")[2].rstrip("]").partition("[")
        for device in ("cpu", "cuda"):
            parts = which.split("-")
            if device in parts:
                parts.remove(device)
                collected.add((device, f"{function} {'-'.join(parts)}"))
    source = "\n".join(path.read_text() for path in BENCHMARKS.glob("bench_*.py"))
    for bar in bars.BARS:
        if bar.area == "sanitizer":
            continue
        assert f'group="{bar.group}"' in source, bar
        name = bar.name.replace("\\", "")
        if name.startswith("training_step"):  # names its case itself
            assert '"cpu": (2, 1) if settings.smoke else (8, 4)' in source
            continue
        assert (bar.device, name) in collected, bar
