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
    return _not_faster(ours(result))


def _not_faster(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["speedup"] and row["speedup"] <= 1:
            lines.append(f"{row['group']}, {row['name']}: {row['speedup']:.2f}x {row['baseline']}")
    return lines


# What users run: shown case by case. What has tables and pictures of its own: not among the groups.
END_TO_END = ("bench_generate.py", "bench_tokenizer.py", "bench_training.py")
ELSEWHERE = ("bench_scaling.py",)


def summary(result: Result) -> str:
    """A line for each case of what users run, and one for each group of an op: how many cases, from what to what."""
    return "\n".join([*_summary(result), "", _losses(ours(result))])


def overview(result: Result) -> str:
    """The summary, with the peaks of memory."""
    return "\n".join([*_summary(result), *_memory(comparisons(result)), "", _losses(ours(result))])


def cases(result: Result, file: str) -> str:
    """Every case of one benchmark file: median times, speed-ups against the baseline, and the share of the floor."""
    rows = [row for row in ours(result) if row["file"] == file]
    groups = {key: rows for key, rows in comparisons(result).items() if rows[0]["file"] == file}
    if not groups:
        return f"{_provenance(result)} {file} has not run there."
    lines = [_provenance(result)]
    if rows:
        lines += [
            "",
            "| | case | baseline | varkern | speed-up | of the floor | commit |",
            "|---|---|---|---|---|---|---|",
        ]
    shown = None
    for row in rows:
        first, shown = (row["group"] if row["group"] != shown else ""), row["group"]
        share = f"{row['fraction']:.0%}" if row["fraction"] else ""
        times = f"{_times(row, groups)} | {_speedup(row)}"
        lines.append(f"| {first} | {row['name']} | {times} | {share} | {row['commit']} |")
    lines += _memory(groups)
    return "\n".join([*lines, "", _losses(rows)] if rows else lines)


def _summary(result: Result) -> list[str]:
    groups, chosen = comparisons(result), ours(result)
    lines = [_provenance(result), "", "| | baseline | varkern | speed-up | commit |", "|---|---|---|---|---|"]
    for row in chosen:
        if row["file"] in END_TO_END:
            name = f"{row['group']}: {row['name']}"
            lines.append(f"| {name} | {_times(row, groups)} | {_speedup(row)} | {row['commit']} |")
    for group in dict.fromkeys(row["group"] for row in chosen if row["file"] not in END_TO_END + ELSEWHERE):
        rows = [row for row in chosen if row["group"] == group and row["speedup"]]
        if not rows:  # every baseline ran out of memory
            continue
        low, high = min(row["speedup"] for row in rows), max(row["speedup"] for row in rows)
        span = f"{low:.2f}" if len(rows) == 1 else f"{low:.2f}–{high:.2f}"
        bases, commits = (", ".join(dict.fromkeys(row[what] for row in rows)) for what in ("baseline", "commit"))
        lines.append(f"| {group} | {bases} | {len(rows)} case{'s' * (len(rows) > 1)} | {span} | {commits} |")
    return lines


def _memory(groups: dict[tuple[str, str], list[Row]]) -> list[str]:
    """The table of peaks, or nothing where none was measured."""
    pairs = [(rows[0], rows[-1]) for rows in groups.values() if rows[0]["peak_bytes"] and len(rows) > 1]
    pairs = [(base, row) for base, row in pairs if base["median_s"] is None and row["peak_bytes"]]
    if not pairs:
        return []
    head = "| peak memory, inputs and weights excluded | reference | varkern | share | commit |"
    lines = ["", head, "|---|---|---|---|---|"]
    for base, row in pairs:
        peaks = f"{bytes_(base['peak_bytes'])} | {bytes_(row['peak_bytes'])}"
        lines.append(f"| {row['name']} | {peaks} | {row['peak_bytes'] / base['peak_bytes']:.0%} | {row['commit']} |")
    return lines


def _provenance(result: Result) -> str:
    versions = result["versions"]
    return (
        f"{result['device']}; torch {versions['torch']}, Python {versions['python']}; last measured "
        f"{result['date'][:10]}. Speed-up: median over interleaved rounds, with quartiles."
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


def _losses(rows: Iterable[Row]) -> str:
    losses = _not_faster(rows)
    return "Not faster than the baseline: " + ("; ".join(losses) if losses else "none of these") + "."


def all_recorded(new: Result | None = None) -> list[Result]:
    """The results in the folder of results, with ``new`` in the place of that of its device."""
    found = [result for path in sorted(RESULTS.glob("*.json")) if (result := read(path)) is not None]
    if new is None:
        return found
    return [*(result for result in found if result["device"] != new["device"]), new]


# The places of a page: "benchmarks" has the overview, "benchmarks-summary" the summary, "benchmarks-norm" every case of
# bench_norm.py.
_PLACE = re.compile(r"(<!-- (benchmarks[\w-]*): begin[^>]*-->\n)(.*?)(<!-- (benchmarks[\w-]*): end -->)", re.DOTALL)


def fill(path: Path, results: Iterable[Result]) -> None:
    """Write the tables of results, one device after another, into the places that a page has for them."""
    changed = filled(path, results)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(changed, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def filled(path: Path, results: Iterable[Result]) -> str:
    """The text of a page with its tables made anew; raises ValueError where it has no place for any."""
    results, content = list(results), path.read_text(encoding="utf-8")

    def replace(found: re.Match[str]) -> str:
        begin, marker, _, end, closed = found.groups()
        if marker != closed:
            raise ValueError(f"{path}: the place {marker} ends with {closed}; write <!-- {marker}: end -->")
        kind = marker.removeprefix("benchmarks").removeprefix("-")
        make = {"": overview, "summary": summary}.get(kind, lambda result: cases(result, f"bench_{kind}.py"))
        return begin + "\n\n".join(map(make, results)) + "\n" + end

    changed, count = _PLACE.subn(replace, content)
    if not count:
        raise ValueError(
            f"{path} has no place for a table: write <!-- benchmarks: begin --> and <!-- benchmarks: end -->"
        )
    return changed
