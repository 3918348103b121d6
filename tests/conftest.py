"""What every test starts from and leaves behind."""

import os

# Several workers share the machine; a test that needs threads sets them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Set by Lightning for its own children; a test must not hand them to the next one.
_LEAKING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Seed, and restore what Lightning changes of a process: environment, signal handlers, process group."""
    torch.manual_seed(0)
    environment = {name: os.environ.get(name) for name in _LEAKING}
    main = threading.current_thread() is threading.main_thread()
    signals = [signal.SIGINT, signal.SIGTERM]
    handlers = {s: signal.getsignal(s) for s in signals}
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if main:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.use_deterministic_algorithms(deterministic)


# CI tries the same examples every time; "thorough" as many others as one likes to wait for.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, stateful_step_count=25)
settings.register_profile("thorough", deadline=None, max_examples=2000, stateful_step_count=50)
settings.load_profile("ci")
