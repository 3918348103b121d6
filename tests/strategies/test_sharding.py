"""Replicas that are sharded by FSDP2: the trainings of replicas that are whole, what is sent, saved and refused."""

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_entropy as le
from tests.engine.sharded import NO_FSDP
from tests.strategies import runs, sharded
from tests.strategies.runs import FORK_WARNINGS, external
from tests.strategies.sharded import METHODS

pytestmark = [pytest.mark.processes, NO_FSDP, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]
EXACT = [name for name in METHODS if name != "int8"]  # whose blocks of weights end where a rank's do
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two replicas of two ranks have played their fits, and then two of one rank."""
    path = tmp_path_factory.mktemp("sharded")
    assert external(4, functools.partial(sharded.play, folder=path), timeout=200) == [""] * 4
    return path


@pytest.fixture(scope="module")
def fewer(folder: Path) -> list[dict[str, Any]]:
    """What two replicas of one rank have seen that went on from those of two."""
    assert external(2, functools.partial(sharded.play_fewer, folder=folder), timeout=100) == [""] * 2
    return [torch.load(folder / f"fewer.{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def more(folder: Path, fewer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two replicas of two ranks have seen that went on from those of one."""
    assert external(4, functools.partial(sharded.play_more, folder=folder), timeout=100) == [""] * 4
    return [torch.load(folder / f"more.{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.mark.parametrize("name", [*EXACT, "clipped"])
def test_sharded_replicas_train_as_whole_ones(told: list[dict[str, Any]], name: str) -> None:
    for rank in told:
        for key in ("losses", "validated", "final", "spread"):
            close(rank[name][key], rank[f"{name} whole"][key])


@pytest.mark.parametrize("name", sharded.PLANNED)
def test_tensor_parallel_replicas_train_as_replicas_of_one_rank(
    told: list[dict[str, Any]], fewer: list[dict[str, Any]], name: str
) -> None:
    """Both ranks of a replica see the same batches, and each exchanges its part of the weights."""
    for rank, seen in enumerate(told):
        planned, alone = seen[f"{name} planned"], fewer[rank // 2][f"{name} unplanned"]
        for key in ("losses", "final"):
            torch.testing.assert_close(planned[key], alone[key], rtol=0, atol=1e-6)
        resumed = seen[f"{name} planned, resumed"]
        assert len(resumed["losses"]) == len(planned["losses"]) - sharded.SAVE_AT
        close(resumed["losses"], planned["losses"][sharded.SAVE_AT :])
        close(resumed["final"], planned["final"])
    sent = [seen[f"{name} planned"]["sent"] for seen in told]
    assert all(0 < n < fewer[0][f"{name} unplanned"]["sent"] for n in sent)


def test_int8_is_near(told: list[dict[str, Any]]) -> None:
    for rank in told:
        torch.testing.assert_close(rank["int8"]["final"], rank["int8 whole"]["final"], rtol=0, atol=2e-3)


def test_each_rank_sends_its_shard(told: list[dict[str, Any]]) -> None:
    sent, whole = ([rank[name]["sent"] for rank in told] for name in ("diloco", "diloco whole"))
    assert sent[0] == sent[2] != sent[1] == sent[3]  # 7 rows are 4 and 3
    assert sent[0] + sent[1] == whole[0] + whole[1]


@pytest.mark.parametrize("name", METHODS)
def test_the_file_has_the_consensus_whole(folder: Path, told: list[dict[str, Any]], name: str) -> None:
    ours, theirs = (torch.load(folder / kind / "middle.ckpt", weights_only=True) for kind in (name, f"{name} whole"))
    if name != "int8":
        close(ours["state_dict"], theirs["state_dict"])
        close(ours["optimizer_states"], theirs["optimizer_states"])
    weights = torch.load(folder / name / "weights.ckpt", weights_only=True)
    close(weights["state_dict"], ours["state_dict"])
    end = torch.load(folder / name / "end.ckpt", weights_only=True)
    close(end["state_dict"], told[0][name]["final"])


@pytest.mark.parametrize("name", ["noise", "diloco", "outer adam", "int8"])
def test_a_resume_in_the_middle_of_a_loop_is_exact(told: list[dict[str, Any]], name: str) -> None:
    for rank in told:
        seen, whole = rank[f"{name} resumed"], rank[name]
        assert len(seen["losses"]) == 8
        close(seen["losses"], whole["losses"][-8:])
        close(seen["final"], whole["final"])


@pytest.mark.parametrize("name", ["noise resumed", "outer adam resumed", "diloco planned, resumed"])
def test_validation_after_the_fit_is_that_of_its_end(told: list[dict[str, Any]], name: str) -> None:
    for rank in told:
        seen = rank[name]
        assert seen["again"]
        close(seen["again"], seen["validated"][-len(seen["again"]) :])


def assert_goes_on(seen: dict[str, Any], losses: Any, saved: dict[str, Any], *, tolerance: float = 1e-12) -> None:
    """The state at the start is that of the save, and so is what follows."""
    torch.testing.assert_close(seen["state"], saved["state"], rtol=0, atol=1e-12)
    torch.testing.assert_close(seen["final"], saved["final"], rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(saved["losses"][-8:]), rtol=0, atol=tolerance)


def losses_of(ranks: list[dict[str, Any]], name: str, replica: int) -> Any:
    """The loss of every batch of a replica, over both of its ranks."""
    both = [torch.tensor(rank[name]["losses"]) for rank in ranks[2 * replica : 2 * replica + 2]]
    return (torch.stack(both).mean(0)).tolist()


# int8 rounds by blocks of weights, which end where a rank's do.
TOLERANCE = {"int8": 2e-3}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "") for name in sharded.RESHARDED), *((name, " whole") for name in sharded.WHOLE)]
)
def test_fewer_ranks_go_on_from_the_same_numbers(
    told: list[dict[str, Any]], fewer: list[dict[str, Any]], name: str, kind: str
) -> None:
    for replica, seen in enumerate(fewer):
        saved = {**told[2 * replica][name], "losses": losses_of(told, name, replica)}
        now = seen[f"{name}{kind}"]
        assert_goes_on(now, now["losses"], saved, tolerance=TOLERANCE.get(name, 1e-6))
        assert not any("consensus" in m or "left over" in m for m in now["warned"])
        assert any("data_parallel was 2, is 1" in m for m in now["warned"]) == (replica == 0)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "one") for name in sharded.RESHARDED), *((name, "one whole") for name in sharded.WHOLE)]
)
def test_more_ranks_go_on_from_the_same_numbers(
    fewer: list[dict[str, Any]], more: list[dict[str, Any]], name: str, kind: str
) -> None:
    for rank in range(4):
        saved, seen = fewer[rank // 2][f"{name} saved"], more[rank][f"{name} {kind}"]
        losses = losses_of(more, f"{name} {kind}", rank // 2)
        assert_goes_on(seen, losses, saved, tolerance=TOLERANCE.get(name, 1e-6))
        assert not any("consensus" in m or "left over" in m for m in seen["warned"])


def test_what_rounding_has_left_over_is_not_divided_into_shares_and_that_is_said(
    told: list[dict[str, Any]], more: list[dict[str, Any]]
) -> None:
    for rank in range(4):
        for name in ("whole", "back"):
            seen, saved = more[rank][name], told[rank]["bfloat16"]
            close(seen["state"], saved["state"])
            torch.testing.assert_close(seen["final"], saved["final"], rtol=0, atol=1e-3)
            assert any("cannot be divided anew" in m for m in seen["warned"]) == (rank == 0)


def test_a_part_that_is_not_known_or_missing_starts_replicas_from_the_consensus(
    fewer: list[dict[str, Any]],
) -> None:
    for rank in range(2):
        for kind, words in (
            ("lost", "of which parameter now /loops/0/slots/net.2.bias/anchor is"),
            ("gone", "1-1.pt, of one of 2 replicas, is missing"),
        ):
            warned = [m for m in fewer[rank][kind]["warned"] if "start from the consensus" in m]
            assert len(warned) == (rank == 0)
            assert all(words in m for m in warned)
            close(fewer[0][kind]["final"], fewer[1][kind]["final"])


def test_one_process_goes_on_from_the_file(folder: Path, tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, "auto", 1, max_epochs=5)
    trainer.fit(sharded.Net(), ckpt_path=folder / "noise" / "end.ckpt")
    assert trainer.global_step == 16 + 8


def test_replicas_start_alike_though_every_rank_has_drawn_its_own(told: list[dict[str, Any]]) -> None:
    starts = [rank["own init"]["start"] for rank in told]
    assert torch.equal(starts[0], starts[2])
    assert torch.equal(starts[1], starts[3])


def test_a_shard_that_is_lost_is_its_replicas_loss(told: list[dict[str, Any]]) -> None:
    assert all(t.isfinite().all() for rank in told for t in rank["lost"]["final"].values())
    assert all(torch.tensor(rank["lost"]["losses"][6:]).isfinite().all() for rank in told)
    close(told[0]["lost"]["final"], told[2]["lost"]["final"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("layer", "all parameters that train must be sharded .* got net.2.weight, net.2.bias that are not"),
        ("world", r"over the ranks of their replica, \[\d, \d\], got \[0, 1, 2, 3\] for net.0.weight"),
        ("first", "by fully_shard .FSDP2., got FullyShardedDataParallel"),
        ("both", "by fully_shard or by a tensor-parallel plan, got both for net.0.weight"),
        ("blocks", "communication_dtype must be 'float32' or 'bfloat16' .* as net.2.bias, got 'int8'"),
        ("precision", "precision must be 'bf16-mixed' or full"),
        ("independent_init", "independent_init must be False"),
        ("start_method", "start_method must be 'popen' .* got 'fork'"),
    ],
)
def test_refusals(told: list[dict[str, Any]], what: str, message: str) -> None:
    for rank in told:
        assert rank["refused"][what].startswith("MisconfigurationException")
        with pytest.raises(RuntimeError, match=message):
            raise RuntimeError(rank["refused"][what])


def test_after_an_exception_no_part_of_a_file_is_written(folder: Path, told: list[dict[str, Any]]) -> None:
    assert any("interrupted.ckpt is not written after an exception" in message for message in told[0]["interrupted"])
    assert not (folder / "interrupted.ckpt").exists()


def test_fabric_refuses(tmp_path: Path) -> None:
    said = external(1, functools.partial(_fabric, tmp_path), timeout=60)
    assert "parameters must not be sharded for ElasticEntropyFabricStrategy" in said[0]


def _fabric(folder: Path, rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fabric = L.Fabric(accelerator="cpu", devices=1, strategy=le.ElasticEntropyFabricStrategy())
    fabric.launch()
    net = torch.nn.Linear(2, 2)
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))
