"""The speeds and memory that varkern is held to, as data, and how recorded rows answer them.

A bar that no row answers is "not run". Bars of GPU times are those of an H200; on another GPU they are evaluated too,
and the table names the device.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from record import Result, Row, comparisons, seconds

PASS, MISS, NOT_RUN = "pass", "FAIL", "not run"


@dataclass(frozen=True)
class Bar:
    """One demand on one comparison.

    device: "cpu" or "cuda". group, name: of the comparison; name is a regular expression that matches it whole.
    measure: "speedup" (over ``against``), "seconds", "images_s" (facts["batch"] a median), "memory" (share of
    ``against``'s peak) or "errors" (facts["errors"]). bound: at least, or for seconds, memory and errors at most. Of
    "varkern" and "varkern float16" the faster counts, for its memory too.
    """

    area: str
    device: str
    group: str
    name: str
    measure: str
    bound: float
    against: str = "reference"

    @property
    def text(self) -> str:
        what = {
            "speedup": f">= {self.bound:g}x {self.against}",
            "seconds": f"<= {seconds(self.bound) if self.bound else 0}",
            "images_s": f">= {self.bound:g} images/s",
            "memory": f"memory <= {self.bound:.0%} of {self.against}",
            "errors": f"{self.bound:g} errors",
        }[self.measure]
        name = self.name.replace("\\", "").replace(".*", "*")
        return f"{self.group}, {name}: {what}"


ATTENTION, FROM_PROJECTION = "block-causal attention", "block-causal attention from the qkv projection"
ENCODE, TEACHER = "residual_quantize: features to indices", "teacher_forcing_input: indices to input"
TRAIN = "residual_quantize_train: forward and backward"
GENERATE, MEMORY, SANITIZER = "generation", "peak memory", "compute-sanitizer"
COMPILED = "torch.compile"
FORWARD, BOTH = "attention {}-forward", "attention {}-forward\\+backward"

BARS = (
    # The quantizer.
    Bar("quantizer", "cpu", ENCODE, "encode 256px-B1", "speedup", 4.0),
    Bar("quantizer", "cpu", ENCODE, "encode 256px-B8", "speedup", 3.5),
    Bar("quantizer", "cpu", TEACHER, "teacher_forcing 256px-B1", "speedup", 5.0),
    Bar("quantizer", "cpu", TEACHER, "teacher_forcing 256px-B8", "speedup", 3.0),
    Bar("quantizer", "cpu", TRAIN, "training 256px-B1", "speedup", 2.0),
    Bar("quantizer", "cpu", TRAIN, "training 256px-B8", "speedup", 2.0),
    # Four times the float32 floor of 215 µs (docs/ops/quantize.md).
    Bar("quantizer", "cuda", ENCODE, "encode 256px-B64", "seconds", 0.86e-3),
    # The attention of training.
    *(
        Bar("attention", "cpu", ATTENTION, name.format(pixels), "speedup", 1.3, "masked SDPA")
        for pixels in ("256px", "512px")
        for name in (FORWARD, BOTH)
    ),
    *(
        Bar("attention", "cuda", ATTENTION, name.format(pixels), "speedup", bound, against)
        for pixels in ("256px", "512px", "1024px")
        for name, against, bound in (
            (FORWARD, "masked SDPA, memory-efficient", 4.0),
            (BOTH, "masked SDPA, memory-efficient", 3.0),
            (FORWARD, "flex", 1.2),
            (BOTH, "flex", 1.2),
            (FORWARD, "dense SDPA", 1.0),
            (BOTH, "dense SDPA", 1.0),
        )
    ),
    # Sampling, training, generation on a CPU.
    Bar("engine", "cpu", "sample_tokens, noise drawn beforehand", "rows B1-16x16", "speedup", 8.0),
    Bar("engine", "cpu", "training step", "training_step d8-B4", "speedup", 1.15),
    Bar("engine", "cpu", GENERATE, "generate d16-B1", "speedup", 1.2),
    Bar("engine", "cpu", MEMORY, "peak generate d16-B1", "memory", 0.7),
    # Generation on a GPU.
    Bar("engine", "cuda", GENERATE, "generate d16-B1", "speedup", 20.0),
    Bar("engine", "cuda", GENERATE, "generate d16-B1", "seconds", 8e-3),
    Bar("engine", "cuda", GENERATE, "generate d16-B1", "speedup", 1.5, COMPILED),
    Bar("engine", "cuda", GENERATE, "generate d16-B64", "speedup", 4.0),
    Bar("engine", "cuda", GENERATE, "generate d16-B64", "images_s", 400.0),
    Bar("engine", "cuda", GENERATE, "generate d16-B64", "speedup", 1.5, COMPILED),
    Bar("engine", "cuda", GENERATE, "generate d16-B64", "memory", 0.6),
    Bar("engine", "cuda", GENERATE, "generate d24-B25", "images_s", 170.0),
    Bar("engine", "cuda", GENERATE, "generate d30-B64", "images_s", 95.0),
    Bar("sanitizer", "cuda", SANITIZER, "memcheck", "errors", 0),
    Bar("sanitizer", "cuda", SANITIZER, "racecheck", "errors", 0),
)


@dataclass(frozen=True)
class Verdict:
    bar: Bar
    status: str
    value: float | None

    @property
    def shown(self) -> str:
        if self.value is None:
            return ""
        formats: dict[str, Callable[[float], str]] = {
            "speedup": "{:.2f}x".format,
            "seconds": seconds,
            "images_s": "{:.0f} images/s".format,
            "memory": "{:.0%}".format,
            "errors": "{:.0f} errors".format,
        }
        return formats[self.bar.measure](self.value)


def value_of(bar: Bar, rows: list[Row]) -> float | None:
    """What the rows of a comparison say to a bar; None where they do not say it."""
    by_provider = {row["provider"]: row for row in rows}
    ours = [row for name, row in by_provider.items() if name.startswith("varkern")]
    if not ours:
        return None
    row, base = min(ours, key=lambda row: row["median_s"] or 0), by_provider.get(bar.against)
    if bar.measure == "errors":
        return row["facts"].get("errors")
    if bar.measure == "memory":
        peaks = row["peak_bytes"], base and base["peak_bytes"]
        return peaks[0] / peaks[1] if peaks[0] is not None and peaks[1] else None
    if row["median_s"] is None:
        return None
    if bar.measure == "seconds":
        return row["median_s"]
    if bar.measure == "images_s":
        return row["facts"]["batch"] / row["median_s"] if "batch" in row["facts"] else None
    if row["baseline"] == bar.against:
        return row["speedup"]
    return base["median_s"] / row["median_s"] if base and base["median_s"] else None


def evaluate(result: Result, bars: tuple[Bar, ...] = BARS) -> list[Verdict]:
    """A verdict for every bar of the result's device."""
    found = comparisons(result)
    verdicts = []
    for bar in bars:
        if bar.device != result["device_type"]:
            continue
        matching = [
            rows for (group, name), rows in found.items() if group == bar.group and re.fullmatch(bar.name, name)
        ]
        values = [value for rows in matching if (value := value_of(bar, rows)) is not None]
        if not values:
            verdicts.append(Verdict(bar, NOT_RUN, None))
            continue
        at_least = bar.measure in ("speedup", "images_s")
        worst = min(values) if at_least else max(values)
        kept = worst >= bar.bound if at_least else worst <= bar.bound
        verdicts.append(Verdict(bar, PASS if kept else MISS, worst))
    return verdicts


def table(result: Result, bars: tuple[Bar, ...] = BARS) -> str:
    """Every bar of the device with what was measured."""
    verdicts = evaluate(result, bars)
    lines = [f"bars on {result['device']}"]
    if result["device_type"] == "cuda" and "H200" not in result["device"]:
        lines[0] += " (set for an H200)"
    lines += [f"  {v.status:8} {v.shown:>14}  {v.bar.area}: {v.bar.text}" for v in verdicts]
    counts = ", ".join(f"{sum(v.status == s for v in verdicts)} {s}" for s in (PASS, MISS, NOT_RUN))
    return "\n".join([*lines, f"  {counts}"])
