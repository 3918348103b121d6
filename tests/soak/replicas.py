"""Rounds with several ranks: one is disturbed; the others say who it was, and the job goes on to the same end."""

import os
import random
import re
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.strategies import board, liveness
from tests.soak.rounds import BAD, Outcome, Verdict, difference
from tests.strategies.runs import external, strategy, trainer
from tests.strategies.streams import Streaming

REPLICAS, STEPS = 2, 16
METHODS: dict[str, le.Relaxation] = {
    "parle": le.parle(3, 0.1, 0.3),
    "elastic_sgd": le.elastic_sgd(4, 0.5),
    "average": le.Relaxation(inner_steps=3, gamma=0.5, rho=0.3, average=0.5, elastic_target="average"),
    "diloco": le.diloco(3),
    "streaming": le.streaming_diloco(4, 2, 3),
}
FORMATS = ("float32", "float32", "bfloat16", "int8", "int4")
# What happens to one rank, at some step, by the hook in which it happens.
MOMENTS = ("training", "batch end", "validation", "save")


@dataclass(frozen=True)
class Job:
    """A training of several ranks.

    Attributes:
        method: a key of METHODS.
        format: of what is sent.
        data_parallel: ranks of a replica.
        batchnorm: with BatchNorm layers, whose statistics the ranks do not share.
        save: every so many steps.
        validation: in the middle of the epoch.
    """

    method: str
    format: Any
    data_parallel: int
    batchnorm: bool
    save: int
    validation: bool

    @classmethod
    def drawn(cls, draw: random.Random) -> "Job":
        """Return a random one."""
        return cls(
            draw.choice(list(METHODS)),
            draw.choice(FORMATS),
            draw.choice([1, 1, 2]),
            draw.random() < 0.5,
            draw.choice([1, 1, 3]),
            draw.random() < 0.5,
        )

    @property
    def ranks(self) -> int:
        """Their number."""
        return REPLICAS * self.data_parallel

    def run(self, folder: Path, disturbance: "Strike | None" = None) -> list[str]:
        """Train from the last checkpoint in the folder to the end; return how every rank ended."""
        folder.mkdir(parents=True, exist_ok=True)

        def work(rank: int) -> None:
            warnings.simplefilter("ignore")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            board.PERIOD, liveness.PATIENCE, board.LIMIT = 0.2, 2.0, 4.0
            keep = ModelCheckpoint(
                folder, "at", every_n_train_steps=self.save, save_last=True, enable_version_counter=False
            )
            own = strategy(
                METHODS[self.method],
                start_method="popen",
                replicas=REPLICAS,
                communication_dtype=self.format,
                **({"broadcast_buffers": False} if self.data_parallel > 1 else {}),
            )
            callbacks = [*([disturbance] if disturbance else []), Ends(folder), keep]
            run = trainer(
                folder,
                own,
                self.ranks,
                callbacks=callbacks,
                limit_val_batches=1 if self.validation else 0,
                val_check_interval=4,
            )
            module = Streaming(bn=self.batchnorm)
            run.fit(module, ckpt_path="last")
            state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
            torch.save(state, folder / f"final.{rank}.pt")

        # A rank that stands still does not end: the others are waited for.
        stands = disturbance is not None and disturbance.kind == "stop"
        waited = tuple(rank for rank in range(self.ranks) if not (stands and rank == disturbance.rank))  # type: ignore[union-attr]
        return external(self.ranks, work, timeout=60, until=waited)


class Ends(L.Callback):
    """Write at which step a rank's fit came to its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        (self.folder / f"{trainer.global_rank}.step").write_text(str(trainer.global_step))


class Strike(L.Callback):
    """Something that happens to one rank, once.

    Args:
        kind: a key of KINDS.
        rank: which.
        step: at the earliest.
        moment: of MOMENTS.
    """

    def __init__(self, kind: str, rank: int, step: int, moment: str) -> None:
        self.kind, self.rank, self.step, self.moment = kind, rank, step, moment
        self.done = False

    def __str__(self) -> str:
        return f"{self.kind} of rank {self.rank} from step {self.step} on, in {self.moment}"

    def at(self, moment: str, trainer: L.Trainer, pl_module: Any) -> None:
        """Strike, if it is time to."""
        due = trainer.global_rank == self.rank and trainer.global_step >= self.step and moment == self.moment
        if due and not self.done:
            self.done = True
            KINDS[self.kind](pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.at("training", trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.at("batch end", trainer, pl_module)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.at("validation", trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Any) -> None:
        self.at("save", trainer, pl_module)


class Hurt(Exception):
    """What a user's code raises."""


