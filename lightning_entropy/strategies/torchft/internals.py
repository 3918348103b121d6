"""torchft, as the strategies use it, which is imported here alone and when it is needed; one of its names is private.

Checked against torchft 0.2.0; ``tests/strategies/torchft/test_internals.py`` fails when that name changes.
"""

from datetime import timedelta
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

LONG = timedelta(days=7)
BEAT = timedelta(milliseconds=100)
RETRIES = 1_000_000  # of a request to the lighthouse, which may be started again


def check_installed() -> None:
    """Raise an error that says what to install where torchft is missing."""
    try:
        import torchft  # noqa: F401
    except ImportError as error:
        raise MisconfigurationException(
            "membership='torchft' needs torchft, which is for Linux: pip install torchft"
        ) from error


def open_group(timeout: timedelta) -> Any:
    """Return a process group of gloo that can be made anew of other members."""
    from torchft import ProcessGroupGloo

    return ProcessGroupGloo(timeout=timeout)


def open_lighthouse(min_replicas: int, *, heartbeat_timeout: float, join_timeout: float) -> tuple[Any, str]:
    """Open a lighthouse for replicas of this machine; return its server and its address.

    Args:
        min_replicas: that must meet.
        heartbeat_timeout: seconds after which a silent replica is taken for dead.
        join_timeout: seconds for which one that is alive and late is waited for.
    """
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=min_replicas,
        join_timeout_ms=int(1000 * join_timeout),
        heartbeat_timeout_ms=int(1000 * heartbeat_timeout),
    )
    return server, f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}"


def start_server(name: str, lighthouse: str, host: str, store: str, timeout: timedelta) -> tuple[Any, Any]:
    """Let a lighthouse know a replica from now on, by a name that no other has; return the server and its client."""
    from torchft.coordination import ManagerClient, ManagerServer

    server = ManagerServer(
        replica_id=name,
        lighthouse_addr=lighthouse,
        hostname=host,
        bind="[::]:0",
        store_addr=store,
        world_size=1,
        heartbeat_interval=BEAT,
        connect_timeout=timeout,
        quorum_retries=RETRIES,
    )
    return server, ManagerClient(server.address(), connect_timeout=timeout)


class Quorum:
    """Who meets.

    ``torchft.Manager`` asks for it too, but waits for a bounded time and is of no use afterwards; a request that was
    given up stays with the lighthouse, which then counts on a replica that does not come.

    Args:
        client: of this replica's server. It asks the lighthouse, and waits until that names those that meet.
        failures: meetings that have failed since the last one that has not: the others must make a new group too.

    Attributes:
        id: of this set of replicas; another one needs a new process group.
        rank: of this replica among them.
        size: how many they are.
        store: address of the store in which they find each other.
    """

    def __init__(self, client: Any, failures: int) -> None:
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
