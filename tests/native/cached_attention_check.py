"""The tests of cached attention through the CUDA backend, its kernels as plain C++.

python cached_attention_check.py PATH, where PATH is the module that test_native.py builds of the .cu files. Beside the
kernels this runs what stands before them: the bindings, alignment, the number of splits.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

import test_conformance
import test_decode

from varkern.ops import _op, backends, use_backend
from varkern.ops.attention import cached


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("_C_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The backend takes CPU tensors, for the emulation has no others.
    load = backends.load
    backends.load = lambda name: (module, None) if name == "varkern._C_cuda" else load(name)
    _op._ABSENT["cuda"] = lambda tensor: None
    cached.stream = lambda tensor: (0,)

    torch.use_deterministic_algorithms(True, warn_only=True)  # NaN in torch.empty
    device = torch.device("cpu")
    with use_backend("cuda"):
        for dtype in test_decode.DTYPES.values():
            for name, case in test_decode.CASES.items():
                torch.manual_seed(0)
                if name != "one_of_many_keys":  # the emulation needs seconds for it
                    test_decode.check(replace(case, dtype=dtype))
            torch.manual_seed(0)
            test_decode.test_generation_is_block_causal_attention(device, (1, 4, 9, 16), dtype)
        test_conformance.check_values("cached_attention", device)
        test_decode.test_what_is_not_a_number_is_not_lost(device)
        test_decode.test_rows_of_zeros_have_the_floor_for_a_norm(device)
        test_decode.test_deterministic(device)
    print("cuda", module.architectures())


if __name__ == "__main__":
    main(sys.argv[1])
