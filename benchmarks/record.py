"""The record of a run, results/<device>.json: read, written, compared with the run before, shown as a table.

A result is ``{"schema", "device", "device_type", "versions", "commit", "command", "date", "rows", "failures",
"not_run"}``; a row is one provider of one comparison, keyed by its group, name and provider.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]

SCHEMA = 1
RESULTS = Path(os.environ.get("VARKERN_RESULTS") or Path(__file__).resolve().parent / "results")
NUMBER = (int, float)
# What a row holds. A row without a time holds a peak of memory, or a count (of a sanitizer's errors), or says that its
# provider ran out of memory; beside such a baseline the others have no speed-up.
ROW = {
    "file": (str,),
    "group": (str,),
    "name": (str,),
    "provider": (str,),
    "baseline": (str,),
    "shape": (list, type(None)),
    "dtype": (str,),
    "median_s": (*NUMBER, type(None)),
    "quartiles_s": (list, type(None)),
    "speedup": (*NUMBER, type(None)),
    "speedup_quartiles": (list, type(None)),
    "gb_s": (*NUMBER, type(None)),
    "gflop_s": (*NUMBER, type(None)),
    "floor_s": (*NUMBER, type(None)),
    "fraction": (*NUMBER, type(None)),
    "peak_bytes": (int, type(None)),
    "rounds": (int,),
    "ceilings": (list, type(None)),
    "facts": (dict,),
    "commit": (str,),
}
TOP = {
    "schema": (int,),
    "device": (str,),
    "device_type": (str,),
    "versions": (dict,),
    "commit": (str,),
    "command": (str,),
    "date": (str,),
    "rows": (list,),
    "failures": (list,),
    "not_run": (list,),
}
UNTIMED: Row = dict.fromkeys(
    (
        "median_s",
        "quartiles_s",
        "speedup",
        "speedup_quartiles",
        "gb_s",
        "gflop_s",
        "floor_s",
        "fraction",
        "peak_bytes",
        "ceilings",
    )
)
# A time is slower only beyond this, whatever the quartiles say: two runs also differ in where memory happens to lie.
LEAST_NOISE = 0.10


def check(result: Result) -> None:
    """Raises ValueError where a result is not what this module writes."""
    _check("the result", result, TOP)
    if result["schema"] != SCHEMA:
        raise ValueError(f"schema {result['schema']} of benchmark results, this version reads {SCHEMA}; measure again")
    for row in result["rows"]:
        check_row(row)


def check_row(row: Row) -> None:
    """Raises ValueError where a row is not what this module writes."""
    _check("a row", row, ROW)


def _check(what: str, entry: dict[str, Any], fields: dict[str, tuple[type, ...]]) -> None:
    if entry.keys() != fields.keys():
        wrong = sorted(entry.keys() ^ fields.keys())
        raise ValueError(f"{what} of a benchmark file lacks or does not know {', '.join(wrong)}; measure again")
    for name, kinds in fields.items():
        if not isinstance(entry[name], kinds):
            raise ValueError(f"{name} of {what} in a benchmark file is {entry[name]!r}; measure again")


def read(path: Path) -> Result | None:
    """A recorded result, or None where there is none; raises ValueError where the file is something else."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        check(result)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no benchmark result ({error}); move it away, or name another --out") from None
    return result


