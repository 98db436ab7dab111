"""Pictures and the tables of a recorded run: python benchmarks/plot.py benchmarks/results/<device>.json

Draws <device>-speedup.png, <device>-scaling.png and <device>-roofline.png into docs/images/benchmarks (--out FOLDER);
--markdown README.md docs/performance.md docs/engine.md docs/ops/*.md also renews the tables of those pages, of this
run and of those of other devices beside it, between the comments "benchmarks-norm: begin" and "benchmarks-norm: end"
(every case of bench_norm.py), "benchmarks-summary: begin" and its end, or "benchmarks: begin" and its end.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import record
from record import Result

BASELINE, OURS = "#9aa5b1", "#c2410c"
FIGURES = Path(__file__).resolve().parents[1] / "docs" / "images" / "benchmarks"


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        sys.exit("varkern: pictures of benchmarks need matplotlib; install it by `pip install -e '.[dev]'`")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def speedups(result: Result) -> Any:
    """A bar for each comparison, its whiskers the quartiles; a line where nothing is gained."""
    rows = [row for row in record.ours(result) if row["speedup"]]
    if not rows:
        return None
    figure, axes = pyplot().subplots(figsize=(9, 1 + 0.24 * len(rows)), layout="constrained")
    for i, row in enumerate(reversed(rows)):
        low, high = row["speedup_quartiles"]
        axes.barh(i, row["speedup"] - 1, left=1, color=OURS if row["speedup"] > 1 else BASELINE, height=0.7)
        axes.plot([low, high], [i, i], color="black", linewidth=1)
        axes.annotate(f" {row['speedup']:.2f}", (max(row["speedup"], high), i), va="center", fontsize=7)
    axes.set_yticks(
        range(len(rows)), [f"{r['group'].partition(':')[0]}: {r['name']}" for r in reversed(rows)], fontsize=7
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("times as fast as the baseline")
    axes.set_title(f"varkern on {result['device']}", fontsize=10)
    return figure


AXES = {  # fact, label, group
    "batch": ("images a call", "generation against batch"),
    "depth": ("depth", "generation against depth"),
    "pixels": ("side of the image, pixels", "generation against resolution"),
}


def scaling(result: Result) -> Any:
    """Cost against batch, depth and resolution, dotted where it would grow as its first point says.

    Below: peak memory where it was recorded with the times, on a GPU; else images a second.
    """
    timed = [row for row in result["rows"] if row["median_s"]]
    groups = {axis: [r for r in timed if r["group"] == group] for axis, (_, group) in AXES.items()}
    if not any(groups.values()):
        return None
    figure, panels = pyplot().subplots(2, 3, figsize=(12, 6.5), layout="constrained", sharex="col")
    for column, (axis, rows) in enumerate(groups.items()):
        above, below = panels[:, column]
        above.set_xscale("log")
        memory = bool(rows) and all(row["peak_bytes"] for row in rows)
        for provider, color in (("reference", BASELINE), ("varkern", OURS)):
            chosen = sorted((r for r in rows if r["provider"] == provider), key=lambda r: r["facts"][axis])
            if not chosen:
                continue
            x = [r["facts"][axis] for r in chosen]
            each = [r["median_s"] / r["facts"]["batch"] for r in chosen]
            above.plot(x, each, "o-", color=color, label=provider)
            # An image costs the same whatever the batch; a block or a pixel more costs what the first did.
            power = {"batch": 0, "depth": 1, "pixels": 2}[axis]
            above.plot(x, [each[0] * (value / x[0]) ** power for value in x], ":", color=color)
            floors = [r["floor_s"] / r["facts"]["batch"] for r in chosen]
            above.plot(x, floors, "--", color="black", linewidth=0.8, label="floor" if provider == "varkern" else None)
            if memory:
                below.plot(x, [r["peak_bytes"] / 2**30 for r in chosen], "o-", color=color)
            else:
                below.plot(x, [1 / value for value in each], "o-", color=color)
            below.set_xticks(x, map(str, x))
            below.minorticks_off()
        above.set(yscale="log", ylabel="seconds an image")
        below.set(yscale="log", ylabel="peak memory, GiB" if memory else "images a second", xlabel=AXES[axis][0])
        if above.lines:
            above.legend(fontsize=8)
    figure.suptitle(f"cost of a generation on {result['device']} (dotted: linear)", fontsize=10)
    return figure


def roofline(result: Result) -> Any:
    """Arithmetic rate against operations a byte, under what a copy and a product reached."""
    rows = [r for r in result["rows"] if r["ceilings"] and r["gflop_s"] and r["gb_s"]]
    if not rows:
        return None
    bandwidth, product = (max(r["ceilings"][i] for r in rows) for i in (0, 1))
    figure, axes = pyplot().subplots(figsize=(8, 5.5), layout="constrained")
    intensity = {id(r): r["gflop_s"] / r["gb_s"] for r in rows}
    low, high = min(intensity.values()) / 2, max(intensity.values()) * 2
    x = sorted({low, min(max(product / bandwidth, low), high), high})
    axes.plot(x, [min(product, bandwidth * value) for value in x], color="black", linewidth=1)
    others = [r for r in rows if r["provider"] != "varkern"]
    axes.scatter(
        [intensity[id(r)] for r in others], [r["gflop_s"] for r in others], s=8, color=BASELINE, label="others"
    )
    groups = sorted({re.split("[:,]", r["group"])[0] for r in rows})
    for i, group in enumerate(groups):  # varkern's: a color and a marker for each group
        ours = [r for r in rows if r["provider"] == "varkern" and re.split("[:,]", r["group"])[0] == group]
        axes.scatter(
            [intensity[id(r)] for r in ours],
            [r["gflop_s"] for r in ours],
            s=24,
            color=f"C{i % 10}",
            marker="osD^v<>Pp*"[i // 10 * 5 % 10 + i % 5],
            label=group,
        )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte, each byte once", ylabel="GFLOP/s")
    axes.set_title(f"{result['device']}: a copy {bandwidth:.0f} GB/s, a product {product:.0f} GFLOP/s", fontsize=10)
    axes.legend(fontsize=6)
    return figure


def draw(result: Result, folder: Path, name: str) -> list[Path]:
    """Writes the pictures that the rows suffice for, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, make in {"speedup": speedups, "scaling": scaling, "roofline": roofline}.items():
        figure = make(result)
        if figure is not None:
            paths.append(folder / f"{name}-{kind}.png")
            figure.savefig(paths[-1], dpi=110)
            pyplot().close(figure)
    return paths


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, default=FIGURES, help="(default: %(default)s)")
    parser.add_argument("--markdown", type=Path, nargs="+", default=[], metavar="FILE")
    options = parser.parse_args(argv)
    try:
        result = record.read(options.result)
    except ValueError as error:
        sys.exit(f"varkern: {error}")
    if result is None:
        sys.exit(f"varkern: there is no result {options.result}; `varkern bench` writes one")
    for path in draw(result, options.out, options.result.stem):
        print(path)
    for page in options.markdown:
        record.fill(page, record.all_recorded(result))
        print(page)


if __name__ == "__main__":
    main()
