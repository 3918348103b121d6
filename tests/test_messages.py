"""The likeliest mistakes of a first contact: each message says what is wrong and what to write instead."""

import inspect
import pickle
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

import lightning_entropy as le
from lightning_entropy import plan
from lightning_entropy.launch import __main__ as launch

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.*:",
    "ignore:.*does not have many workers.*",
)


def fit(**kwargs: Any) -> None:
    L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    ).fit(BoringModel())


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], 0.1)


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: le.EntropySGD(gamma="auto"),
        r"gamma must be a number >= 0, Pull\(share\) or a schedule such as Scoping, got 'auto'",
    ),  # type: ignore[arg-type]
    # Lightning's own words, which the questions in docs/faq.md repeat.
    (lambda: fit(callbacks=[le.EntropySGD()] * 2), "^Found more than one stateful callback of type `EntropySGD`"),
    (lambda: fit(strategy=le.parle()), r"^You selected an invalid strategy name: `strategy=Relaxation\(inner_steps=25"),
    # A name that is only nearly ours is Lightning's to refuse, and its words are not ours.
    (lambda: fit(strategy="parle "), r"^You selected an invalid strategy name: `strategy='parle '`"),
    (
        lambda: fit(strategy="entropy_sgd"),
        r"^strategy='entropy_sgd' is a method of one process and no strategy: .*EntropySGD",
    ),
    (
        lambda: fit(strategy="lookahead"),
        r"write callbacks=\[InnerOuterCallback\(lookahead\(\)\)\]. Strategies .* diloco",
    ),
    (
        lambda: fit(callbacks=[le.entropy_sgd]),
        r"^entropy_sgd is a preset and no callback: .*InnerOuterCallback\(entropy_sgd\(\)",
    ),
    (
        lambda: fit(callbacks=[le.lookahead]),
        r"^lookahead is a preset and no callback: .*InnerOuterCallback\(lookahead\(\)",
    ),
    (lambda: le.EntropySGD(L=20), "^EntropySGD has no argument 'L': it is inner_steps here$"),  # type: ignore[call-arg]
    (lambda: fit(callbacks=[le.entropy_sgd()]), r"a Relaxation is a method and no callback: .*InnerOuterCallback"),
    (lambda: le.relax(optimizer(), le.EntropySGD()), "got EntropySGD: EntropySGD has one, at its attribute relaxation"),  # type: ignore[arg-type]
    (lambda: le.relax(optimizer(), le.entropy_sgd), r"got entropy_sgd: call the preset, as in entropy_sgd\(\)"),  # type: ignore[arg-type]
    (lambda: le.ElasticEntropyStrategy(le.parle), r"got parle: call the preset, as in parle\(\)"),  # type: ignore[arg-type]
    (lambda: le.InnerOuterCallback(le.HeatSmoothing()), "got HeatSmoothing: HeatSmoothing has one"),  # type: ignore[arg-type]
    (lambda: fit(callbacks=[le.EntropySGD]), r"^EntropySGD is a class .*write callbacks=\[EntropySGD\(...\)\]"),
    (lambda: fit(callbacks=[le.EntropySGD(), le.HamiltonJacobi()]), "got EntropySGD and HamiltonJacobi: remove one"),
    (lambda: fit(callbacks=le.entropy_sgd()), r"^a Relaxation is a method and no callback: .*InnerOuterCallback"),
    (
        lambda: fit(callbacks=[le.RefreshBatchNorm]),
        r"^RefreshBatchNorm is a class .*\[RefreshBatchNorm\(...\)\]",
    ),
    (
        lambda: fit(callbacks=[le.ElasticEntropyStrategy()]),
        r"^ElasticEntropyStrategy is a strategy and no callback: write Trainer\(strategy=ElasticEntropyStrategy\(",
    ),
    (
        lambda: le.InnerOuterCallback("lookahead"),
        r"got 'lookahead': a method is a value and no name, as lookahead\(\) is",
    ),  # type: ignore[arg-type]
    (lambda: le.relax(le.entropy_sgd(), optimizer()), r"got Relaxation: relax\(optimizer, relaxation\)"),  # type: ignore[arg-type]
    (lambda: le.relax(torch.optim.SGD, le.entropy_sgd()), "must be a torch.optim.Optimizer, got the class SGD$"),  # type: ignore[arg-type]
    (
        lambda: le.relax(optimizer(), le.entropy_sgd(), outer=optimizer()),  # type: ignore[arg-type]
        "^outer must be a callable of the list of anchors, got a SGD: write outer=torch.optim.Adam, or",
    ),
    (
        lambda: le.relax(optimizer(), 3),
        "relaxation must be a Relaxation, as le.entropy_sgd\\(\\) and the other presets return, got int$",
    ),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_a_mistake_is_told_with_what_to_write_instead(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError, RuntimeError, MisconfigurationException), match=message):
        mistake()


