"""What replicas make the host wait for, beyond the same training without them: nothing between their exchanges."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

import lightning_entropy as le
from tests.device_calls import Calls, as_on_a_gpu
from tests.strategies.runs import FORK_WARNINGS, Net, strategy, trainer

pytestmark = [
    pytest.mark.usefixtures("on_a_gpu"),
    pytest.mark.processes,
    *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS),
]

STEPS = 10  # and one that ends the tenth
METHODS: dict[str, le.Relaxation] = {
    "parle": le.parle(4, 0.1, 0.3),
    "elastic_sgd": le.elastic_sgd(4, 0.3),
    "average": le.Relaxation(inner_steps=4, rho=0.3, elastic_target="average"),
    "local_sgd": le.local_sgd(4),
    "diloco": le.diloco(4),
    "streaming_diloco": le.streaming_diloco(4, 2, 1),
}


@pytest.fixture
def on_a_gpu() -> Iterator[None]:
    with as_on_a_gpu():
        yield


class Counting(Net):
    """Counts from the beginning of each training step to that of the next, and writes the counts at the end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(samples=8 * (STEPS + 2))  # an epoch's end is elsewhere
        self.folder, self.calls, self.marks = folder, Calls(), list[Counter[str]]()

    def on_train_start(self) -> None:
        self.calls.__enter__()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.marks.append(self.calls.waits)
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        self.calls.__exit__(None, None, None)
        found = [dict(after - before) for before, after in pairwise(self.marks)]
        torch.save(found, self.folder / f"reads.{self.global_rank}.pt")


def reads(folder: Path, strategy: Any, devices: int, **options: Any) -> list[list[dict[str, int]]]:
    """What each rank waited for in each of ten steps."""
    L.seed_everything(7, verbose=False)
    trainer(folder, strategy, devices, max_epochs=-1, max_steps=STEPS + 1, **options).fit(Counting(folder))
    found = [torch.load(folder / f"reads.{rank}.pt") for rank in range(devices)]
    assert all(len(rank) == STEPS for rank in found)
    return found


PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "float64": dict,
    "bfloat16": lambda: {"precision": "bf16-mixed"},
    "float16": lambda: {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=128.0))},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_one_replica_waits_for_nothing(tmp_path: Path, method: str, precision: str) -> None:
    options = PRECISIONS[precision]
    plain = reads(tmp_path, "auto", 1, **options())
    assert reads(tmp_path, strategy(METHODS[method]), 1, **options()) == plain
    assert any(plain[0]) == (precision == "float16")  # torch's scaler asks whether to skip


# Of an exchange that is used: how many replicas' weights were finite. That it begins waits for nothing.
USED = Counter({"tolist": 1})


def expected(method: str, step: int) -> Counter[str]:
    """What the k-th step waits for, with what is done before the next begins."""
    k = step % 4 + 1  # of a loop of four
    if method == "streaming_diloco":  # two fragments, used at 2 and 4, begun one step before
        return Counter() if k % 2 else USED
    return USED if k == 4 else Counter()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_two_replicas_wait_at_exchanges_alone(tmp_path: Path, method: str, precision: str) -> None:
    options = PRECISIONS[precision]
    plain = [Counter(found) for found in reads(tmp_path, "auto", 1, **options())[0]]
    for rank in reads(tmp_path, strategy(METHODS[method]), 2, **options()):
        assert [Counter(found) - own for found, own in zip(rank, plain, strict=True)] == [
            expected(method, step) for step in range(STEPS)
        ]