def write(path: Path, result: Result) -> None:
    """One row a line, so that a change reads well; replaces the file at once or not at all."""
    check(result)
    head = {key: value for key, value in result.items() if key != "rows"}
    lines = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    rows = ",\n".join("  " + json.dumps(_rounded(row), ensure_ascii=False) for row in result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(f'{lines},\n "rows": [\n{rows}\n ]\n}}\n')
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _rounded(value: Any) -> Any:
    """Five digits: no measurement has more, and files in git need no noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return value


def key(row: Row) -> tuple[str, str, str]:
    return row["group"], row["name"], row["provider"]


def merged(old: Result | None, new: Result, ran: Iterable[str]) -> Result:
    """The new result with the old rows of the files that did not run to their end; ``ran`` names those that did."""
    if old is None:
        return new
    fresh, ran = {key(row) for row in new["rows"]}, set(ran)
    kept = [row for row in old["rows"] if row["file"] not in ran and key(row) not in fresh]
    return {**new, "rows": sorted(kept + new["rows"], key=lambda row: (row["file"], row["group"]))}


def noise(old: Row, new: Row, field: str, spread: str) -> float:
    """By how much two measurements of the same thing may differ, relatively: from the quartiles of both."""
    spreads = [(row[spread][1] - row[spread][0]) / row[field] for row in (old, new)]
    return max(LEAST_NOISE, 1.5 * math.hypot(*spreads))


def machine(old: Row, new: Row) -> float:
    """By how much the machine was slower when the new row was taken, by the ceilings that bound the row.

    Never below 1: what does not reach its floor gains nothing from a faster memory.
    """
    if not old["ceilings"] or not new["ceilings"]:
        return 1.0
    bandwidth, product = (before / now for before, now in zip(old["ceilings"], new["ceilings"], strict=True))
    if not new["gflop_s"]:
        return max(1.0, bandwidth)
    moves = new["gb_s"] / new["ceilings"][0] > new["gflop_s"] / new["ceilings"][1]
    return max(1.0, bandwidth if moves else product)


def slower(old: Result | None, new: Result) -> list[str]:
    """A sentence for each row that got slower by more than the noise.

    A time counts relative to the ceilings of its moment. Where the row has a baseline in the same rounds, its speed-up
    has to have fallen as well: the baseline of a slow moment is slow too.
    """
    before = {key(row): row for row in old["rows"]} if old else {}
    found = []
    for row in new["rows"]:
        was = before.get(key(row))
        if was is None or not row["median_s"] or not was["median_s"]:
            continue
        moment = machine(was, row)
        ratio = row["median_s"] / was["median_s"] / moment
        if ratio <= 1 + noise(was, row, "median_s", "quartiles_s"):
            continue
        text = f"{' / '.join(key(row))}: {seconds(was['median_s'])} -> {seconds(row['median_s'])}"
        if row["provider"] != row["baseline"] == was["baseline"] and row["speedup"] and was["speedup"]:
            fallen = was["speedup"] / row["speedup"]
            if fallen <= 1 + noise(was, row, "speedup", "speedup_quartiles"):
                continue
            text += f", {was['speedup']:.2f}x -> {row['speedup']:.2f}x"
        found.append(text + (f", the machine {moment:.2f} times slower" if moment > 1.05 else ""))
    return found


def seconds(value: float) -> str:
    """1.23 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.2g} µs"


def bytes_(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f} MiB" if value < 1 << 30 else f"{value / 2**30:.2f} GiB"


