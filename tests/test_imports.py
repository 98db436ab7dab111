"""``import varkern`` needs neither triton nor the extensions: the reference answers and the report says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import varkern


def run(code: str, *blocked: str, **environment: str) -> str:
    """What the code prints in a new process in which the named modules cannot be imported."""
    names = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "VARKERN_BACKEND")}
    prelude = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], env=names | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


ANSWER = """
import torch, varkern
from varkern.ops import modulated_layer_norm_reference
x, scale, shift = torch.randn(2, 3, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
x.requires_grad_()
out = varkern.modulated_layer_norm(x, scale, shift)
want = modulated_layer_norm_reference(x, scale, shift)
torch.testing.assert_close(out, want)
torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x), torch.autograd.grad(want.square().sum(), x))
"""


def test_import_loads_nothing_optional() -> None:
    optional = ("triton", "flash_attn", "sklearn", "varkern.kernels", "varkern._C", "varkern._C_cuda")
    print_loaded = f"import varkern; print([name for name in {optional!r} if name in sys.modules])"
    assert run(print_loaded).strip() == "[]"


def test_import_starts_no_cuda() -> None:
    assert run("import torch, varkern; print(torch.cuda.is_initialized())").strip() == "False"


@pytest.mark.parametrize(
    "blocked",
    [
        ("triton",),
        ("varkern._C",),
        ("varkern._C_cuda",),
        ("triton", "varkern._C", "varkern._C_cuda", "varkern.kernels"),
    ],
    ids=["no_triton", "no_cpu_extension", "no_cuda_extension", "nothing"],
)
def test_the_op_answers(blocked: tuple[str, ...]) -> None:
    run(ANSWER, *blocked)


def test_the_reference_answers_without_the_extension() -> None:
    choice = "op = library.Op.registry['modulated_layer_norm']; print(op.choose(None, x, scale, shift))"
    code = ANSWER + "from varkern.ops import _op as library\n" + choice
    assert run(code).strip() == "cpu"
    assert run(code, "varkern._C").strip() == "reference"
    assert run(code, "varkern._C", TRITON_INTERPRET="1").strip() == "reference"


def test_an_unbuilt_checkout_says_so_once(tmp_path: Path) -> None:
    """It may lie in the working directory, in front of an installed package."""
    root = Path(varkern.__file__).resolve().parents[1]
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "assets")
    shutil.copytree(root / "varkern", tmp_path / "varkern", ignore=ignore)
    (tmp_path / "setup.py").touch()
    code = f"import warnings; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    code += "with warnings.catch_warnings(record=True) as seen:\n    warnings.simplefilter('always')\n"
    code += textwrap.indent(ANSWER + "{}\nvarkern.modulated_layer_norm(x, scale, shift)", "    ")
    code += "\nprint(varkern.__file__)\nfor w in seen:\n    if 'varkern' in str(w.message): print(w.message)"
    place, *said = run(code.format("")).splitlines()
    assert Path(place).parents[1] == tmp_path
    assert len(said) == 1
    assert f"its kernels were not built in {tmp_path} (" in said[0]
    assert "`pip install -e .`" in said[0]
    assert len(run(code.format(""), VARKERN_BACKEND="reference").splitlines()) == 1  # asked for


def test_asking_for_what_is_missing_says_why() -> None:
    code = ANSWER + "with varkern.use_backend({!r}):\n try: varkern.modulated_layer_norm(x, scale, shift)\n"
    code += " except RuntimeError as error: print(error)"
    assert "varkern._C did not import" in run(code.format("cpu"), "varkern._C")
    assert "triton did not import" in run(code.format("triton"), "triton", TRITON_INTERPRET="1")


def test_kernels_import_without_triton() -> None:
    code = "import varkern.kernels; print(varkern.kernels.unavailable())"
    assert run(code, "triton").startswith("triton did not import (ModuleNotFoundError")
    loaded = run("import varkern.kernels; print('triton' in sys.modules)")
    assert loaded.strip() == "False"


def test_report_says_what_is_missing() -> None:
    code = "import json; from varkern.info import report; print(json.dumps(report()))"
    found = json.loads(run(code, "triton", "varkern._C"))
    assert found["versions"]["triton"].startswith("absent: triton did not import")
    assert "varkern._C did not import" in found["extensions"]["varkern._C"]
    row = found["ops"]["modulated_layer_norm"][0]
    assert (row["device"], row["backend"]) == ("cpu", "reference")
    assert "pip install -e ." in row["others"]["cpu"]


def test_report_as_text_and_json() -> None:
    text = subprocess.run([sys.executable, "-m", "varkern.info"], capture_output=True, text=True, check=True).stdout
    assert "modulated_layer_norm\n  cpu float32, float16, bfloat16: cpu\n" in text
    command = [sys.executable, "-m", "varkern.info", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(found) == {"versions", "cpu", "gpus", "extensions", "override", "ops"}
    assert found["cpu"]["simd"] in ("baseline", "avx2", "avx512")
