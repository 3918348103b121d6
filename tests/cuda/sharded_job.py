"""Train a net that FSDP2 has sharded over one rank, and one that it has not: ``sharded_job.py DEVICE METHOD``."""

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lightning_entropy as le
from tests.cuda.test_training import METHODS, net, sgd, train


def main(kind: str, method: str) -> None:
    """Print the largest difference of a weight."""
    device = torch.device(kind)
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # gloo for the host, NCCL for cards
    mesh = dist.init_device_mesh(kind, (1,))
    found = []
    for sharded in (False, True):
        module: Any = net(device)
        if sharded:
            module = fully_shard(module, mesh=mesh)
        optimizer = sgd(module)
        loop = le.relax(optimizer, METHODS[method], seed=1, module=module)
        train(module, optimizer, loop, range(9), device)
        parts = [p.detach() for p in module.parameters()]
        assert all(isinstance(p, DTensor) for p in parts) == sharded
        found.append([copy.deepcopy(p.full_tensor() if isinstance(p, DTensor) else p) for p in parts])
    print("difference", max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
