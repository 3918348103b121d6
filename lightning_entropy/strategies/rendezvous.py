"""How ranks find each other where Lightning's way does not do: restarted by torchrun, or one alone among others."""

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment


def join_after_restart(
    environment: ClusterEnvironment, backend: str, device: torch.device, timeout: timedelta | None
) -> None:
    """Create the process group under keys of this restart, if torchrun has restarted the ranks; else do nothing.

    The ranks meet in the agent's store, which outlives them. Without keys of its own a restarted rank may read an
    address that a dead one has left there and fail to connect ("Connection refused").

    Args:
        environment: the cluster's.
        backend: of the process group.
        device: of this rank.
        timeout: of the process group; None: torch's own.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    wait: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    size = environment.world_size()
    store = dist.TCPStore(environment.main_address, environment.main_port, size, is_master=False, **wait)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"restart/{restarts}", store),
        rank=environment.global_rank(),
        world_size=size,
        device_id=None if device.type == "cpu" else device,
        **wait,
    )


def join_alone(backend: str, device: torch.device, timeout: timedelta | None) -> None:
    """Create the process group of a single rank, without a port: jobs beside it may have the one that it would take.

    Args:
        backend: of the process group.
        device: of this rank.
        timeout: of the process group; None: torch's own.
    """
    if dist.is_initialized():
        return
    wait: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    place = None if device.type == "cpu" else device
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=place, **wait)
    if backend == "nccl":  # which warns of a group that is left
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
