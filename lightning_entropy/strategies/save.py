"""A checkpoint of the Trainer that is to be saved: what all replicas have in common, and what is this rank's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from lightning_entropy.strategies.replica_files import save_whole
from lightning_entropy.strategies.resharding import places_of
from lightning_entropy.strategies.sharding import own_parts

# In a checkpoint, what is the same for all replicas; everything else is in each replica's own file too.
COMMON = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "pytorch-lightning_version")


@dataclass(frozen=True)
class Save:
    """A checkpoint, and where it goes.

    Attributes:
        io: writes the main file.
        content: of the main file, with whole weights on the rank that writes it.
        parts: the Trainer's checkpoint as this rank has it.
        path: of the main file.
        storage_options: for ``io``.
        alone: after an exception: other ranks may not be saving, or not at this step.
        sharded: this rank has shards.
    """

    io: CheckpointIO
    content: dict[str, Any]
    parts: dict[str, Any]
    path: Any
    storage_options: Any
    alone: bool
    sharded: bool

    def own(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what goes into this rank's file: its own parts, and where in the whole they are.

        Args:
            state: of this replica, with the names of its ``parameters``.
        """
        parts = {key: value for key, value in self.parts.items() if key not in COMMON}
        own: dict[str, Any] = {"checkpoint": parts, **state}
        return {**own_parts(own), "places": places_of(own, state["parameters"])} if self.sharded else own

    def write(self, more: Mapping[str, Any] | None = None, *, writer: str = "") -> None:
        """Write the main file by itself, atomically.

        Args:
            more: what it has beside the content.
            writer: a name of whoever writes, where another process may write the same file meanwhile.
        """
        save_whole(self.io, {**self.content, **(more or {})}, self.path, self.storage_options, writer=writer)
