"""What README.md promises: its Python runs, its command lines parse, its links and make verbs exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import varkern
from varkern import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A comment directly before a block, with the reason, is the one way out.
EXCUSE = re.compile(r"<!-- not run by the tests: (?P<reason>.+) -->\n\Z")


def blocks(language):
    """(first line of code, the comment before it or None, code) of each fenced block."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        line = README[: found.start()].count("\n") + 2
        yield line, EXCUSE.search(README[: found.start()]), found[1]


PYTHON = [pytest.param(code, excuse, id=f"line-{line}") for line, excuse, code in blocks("python")]


@pytest.mark.parametrize(("code", "excuse"), PYTHON)
def test_python_block(code, excuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = ast.parse(code)
    for node in ast.walk(tree):  # names of the package exist, in blocks that are not run too
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "varkern":
            assert hasattr(varkern, node.attr)
        if isinstance(node, ast.ImportFrom) and node.module == "varkern":
            assert all(hasattr(varkern, name.name) for name in node.names)
    if excuse:
        needed = re.findall(r"[\w]+\.pth", excuse["reason"])
        assert needed, "an excuse names the files that are missing"
        assert all(name in code for name in needed)
        pytest.skip(excuse["reason"])
    exec(compile(tree, "README.md", "exec"), {"__name__": "readme"})


def test_blocks_are_found_and_most_run():
    assert len(PYTHON) >= 6
    assert sum(excuse is not None for _, excuse, _ in blocks("python")) == 2


def test_first_example_writes_its_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(next(code for _, _, code in blocks("python")), namespace)
    assert namespace["images"].shape == (8, 1, 32, 32)
    assert (tmp_path / "threes.png").stat().st_size > 1000


def test_command_lines_parse():
    lines = [line for _, _, code in blocks("sh") for line in code.splitlines() if line.startswith("varkern ")]
    assert len(lines) >= 4
    for line in lines:
        cli.build_parser().parse_args(shlex.split(line)[1:])


def test_command_table_is_complete(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = re.findall(r"^    ([a-z-]+)\b", capsys.readouterr().out, re.MULTILINE)
    assert re.findall(r"^\| `varkern ([a-z-]+)` \|", README, re.MULTILINE) == listed


def test_links_and_make_verbs_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for verb in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{verb}:", makefile, re.MULTILINE), verb