def _raise(module: Any) -> None:
    raise Hurt("as planned")


def _full(module: Any) -> None:
    def save_checkpoint(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    TorchCheckpointIO.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


@torch.no_grad()
def _spoil(module: Any) -> None:
    tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
    tensors[torch.randint(len(tensors), ()).item()].view(-1)[0] = torch.nan  # type: ignore[index]


KINDS: dict[str, Callable[[Any], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "terminate": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda _: os.kill(os.getpid(), signal.SIGINT),
    "exception": _raise,
    "full disk": _full,
    "nan": _spoil,
}
TOGETHER = {"terminate": "SIGTERMException: ", "interrupt": "SystemExit: 1"}  # how all ranks end
REASONS = {"exception": "Hurt: as planned", "full disk": "No space left on device"}


@cache
def undisturbed(job: Job, folder: Path) -> dict[str, Tensor]:
    """Return the final weights of a job that nothing happens to."""
    path = folder / f"undisturbed {abs(hash(job))}"
    said = job.run(path)
    assert said == [""] * job.ranks, said
    return torch.load(path / "final.0.pt", weights_only=True)


def drawn(seed: int, number: int) -> tuple[Job, Strike]:
    """Return the job and the disturbance of a round."""
    draw = random.Random(f"replicas {seed}:{number}")
    job, kind = Job.drawn(draw), draw.choice(list(KINDS))
    moments = [m for m in MOMENTS if m != "validation" or job.validation]
    moment = "save" if kind == "full disk" else draw.choice([m for m in moments if kind != "nan" or m != "validation"])
    return job, Strike(kind, draw.randrange(job.ranks), draw.randrange(STEPS - 2), moment)


def play(seed: int, number: int, folder: Path, whole: Path) -> Outcome:
    """Play one round.

    Args:
        seed: with the number, of all that is random.
        number: of the round.
        folder: an empty one.
        whole: for the undisturbed jobs of all rounds.
    """
    job, strike = drawn(seed, number)
    outcome = Outcome(number, strike.kind, notes=[str(job), str(strike)])
    try:
        _judge(job, strike, outcome, folder, undisturbed(job, whole))
    except AssertionError as error:
        outcome.notes.append(str(error))
        outcome.verdict = outcome.verdict if outcome.verdict in BAD else Verdict.WRONG_ERROR
    return outcome


def _judge(job: Job, strike: Strike, outcome: Outcome, folder: Path, whole: dict[str, Tensor]) -> None:
    said = job.run(folder, strike)
    outcome.notes += [f"rank {rank}: {text[:300]}" for rank, text in enumerate(said)]
    others = [text for rank, text in enumerate(said) if rank != strike.rank]
    if "hung" in others or (strike.kind != "stop" and "hung" in said):
        outcome.verdict = Verdict.HANG
        return
    if strike.kind == "nan":
        # Judged by what it must not do: end the job, stay in the weights, or part the replicas.
        assert said == [""] * job.ranks, "all ranks must come to their end"
        finals = [torch.load(folder / f"final.{rank}.pt", weights_only=True) for rank in range(job.ranks)]
        assert all(value.isfinite().all() for value in finals[0].values()), "the consensus must be finite"
        assert all(difference(final, finals[0]) is None for final in finals), "all ranks must hold the consensus"
        outcome.verdict = Verdict.SAID
        return
    if all(text == "" for text in said):  # it came too late to happen
        pass
    elif strike.kind in TOGETHER:
        assert set(said) <= {TOGETHER[strike.kind], ""}, "all ranks must stop together"
        steps = {path.read_text() for path in folder.glob("*.step")}
        assert len(steps) <= 1, f"all ranks must stop at one step, got {steps}"
    else:
        for text in others:
            named = re.search(rf"rank {strike.rank} \(replica {strike.rank // job.data_parallel}\)", text)
            assert named or text == "exit 1", f"the rank must be named, got {text!r}"
            assert text == "exit 1" or REASONS.get(strike.kind, "") in text, f"its reason must be given, got {text!r}"
    again = job.run(folder)
    outcome.notes.append(f"resumed: {again}")
    if "hung" in again:
        outcome.verdict = Verdict.HANG
        return
    assert again == [""] * job.ranks, "a resume must come to its end"
    found = difference(torch.load(folder / "final.0.pt", weights_only=True), whole)
    if found is not None:
        outcome.verdict = Verdict.DIFFERS
        outcome.notes.append(found)
