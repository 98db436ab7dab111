"""Models sharded over processes train and generate as whole ones."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

CHILD = Path(__file__).with_name("sharded_child.py")


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, str(CHILD)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], **pipes) for rank in range(2)]
    try:
        outputs = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
        assert output.rstrip().endswith("same"), output
