"""One of two processes of ``test_sharded``: a model sharded by ``fully_shard`` beside the same model whole.

python sharded_child.py RANK STORE
"""

import copy
import sys

import published_transformer as published
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import varkern
from varkern.engine import generate_scales


def sharded(var: varkern.VAR, root: bool) -> varkern.VAR:
    var = copy.deepcopy(var)
    for block in var.blocks:
        fully_shard(block)
    return fully_shard(var) if root else var


def check(root: bool, **settings) -> None:
    whole = published.model(cond_drop_rate=0.0, **settings)
    var = sharded(whole, root)
    labels, inputs = torch.tensor([1, 4]), torch.randn(2, whole.L - 1, whole.Cvae)
    for step in range(2):  # before and after an optimizer has moved the shards
        want = varkern.generate(whole, 2, labels, 3)
        got = var.autoregressive_infer_cfg(2, labels, 3)
        torch.testing.assert_close(got, want.images, rtol=0, atol=1e-4)
        last = list(generate_scales(var, 2, labels, 3))[-1]
        assert all(torch.equal(a, b) for a, b in zip([last.tokens], want.tokens[-1:], strict=True))
        losses = []
        for model in (whole, var):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            with published.Ops() as ops:
                loss = published.loss(model(labels, inputs))
            assert ops.counts["block_causal_attention_qkv"] == len(whole.blocks), ops.counts
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 1e-5, (step, losses)
    with varkern.use_backend("reference"):
        images = varkern.generate(var, 1, 1, 0).images
    torch.testing.assert_close(images, varkern.generate(whole, 1, 1, 0).images, rtol=0, atol=1e-4)


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    check(root=True)
    check(root=False)
    check(root=True, shared_aln=True)
    model = nn.parallel.DistributedDataParallel(published.model(), broadcast_buffers=False)
    published.loss(model(torch.tensor([1]), torch.randn(1, 29, 8))).backward()
    varkern.generate(model.module, 1, 1, 0)
    dist.destroy_process_group()
    print("same")


if __name__ == "__main__":
    main()
