"""Group norm and gated residual through the CUDA backend, its kernels as plain C++: python fused_norm_check.py PATH.

PATH is the module that test_native.py builds of the .cu files. Beside the kernels this runs what stands before them:
the bindings, memory formats, how the pixels are cut.
"""

import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

import test_conformance
import test_gated_norm
import test_group_norm

from varkern.ops import _op, backends, gated_norm, group_norm, norm, use_backend

SHAPES = ("one_pixel", "odd_channels", "groups_of_one", "groups_across_vectors", "chunks_of_channels")


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
    for ops in (group_norm, gated_norm, norm):
        ops.stream = lambda tensor: (0,)

    torch.use_deterministic_algorithms(True, warn_only=True)  # NaN in torch.empty
    torch.manual_seed(0)
    device = torch.device("cpu")
    with use_backend("cuda"):
        for layout in test_group_norm.FORMATS.values():
            for dtype in test_group_norm.DTYPES.values():
                for name in SHAPES:
                    test_group_norm.check(
                        test_group_norm.arguments(test_group_norm.SHAPES[name], device, dtype, layout)
                    )
            for offset in (3.0, 1000.0):
                test_group_norm.test_means_of_many_deviations(device, layout, offset)
            test_group_norm.test_statistics_of_uneven_images(device, layout)
            test_group_norm.test_what_is_not_a_number_stays_in_its_group(device, layout)
        for change in test_group_norm.STRIDES.values():
            test_group_norm.test_strides(device, change)
        test_group_norm.test_an_image_does_not_depend_on_its_batch(device)
        for dtypes in test_gated_norm.DTYPES.values():
            for C in (33, 64):
                test_gated_norm.check(test_gated_norm.arguments((2, 5, C), device, *dtypes))
        test_gated_norm.test_two_dimensional_condition_shared_by_the_batch(device)
        test_gated_norm.test_large_mean(device)
        for op in (*test_group_norm.OPS, *test_gated_norm.OPS):
            test_conformance.check_values(op, device)
    print("cuda", module.architectures())


if __name__ == "__main__":
    main(sys.argv[1])
