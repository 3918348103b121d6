"""What replicas tell each other when they meet, and what a meeting brings."""

import json
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lightning_entropy.strategies.compression import Format
from lightning_entropy.strategies.torchft.rounding import Left

Subject = tuple[int, int, bool, Format, int]  # stream, size, wide, format and body of a record


class Record(NamedTuple):
    """What every replica tells the others when they meet.

    Attributes:
        replica: its number.
        joins: it has no state yet, and asks for one.
        stream: which of its exchanges this is.
        size: how many numbers it sends.
        wide: they are of 8 bytes.
        format: of the first of them.
        body: how many those are.
        key: of the mean that they are differences from.
        version: of what all replicas have in common; -1: nothing.
        serial: of this meeting, in its own count.
        host: of its state, for replicas that join.
        port: of it.
        in_step: it has come to the same exchange as the others before, and not left one out since.
    """

    replica: int
    joins: bool
    stream: int
    size: int
    wide: bool
    format: Format
    body: int
    key: int
    version: int
    serial: int
    host: str
    port: int
    in_step: bool = True

    @property
    def subject(self) -> Subject:
        """What must be equal for two replicas' numbers to be added."""
        return self.stream, self.size, self.wide, self.format, self.body


@dataclass
class Met:
    """What a meeting has brought.

    Attributes:
        records: of all that met.
        rank: of this replica among them.
        total: the sum of what they sent, where this replica's was of the same kind; None: it was not.
        whole: what is rounded was sent in full, and not as differences.
        left: by the sum, where it was rounded.
        bytes: of what each replica sent to be added.
        common: what this replica has missed of what all have in common; None: nothing.
    """

    records: list[Record]
    rank: int
    total: Tensor | None = None
    common: dict[str, Any] | None = None
    whole: bool = True
    left: Left | None = None
    bytes: int = 0

    @property
    def key(self) -> int:
        """A number that all that met have in common, and no others: of this meeting's mean."""
        return zlib.crc32(json.dumps(self.records).encode()) + 1

    @property
    def source(self) -> int:
        """The rank that gives its state to those that join: the first that has one, or else the first."""
        return next((rank for rank, record in enumerate(self.records) if not record.joins), 0)

    @property
    def begins(self) -> bool:
        """Whether this replica joins, and has to begin with its own state: none has one, and it is the first."""
        return self.rank == self.source and self.records[self.rank].joins

    @property
    def present(self) -> list[int]:
        """The numbers of the replicas that met."""
        return sorted(record.replica for record in self.records)


def most_wanted(records: list[Record]) -> Subject:
    """Return what a meeting is for: what most of those have come for that are in step with each other.

    Where as many have come for two, it is the one whose turn is earlier. One that is out of step finds the others again
    as they take their turns, and those that are in step wait for nobody.

    Args:
        records: of the replicas that send something.
    """
    voting = [record for record in records if record.in_step] or records
    votes = Counter(record.subject for record in voting)
    return min(voting, key=lambda record: (-votes[record.subject], record.version, record.stream)).subject
