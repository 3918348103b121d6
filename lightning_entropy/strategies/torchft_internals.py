"""The private name of torchft that the strategies use.

Checked against torchft 0.2.0; ``tests/strategies/test_torchft_internals.py`` fails when it changes.
"""

from datetime import timedelta

from torchft.coordination import ManagerClient

LONG = timedelta(days=7)


class Quorum:
    """Who meets: what ``ManagerClient._quorum`` returns, without what torchft's own recovery needs.

    Attributes:
        id: of this set of replicas; another one needs a new process group.
        rank: of this replica among them.
        size: how many they are.
        store: address of the store in which they find each other.
    """

    def __init__(self, client: ManagerClient, failures: int) -> None:
        """Ask the lighthouse, and wait until it names those that meet.

        ``torchft.Manager`` does the same, but waits for a bounded time and is of no use afterwards; a request that was
        given up stays with the lighthouse, which then counts on a replica that does not come.

        Args:
            client: of this replica's manager server.
            failures: meetings that have failed since the last one that has not: the others must make a new group too.
        """
        found = client._quorum(
            group_rank=0,
            step=0,  # torchft's recovery is not used: it would throw away the work of whoever missed a step
            checkpoint_metadata="",
            shrink_only=False,
            timeout=LONG,
            init_sync=False,
            commit_failures=failures,
        )
        self.id: int = found.quorum_id
        self.rank: int = found.replica_rank
        self.size: int = found.replica_world_size
        self.store: str = f"{found.store_address}/torchft/{found.quorum_id}/0"
