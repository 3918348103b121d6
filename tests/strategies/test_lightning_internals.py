"""The private names of Lightning and torch that the strategies rely on."""

import ast
import inspect
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.fabric.strategies import ddp as fabric_ddp
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies import ddp as trainer_ddp
from torch import nn

import lightning_entropy as le
from lightning_entropy import strategies
from lightning_entropy.strategies import lightning_internals as internals
from lightning_entropy.strategies.watched_ddp import WatchedDDPStrategy
from tests.strategies.runs import FORK_WARNINGS, Net, external, trainer

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]

OURS = [le.ElasticEntropyStrategy, le.ElasticEntropyFabricStrategy]
FOLDER = Path(strategies.__file__).parent
ELSEWHERE = {"sys._current_frames", "os._exit"}  # of Python, documented


@pytest.mark.parametrize("cls", OURS)
def test_ranks_that_share_a_gpu_use_gloo(cls: Any) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert internals.backend(cls(parallel_devices=[first, first])) == "gloo"
    assert internals.backend(cls(parallel_devices=[first, second])) == "nccl"
    assert internals.backend(cls(parallel_devices=[first, first], process_group_backend="nccl")) == "nccl"
    assert internals.backend(cls(parallel_devices=[torch.device("cpu")] * 2)) == "gloo"


