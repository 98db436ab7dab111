"""The tables of the documents: made from recorded results, and up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from planted_rows import BENCHMARKS, bars, record, result, row, suite

from varkern import cli

ROOT = BENCHMARKS.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_tables_have_gains_losses_memory_floors_and_commits(tmp_path: Path) -> None:
    slow = row("small", speedup=0.8, commit="1" * 9)
    memory = [
        {**row("peak x", provider, group=bars.MEMORY), **record.UNTIMED, "peak_bytes": peak << 20}
        for provider, peak in (("reference", 100), ("varkern", 60))
    ]
    whole = [
        row("d16", provider, file="bench_generate.py", group="generation") for provider in ("reference", "varkern")
    ]
    found = result(row(provider="reference"), row(), row("small", "reference"), slow, *memory, *whole)
    found["versions"] = {"torch": "2.11", "python": "3.12"}
    other = {**found, "device": "another GPU"}
    kinds = ("benchmarks", "benchmarks-summary", "benchmarks-quantize", "benchmarks-conv")
    page = tmp_path / "page.md"
    page.write_text("above\n" + "".join(f"<!-- {kind}: begin -->\nold\n<!-- {kind}: end -->\n" for kind in kinds))
    record.fill(page, [found, other])
    once = page.read_text()
    record.fill(page, [found, other])
    assert page.read_text() == once
    assert once.startswith("above\n<!-- benchmarks: begin -->\nsome CPU, avx2, 2 threads; torch 2.11, Python 3.12;")
    assert "old" not in once
    assert once.count("another GPU") == once.count("some CPU") == 4

    text = once.split(": end -->")
    assert f"| {bars.ENCODE} | reference | 2 cases | 0.80–2.00 | 000000000, 111111111 |" in text[1]
    assert "| generation: d16 | 2 ms (reference) | 1 ms | 2.00 (1.96–2.04) | 000000000 |" in text[1]
    assert "peak x" not in text[1]
    assert "| peak x | 100 MiB | 60 MiB | 60% | 000000000 |" in text[0]
    first = f"| {bars.ENCODE} | encode 256px-B1 | 2 ms (reference) | 1 ms | 2.00 (1.96–2.04) | 50% | 000000000 |"
    assert first in text[2]
    assert "|  | small | 2 ms (reference) | 1 ms | 0.80 (0.78–0.82) | 50% | 111111111 |" in text[2]
    assert "d16" not in text[2]
    assert all(f"Not faster than the baseline: {bars.ENCODE}, small: 0.80x reference." in part for part in text[:3])
    assert "bench_conv.py has not run there." in text[3]


def test_a_page_without_a_place_is_known_before_measuring(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(suite, "collect", lambda *_: pytest.fail("measured"))
    for text, sentence in (
        ("nothing here", "has no place for a table"),
        (
            "<!-- benchmarks: begin -->\n<!-- benchmarks-norm: end -->\n",
            "the place benchmarks ends with benchmarks-norm",
        ),
    ):
        page = tmp_path / "page.md"
        page.write_text(text)
        assert cli.main(["bench", "--smoke", "--device", "cpu", "--markdown", str(page)]) == 2
        assert sentence in capsys.readouterr().err
        assert page.read_text() == text


def test_results_of_other_devices_stay_in_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    old, gpu_run = result(row(provider="reference"), row()), result(row(), device="another GPU")
    for name, found in (("cpu", old), ("gpu", gpu_run)):
        record.write(tmp_path / f"{name}.json", found)
    new = result(row(provider="reference"), row(speedup=3.0))
    assert record.all_recorded() == [old, gpu_run]
    assert record.all_recorded(new) == [gpu_run, new]


def test_the_tables_of_all_pages_are_those_of_the_recorded_results() -> None:
    recorded = record.all_recorded()
    assert recorded, "benchmarks/results has no record"
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        if "<!-- benchmarks" in content:
            assert record.filled(page, recorded) == content, f"{page} is not what benchmarks/plot.py --markdown writes"


def test_every_benchmark_has_its_cases_on_one_page() -> None:
    places = [name for page in PAGES for name in re.findall(r"<!-- benchmarks-(\w+): begin", page.read_text("utf-8"))]
    files = [path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")]
    assert sorted(places) == sorted([*files, "summary"])
