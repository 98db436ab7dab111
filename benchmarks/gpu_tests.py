"""pytest for `make gpu`: notes each test as it begins and as it ends, so that a run which is killed leaves what it had.

    python gpu_tests.py FILE [arguments of pytest]

FILE gets lines of JSON: ``{"selected": n}``, ``{"begun": id}`` and ``{"test", "outcome", "seconds", "message"}``.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

Line = dict[str, Any]
STOPPED = "stopped"  # the outcome of a test that has begun and not ended


class Notes:
    """A plugin of the process that distributes the tests, or that runs them itself."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        self.selected = 0

    def note(self, **line: Any) -> None:
        print(json.dumps(line), file=self.file, flush=True)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.note(selected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        if len(ids) > self.selected:
            self.selected = len(ids)
            self.note(selected=self.selected)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note(begun=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            self.note(test=report.nodeid, outcome=outcome, seconds=report.duration, message=_message(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.note(test=report.nodeid, outcome="error", seconds=0.0, message=_message(report))


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):  # of what is skipped: file, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return "" if report.longrepr is None else (crash.message if crash else str(report.longrepr))[-2000:]


def read(path: Path) -> list[Line]:
    """What was noted, a line a test, in the order in which they ended; what had only begun comes last."""
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []
    ended = [line for line in lines if "test" in line]
    names = {line["test"] for line in ended}
    begun = dict.fromkeys(line["begun"] for line in lines if "begun" in line)
    running = [name for name in begun if name not in names]
    # Where a teardown fails after its test has passed, the last line counts.
    last = {line["test"]: line for line in ended}
    return [
        *last.values(),
        *({"test": name, "outcome": STOPPED, "seconds": 0.0, "message": "it had not ended"} for name in running),
    ]


def selected(path: Path) -> int:
    """How many tests there were to run; 0 where nothing was collected."""
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []
    return max((line["selected"] for line in lines if "selected" in line), default=0)


def counts(tests: Sequence[Line]) -> str:
    """1 failed, 5 passed."""
    found, order = Counter(line["outcome"] for line in tests), ("failed", "error", STOPPED, "passed", "skipped")
    return ", ".join(f"{found[name]} {name}" for name in order if found[name])


def junit(tests: Sequence[Line]) -> str:
    """The tests as a JUnit file."""
    tags = {"failed": "failure", "error": "error", STOPPED: "error", "skipped": "skipped"}
    found = Counter(tags.get(line["outcome"]) for line in tests)
    totals = {"failures": found["failure"], "errors": found["error"], "skipped": found["skipped"], "tests": len(tests)}
    suite = ElementTree.Element("testsuite", {"name": "pytest", **{name: str(n) for name, n in totals.items()}})
    for line in tests:
        file, _, name = line["test"].partition("::")
        case = ElementTree.SubElement(suite, "testcase", classname=file, name=name, time=f"{line['seconds']:.3f}")
        if line["outcome"] in tags:
            message = "".join(c for c in line["message"] if c.isprintable() or c in "\n\t")
            entry = ElementTree.SubElement(case, tags[line["outcome"]], message=message.partition("\n")[0])
            entry.text = message
    root = ElementTree.Element("testsuites")
    root.append(suite)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose conftest.py is another's
    sys.exit(pytest.main(sys.argv[2:], plugins=[Notes(Path(sys.argv[1]))]))
