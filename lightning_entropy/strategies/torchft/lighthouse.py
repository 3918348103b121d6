"""The lighthouse, which knows what replicas there are: its address, and what it says."""

import os
import re
import socket
import urllib.request
from http.client import HTTPException
from urllib.parse import urlsplit

from lightning.pytorch.utilities.exceptions import MisconfigurationException

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"  # in the environment: its address


class NoLighthouse(Exception):
    """The lighthouse cannot be reached; the message says what to do."""


def lighthouse_address() -> str:
    """Return the address of the lighthouse.

    Raises:
        MisconfigurationException: the environment does not have it.
    """
    address = os.environ.get(LIGHTHOUSE, "")
    if not address:
        raise MisconfigurationException(
            f"membership='torchft' needs {LIGHTHOUSE}, the lighthouse's address http://host:port, in the environment: "
            "python -m lightning_entropy.launch starts one and sets it"
        )
    return address


def address_toward(lighthouse: str) -> str:
    """Return the address of this machine's interface toward the lighthouse, as other replicas can reach it.

    Args:
        lighthouse: its address, ``http://host:port``.

    Raises:
        ValueError: it is none.

    Example:
        >>> address_toward("http://127.0.0.1:29510")
        '127.0.0.1'
    """
    parts = urlsplit(lighthouse)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise ValueError(f"the lighthouse's address must be http://host:port, got {lighthouse!r}")
    family, kind, protocol, _, target = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])


def said_by(lighthouse: str) -> str:
    """Return what the lighthouse says of the next quorum, as the end of a sentence; nothing if it does not answer."""
    try:
        with urllib.request.urlopen(f"{lighthouse}/status", timeout=2.0) as page:
            found = re.search(r"Next quorum status:\s*([^<\n]+)", page.read().decode())
    except (OSError, HTTPException):
        return ", which does not answer"
    return f", which says: {found[1].strip()}" if found else ""
