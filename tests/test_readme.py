"""What README.md and the pages beside it promise: Python of the README runs, command lines parse, and every link, path,
name and make verb exists."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import varkern
from varkern import cli
from varkern.ops._op import Op

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "varkern/assets/README.md"]
# A comment directly before a block, with the reason, is the one way out.
EXCUSE = re.compile(r"<!-- not run by the tests: (?P<reason>.+) -->\n\Z")


def blocks(language, text=README):
    """(first line of code, the comment before it or None, code) of each fenced block."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: found.start()].count("\n") + 2
        yield line, EXCUSE.search(text[: found.start()]), found[1]


def spans(text):
    """What stands between backticks, outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


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


def test_command_table_is_complete(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = re.findall(r"^    ([a-z-]+)\b", capsys.readouterr().out, re.MULTILINE)
    assert re.findall(r"^\| `varkern ([a-z-]+)` \|", README, re.MULTILINE) == listed


# --- every page -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def page(request):
    return request.param


def test_command_lines_parse(page):
    text = page.read_text(encoding="utf-8")
    lines = [line for _, _, code in blocks("sh", text) for line in code.splitlines()]
    lines += [span for span in spans(text) if "..." not in span and re.match(r"varkern [a-z-]+ -", span)]
    commands = [line for line in lines if line.startswith("varkern ")]
    assert len(commands) >= 4 or page != ROOT / "README.md"
    for line in commands:
        arguments = shlex.split(line.replace("[", "").replace("]", ""), comments=True)[1:]
        cli.build_parser().parse_args(arguments)


def test_make_verbs_exist(page):
    text, makefile = page.read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line for _, _, code in blocks("sh", text) for line in code.splitlines()] + spans(text)
    for line in lines:
        for verb in re.findall(r"[\w-]+", line[5:].split("#")[0]) if line.startswith("make ") else []:
            assert re.search(rf"^{verb}:", makefile, re.MULTILINE), line


def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


# What a path of the checkout begins with, and what a placeholder in it stands for.
FOLDERS = ("varkern/", "kernels/", "csrc/", "tests/", "benchmarks/", "docs/")
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")
PLACEHOLDER = re.compile(r"<[a-z]+>")


def test_paths_exist(page):
    """`varkern/ops/norm.py`, `csrc/cpu/<op>.cpp`, `kernels/attention*.py`, `tests/test_x.py::test_y`."""
    for span in spans(page.read_text(encoding="utf-8")):
        for word in span.split():
            if not word.startswith(FOLDERS) or "..." in word:
                continue
            name, _, function = word.partition("::")
            pattern = PLACEHOLDER.sub("*", name).rstrip("/")
            found = list(ROOT.glob(pattern))
            assert found, f"{word} is nowhere"
            if function:
                assert f"def {function}(" in found[0].read_text(encoding="utf-8"), word


def test_pages_that_the_code_names_exist():
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    named = {page for path in sources for page in re.findall(r"docs/[a-z_/]+\.md", path.read_text(encoding="utf-8"))}
    assert "docs/ops/conv.md" in named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_python_names_exist(page):
    """`varkern.ops.sample_tokens`, and what code blocks import from the package."""
    text = page.read_text(encoding="utf-8")
    names = [span for span in spans(text) if re.fullmatch(r"varkern(\.\w+)+", span)]
    for _, _, code in blocks("python", text):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "varkern":
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        assert resolves(name), name


def resolves(name):
    parts = name.split(".")
    found = varkern
    for i, part in enumerate(parts[1:], 2):
        try:
            found = importlib.import_module(".".join(parts[:i])) if not hasattr(found, part) else getattr(found, part)
        except ImportError:
            return ".".join(parts) == "varkern._C_cuda"  # built where nvcc is
    return True


def test_pages_stay_short(page):
    lines = len(page.read_text(encoding="utf-8").splitlines())
    assert lines <= (150 if page.name == "performance.md" else 450)


def test_every_op_has_a_page():
    """Each op in the registry is named in the heading or the text of a page of docs/ops."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/ops").glob("*.md"))
    for name in Op.registry:
        assert re.search(rf"\b{name}\b", text), name


def test_what_a_page_must_not_name_is_found(tmp_path):
    """The checks above see a path, a name and a command that are wrong."""
    wrong = tmp_path / "wrong.md"
    wrong.write_text("`varkern/nothing.py` `varkern.nothing` `make nothing` `varkern sample --nothing` [x](nothing.md)")
    for check in (test_paths_exist, test_python_names_exist, test_make_verbs_exist, test_links_lead_somewhere):
        with pytest.raises(AssertionError):
            check(wrong)
    with pytest.raises(ValueError, match="--nothing"):
        test_command_lines_parse(wrong)
