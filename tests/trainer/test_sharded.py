"""The callbacks under Lightning's ModelParallelStrategy: the fits of one process, and checkpoints of both kinds."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.sharded import NO_FSDP
from tests.strategies.runs import FORK_WARNINGS, external
from tests.trainer import model_parallel
from tests.trainer.model_parallel import CALLBACKS

pytestmark = [pytest.mark.processes, NO_FSDP, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clipped": ("entropy", {"gradient_clip_val": 0.05}),
    "accumulated": ("heat", {"accumulate_grad_batches": 2}),
    "manual": ("heat", {"manual": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks, and then one that goes on from their checkpoints, have played their fits."""
    path = tmp_path_factory.mktemp("model_parallel")
    for ranks in (2, 1):
        work = functools.partial(model_parallel.play, ranks=ranks, folder=path)
        assert external(ranks, work, timeout=200) == [""] * ranks
    return path


def told(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{ranks}.{rank}.pt", weights_only=False) for rank in range(ranks)]


@functools.cache
def plain(name: str, folder: Path) -> dict[str, Any]:
    name, options = OTHERS.get(name, (name, {}))
    return model_parallel.fit(folder / "plain", name, ranks=None, **options)


def check(seen: dict[str, Any], name: str, folder: Path) -> None:
    """Compare a fit, or the end of one that goes on from a checkpoint, with one by one process."""
    whole, n = plain(name, folder), len(seen["losses"])
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    close(seen["losses"], whole["losses"][-n:])
    validated = seen["validated"][2:]  # after the sanity check
    close(validated, whole["validated"][-len(validated) :])
    close(seen["final"], whole["final"])


@pytest.mark.parametrize("name", [*CALLBACKS, *OTHERS])
def test_two_ranks_train_as_one_process(folder: Path, name: str) -> None:
    for rank in told(folder, 2):
        for seen in [rank[name]] if name in OTHERS else [rank[f"{name} True"], rank[f"{name} False"]]:
            check(seen, name, folder)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_resume_in_the_middle_of_a_loop_is_exact(folder: Path, name: str, distributed: bool) -> None:
    for rank in told(folder, 2):
        seen = rank[f"{name} {distributed} resumed"]
        assert len(seen["losses"]) == 8
        check(seen, name, folder)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("name", ["entropy", "outer adam"])
def test_one_rank_goes_on_from_a_checkpoint_of_two(folder: Path, name: str, distributed: bool) -> None:
    seen = told(folder, 1)[0][f"{name} {distributed} resumed"]
    assert len(seen["losses"]) == 8
    check(seen, name, folder)


def test_one_process_with_plain_tensors_goes_on_from_a_file_of_two_ranks(folder: Path) -> None:
    seen = model_parallel.fit(
        folder / "plain", "entropy", ranks=None, ckpt_path=folder / "entropy False" / "middle.ckpt"
    )
    check(seen, "entropy", folder)


def test_a_folder_has_no_numbers_of_shards_in_the_first_ranks_file(folder: Path) -> None:
    meta = torch.load(folder / "entropy True" / "middle.ckpt" / "meta.pt", weights_only=True)
    slots = meta["callbacks"]["EntropySGD"]["loops"][0]["slots"]
    assert slots
    assert all(t.is_meta for slot in slots.values() for key, t in slot.items() if key != "moved")


def test_a_file_of_the_weights_has_x(folder: Path) -> None:
    checkpoint = torch.load(folder / "heat False" / "end.ckpt", weights_only=True)
    torch.testing.assert_close(checkpoint["state_dict"], told(folder, 2)[0]["heat False"]["final"], rtol=0, atol=0)
