"""Replicas whose weights are shards, by FSDP2 or a tensor-parallel plan: checks, start, what is saved and loaded."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_entropy.engine.shards import Gathered, is_sharded, local, mapped, part_of, whole
from lightning_entropy.strategies.options import Grid, ReplicaOptions

HOW = (
    "in configure_model, call fully_shard(..., mesh=self.device_mesh['data_parallel']) for layers and for the whole, "
    "or parallelize_module(..., self.device_mesh['data_parallel'], plan)"
)


def check_sharding(
    module: Module, options: ReplicaOptions, grid: Grid, *, start_method: str, precision: str | None
) -> bool:
    """Return whether a module's parameters are sharded over the ranks of its replica.

    Args:
        module: as ``configure_model`` has left it.
        options: of the replicas.
        grid: where this rank stands.
        start_method: how its process was started.
        precision: of the Trainer.

    Raises:
        MisconfigurationException: they are sharded over other ranks, or by ``fully_shard`` some only, or by it on top
            of a plan; or an option does not go with it.
    """
    if any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
        raise MisconfigurationException(
            f"parameters of a replica must be sharded by fully_shard (FSDP2), got FullyShardedDataParallel: {HOW}"
        )
    params = dict(module.named_parameters())
    if not is_sharded(params.values()):
        return False
    ranks = list(range(grid.replica * grid.data_parallel, (grid.replica + 1) * grid.data_parallel))
    for name, p in params.items():
        if isinstance(p, DTensor) and p.device_mesh.mesh.flatten().tolist() != ranks:
            found = p.device_mesh.mesh.flatten().tolist()
            raise MisconfigurationException(
                f"parameters must be sharded over the ranks of their replica, {ranks}, got {found} for {name}: {HOW}"
            )
        if isinstance(p, DTensor) and p.device_mesh.ndim > 1 and not p.placements[0].is_replicate():
            raise MisconfigurationException(
                "parameters of a replica must be sharded by fully_shard or by a tensor-parallel plan, got both for "
                f"{name}, of which only some ranks need the same batches: {HOW}"
            )
    planned, trained = has_plan(module), {name: p for name, p in params.items() if p.requires_grad}
    plain = [name for name, p in trained.items() if not isinstance(p, DTensor)]
    if plain and not planned:
        raise MisconfigurationException(
            f"all parameters that train must be sharded where some are, as others' gradients are not averaged, got "
            f"{', '.join(plain[:3])} that {'are' if len(plain) > 1 else 'is'} not: {HOW}"
        )
    undivided = [name for name, p in trained.items() if not any(s.is_shard() for s in getattr(p, "placements", ()))]
    if planned and undivided and options.communication_dtype in ("int8", "int4"):
        raise MisconfigurationException(
            "communication_dtype must be 'float32' or 'bfloat16' with a plan that leaves weights whole, "
            f"as {undivided[0]}, got {options.communication_dtype!r}: each rank would round them in a block of its own"
        )
    if options.elastic:
        raise MisconfigurationException("membership must be 'static' with sharded parameters, got 'torchft'")
    if options.independent_init:
        raise MisconfigurationException(
            "independent_init must be False with sharded parameters, got True: no rank can draw a whole weight"
        )
    if precision == "16-mixed":
        raise MisconfigurationException(
            "precision must be 'bf16-mixed' or full with sharded parameters, got '16-mixed': a gradient scaler would "
            "look at a rank's own shards alone"
        )
    if start_method != "popen":
        raise MisconfigurationException(
            f"start_method must be 'popen' (or torchrun's processes) with sharded parameters, got {start_method!r}, "
            "which brings a module's weights back to the process that has started it"
        )
    return True


def has_plan(module: Module) -> bool:
    """Whether a module is shared out by a tensor-parallel plan alone, so that all ranks of a replica need one batch."""
    return is_sharded(module.parameters()) and not any(isinstance(m, FSDPModule) for m in module.modules())


def has_shards(module: Module) -> bool:
    """Whether a module's parameters are shards: seen when FSDP2 has none of them gathered."""
    Gathered(module).drop()
    return is_sharded(module.parameters())


@torch.no_grad()
def sync_shards(module: Module, across: Any, position: int) -> None:
    """Overwrite the shards of every replica with the first's. A collective of the ranks at one position.

    Args:
        module: whose parameters are overwritten.
        across: the group of those ranks.
        position: of this rank in its replica, which is the rank in the first.
    """
    for p in module.parameters():
        if isinstance(p, DTensor) and local(p).numel():
            part = local(p).contiguous().view(-1).view(torch.uint8).clone()  # as bytes: gloo lacks some types
            dist.broadcast(part, position, group=across)
            local(p).copy_(part.view(p.dtype).view(local(p).shape))


@torch.no_grad()
def gathered(state: Any, *, keep: bool) -> Any:
    """Return a state with whole tensors on the CPU for shards. A collective of the replica.

    Args:
        state: nested.
        keep: False on ranks that need no more than to take part.
    """

    def gather(_: str, t: Tensor) -> Tensor:
        if not isinstance(t, DTensor):
            return t
        full = t.full_tensor()
        return full.cpu() if keep else full.new_empty(0)

    return mapped(state, gather)


@torch.no_grad()
def own_parts(state: Any) -> Any:
    """Return a state with this rank's parts for shards."""
    return mapped(state, lambda _, t: local(t).clone() if isinstance(t, DTensor) else t)


@torch.no_grad()
def with_shards(state: Any, params: Mapping[str, Tensor]) -> Any:
    """Return a state with shards again where :func:`own_parts` has left parts, of a parameter in their path."""

    def dress(path: str, t: Tensor) -> Tensor:
        p = next((params[key] for key in path.split("/") if key in params), None)
        return t if p is None or t.shape != local(p).shape else whole(t.to(p.device), p)

    return mapped(state, dress)


@torch.no_grad()
def module_state(state: Mapping[str, Any], module: Module) -> dict[str, Any]:
    """Return a module's state dict, of whole tensors, with shards for its sharded parameters."""
    params = dict(module.named_parameters(remove_duplicate=False))
    return {k: _sharded(v, params[k]) if k in params else v for k, v in state.items()}


@torch.no_grad()
def optimizer_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict, of whole tensors or of this rank's parts, with shards as its parameters are."""
    saved = [i for group in state["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    by_index = dict(zip(saved, params, strict=False))
    entries = {
        i: {k: _sharded(v, by_index[i]) if i in by_index else v for k, v in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": entries}


def _sharded(value: Any, p: Tensor) -> Any:
    if not isinstance(value, Tensor) or not isinstance(p, DTensor):
        return value
    if value.shape == p.shape:
        return whole(part_of(value, p).to(p.device, copy=True), p)
    return whole(value.to(p.device), p) if value.shape == local(p).shape else value
