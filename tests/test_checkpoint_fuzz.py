"""Damaged, edited and odd checkpoints: each loads to exactly the right weights, or is refused in one sentence.

The mutants, by a fixed seed, and what is asked of each: `checkpoint_mutants.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MUTANTS = 1260


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the bound on memory needs Linux")
def test_mutants_load_rightly_or_are_refused_in_little_memory(tmp_path: Path) -> None:
    script = Path(__file__).with_name("checkpoint_mutants.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(MUTANTS)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ends = {end["kind"]: end for end in map(json.loads, done.stdout.splitlines())}
    assert sum(end["loaded"] + end["refused"] for end in ends.values()) == MUTANTS
    assert all(end["refused"] for kind, end in ends.items() if kind != "guise")
    assert ends["guise"]["refused"] == 0
    assert ends["folder_config"]["loaded"] > 0
    assert ends["wrong_tensor"]["loaded"] == ends["wrong_levels"]["loaded"] == ends["wrong_tokenizer"]["loaded"] == 0
