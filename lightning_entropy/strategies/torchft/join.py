"""How a replica begins where replicas come and go: with the state of one that is there, or with its own."""

from typing import Any

from torch.nn import Module

from lightning_entropy.strategies.torchft.assembly import Assembly
from lightning_entropy.strategies.torchft.delegation import Delegation

PEER = "a replica that joins"  # the path of a checkpoint that goes to one


def join(assembly: Assembly | Delegation, module: Module) -> dict[str, Any] | None:
    """Meet the others for the first time.

    Args:
        assembly: where.
        module: gets the weights of the first of several replicas that begin together.

    Returns:
        The state of a replica that is training; None if all that are here begin.
    """
    while True:
        met = assembly.join().wait()
        if met is None:
            continue
        if met.begins:
            if assembly.asks():
                assembly.give_state({"weights": module.state_dict()})
            return None
        try:
            state = assembly.take_state(met)
        except OSError:
            continue  # it is gone, and another will do
        if "weights" not in state:
            return state
        module.load_state_dict(state["weights"])
        return None