@pytest.mark.parametrize(("cls", "module"), [(DDPStrategy, trainer_ddp), (FabricDDPStrategy, fabric_ddp)])
def test_lightning_opens_the_process_group_with_the_backend_and_the_timeout(
    cls: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        module, "_init_dist_connection", lambda environment, backend, **kw: calls.append((backend, kw["timeout"]))
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    cuda = torch.device("cuda:0")
    strategy = cls(
        accelerator=L.pytorch.accelerators.CPUAccelerator(),
        parallel_devices=[cuda, cuda],
        cluster_environment=L.fabric.plugins.environments.LightningEnvironment(),
    )
    monkeypatch.setattr(type(strategy.accelerator), "setup_device", lambda self, device: None)
    internals.backend(strategy)
    strategy.setup_environment()
    assert calls == [("gloo", internals.timeout(strategy))]
    assert internals.timeout(strategy) is not None


@pytest.mark.parametrize(("cls", "module"), [(DDPStrategy, trainer_ddp), (FabricDDPStrategy, fabric_ddp)])
def test_ddp_gets_the_group(cls: Any, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "DistributedDataParallel", lambda **kwargs: made.append(kwargs))
    group: Any = object()
    strategy = cls(parallel_devices=[torch.device("cpu")], find_unused_parameters=True)
    internals.wrap_in_group(strategy, group)
    if cls is DDPStrategy:
        strategy.model = Net()
        strategy.configure_ddp()
    else:
        strategy.setup_module(Net())
    assert made[0]["process_group"] is group
    assert made[0]["find_unused_parameters"] is True


@pytest.mark.processes
def test_fabric_accepts_no_backward_sync_without_ddp() -> None:
    def work(rank: int) -> None:
        for ours in (True, False):
            fabric = Fabric(accelerator="cpu", devices=1, strategy=FabricDDPStrategy())
            fabric.launch()
            model = fabric.setup(nn.Linear(2, 2))
            plain = model._forward_module.module
            model._forward_module = plain
            if ours:
                internals.without_gradient_sync(fabric.strategy)  # type: ignore[arg-type]
                with pytest.warns(UserWarning, match="does not support skipping the gradient synchronization"):
                    fabric.no_backward_sync(model)
            else:
                with pytest.raises(TypeError, match="only possible if the module"):
                    fabric.no_backward_sync(model)

    assert external(1, work) == [""]


def test_converted_is_what_fabric_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class Keeps(L.fabric.plugins.TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            written.append(checkpoint)

    module = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    state = {"module": module, "optimizer": optimizer, "step": 3}
    filter = {"module": lambda name, value: name == "bias"}
    strategy = FabricDDPStrategy(checkpoint_io=Keeps())
    strategy.save_checkpoint("path", state, filter=filter)
    content = internals.converted(strategy, state, filter)
    assert content.keys() == written[0].keys() == state.keys()
    assert list(content["module"]) == list(written[0]["module"]) == ["bias"]
    assert content["optimizer"] == written[0]["optimizer"] == optimizer.state_dict()
    assert set(internals.converted(strategy, state, None)["module"]) == {"weight", "bias"}


def test_sync_batchnorm_is_where_the_trainer_puts_it() -> None:
    for group, cls in ((None, None), (object(), internals.GroupSyncBatchNorm)):
        run = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", sync_batchnorm=True, logger=False)
        strategy: Any = run.strategy
        assert type(strategy._layer_sync) is TorchSyncBatchNorm
        internals.confine_sync_batchnorm(strategy, group)  # type: ignore[arg-type]
        assert strategy._layer_sync is None if cls is None else type(strategy._layer_sync) is cls
    plain: Any = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False).strategy
    internals.confine_sync_batchnorm(plain, object())  # type: ignore[arg-type]
    assert plain._layer_sync is None


def test_the_module_returns_the_mesh() -> None:
    module, mesh = L.LightningModule(), object()
    assert module.device_mesh is None
    internals.set_device_mesh(module, mesh)  # type: ignore[arg-type]
    assert module.device_mesh is mesh


class Called(L.Callback):
    def __init__(self, calls: list[str], name: str) -> None:
        self.calls, self.name = calls, name

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.calls.append(self.name)


class First(Called):
    pass


def test_the_first_callback_is_called_first(tmp_path: Path) -> None:
    calls: list[str] = []
    run = trainer(tmp_path, "auto", 1, callbacks=[Called(calls, "a"), Called(calls, "b")], max_epochs=1)
    internals.put_first(run, First(calls, "replaced"))
    internals.put_first(run, First(calls, "first"))
    run.fit(Net())
    assert calls == ["first", "a", "b"]


class Renames(SingleDeviceStrategy):
    def on_exception(self, exception: BaseException) -> None:
        internals.replace_message(exception, "rank 1 is gone")


class Fails(Net):
    def training_step(self, batch: Any, _: int) -> Any:
        raise RuntimeError("connection closed")


def test_the_trainer_raises_the_exception_whose_message_was_replaced(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^rank 1 is gone$"):
        trainer(tmp_path, Renames(torch.device("cpu")), 1).fit(Fails())


def test_modules_of_torch_that_draw_their_weights_by_a_private_name(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = nn.MultiheadAttention
    if getattr(kind, "reset_parameters", None) is kind._reset_parameters:  # lightning.pytorch.demos adds it
        monkeypatch.delattr(kind, "reset_parameters")
    attention, transformer = nn.MultiheadAttention(4, 2), nn.Transformer(4, 2, 1, 1, 8, batch_first=True)
    for module in (attention, transformer):
        assert not hasattr(module, "reset_parameters")
        reset = internals.reset_method(module)
        assert reset is not None
        before = next(module.parameters()).detach().clone()
        reset()
        assert not torch.equal(before, next(module.parameters()))
    linear = nn.Linear(2, 2)
    assert internals.reset_method(linear) == linear.reset_parameters
    assert internals.reset_method(nn.Tanh()) is None


def private(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("_") and not name.startswith("__")} - {"_abc_impl"}


@pytest.mark.parametrize("cls", [*OURS, WatchedDDPStrategy])
def test_no_private_name_of_a_parent_is_taken(cls: Any) -> None:
    """Neither overridden as a method nor used for an attribute of ours."""
    parent = DDPStrategy if issubclass(cls, DDPStrategy) else FabricDDPStrategy
    theirs = private({*dir(parent), *vars(parent())})
    ours = private({*vars(cls), *(vars(cls()).keys() - vars(parent()).keys())})
    assert ours
    assert not ours & theirs
    used = {
        node.attr
        for file in FOLDER.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    assert not used & theirs


def test_private_names_of_others_are_in_a_file_a_library() -> None:
    found = set()
    for file in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                found |= {f"{file.relative_to(FOLDER)}: {a.name}" for a in node.names if a.name.startswith("_")}
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                name = ast.unparse(node)
                named_tuples = name.endswith("._replace")  # public, in spite of its name
                if not name.startswith(("self._", "cls._")) and not named_tuples and name not in ELSEWHERE:
                    found.add(f"{file.relative_to(FOLDER)}: {name}")
    assert {entry.split(":")[0] for entry in found} == {"lightning_internals.py", "torchft/internals.py"}, found


@pytest.mark.processes
def test_the_only_collective_of_a_batch_is_taken_out(tmp_path: Path) -> None:
    """DDP's ranks are broadcast to before every batch; with the loop freed they are not, and afterwards they are."""

    class Free(L.Callback):
        def __init__(self) -> None:
            self.calls, self.seen = 0, []
            self.undo: Any = None

        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            original = torch.distributed.broadcast

            def counted(*args: Any, **kwargs: Any) -> Any:
                self.calls += 1
                return original(*args, **kwargs)

            torch.distributed.broadcast = counted
            self.undo = internals.free_batches(trainer)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, i: int) -> None:
            self.seen.append(self.calls)
            if i == 1:
                self.undo()

        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            torch.save(self.seen, tmp_path / f"seen.{trainer.global_rank}.pt")

    trainer(tmp_path, "ddp_fork", 2, callbacks=[Free()], max_epochs=1).fit(Net())
    for rank in range(2):
        assert torch.load(tmp_path / f"seen.{rank}.pt") == [0, 0, 1, 2]


def test_a_timer_is_asked_every_epoch_until_that_is_undone(tmp_path: Path) -> None:
    asked: list[bool] = []
    run = trainer(tmp_path, "auto", 1)
    run.strategy.broadcast = lambda obj, src=0: asked.append(obj) or obj  # type: ignore[func-returns-value,assignment]
    timer = Timer(timedelta(hours=1))
    undo = internals.ask_every_epoch(timer)
    timer.on_train_batch_end(run)
    assert asked == []
    timer.on_train_epoch_end(run)
    assert asked == [False]
    undo()
    timer.on_train_batch_end(run)
    assert asked == [False, False]


def test_a_checkpoint_by_time_is_known() -> None:
    assert internals.asks_every_batch(ModelCheckpoint(train_time_interval=timedelta(minutes=1)))
    assert not internals.asks_every_batch(ModelCheckpoint(every_n_train_steps=1))


def test_handlers_that_are_not_lightnings_are_found(tmp_path: Path) -> None:
    def mine(number: int, frame: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    run = trainer(tmp_path, "auto", 1)
    try:
        run._signal_connector.register_signal_handlers()
        assert internals.handlers_of_others(signal.getsignal(signal.SIGTERM)) == [mine]
        assert internals.handlers_of_others(mine) == [mine]
        assert internals.handlers_of_others(signal.SIG_DFL) == []
        assert internals.handlers_of_others(signal.default_int_handler) == []
    finally:
        run._signal_connector.teardown()
        signal.signal(signal.SIGTERM, before)


def test_how_processes_are_started() -> None:
    assert internals.start_method(DDPStrategy(start_method="fork")) == "fork"


def test_shards_are_not_sent_where_nothing_is_trained() -> None:
    source = inspect.getsource(trainer_ddp._sync_module_states)
    assert '"_ddp_params_and_buffers_to_ignore"' in source, "which shards_not_sent sets"
    assert "_sync_module_states(self.model)" in inspect.getsource(trainer_ddp.DDPStrategy.setup)
    module = torch.nn.Linear(1, 1)
    with internals.shards_not_sent(module):
        assert module._ddp_params_and_buffers_to_ignore == []
    assert not hasattr(module, "_ddp_params_and_buffers_to_ignore")