def comparisons(result: Result) -> dict[tuple[str, str], list[Row]]:
    """The rows of each comparison, by group and name."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in result["rows"]:
        found.setdefault((row["group"], row["name"]), []).append(row)
    return found


def table(result: Result) -> str:
    """Every row as text, a group at a time."""
    lines, group = [], None
    for (heading, name), rows in comparisons(result).items():
        if heading != group:
            group = heading
            lines += ["", heading]
        for row in rows:
            if row["median_s"] is None:
                lacking = "out of memory" if row["facts"].get("out_of_memory") else ""
                shown = lacking or bytes_(row["peak_bytes"]) or " ".join(f"{k} {v}" for k, v in row["facts"].items())
                lines.append(f"  {name:40} {row['provider']:>14} {shown:>10}")
                continue
            low, high = row["quartiles_s"]
            spread = (high - low) / row["median_s"]
            ratio = f"{row['speedup']:6.2f}x" if row["speedup"] else 7 * " "  # none beside a baseline out of memory
            times = f"{seconds(row['median_s']):>10} ±{spread / 2:4.0%}  {ratio}"
            floor = f"{row['fraction']:5.0%} of the floor" if row["floor_s"] else ""
            lines.append(f"  {name:40} {row['provider']:>14} {times}  {floor:18} {bytes_(row['peak_bytes']):>10}")
    return "\n".join(lines)


def ours(result: Result) -> list[Row]:
    """The timed rows of varkern that have another provider as their baseline."""
    return [r for r in result["rows"] if r["provider"] == "varkern" and r["baseline"] != "varkern" and r["median_s"]]


def not_faster(result: Result) -> list[str]:
    """Where the reference is as fast as varkern or faster."""
    lines = []
    for row in ours(result):
        if row["speedup"] and row["speedup"] <= 1:
            lines.append(f"{row['group']}, {row['name']}: {row['speedup']:.2f}x {row['baseline']}")
    return lines


def markdown(result: Result) -> str:
    """Median times and speed-ups against the baseline of every comparison, peaks of memory, and what is not faster."""
    groups = comparisons(result)
    lines = [_provenance(result), "", "| | case | baseline | varkern | speed-up |", "|---|---|---|---|---|"]
    shown = None
    for row in ours(result):
        group = row["group"]
        first, shown = (group if group != shown else ""), group
        lines.append(f"| {first} | {row['name']} | {_times(row, groups)} | {_speedup(row)} |")
    memory = [(rows[0], rows[-1]) for rows in groups.values() if rows[0]["peak_bytes"] and len(rows) > 1]
    memory = [(base, row) for base, row in memory if base["median_s"] is None and row["peak_bytes"]]
    if memory:
        lines += ["", "| peak memory, inputs and weights excluded | reference | varkern | |", "|---|---|---|---|"]
        for base, row in memory:
            peaks = f"{bytes_(base['peak_bytes'])} | {bytes_(row['peak_bytes'])}"
            lines.append(f"| {row['name']} | {peaks} | {row['peak_bytes'] / base['peak_bytes']:.0%} |")
    return "\n".join([*lines, "", _losses(result)])


def summary(result: Result) -> str:
    """A line for each case of what users run, and one for each group of an op: how many cases, from what to what."""
    groups, chosen = comparisons(result), ours(result)
    lines = [_provenance(result), "", "| | baseline | varkern | speed-up |", "|---|---|---|---|"]
    for row in chosen:
        if row["file"] in END_TO_END:
            lines.append(f"| {row['group']}: {row['name']} | {_times(row, groups)} | {_speedup(row)} |")
    for group in dict.fromkeys(row["group"] for row in chosen if row["file"] not in END_TO_END + ELSEWHERE):
        rows = [row for row in chosen if row["group"] == group and row["speedup"]]
        if not rows:
            continue
        low, high = min(row["speedup"] for row in rows), max(row["speedup"] for row in rows)
        span = f"{low:.2f}" if len(rows) == 1 else f"{low:.2f}–{high:.2f}"
        bases = ", ".join(dict.fromkeys(row["baseline"] for row in rows))
        lines.append(f"| {group} | {bases} | {len(rows)} case{'s' * (len(rows) > 1)} | {span} |")
    return "\n".join([*lines, "", _losses(result)])


# What users run, and what is shown as a picture.
END_TO_END = ("bench_generate.py", "bench_tokenizer.py", "bench_training.py")
ELSEWHERE = ("bench_scaling.py",)


def _provenance(result: Result) -> str:
    versions = result["versions"]
    files: dict[str, list[str]] = {}
    for row in result["rows"]:
        names = files.setdefault(row["commit"], [])
        name = row["file"].removeprefix("bench_").removesuffix(".py")
        if name not in names:
            names.append(name)
    commits = "; ".join(f"{commit} ({', '.join(names)})" for commit, names in files.items())
    return (
        f"{result['device']}; torch {versions['torch']}, Python {versions['python']}. Measured at commit {commits}; "
        f"last {result['date'][:10]} by `{result['command']}`. Speed-up: median over interleaved rounds, with "
        "quartiles."
    )


def _times(row: Row, groups: dict[tuple[str, str], list[Row]]) -> str:
    base = next(r for r in groups[row["group"], row["name"]] if r["provider"] == row["baseline"])
    time = "out of memory" if base["median_s"] is None else seconds(base["median_s"])
    return f"{time} ({row['baseline']}) | {seconds(row['median_s'])}"


def _speedup(row: Row) -> str:
    if row["speedup"] is None:
        return ""
    slow, fast = row["speedup_quartiles"]
    return f"{row['speedup']:.2f} ({slow:.2f}–{fast:.2f})"


def _losses(result: Result) -> str:
    losses = not_faster(result)
    return "Not faster than the baseline: " + ("; ".join(losses) if losses else "none of these") + "."


def fill(path: Path, result: Result) -> None:
    """Write the tables into the places that a file has for them: "benchmarks" for all, "benchmarks-summary"."""
    content = path.read_text(encoding="utf-8")
    tables = {"benchmarks": markdown, "benchmarks-summary": summary}
    markers = [marker for marker in tables if f"<!-- {marker}: begin" in content]
    for marker in markers or ["benchmarks"]:
        replace_between(path, marker, tables[marker](result))


def replace_between(path: Path, marker: str, text: str) -> None:
    """Put text between the comments ``<!-- marker: begin -->`` and ``<!-- marker: end -->`` of a file."""
    content = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {marker}: begin[^>]*-->\n).*?(<!-- {marker}: end -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{text}\n{found[2]}", content)
    if count != 1:
        raise ValueError(f"{path} has no place for a table: write <!-- {marker}: begin --> and <!-- {marker}: end -->")
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(changed, encoding="utf-8")
    os.replace(partial, path)
