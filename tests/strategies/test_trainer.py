"""The Trainer's strategy in the Trainer: started in several ways, beside callbacks and plugins."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

import lightning_entropy as le
from lightning_entropy.strategies.lightning_internals import GroupSyncBatchNorm
from tests.strategies.runs import FORK_WARNINGS, Net, Samples, external, final_weights, fit, script, strategy, trainer

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]


@pytest.mark.parametrize("strategy", ["elastic_entropy", "elastic_entropy_spawn"])
def test_popen_and_spawn(tmp_path: Path, strategy: str, expected: dict[str, Any]) -> None:
    done = script("-m", "tests.strategies.job", tmp_path, strategy)
    assert done.returncode == 0, done.stderr
    for weights in final_weights(tmp_path):
        assert all(torch.equal(v, expected[k]) for k, v in weights.items())


PARLE = le.parle(3, 0.1, 0.3, 0.25)


@pytest.mark.parametrize(
    ("callback", "what"),
    [
        (le.EntropySGD(), "ElasticEntropyStrategy and EntropySGD"),
        (le.HeatSmoothing(), "ElasticEntropyStrategy and HeatSmoothing"),
        (EMAWeightAveraging(), "EMAWeightAveraging would put"),
    ],
)
def test_one_owner_of_the_weights(tmp_path: Path, callback: L.Callback, what: str) -> None:
    with pytest.raises(Exception, match=f"MisconfigurationException: .*{what}"):
        fit(tmp_path, strategy(PARLE), 1, callbacks=[callback])


def test_the_trainer_goes_on_with_the_consensus(tmp_path: Path) -> None:
    """Test, prediction and another fit in the same processes, and strategies for them alone."""

    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        run = trainer(tmp_path, strategy(PARLE, start_method="popen"), 2, max_epochs=1)
        module = Net(bn=True)
        run.fit(module)
        after = {k: v.clone() for k, v in module.state_dict().items()}
        validated = run.validate(module, DataLoader(Samples(16), 8), verbose=False)
        assert all(torch.equal(v, after[k]) for k, v in module.state_dict().items())
        run.fit_loop.max_epochs = 2
        run.fit(module)
        assert run.global_step == 16
        torch.save((after, validated), tmp_path / f"{rank}.pt")

    assert external(2, work) == ["", ""]
    left, right = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert left[1] == right[1]
    assert all(torch.equal(v, right[0][k]) for k, v in left[0].items())


class Evaluated(L.Callback):
    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        record: Any = next(c for c in trainer.callbacks if hasattr(c, "extra"))  # type: ignore[attr-defined]
        record.extra["batches"] = trainer.num_val_batches[0]


def test_validation_is_shared_among_all_ranks(tmp_path: Path) -> None:
    ranks = fit(tmp_path, strategy(PARLE), 2, limit_val_batches=10, callbacks=[Evaluated()])
    assert [rank["batches"] for rank in ranks] == [1, 1]  # of two


def test_sync_batchnorm_stays_inside_a_replica(tmp_path: Path) -> None:
    """Its layers need a GPU, so here one looks at the groups that they would get."""

    def work(rank: int) -> None:
        warnings.simplefilter("ignore")
        own = strategy(PARLE, start_method="popen")  # one rank a replica: ordinary layers
        trainer(tmp_path, own, 4, sync_batchnorm=True).fit(Net(bn=True))
        assert own._layer_sync is None
        own = strategy(PARLE, replicas=2, start_method="popen")
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
            trainer(tmp_path, own, 4, sync_batchnorm=True).fit(Net(bn=True))
        assert isinstance(own._layer_sync, GroupSyncBatchNorm)
        layer: Any = own._layer_sync.apply(torch.nn.BatchNorm1d(3))
        replica = rank // 2
        assert torch.distributed.get_process_group_ranks(layer.process_group) == [2 * replica, 2 * replica + 1]

    assert external(4, work) == [""] * 4