@pytest.mark.parametrize(
    "callbacks",
    [
        le.entropy_sgd(),
        [le.lookahead()],
        [le.lookahead],
        [le.EntropySGD],
        [le.RefreshBatchNorm],
        [le.ElasticEntropyStrategy()],
    ],
)
def test_what_is_no_callback_is_told_in_one_traceback(callbacks: Any) -> None:
    with pytest.raises((TypeError, AttributeError)) as caught:
        fit(callbacks=callbacks)
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback") == 1
    assert "no callback" in shown.splitlines()[-1]


def test_a_method_is_shown_by_what_makes_it_another() -> None:
    for name in ("lookahead", "entropy_sgd", "parle", "diloco", "heat", "streaming_diloco"):
        method = getattr(le, name)()
        assert eval(repr(method), vars(le)) == method
        assert len(repr(method)) < 250
    assert repr(le.lookahead(5, 0.5)) == "Relaxation(inner_steps=5, outer_lr=0.5)"


class Dicts(BoringModel):
    """With BatchNorm, and without a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 2), torch.nn.BatchNorm1d(2))

    forward = L.LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch["x"]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def train_dataloader(self) -> Any:
        return DataLoader([{"x": torch.ones(32) * i} for i in range(8)], 4)

    val_dataloader = train_dataloader


def test_batches_that_refresh_batchnorm_cannot_run_ask_for_what_to_run() -> None:
    arguments = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
                 "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}  # fmt: skip
    words = r"RefreshBatchNorm runs Dicts\(batch\), a batch being a dict, which has failed \(it has no forward\): say"
    with pytest.raises(MisconfigurationException, match=words):
        L.Trainer(**arguments, callbacks=[le.RefreshBatchNorm(2)]).fit(Dicts())
    forward = le.RefreshBatchNorm(2, forward=lambda module, batch: module.net(batch["x"]))
    L.Trainer(**arguments, callbacks=[forward]).fit(Dicts())


def test_replicas_that_ignore_each_other_say_so_at_the_start() -> None:
    def said(method: le.Relaxation) -> str:
        strategy = le.ElasticEntropyStrategy(method)
        return strategy.options.describe(strategy.options.grid(0, 2))

    for method in (le.lookahead(), le.entropy_sgd()):
        assert "do not meet while they train (rho is 0)" in said(method)
    for method in (le.parle(), le.elastic_sgd(), le.local_sgd(), le.diloco(), le.streaming_diloco()):
        assert "do not meet" not in said(method)


def test_a_relaxation_has_no_attributes_beyond_its_own() -> None:
    with pytest.raises(AttributeError, match="'Relaxation' object has no attribute 'gama'"):
        le.entropy_sgd().gama  # type: ignore[attr-defined] # noqa: B018


def test_a_class_in_the_place_of_a_callback_leaves_the_class_as_it_is() -> None:
    assert le.EntropySGD().state_key == "EntropySGD"
    assert not hasattr(le.EntropySGD, "state_key")
    assert next(iter(inspect.signature(le.EntropySGD).parameters)) == "inner_steps"


@pytest.mark.parametrize("gamma", [100.0, le.Scoping(100.0, 1e-3)])
def test_a_gamma_with_which_the_weights_cannot_move_is_warned_of(gamma: Any) -> None:
    # BoringModel's learning rate is 0.1: k = 10, and L = 20 steps end at a tenth of one step, 1/200 of the path.
    words = r"gamma = 100 at a learning rate of 0.1 is a spring that takes back 99.5% of a loop's path.*1/gamma of"
    with pytest.warns(UserWarning, match=words):
        fit(callbacks=[le.EntropySGD(gamma=gamma)])
    with pytest.warns(UserWarning, match=words):
        fit(strategy=le.ElasticEntropyStrategy(le.parle(20, gamma=gamma)))


def test_batchnorm_that_is_not_there_is_said_before_training() -> None:
    with pytest.warns(UserWarning, match="RefreshBatchNorm has nothing to do: no layer") as said:
        fit(callbacks=[le.RefreshBatchNorm(2)])
    assert sum("nothing to do" in str(w.message) for w in said) == 1  # and not again at each validation


def test_a_preset_that_answers_lightning_is_a_function_still() -> None:
    assert inspect.isfunction(le.lookahead) and pickle.loads(pickle.dumps(le.lookahead)) is le.lookahead
    assert list(inspect.signature(le.lookahead).parameters) == ["inner_steps", "outer_lr"]
    assert str(le.lookahead.__doc__).startswith("Step toward where k steps")
    with pytest.raises(TypeError, match="no callback") as caught:
        fit(callbacks=[le.lookahead])
    assert caught.value.__context__ is None  # one traceback


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (le.diloco(), "in one process it is SNOO with H = 500, outer_lr = 0.7 and outer_momentum = 0.9"),
        (le.local_sgd(), "in one process it is your optimizer, unchanged"),
        (le.elastic_sgd(), "in one process it is your optimizer, unchanged"),
        (le.parle(), "in one process it is the loop without the others' part"),
        (le.snoo(), "in one process it is SNOO with H = 30"),
        (le.gpa(), None),
        (le.lookahead(), None),
        (le.entropy_sgd(), None),
    ],
    ids=["diloco", "local_sgd", "elastic_sgd", "parle", "snoo", "gpa", "lookahead", "entropy_sgd"],
)
def test_a_method_of_replicas_as_a_callback_says_what_it_is_alone(
    method: le.Relaxation, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    fit(callbacks=[le.InnerOuterCallback(method)])
    assert ("strategy=ElasticEntropyStrategy(relaxation) has them" in caplog.text) == (said is not None)
    assert said is None or said in caplog.text


@pytest.mark.parametrize("name", ["elastic_sgd", "local_sgd"])
def test_of_these_two_one_alone_is_the_optimizer(name: str) -> None:
    ends = []
    for callbacks in ([], [le.InnerOuterCallback(getattr(le, name)(3))]):
        torch.manual_seed(0)
        module = BoringModel()
        L.Trainer(
            accelerator="cpu",
            max_steps=7,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        ).fit(module)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


def test_a_loop_that_is_longer_than_the_training_is_warned_of() -> None:
    words = "inner_steps = 20 is more than the 1 optimizer steps of this training: no outer step comes before its end"
    with pytest.warns(UserWarning, match=f"EntropySGD: {words}"):
        fit(callbacks=[le.EntropySGD(20)])
    with pytest.warns(UserWarning, match=f"ElasticEntropyStrategy: {words}"):
        fit(strategy=le.ElasticEntropyStrategy(le.parle(20)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callbacks=[le.EntropySGD(1)])
    assert not [w for w in caught if "inner_steps" in str(w.message)]


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.ones(3, 32))


def test_a_training_whose_length_is_not_known_is_not_warned_of() -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[le.EntropySGD(15)],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*inner_steps")
        trainer.fit(BoringModel(), DataLoader(Endless()))


@pytest.mark.filterwarnings("ignore:.*checkpoint that ended before the epoch ended")
def test_a_checkpoint_of_replicas_in_a_callbacks_fit_and_the_reverse(tmp_path: Path) -> None:
    def resume(first: dict[str, Any], second: dict[str, Any]) -> None:
        path = tmp_path / "x.ckpt"
        for steps, kwargs, load in ((2, first, None), (4, second, path)):
            trainer = L.Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=steps,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **kwargs,
            )
            trainer.fit(BoringModel(), ckpt_path=load)
            if load is None:
                trainer.save_checkpoint(path)

    replicas = {"strategy": "parle"}
    with pytest.warns(UserWarning, match="loop is of ElasticEntropyStrategy, not of EntropySGD: it is not loaded"):
        resume(replicas, {"callbacks": [le.EntropySGD(2)]})
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"),
        pytest.warns(UserWarning, match="loop is of EntropySGD, not of ElasticEntropyStrategy: it is not loaded"),
    ):
        resume({"callbacks": [le.EntropySGD(2)]}, replicas)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(replicas, replicas)
    assert not [w for w in caught if "the checkpoint's loop" in str(w.message)]


@pytest.mark.parametrize("name", ["elastic_entropy", "elastic-entropy", "parle", "local_sgd", "local-sgd", "diloco"])
def test_replicas_on_one_device_are_said_to_be_one(name: str, caplog: pytest.LogCaptureFixture) -> None:
    fit(strategy=name)
    words = "ElasticEntropyStrategy: 1 replica x 1 process, and nothing to tie it to: ask for more devices"
    assert words in caplog.text


@pytest.mark.parametrize("gamma", [0.0, 1.0, 9.9, le.Pull(0.99), le.Scoping(0.01, 1e-3, limit=100.0)])
def test_a_gamma_that_leaves_room_or_says_its_share_is_not_warned_of(gamma: Any) -> None:
    fit(callbacks=[le.EntropySGD(gamma=gamma)])  # warnings are errors
    fit(callbacks=[le.EntropySGD(1000, gamma=gamma)])


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (plan.main, ["--params", "124M"], "the following arguments are required: --link, --step"),
        (plan.main, ["--params", "many", "--link", "1Gbit", "--step", "1s"], "a number of weights such as 124M"),
        (launch.main, ["train.py"], "the following arguments are required: --replicas"),
        (launch.main, ["--replicas", "2", "--min-replicas", "3", "train.py"], "must be at most --replicas"),
        (launch.main, ["--replicas", "2", "tarin.py"], "the script must be a file, got tarin.py: there is none"),
    ],
)
def test_a_mistake_on_a_command_line_ends_in_two_lines(
    command: Callable[[list[str]], Any], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2
    assert words in said[1]
