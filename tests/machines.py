"""Run the numeric tests as on other processors and with other numbers of threads.

    python tests/machines.py [arguments of pytest instead of the numeric files]

PyTorch's libraries and the kernels are held to the vectors of older processors. Closes with a table of the outcomes,
and fails where a test did.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PROCESSORS = {
    "this one": {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "VARKERN_SIMD": "avx2"},
    "baseline": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "VARKERN_SIMD": "baseline"},
}
THREADS = (1, 2, 4)
NUMERIC = (
    "conformance",
    "norm",
    "gated_norm",
    "group_norm",
    "conv",
    "attention*",
    "decode",
    "quantize*",
    "sampling",
    "engine",
)
NUMERIC += ("engine", "generate", "golden", "native*")


def main(arguments: list[str]) -> int:
    files = [str(path) for name in NUMERIC for path in sorted(TESTS.rglob(f"test_{name}.py"))]
    rows, failed = [], False
    for (processor, settings), threads in product(PROCESSORS.items(), THREADS):
        print(f"+ {processor}, {threads} threads", flush=True)
        environment = {**os.environ, **settings, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        command = [
            str(Path(sys.executable).with_name("pytest")),
            "-q",
            *(arguments or [*files, "-m", "not gpu and not slow"]),
        ]
        start, last = time.monotonic(), ""
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
        failed |= process.returncode != 0
        rows.append(f"{processor:10} {threads:7} {time.monotonic() - start:7.0f} s  {last}")
    print("\nprocessor  threads      time  outcome", *rows, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
